//! Touching pages for a guest that has not run: a few instructions of ours, run on its first vCPU before the captured state is
//! loaded, read a byte of each. They reach the processor's page tables that way, without the guest having left for them.
//!
//! Where KVM enters pages on request ([`super::prefault`]) nothing is run.

use kvm_bindings::{kvm_mp_state, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{KvmError, run::VcpuThread, state};
use crate::{
    layout::{GENERATION, PAGE_BYTES},
    memory::GuestMemory,
};

/// 32-bit code without paging. ESI: a table of addresses and numbers of pages, up to a number that is zero.
const CODE: [u8; 24] = [
    0x8b, 0x1e, // next: mov ebx, [esi]
    0x8b, 0x4e, 0x04, // mov ecx, [esi + 4]
    0x83, 0xc6, 0x08, // add esi, 8
    0xe3, 0x0c, // jecxz done
    0x8a, 0x03, // page: mov al, [ebx]
    0x81, 0xc3, 0x00, 0x10, 0x00, 0x00, // add ebx, 4096
    0xe2, 0xf6, // loop page
    0xeb, 0xea, // jmp next
    0xe6, PORT, // done: out PORT, al
];
const PORT: u8 = 0xf0;
/// In the page of the generation identifier, which is nobody's memory; what is there comes back afterwards.
const TABLE: u64 = GENERATION + 64;
/// Entries that fit there, the last one apart.
const ENTRIES: usize = (PAGE - 64) / 8 - 1;
/// [`PAGE_BYTES`], in memory.
const PAGE: usize = 4096;
/// The vCPU can run (`KVM_MP_STATE_RUNNABLE`).
const RUNNABLE: u32 = 0;
/// Exits that are none of ours (signals) before it is given up.
const ATTEMPTS: u32 = 64;

/// Addresses and numbers of pages, as many as one round takes, from what is left of `parts`.
pub type Table = Vec<(u32, u32)>;

/// The rounds for these ranges of guest addresses; what lies above 4 GiB is left out.
pub fn rounds(parts: impl Iterator<Item = (GuestAddress, u64)>) -> Vec<Table> {
    let entry = |(at, bytes): (GuestAddress, u64)| {
        let end = at.0.checked_add(bytes)?;
        u32::try_from(end).ok()?;
        Some((u32::try_from(at.0).ok()?, u32::try_from(bytes / PAGE_BYTES).ok()?))
    };
    let entries: Table = parts.filter_map(entry).filter(|(_, pages)| *pages > 0).collect();
    entries.chunks(ENTRIES).map(<[_]>::to_vec).collect()
}

/// Runs the rounds. The vCPU must have its features and no other state yet. It runs on its own thread: KVM makes the first run
/// by another one wait.
///
/// # Errors
/// [`KvmError`], after which the vCPU can not be used.
pub fn run(thread: &VcpuThread, memory: &GuestMemory, rounds: &[Table]) -> Result<(), KvmError> {
    let in_memory =
        |error: GuestMemoryError| KvmError::Refused { what: "touch pages", source: std::io::Error::other(error) };
    let mut page = [0; PAGE];
    memory.read_slice(&mut page, GuestAddress(GENERATION)).map_err(in_memory)?;
    enter_flat(&thread.vcpu())?;
    let result = rounds.iter().try_for_each(|table| {
        let bytes: Vec<u8> = table
            .iter()
            .chain([&(0, 0)])
            .flat_map(|(address, pages)| [address.to_le_bytes(), pages.to_le_bytes()])
            .flatten()
            .collect();
        memory.write_slice(&CODE, GuestAddress(GENERATION)).map_err(in_memory)?;
        memory.write_slice(&bytes, GuestAddress(TABLE)).map_err(in_memory)?;
        let regs = kvm_regs { rip: GENERATION, rsi: TABLE, rflags: 2, ..Default::default() };
        thread.vcpu().set_regs(&regs).map_err(KvmError::refused("set the registers"))?;
        thread.run_errand(round)
    });
    memory.write_slice(&page, GuestAddress(GENERATION)).map_err(in_memory)?;
    result
}

/// Until the code says that it is done.
fn round(vcpu: &mut VcpuFd) -> Result<(), KvmError> {
    let refused = |what: String| KvmError::Refused { what: "touch pages", source: std::io::Error::other(what) };
    for _ in 0..ATTEMPTS {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, _)) if port == u16::from(PORT) => {
                return state::settle(vcpu).map_err(|error| refused(error.to_string()));
            }
            Ok(VcpuExit::Intr) => {}
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Ok(exit) => return Err(refused(format!("{exit:?}"))),
            Err(error) => return Err(KvmError::refused("touch pages")(error)),
        }
    }
    Err(refused("it was interrupted again and again".into()))
}

/// Protected mode, flat segments, no paging.
fn enter_flat(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(KvmError::refused("tell the system registers"))?;
    let segment = |selector: u16, type_: u8| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = segment(0x10, 3);
    sregs.cs = segment(8, 0xb);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // Protection on, and what is always on.
    sregs.cr0 = 1 | 1 << 4;
    (sregs.cr4, sregs.efer) = (0, 0);
    vcpu.set_sregs(&sregs).map_err(KvmError::refused("set the system registers"))?;
    // All but the first wait for a start signal.
    vcpu.set_mp_state(kvm_mp_state { mp_state: RUNNABLE }).map_err(KvmError::refused("make a vCPU runnable"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_go_where_the_comments_say() {
        // Relative to the next instruction.
        assert_eq!(10 + usize::from(CODE[9]), 22);
        assert_eq!(20 + i32::from(i8::from_ne_bytes([CODE[19]])), 10);
        assert_eq!(22 + i32::from(i8::from_ne_bytes([CODE[21]])), 0);
        assert!(CODE.len() as u64 <= TABLE - GENERATION);
    }

    #[test]
    fn rounds_hold_what_fits_and_leave_out_what_can_not_be_reached() {
        let page = |index: u64| (GuestAddress(index * PAGE_BYTES), PAGE_BYTES);
        let all = rounds((0..600).map(page).chain([(GuestAddress(1 << 32), PAGE_BYTES), (GuestAddress(0), 100)]));
        assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [ENTRIES, 600 - ENTRIES]);
        assert_eq!(all[1].last(), Some(&(599 * 4096, 1)));
        assert!(rounds(std::iter::empty()).is_empty());
    }
}
