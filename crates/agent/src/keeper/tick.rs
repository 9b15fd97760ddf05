//! Keeping the kernel's tick away while an identity is applied.
//!
//! A fork goes on where its template was captured, and soon after that the timer interrupts: four times what it would
//! need, because under emulation the handler has to be translated first, once for interrupted user code and once for
//! interrupted kernel code, and what it starts has to be too (measured: a quarter of all code on the way to the ack). So
//! while the keeper waits it pushes the timer of its CPU away, and when it has answered it lets it fire. To the kernel
//! that is a machine that stood still for a moment, as every virtual machine does.
//!
//! The timer is the local APIC's, reached through `/dev/mem`, which the kernel allows only with `iomem=relaxed`: that is
//! on the command line of emulated machines and of no others. Where it is not, nothing is held.

use std::{ffi::c_void, ptr::NonNull};

use rustix::{
    fs::{Mode, OFlags},
    mm::{MapFlags, ProtFlags},
};

/// Physical address of the local APIC (Intel SDM volume 3, 11.4.1).
const APIC: u64 = 0xFEE0_0000;
const PAGE: usize = 4096;
/// Registers of the timer, as indices of 32-bit words (the same, 11.5.4).
const LVT_TIMER: usize = 0x320 / 4;
const INITIAL_COUNT: usize = 0x380 / 4;
const DIVIDE: usize = 0x3E0 / 4;
/// Bits of the mode in [`LVT_TIMER`]; one-shot is zero, and the only one that is held.
const MODE: u32 = 0b11 << 17;
/// How long one push lasts, in the timer's own counts: 1 GHz in QEMU. Longer than an identity takes, and short enough
/// for a timer of the workload that is late once.
const HOLD: u32 = 300_000_000;

/// The timer of this CPU.
#[derive(Debug)]
pub(super) struct Tick(NonNull<u32>);

// SAFETY: the mapping belongs to the process; every access is one volatile word, and only the keeper's thread makes any.
unsafe impl Send for Tick {}
// SAFETY: as above.
unsafe impl Sync for Tick {}

impl Tick {
    /// Finds it; `None` where it can not be reached.
    pub(super) fn open() -> Option<Self> {
        let flags = OFlags::RDWR | OFlags::SYNC | OFlags::CLOEXEC;
        let memory = rustix::fs::open("/dev/mem", flags, Mode::empty()).ok()?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping of the registers' page at an address that the kernel chooses.
        let page =
            unsafe { rustix::mm::mmap(std::ptr::null_mut::<c_void>(), PAGE, access, MapFlags::SHARED, &memory, APIC) };
        NonNull::new(page.ok()?.cast::<u32>()).map(Self)
    }

    /// Pushes the next interrupt away.
    pub(super) fn hold(&self) {
        if self.read(LVT_TIMER) & MODE == 0 {
            let divide = self.read(DIVIDE);
            // 0b111 divides by one, 0 by two (the same, figure 11-10).
            let shift = ((divide & 0b11 | divide >> 1 & 0b100) + 1) & 0b111;
            self.write(INITIAL_COUNT, HOLD >> shift);
        }
    }

    /// Lets it come at once.
    pub(super) fn release(&self) {
        if self.read(LVT_TIMER) & MODE == 0 {
            self.write(INITIAL_COUNT, 1);
        }
    }

    fn read(&self, register: usize) -> u32 {
        // SAFETY: the registers lie in the page, which stays mapped for the life of the process.
        unsafe { self.0.add(register).read_volatile() }
    }

    fn write(&self, register: usize, value: u32) {
        // SAFETY: as above; a new count only moves the next interrupt.
        unsafe { self.0.add(register).write_volatile(value) }
    }
}
