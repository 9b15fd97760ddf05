//! Serial ports with names, as virtio-console calls them: byte streams between guest and host.
//!
//! A port is a pipe for writing, which for the guest always has a reader, or a listening socket, at which one host at a
//! time is connected; the next one waits until the first has gone. When a host comes or goes the driver is told, and
//! no byte is lost or overtaken on the way: what a host sent before it hung up arrives before the news of it.
//!
//! A host that is gone is noticed by a failed write, so the process must ignore SIGPIPE, as Rust programs do.

mod control;
mod port;

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixListener},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::{
    control::{MESSAGE_BYTES, Message, event},
    port::{Port, PortState},
};
use super::{Kind, LoadError, Progress, QueueError, Queues, VirtioDevice, read_config_bytes};
use crate::events::{HostEvent, Watcher};

/// Highest port number. Port 0 is the one that drivers make a terminal of; it does not exist here.
pub const PORT_MAX: u32 = 15;

/// Longest name, bytes. The driver's buffers are a page.
const NAME_MAX: usize = 64;

/// Descriptors of each queue. Linux fills receive queues with a page each, and uses them in turn: every page it has not used
/// since the capture is one more that a fork must copy.
const QUEUE_SIZE: u16 = 32;

const FEATURE_MULTIPORT: u64 = 1 << 1;

const PORT0_TRANSMIT: u16 = 1;
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// Where a port's bytes go on the host. Descriptors become non-blocking (for everybody who shares them).
#[derive(Debug)]
pub enum HostEnd {
    /// A pipe's end for writing.
    Pipe(OwnedFd),
    /// A socket that listens.
    Socket(UnixListener),
}

/// What a port is.
#[derive(Debug)]
pub struct PortConfig {
    /// Its number, 1 to [`PORT_MAX`].
    pub number: u32,
    /// Its name in the guest (`/sys/class/virtio-ports/*/name`), at most 64 bytes.
    pub name: String,
    /// The host's side.
    pub end: HostEnd,
}

/// Why a console can not be made.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// Numbers must differ and lie between 1 and [`PORT_MAX`]; names must not be empty or too long.
    #[error("port {0} has a number or name that can not be")]
    Port(u32),
    /// A descriptor is not what it should be.
    #[error("port {0}'s descriptor can not be used")]
    Descriptor(u32, #[source] io::Error),
}

/// The device.
#[derive(Debug)]
pub struct Console {
    ports: Vec<Port>,
    queue_sizes: Vec<u16>,
    config: [u8; 12],
    /// Loaded, and neither guest nor host have used it since. What there is to tell the driver waits: a fork's way to its
    /// ack is no time for interrupts about hosts that were connected to its template.
    quiet: bool,
}

#[derive(Serialize, Deserialize)]
struct State {
    ports: Vec<PortState>,
}

impl Console {
    /// A console with these ports.
    ///
    /// # Errors
    /// [`ConsoleError`].
    pub fn new(ports: Vec<PortConfig>) -> Result<Self, ConsoleError> {
        let mut made: Vec<Port> = Vec::with_capacity(ports.len());
        for config in ports {
            let number = config.number;
            let fits = (1..=PORT_MAX).contains(&number) && (1..=NAME_MAX).contains(&config.name.len());
            if !fits || config.name.contains('\0') || made.iter().any(|port| port.number == number) {
                return Err(ConsoleError::Port(number));
            }
            made.push(Port::new(config).map_err(|error| ConsoleError::Descriptor(number, error.into()))?);
        }
        made.sort_by_key(|port| port.number);
        let count = made.last().map_or(1, |port| port.number + 1);
        let queues = usize::try_from(2 * count + 2).unwrap_or_default();
        let mut config = [0; 12];
        // Columns and rows of terminals, which there are none of, stay 0.
        config[4..8].copy_from_slice(&count.to_le_bytes());
        Ok(Self { ports: made, queue_sizes: vec![QUEUE_SIZE; queues], config, quiet: false })
    }

    /// The ports that the agent in the guest expects: 1 `offshoot.ack`, and from 2 on `offshoot.ctl.0` and so on.
    ///
    /// # Errors
    /// [`ConsoleError`]; [`ConsoleError::Port`] if there are more than 14 channels.
    pub fn offshoot(ack: OwnedFd, channels: Vec<UnixListener>) -> Result<Self, ConsoleError> {
        let mut ports = vec![PortConfig { number: 1, name: "offshoot.ack".into(), end: HostEnd::Pipe(ack) }];
        for (number, listener) in (0..=PORT_MAX).zip(channels) {
            ports.push(PortConfig {
                number: number + 2,
                name: format!("offshoot.ctl.{number}"),
                end: HostEnd::Socket(listener),
            });
        }
        Self::new(ports)
    }

    /// The driver's messages.
    fn receive_control(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        for _ in 0..queues.waiting(CONTROL_TRANSMIT)? {
            let Some(chain) = queues.next(CONTROL_TRANSMIT)? else { break };
            let mut bytes = [0; MESSAGE_BYTES];
            let count = chain.read(queues.memory(), 0, &mut bytes)?;
            queues.complete(&chain, 0)?;
            if count == MESSAGE_BYTES {
                self.control(Message::from_bytes(bytes));
            }
        }
        Ok(())
    }

    fn control(&mut self, message: Message) {
        if message.event == event::DEVICE_READY {
            if message.value == 1 {
                for port in &mut self.ports {
                    port.news.device_ready();
                }
            }
            return;
        }
        let Some(port) = self.ports.iter_mut().find(|port| port.number == message.port) else { return };
        match (message.event, message.value) {
            (event::PORT_READY, 1) => port.news.port_ready(port.host_open()),
            (event::PORT_OPEN, value) => port.guest_open = value != 0,
            // A driver that could not set up the port, or says something that only devices say.
            _ => {}
        }
    }

    /// Tells the driver what there is to tell, as far as it has buffers.
    fn send_control(&mut self, queues: &mut Queues<'_>) -> Result<(), QueueError> {
        if self.quiet {
            return Ok(());
        }
        for port in &mut self.ports {
            while let Some((event, value)) = port.news.next() {
                let Some(chain) = queues.next(CONTROL_RECEIVE)? else { return Ok(()) };
                let mut bytes = Message { port: port.number, event, value }.to_bytes().to_vec();
                if event == event::PORT_NAME {
                    bytes.extend_from_slice(port.name.as_bytes());
                    bytes.push(0);
                }
                let written = chain.write(queues.memory(), 0, &bytes)?;
                if written < bytes.len() {
                    return Err(QueueError::Small);
                }
                queues.complete(&chain, u32::try_from(written).unwrap_or_default())?;
                port.news.said();
            }
        }
        Ok(())
    }

    /// Does all there is to do, on the device thread.
    fn serve(&mut self, which: Option<u32>, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let mut progress = Progress::Done;
        for port in self.ports.iter_mut().filter(|port| which.is_none_or(|which| which == port.number)) {
            if port.accept() {
                self.quiet = false;
            }
            for step in [port.transmit(queues)?, port.receive(queues)?] {
                if step == Progress::More {
                    progress = Progress::More;
                }
            }
        }
        self.send_control(queues)?;
        Ok(progress)
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn features(&self) -> u64 {
        FEATURE_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn notify(&mut self, queue: u16, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let mut progress = Progress::Done;
        match queue {
            CONTROL_RECEIVE => {}
            CONTROL_TRANSMIT => self.receive_control(queues)?,
            PORT0_TRANSMIT => discard(queue, queues)?,
            _ => {
                let (number, transmits) = (u32::from(queue / 2).saturating_sub(1), queue % 2 == 1);
                match self.ports.iter_mut().find(|port| port.number == number) {
                    Some(port) if transmits => progress = port.transmit(queues)?,
                    Some(port) => progress = port.receive(queues)?,
                    None if transmits => discard(queue, queues)?,
                    None => {}
                }
            }
        }
        if std::mem::take(&mut self.quiet) {
            // On the device thread: this vCPU has more important things to do.
            return Ok(Progress::More);
        }
        self.send_control(queues)?;
        if queue == CONTROL_TRANSMIT {
            // A port that was opened may have bytes waiting.
            progress = Progress::More;
        }
        Ok(progress)
    }

    fn attach(&mut self, watcher: Watcher) -> io::Result<()> {
        for port in &mut self.ports {
            port.attach(watcher.clone())?;
        }
        Ok(())
    }

    fn host_event(&mut self, event: HostEvent, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        match event {
            HostEvent::Ready(key, readiness) => {
                let number = key / 2;
                if let Some(port) = self.ports.iter_mut().find(|port| port.number == number) {
                    port.ready(key % 2 == 1, readiness);
                }
                self.serve(Some(number), queues)
            }
            HostEvent::Requested => self.serve(None, queues),
        }
    }

    fn restored(&mut self, queues: &mut Queues<'_>) -> Result<Progress, QueueError> {
        let mut progress = Progress::Done;
        // Only these: each look at a queue is a page of the guest's that must be brought in.
        for port in self.ports.iter_mut().filter(|port| port.is_behind()) {
            // What a full pipe did not take then, it takes now. What was for a host of the template's is not for whoever
            // connects to the fork.
            if port.transmit(queues)? == Progress::More {
                progress = Progress::More;
            }
        }
        Ok(progress)
    }

    fn reset(&mut self) {
        self.quiet = false;
        for port in &mut self.ports {
            port.reset();
        }
    }

    fn save(&self) -> Vec<u8> {
        let state = State { ports: self.ports.iter().map(Port::save).collect() };
        // Fails only for types that have no fixed layout, which these are not.
        postcard::to_allocvec(&state).unwrap_or_default()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), LoadError> {
        let (state, rest) = postcard::take_from_bytes::<State>(state).map_err(|_| LoadError::Format)?;
        if !rest.is_empty() {
            return Err(LoadError::Format);
        }
        if state.ports.len() != self.ports.len() {
            return Err(LoadError::OtherDevice);
        }
        for (port, state) in self.ports.iter_mut().zip(state.ports) {
            port.load(state)?;
        }
        self.quiet = true;
        Ok(())
    }
}

/// Gives back what the driver has sent to nobody.
fn discard(queue: u16, queues: &mut Queues<'_>) -> Result<(), QueueError> {
    for _ in 0..queues.waiting(queue)? {
        let Some(chain) = queues.next(queue)? else { break };
        queues.complete(&chain, 0)?;
    }
    Ok(())
}
