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
mod ready;

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use ::memory::Delta;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use self::{clocks::StoppedClocks, devices::Devices};
pub use self::{devices::DeviceFiles, error::MachineError, prepared::Prepared, ready::Ready};
use crate::{
    config::MachineConfig,
    kvm::{
        self,
        state::{VcpuState, VmState},
    },
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
    /// The clocks of a machine that was restored and has never run, or is paused.
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
    pub fn restore(snapshot: &Snapshot, memory: &File, files: DeviceFiles) -> Result<Self, MachineError> {
        Self::restore_with(snapshot, memory, None, files, &Ready::default())
    }

    /// The same, with the pages that a captured copy had for itself above the memory file, and pages that it is to have before it
    /// runs.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn restore_with(
        snapshot: &Snapshot,
        memory: &File,
        own: Option<&Delta>,
        mut files: DeviceFiles,
        ready: &Ready,
    ) -> Result<Self, MachineError> {
        let kvm = kvm::open(files.kvm.take())?;
        Prepared::new(kvm, snapshot.machine)?.restore(snapshot, memory, own, files, ready)
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
        if self.running {
            self.stopped = StoppedClocks::read(&self.prepared);
        }
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
