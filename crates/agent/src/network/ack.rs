//! The ack as a datagram: sent at once by whoever has it, and again by a thread of its own until it is confirmed.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use identity::ack::MAX_DATAGRAM;
use rustix::{
    event::{PollFd, PollFlags, poll},
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

/// The first wait; each is twice the one before, up to [`LONGEST`].
const FIRST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_secs(1);
/// After that nobody waits for it any more: the longest deadline that the host takes for an ack.
const PATIENCE: Duration = Duration::from_secs(30);

/// An ack and where it goes.
#[derive(Debug, Clone)]
pub struct Letter {
    /// The signed line, at most [`MAX_DATAGRAM`] bytes.
    pub line: String,
    /// The only answer that counts.
    pub confirmation: String,
    /// Where it goes. Only this address and port can confirm it.
    pub to: SocketAddr,
}

/// What became of the ack that was sent last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// None was sent.
    None,
    /// It is sent again until it is confirmed.
    Waiting,
    /// It was confirmed.
    Confirmed,
    /// It was not confirmed until the deadline.
    Expired,
}

impl Outcome {
    /// As the control channel says it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Waiting => "waiting",
            Self::Confirmed => "confirmed",
            Self::Expired => "expired",
        }
    }
}

/// Sends acks.
#[derive(Debug, Clone)]
pub struct AckSender(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Opened before the capture, as everything a fork needs at once.
    v4: UdpSocket,
    v6: Option<UdpSocket>,
    timer: OwnedFd,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    letter: Option<Letter>,
    outcome: Outcome,
    pause: Duration,
    until: Instant,
}

impl AckSender {
    /// Opens the sockets, in the thread's network namespace, and starts the thread.
    ///
    /// # Errors
    /// What the kernel says. That there is no IPv6 is fine.
    pub fn start() -> io::Result<Self> {
        let v4 = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        v4.set_nonblocking(true)?;
        let v6 = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))
            .and_then(|socket| socket.set_nonblocking(true).map(|()| socket));
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let now = Now { letter: None, outcome: Outcome::None, pause: FIRST, until: Instant::now() };
        let inner = Arc::new(Inner { v4, v6: v6.ok(), timer, now: Mutex::new(now) });
        let sender = Self(Arc::clone(&inner));
        std::thread::Builder::new().name("network-ack".into()).stack_size(256 * 1024).spawn(move || inner.run())?;
        Ok(sender)
    }

    /// Sends a letter, in place of the one before. Does not wait. That a datagram is lost, or can not leave yet, is no error: it is sent again.
    pub fn send(&self, letter: Letter) {
        let mut now = self.0.lock();
        self.0.put(&letter);
        *now = Now { letter: Some(letter), outcome: Outcome::Waiting, pause: FIRST, until: Instant::now() + PATIENCE };
        self.0.wake_in(FIRST);
    }

    /// Sends the last letter again, from the start and to `to`. False if there was none.
    pub fn send_again(&self, to: SocketAddr) -> bool {
        let letter = self.0.lock().letter.clone();
        letter.map(|letter| self.send(Letter { to, ..letter })).is_some()
    }

    /// Forgets the letter: it is another identity's.
    pub fn forget(&self) {
        let mut now = self.0.lock();
        (now.letter, now.outcome) = (None, Outcome::None);
    }

    /// Forgets the letter, and does not wake up for it.
    pub fn recall(&self) {
        self.forget();
        self.0.wake_in(Duration::ZERO);
    }

    /// What became of the last letter.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.0.lock().outcome
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, letter: &Letter) {
        let socket = if letter.to.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() };
        let _ = socket.map(|socket| socket.send_to(letter.line.as_bytes(), letter.to));
    }

    fn wake_in(&self, pause: Duration) {
        let it_value = Timespec::try_from(pause).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }

    /// Runs for ever; sleeps while there is nothing to wait for.
    fn run(&self) {
        loop {
            let mut waited_for = vec![PollFd::new(&self.timer, PollFlags::IN), PollFd::new(&self.v4, PollFlags::IN)];
            waited_for.extend(self.v6.as_ref().map(|socket| PollFd::new(socket, PollFlags::IN)));
            if !matches!(poll(&mut waited_for, None), Ok(_) | Err(rustix::io::Errno::INTR)) {
                return;
            }
            let expired = rustix::io::read(&self.timer, &mut [0_u8; 8]).is_ok();
            for socket in [Some(&self.v4), self.v6.as_ref()].into_iter().flatten() {
                self.hear(socket);
            }
            if expired {
                self.again();
            }
        }
    }

    fn hear(&self, socket: &UdpSocket) {
        let mut buffer = [0; MAX_DATAGRAM + 1];
        loop {
            let (len, from) = match socket.recv_from(&mut buffer) {
                Ok(received) => received,
                // "Nobody listens there" is an answer to a datagram before; it is sent again.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(_) => return,
            };
            let mut now = self.lock();
            let confirms = |letter: &Letter| from == letter.to && buffer[..len] == *letter.confirmation.as_bytes();
            if now.outcome == Outcome::Waiting && now.letter.as_ref().is_some_and(confirms) {
                now.outcome = Outcome::Confirmed;
            }
        }
    }

    fn again(&self) {
        let mut now = self.lock();
        if now.outcome != Outcome::Waiting {
            return;
        }
        if Instant::now() >= now.until {
            now.outcome = Outcome::Expired;
            return;
        }
        if let Some(letter) = &now.letter {
            self.put(letter);
        }
        now.pause = (now.pause * 2).min(LONGEST);
        self.wake_in(now.pause);
    }
}
