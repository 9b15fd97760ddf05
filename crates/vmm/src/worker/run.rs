//! The process from its start to its end.

use std::{
    error::Error,
    fs::File,
    os::{
        fd::{OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    process::{self, ExitCode},
};

use super::{
    launch::{self, Launch, LaunchError, Network, Purpose, Start},
    seccomp::{self, Role},
    server::{End, Guest, Server},
};
use crate::{config::MachineConfig, virtio::Cable};

/// What a machine is loaded from.
#[derive(Debug)]
pub enum Source {
    /// A kernel.
    Boot {
        /// The kernel image.
        kernel: File,
        /// The initramfs.
        initramfs: Option<File>,
        /// The kernel's command line.
        command_line: String,
        /// What the serial console's output is written to.
        console: File,
    },
    /// A captured state.
    Restore {
        /// The state file.
        state: File,
        /// The list of pages to have ready.
        pages: Option<File>,
        /// What the captured machine had for itself, and the id of the template above which that is.
        own: Option<(File, String)>,
    },
}

/// Everything that a machine is loaded with.
#[derive(Debug)]
pub struct Loading {
    /// Memory and vCPUs.
    pub machine: MachineConfig,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The memory file.
    pub memory: File,
    /// The root image.
    pub root_image: File,
    /// Where ack lines go.
    pub ack: OwnedFd,
    /// Listening sockets of the control channels.
    pub channels: Vec<UnixListener>,
    /// What the network card is connected to, if there is a card.
    pub network: Option<Cable>,
    /// Whether nobody waits for the machine yet.
    pub ahead: bool,
    /// Where the guest begins.
    pub source: Source,
}

/// All descriptors of a launch document, each with an owner.
struct Inherited {
    purpose: Purpose,
    control: UnixListener,
    /// Kept open until the process ends.
    _held: Vec<OwnedFd>,
    loading: Loading,
}

type Failure = Box<dyn Error>;

/// A worker's `main`: takes the launch document (the only argument), enters the jail, loads a machine, serves it.
///
/// Everything it has to say goes to standard error, which is the machine's log.
pub fn main<G: Guest>(load: impl FnOnce(Loading) -> Result<G, Failure>) -> ExitCode {
    let inherited = match confined() {
        Ok(inherited) => inherited,
        Err(error) => return fail(error.as_ref()),
    };
    let Inherited { control, purpose, loading, _held } = inherited;
    let guest = match load(loading) {
        Ok(guest) => guest,
        // Said while the control socket is still open: whoever waits there reads the log once it is closed.
        Err(error) => return fail(error.as_ref()),
    };
    if let Err(error) = seccomp::enter(Role::Main) {
        return fail(&error);
    }
    match Server::new(control, guest, purpose).serve() {
        Ok(End::Guest(how)) => eprintln!("the machine has ended: {how}"),
        Ok(End::Quit | End::Orphaned) => {}
        Err(error) => return fail(&error),
    }
    // Without taking the machine apart: the kernel does that at once, whatever its threads are at.
    process::exit(0)
}

/// Says why, and ends the process without taking anything apart.
fn fail(error: &dyn Error) -> ExitCode {
    eprintln!("{}", chain(error));
    process::exit(1)
}

/// Enters the jail, and only then takes what it was given: from there on, what is read may be a guest's or a stranger's.
fn confined() -> Result<Inherited, Failure> {
    let mut arguments = std::env::args_os().skip(1);
    let document = arguments.next().and_then(|text| text.into_string().ok());
    let (Some(document), None) = (document, arguments.next()) else {
        return Err("offshoot starts this program; it is of no use by itself".into());
    };
    let launch = Launch::parse(&document)?;
    launch.close_others()?;
    share_the_heap();
    super::jail::enter(&launch)?;
    Ok(Inherited::take(launch)?)
}

/// One heap for all threads: each of its own would cost every fork some hundred kilobytes.
fn share_the_heap() {
    // SAFETY: no requirements; an option that is not known is ignored.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

impl Inherited {
    /// Once per process, after [`Launch::close_others`].
    fn take(launch: Launch) -> Result<Self, LaunchError> {
        // SAFETY: `close_others` made sure that no number is named twice, and each is taken once here.
        let take = |number: RawFd| unsafe { launch::take(number) };
        let source = match launch.start {
            Start::Boot { kernel, initramfs, command_line, console } => Source::Boot {
                kernel: take(kernel).into(),
                initramfs: initramfs.map(|number| take(number).into()),
                command_line,
                console: take(console).into(),
            },
            Start::Restore { state, pages, own } => Source::Restore {
                state: take(state).into(),
                pages: pages.map(|number| take(number).into()),
                own: own.map(|own| (take(own.file).into(), own.template)),
            },
        };
        Ok(Self {
            purpose: launch.purpose,
            control: take(launch.control).into(),
            _held: launch.held.into_iter().map(take).collect(),
            loading: Loading {
                machine: launch.machine,
                kvm: take(launch.kvm),
                memory: take(launch.memory).into(),
                root_image: take(launch.root_image).into(),
                ack: take(launch.ack),
                channels: launch.channels.into_iter().map(|number| take(number).into()).collect(),
                network: launch.network.map(|network| match network {
                    Network::Unconnected => Cable::Loose,
                    Network::Tap(number) => Cable::Tap(take(number)),
                    Network::Stream(number) => Cable::Stream(take(number)),
                }),
                ahead: launch.purpose == Purpose::Spare,
                source,
            },
        })
    }
}

impl Loading {
    /// Whether the machine is a template's, which writes its memory file.
    #[must_use]
    pub fn is_template(&self) -> bool {
        matches!(self.source, Source::Boot { .. })
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
