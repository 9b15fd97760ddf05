//! Settings that keep an idle guest from waking its host, and its memory where it is.

use std::fs;

use crate::console;

/// Turns off what ticks in an idle guest. Each is tried; what did not work is noted in the kernel's log.
pub fn settle() {
    // An hour between updates of counters that nobody reads; no periodic writeback (the disk is read-only, the rest is
    // memory); no watchdog, which would also take a paused guest for a hung one.
    for (file, value) in [
        ("/proc/sys/vm/stat_interval", "3600"),
        ("/proc/sys/vm/dirty_writeback_centisecs", "0"),
        ("/proc/sys/kernel/watchdog", "0"),
        // No timer that bounds real-time threads. A workload that hogs the CPU hogs its own.
        ("/proc/sys/kernel/sched_rt_runtime_us", "-1"),
        // The kernel moves pages to have larger free blocks, twice a second. A mailbox that moves after it was armed leaves
        // its likeness behind, and the host finds two; in a fork every page moved is one that is no longer shared.
        ("/proc/sys/vm/compaction_proactiveness", "0"),
        ("/proc/sys/vm/compact_unevictable_allowed", "0"),
    ] {
        if let Err(error) = fs::write(file, value) {
            console::note(&format!("{file} could not be set to {value}: {error}"));
        }
    }
    if let Err(error) = stop_interval_timer() {
        console::note(&format!("the interval timer could not be stopped: {error}"));
    }
}

/// Stops the PC's interval timer (8254). The kernel has left it for a better clock, but the emulated chip goes on
/// counting, which costs the host CPU time for every idle fork.
fn stop_interval_timer() -> std::io::Result<()> {
    const FIRST_PORT: u64 = 0x40;
    const PORTS: u64 = 4;
    // SAFETY: the three ports are the timer's alone, and nothing in the guest uses it by now. Mode 0 with a count of 0:
    // it counts down once, and stays.
    unsafe {
        if libc::syscall(libc::SYS_ioperm, FIRST_PORT, PORTS, 1) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        outb(0x43, 0x30);
        outb(0x40, 0);
        outb(0x40, 0);
        libc::syscall(libc::SYS_ioperm, FIRST_PORT, PORTS, 0);
    }
    Ok(())
}

/// # Safety
/// The caller has the right to the port, and knows what the device does with the byte.
unsafe fn outb(port: u16, value: u8) {
    // SAFETY: the caller's promise; the instruction touches neither memory nor flags.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
}
