//! One machine: memory, vCPUs and devices together.
//!
//! ```text
//! Prepared ── boot ────→ Machine, paused ── resume ⇄ pause ── drop
//!          └─ restore ─→        │ paused: read, write, snapshot
//! ```

mod clocks;
mod devices;
mod error;
mod prepared;

use std::{
    fs::File,
    ops::Range,
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use self::{clocks::StoppedClocks, devices::Devices};
pub use self::{devices::DeviceFiles, error::MachineError, prepared::Prepared};
use crate::{
    config::MachineConfig,
    kvm::{
        self, prefault,
        run::VcpuThread,
        state::{VcpuState, VmState},
    },
    layout::PAGE_BYTES,
    memory::{self, GuestMemory},
    snapshot::Snapshot,
};

/// How a machine came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The guest asked for a reset.
    Reset,
    /// The guest failed beyond repair (triple fault). Linux restarts this way too, with `reboot=t`.
    Shutdown,
    /// KVM or the guest did what the machine cannot handle.
    Failed(String),
}

/// A machine with one guest. Dropping it ends the guest.
#[derive(Debug)]
pub struct Machine {
    prepared: Prepared,
    devices: Devices,
    /// The clocks of a machine that was restored and has never run.
    stopped: Option<StoppedClocks>,
    running: bool,
}

impl Machine {
    /// A machine at the first instruction of a kernel, paused. The guest writes through to the memory file.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn boot(
        config: MachineConfig,
        memory: &File,
        kernel: &mut File,
        initramfs: Option<&mut File>,
        command_line: &str,
        mut files: DeviceFiles,
    ) -> Result<Self, MachineError> {
        let kvm = kvm::open(files.kvm.take())?;
        Prepared::new(kvm, config)?.boot(memory, kernel, initramfs, command_line, files)
    }

    /// A copy of a captured machine, paused where that was; it has never run. Its memory is a private mapping of the file.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn restore(snapshot: &Snapshot, memory: &File, mut files: DeviceFiles) -> Result<Self, MachineError> {
        let kvm = kvm::open(files.kvm.take())?;
        Prepared::new(kvm, snapshot.machine)?.restore(snapshot, memory, files)
    }

    /// The machine's size.
    pub fn config(&self) -> MachineConfig {
        self.prepared.config
    }

    /// Lets the guest run.
    pub fn resume(&mut self) {
        self.running = true;
        if let Some(stopped) = self.stopped.take() {
            stopped.restart(&self.prepared);
        }
        self.devices.resume();
        self.prepared.events.resume();
        for vcpu in &self.prepared.vcpus {
            vcpu.resume();
        }
    }

    /// Stops the guest; when this returns no vCPU runs, and no device touches guest memory.
    pub fn pause(&mut self) {
        for vcpu in &self.prepared.vcpus {
            vcpu.park();
        }
        for vcpu in &self.prepared.vcpus {
            vcpu.wait_parked();
        }
        self.prepared.events.pause();
        self.running = false;
    }

    /// Everything of the machine but its memory, which must be captured while the machine is still paused.
    ///
    /// # Errors
    /// [`MachineError::Running`], [`MachineError::State`].
    pub fn snapshot(&mut self) -> Result<Snapshot, MachineError> {
        self.expect_paused()?;
        let prepared = &self.prepared;
        let vcpus = prepared.vcpus.iter().map(|vcpu| VcpuState::save(&vcpu.vcpu(), &prepared.support));
        Ok(Snapshot {
            machine: prepared.config,
            host: prepared.host.clone(),
            // The order is that of the fields: vCPUs before the machine's chips.
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: VmState::save(prepared.vm.fd())?,
            devices: self.devices.save()?,
        })
    }

    /// Writes guest memory, at an offset in the memory file.
    ///
    /// # Errors
    /// [`MachineError::Running`], [`MachineError::Place`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MachineError> {
        self.access(offset, bytes.len(), |memory, at| memory.write_slice(bytes, at))
    }

    /// Reads guest memory, at an offset in the memory file.
    ///
    /// # Errors
    /// [`MachineError::Running`], [`MachineError::Place`].
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), MachineError> {
        self.access(offset, bytes.len(), |memory, at| memory.read_slice(bytes, at))
    }

    /// Makes parts of guest memory, by offset in the memory file, the machine's own before the guest touches them: the pages
    /// that a fork writes anyway on its way to its ack. Parts that are not there are left out.
    ///
    /// # Errors
    /// [`MachineError::Running`].
    pub fn populate(&self, parts: impl IntoIterator<Item = Range<u64>>) -> Result<(), MachineError> {
        self.expect_paused()?;
        // One vCPU for all: their page tables are the same.
        let vcpu = self.prepared.vcpus.first().map(VcpuThread::vcpu);
        let mut can_enter = true;
        let size = memory::size(self.prepared.vm.memory());
        for part in parts {
            // Whole pages.
            let (start, end) =
                (part.start / PAGE_BYTES * PAGE_BYTES, part.end.div_ceil(PAGE_BYTES).saturating_mul(PAGE_BYTES));
            let bytes = end.min(size).saturating_sub(start);
            if bytes == 0 {
                continue;
            }
            memory::populate(self.prepared.vm.memory(), start, bytes);
            // After it is the machine's own, else it would be entered for reading only.
            if let (true, Some(vcpu), Some(at)) = (can_enter, &vcpu, memory::address_of(start, bytes)) {
                can_enter = prefault::enter(vcpu, at, bytes);
            }
        }
        Ok(())
    }

    fn access(
        &self,
        offset: u64,
        bytes: usize,
        what: impl FnOnce(&GuestMemory, GuestAddress) -> Result<(), GuestMemoryError>,
    ) -> Result<(), MachineError> {
        self.expect_paused()?;
        let place = MachineError::Place { offset, bytes };
        match memory::address_of(offset, bytes as u64) {
            None => Err(place),
            Some(at) => what(self.prepared.vm.memory(), at).map_err(|_| place),
        }
    }

    fn expect_paused(&self) -> Result<(), MachineError> {
        if self.running { Err(MachineError::Running) } else { Ok(()) }
    }

    /// How the guest ended, waiting for it at most for `limit` (`None`: for ever). `None` if it still runs.
    pub fn wait(&self, limit: Option<Duration>) -> Option<Exit> {
        self.prepared.ending.wait(limit)
    }
}

impl AsFd for Machine {
    /// Readable when the guest has ended; not to be read from.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.prepared.ending.as_fd()
    }
}
