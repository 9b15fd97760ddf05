//! The frequency of the host's time-stamp counter, which under emulation is the guest's too.
//!
//! A kernel that boots measures it against an emulated timer. On a busy host that fails, and as this machine has no
//! interrupt controller for that timer's ticks, the boot then waits for one for ever (seen with three busy processes a
//! CPU: half of all boots). So it is measured here, where losing the CPU does not matter, and told to the kernel. That
//! also makes the guest's clock exact: a measured error of 100 ppm would be 9 s a day.

use std::{
    thread,
    time::{Duration, Instant},
};

/// What is measured over: at the precision of one reading, below 1 µs, that is an error of at most 50 ppm.
const SPAN: Duration = Duration::from_millis(40);
/// Readings of which the quickest is used.
const READINGS: usize = 16;

/// Frequency in kHz; `None` where the counter does not count evenly.
pub(super) fn khz() -> Option<u64> {
    let (start, first) = reading()?;
    thread::sleep(SPAN);
    let (end, last) = reading()?;
    let nanos = u64::try_from(end.duration_since(start).as_nanos()).ok()?;
    let ticks = last.checked_sub(first)?;
    let khz = u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(nanos.max(1))).ok()?;
    // Slower or faster than any CPU is: not the counter that is meant.
    (100_000..20_000_000).contains(&khz).then_some(khz)
}

/// The time and the counter at one moment: of several readings the one that took least.
fn reading() -> Option<(Instant, u64)> {
    let once = || {
        let before = counter();
        let now = Instant::now();
        let after = counter();
        (after.wrapping_sub(before), now, before.midpoint(after))
    };
    (0..READINGS).map(|_| once()).min_by_key(|(width, ..)| *width).map(|(_, now, count)| (now, count))
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn counter() -> u64 {
    // SAFETY: every CPU with 64 bits has the instruction, and Linux allows it to user programs.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    0
}

#[cfg(all(test, target_arch = "x86_64"))]
#[allow(clippy::unwrap_used)]
mod tests {
    #[test]
    fn two_measurements_agree() {
        let (one, two) = (super::khz().unwrap(), super::khz().unwrap());
        assert!(one.abs_diff(two) < one / 1000, "{one} and {two} kHz");
    }
}
