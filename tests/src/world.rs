//! A host of a test's own: a network namespace that plays it, behind whose only card is another one, the world outside.
//!
//! ```text
//! outside: servers            the host: `offshoot`                         a fork's own namespace
//! ┌────────────────────┐     ┌───────────────────────────────────────┐     ┌──────────────┐
//! │ server ────────────┼─────┼─ uplink  198.51.100.1, 2001:db8:1::1  │     │ wire0, tap0  │
//! │  198.51.100.2      │     │  ofs… ────────────────────────────────┼─────┼─             │
//! │  203.0.113.9       │     └───────────────────────────────────────┘     └──────────────┘
//! │  169.254.169.254   │
//! │  2001:db8:1::2     │   It has no route to forks: they are seen as the host, or not at all.
//! └────────────────────┘
//! ```
//!
//! A namespace lives as long as a process that holds it, and that one ends with the test, however it ends. The host has mounts of its
//! own too, so the namespaces that `offshoot` mounts are gone then as well.

use std::{
    ffi::OsStr,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::programs;

/// The host's address towards the outside.
pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// A server's address outside.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// Another one of the same server, in another range.
pub const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// Where clouds have their metadata services. The server has it too.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The server's IPv6 address.
pub const SERVER_V6: &str = "2001:db8:1::2";

/// Long enough for an answer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The host and the outside.
#[derive(Debug)]
pub struct World {
    /// What plays the host.
    pub host: Place,
    /// What is behind its card.
    pub outside: Place,
    holders: [Holder; 2],
}

/// A network namespace to do things in.
#[derive(Debug, Clone)]
pub struct Place {
    net: PathBuf,
    mounts: Option<PathBuf>,
}

/// A process in namespaces of its own that does nothing. It ends when its input does.
#[derive(Debug)]
struct Holder(Child);

impl Holder {
    fn start() -> Self {
        let mut command = Command::new(programs::distribution("unshare", "util-linux"));
        command.args(["--net", "--mount", "--propagation", "private", "cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("unshare can be started");
        // What it sends back says that it is where it is to be.
        child.stdin.as_mut().expect("a pipe").write_all(b"\n").expect("a namespace can be made; the tests need root");
        let mut line = String::new();
        let read = BufReader::new(child.stdout.as_mut().expect("a pipe")).read_line(&mut line);
        assert!(matches!(read, Ok(1)), "no namespaces can be made; the tests need root");
        Self(child)
    }

    fn place(&self) -> Place {
        let namespaces = Path::new("/proc").join(self.0.id().to_string()).join("ns");
        Place { net: namespaces.join("net"), mounts: Some(namespaces.join("mnt")) }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// A host with its outside.
    #[must_use]
    pub fn new() -> Self {
        let holders = [Holder::start(), Holder::start()];
        let [host, outside] = [0, 1].map(|at: usize| holders[at].place());
        host.sh(&format!(
            "ip link set lo up
            ip link add uplink type veth peer name server netns {}
            ip addr add {HOST}/24 dev uplink
            ip link set uplink up",
            holders[1].0.id()
        ));
        outside.sh(&format!(
            "ip link set lo up
            for address in {SERVER}/24 {OTHER}/32 {METADATA}/32; do ip addr add $address dev server; done
            ip link set server up"
        ));
        host.sh(&format!("ip route add default via {SERVER}"));
        if Self::has_v6() {
            host.sh("ip addr add 2001:db8:1::1/64 dev uplink nodad
                echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
                ip -6 route add default via 2001:db8:1::2");
            outside.sh("ip addr add 2001:db8:1::2/64 dev server nodad");
        }
        Self { host, outside, holders }
    }

    /// Whether this machine's kernel has IPv6.
    #[must_use]
    pub fn has_v6() -> bool {
        std::fs::read_to_string("/proc/sys/net/ipv6/conf/default/disable_ipv6").is_ok_and(|text| text.trim() == "0")
    }

    /// A path that only the host's mounts show.
    #[must_use]
    pub fn path_on_host(&self, path: &Path) -> PathBuf {
        let holder = self.holders[0].0.id().to_string();
        Path::new("/proc").join(holder).join("root").join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A namespace that is mounted on the host.
    #[must_use]
    pub fn mounted(&self, path: &Path) -> Place {
        Place { net: self.path_on_host(path), mounts: None }
    }
}

impl Place {
    /// A program that is to run here.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(programs::distribution("nsenter", "util-linux"));
        let option = |name: &str, path: &Path| format!("--{name}={}", path.display());
        command.arg(option("net", &self.net));
        command.args(self.mounts.as_ref().map(|mounts| option("mount", mounts)));
        command.arg("--").arg(program);
        command
    }

    /// Runs a shell script here, which must succeed; its output.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let output = self.command("/bin/sh").args(["-euc", script]).output().expect("nsenter can be started");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{script}\n{}{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }

    /// Does something here, on a thread of its own. Sockets that it opens stay here.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(&self.net).unwrap_or_else(|error| panic!("{}: {error}", self.net.display()));
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("the namespace can be entered; the tests need root");
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// What `http://SERVER/PATH` says to who asks from here; `None` if nobody answers.
    #[must_use]
    pub fn get(&self, server: impl Into<SocketAddr>, path: &str) -> Option<String> {
        let server = server.into();
        let answer = self.within(|| {
            let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            write!(stream, "GET /{path} HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).map(|_| answer)
        });
        let answer = answer.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.contains(" 200 ").then(|| body.trim_end().to_owned())
    }
}
