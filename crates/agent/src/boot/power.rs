//! The guest's end.

use std::{io, thread};

/// Writes everything back and ends the guest. The sandbox' engine sees its virtual machine exit.
pub fn off() -> ! {
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    // Pid 1 must not get here; if it does, its end is the kernel's panic, which ends the guest too.
    std::process::exit(70)
}

/// Ends the guest when it is told to (SIGTERM, SIGINT, SIGPWR) and when the agent panics in a place without which no
/// promise can be kept. To be called before any other thread is started: they inherit the blocked signals.
///
/// # Errors
/// If the thread can not be started.
pub fn obey_signals() -> io::Result<()> {
    // SAFETY: the set is a local that both calls only write to or read from.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGPWR] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    };
    std::panic::set_hook(Box::new(|info| {
        let thread = thread::current();
        let name = thread.name().unwrap_or("");
        crate::console::warn(&format!("panic in thread {name:?} at {:?}", info.location()));
        if matches!(name, "main" | "keeper" | "reaper") && std::process::id() == 1 {
            off();
        }
    }));
    thread::Builder::new().name("power".into()).stack_size(256 * 1024).spawn(move || {
        let mut signal = 0;
        // SAFETY: waits for a signal of the set, and writes its number to a local.
        while unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {}
        off()
    })?;
    Ok(())
}
