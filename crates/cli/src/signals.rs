//! Signals that ask a command to end, and the one of a terminal's new size.

use std::{io, process, sync::mpsc, thread, time::Duration};

use host::{Home, stop};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{error::Failure, output::style::Style};

/// Catches them from now on, until the program ends.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    resize: Signal,
}

/// What came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caught {
    /// A signal that asks to end, by its number.
    Number(i32),
    /// The terminal has another size.
    Resize,
}

impl Signals {
    /// Begins; needs a runtime.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            resize: signal(SignalKind::window_change())?,
        })
    }

    /// The next one. Nothing is lost if this is given up.
    pub async fn next(&mut self) -> Caught {
        tokio::select! {
            _ = self.interrupt.recv() => Caught::Number(SignalKind::interrupt().as_raw_value()),
            _ = self.terminate.recv() => Caught::Number(SignalKind::terminate().as_raw_value()),
            _ = self.hang_up.recv() => Caught::Number(SignalKind::hangup().as_raw_value()),
            _ = self.resize.recv() => Caught::Resize,
        }
    }

    /// The next one that asks to end.
    pub async fn end(&mut self) -> i32 {
        loop {
            if let Caught::Number(number) = self.next().await {
                return number;
            }
        }
    }
}

/// Time for what is unfinished to be undone. It takes well below a second, but a program that installs packages has to tidy
/// up too.
const UNDO_LIMIT: Duration = Duration::from_secs(30);

/// From now on a signal that asks to end makes the work of this process stop and undo itself: see [`host::stop`]. The verb
/// then finds that it failed and asks [`host::stop::requested`] why.
///
/// # Errors
/// If the system refuses.
pub fn undo_work(home: &Home) -> io::Result<()> {
    let home = home.clone();
    let (caught, catching) = mpsc::channel();
    thread::Builder::new().name("signals".into()).spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(caught.send(Err(error))),
        };
        let number = runtime.block_on(async {
            let mut signals = match Signals::new() {
                Ok(signals) => signals,
                Err(error) => return Err(caught.send(Err(error))),
            };
            let _ = caught.send(Ok(()));
            Ok(signals.end().await)
        });
        let Ok(number) = number else { return };
        stop::request(number);
        stop::end_unfinished(&home, UNDO_LIMIT);
        // The work neither ended nor found out that it should: better a known leftover than a command that can not be ended.
        Failure::interrupted(number, "interrupted, but not everything could be undone")
            .with_next("remove what is left with `offshoot cleanup`")
            .report(false, Style::PLAIN);
        process::exit(128 + number);
    })?;
    catching.recv().map_err(|_| io::Error::other("the thread for signals ended"))?
}
