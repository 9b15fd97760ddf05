//! A machine that waits for its template.

use std::{
    fs::File,
    process,
    sync::{Arc, OnceLock},
};

use ::memory::Delta;
use kvm_ioctls::Kvm;

use super::{DeviceFiles, Devices, Machine, MachineError, Ready, StoppedClocks};
use crate::{
    boot::{self, Image},
    config::MachineConfig,
    ending::Ending,
    events::EventLoop,
    kvm::{
        cpuid,
        run::{Buses, VcpuThread},
        state::Support,
        vcpu,
        vm::Vm,
    },
    memory::{self, Sharing},
    snapshot::{HostCpu, Snapshot},
    worker::seccomp::{self, Role},
};

/// What can be made of a machine before it is known for which template: the object in the kernel, memory slots over room
/// that is still empty, interrupt controllers, vCPUs with their threads, the device thread. A worker that waits for work keeps
/// one, so that a fork pays only for the mapping, the state and the first run.
#[derive(Debug)]
pub struct Prepared {
    // The order in which they end: first whatever runs, then what it runs on.
    pub(super) vcpus: Vec<VcpuThread>,
    pub(super) events: EventLoop,
    pub(super) buses: Arc<OnceLock<Buses>>,
    pub(super) ending: Arc<Ending>,
    pub(super) vm: Vm,
    pub(super) config: MachineConfig,
    pub(super) support: Support,
    pub(super) host: HostCpu,
    kvm: Kvm,
}

impl Prepared {
    /// Makes all that does not depend on the template.
    ///
    /// # Errors
    /// [`MachineError::Config`], [`MachineError::Memory`], [`MachineError::Kvm`], [`MachineError::State`],
    /// [`MachineError::Events`], [`MachineError::Resources`].
    pub fn new(kvm: Kvm, config: MachineConfig) -> Result<Self, MachineError> {
        config.check()?;
        let support = Support::probe(&kvm)?;
        let host = HostCpu::probe(&kvm, &support)?;
        let vm = Vm::new(&kvm, memory::reserve(config.memory_bytes)?)?;
        let ending = Arc::new(Ending::new().map_err(MachineError::resources("an event descriptor"))?);
        let buses = Arc::new(OnceLock::new());
        let mut vcpus = Vec::with_capacity(config.vcpus.into());
        for id in 0..config.vcpus {
            let thread = VcpuThread::start(id, vcpu::create(&vm, id)?, buses.clone(), ending.clone());
            vcpus.push(thread.map_err(MachineError::resources("a thread"))?);
        }
        let events = EventLoop::start(|| {
            if let Err(error) = seccomp::enter(Role::Devices) {
                // This thread must do nothing more, and the machine is of no use without it.
                eprintln!("{error}");
                process::abort();
            }
        })?;
        Ok(Self { vcpus, events, buses, ending, vm, config, support, host, kvm })
    }

    /// Loads a kernel; the machine is paused at its first instruction. The guest writes through to the memory file.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn boot(
        self,
        memory: &File,
        kernel: &mut File,
        initramfs: Option<&mut File>,
        command_line: &str,
        files: DeviceFiles,
    ) -> Result<Machine, MachineError> {
        memory::fill(self.vm.memory(), memory, Sharing::Shared)?;
        let (devices, buses) = Devices::new(&self.vm, &self.ending, files, None)?;
        let slots = devices.slots();
        let image = Image { kernel, initramfs, command_line, vcpus: self.config.vcpus, slots: &slots };
        let entry = boot::load(self.vm.memory(), image)?;
        let supported = cpuid::supported(&self.kvm)?;
        for (id, thread) in (0..).zip(&self.vcpus) {
            let fd = thread.vcpu();
            vcpu::reset(&fd, &cpuid::for_vcpu(&supported, id, self.config.vcpus))?;
            if id == 0 {
                vcpu::enter_kernel(&fd, self.vm.memory(), entry)?;
            }
        }
        devices.generation().renew().map_err(MachineError::resources("random numbers"))?;
        self.finish(devices, buses, None)
    }

    /// Maps the template's memory copy-on-write, with a captured fork's own pages above it, and loads the state; the machine is paused where the template was, and has a
    /// new generation identifier.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn restore(
        self,
        snapshot: &Snapshot,
        memory: &File,
        own: Option<&Delta>,
        files: DeviceFiles,
        ready: &Ready,
    ) -> Result<Machine, MachineError> {
        snapshot.check_machine(&self.config)?;
        snapshot.check_host(&self.host, &self.support)?;
        memory::fill(self.vm.memory(), memory, Sharing::Private)?;
        // Before everything that writes to memory as it is loaded, as the generation's identifier.
        if let Some(own) = own {
            memory::put_above(self.vm.memory(), own)?;
        }
        // Devices before the interrupt controllers: an edge that one of them raises while it is loaded is replaced by what was
        // captured.
        let (devices, buses) = Devices::new(&self.vm, &self.ending, files, Some(&snapshot.devices))?;
        for (vcpu, state) in self.vcpus.iter().zip(&snapshot.vcpus) {
            state.prepare(&vcpu.vcpu(), &self.support)?;
        }
        // Between the two: it needs the processors' features, and leaves traces in the rest of their state.
        ready.make(self.vm.memory(), &self.vcpus)?;
        for (vcpu, state) in self.vcpus.iter().zip(&snapshot.vcpus) {
            state.load_prepared(&vcpu.vcpu(), &self.support)?;
        }
        snapshot.vm.load(self.vm.fd())?;
        // After the state, before the first run.
        devices.generation().renew().map_err(MachineError::resources("random numbers"))?;
        devices.generation().notify();
        self.finish(devices, buses, Some(StoppedClocks::new(snapshot)))
    }

    fn finish(self, devices: Devices, buses: Buses, stopped: Option<StoppedClocks>) -> Result<Machine, MachineError> {
        devices.connect(&self.events)?;
        // Nobody else has set it: this consumes the machine.
        let _ = self.buses.set(buses);
        Ok(Machine { prepared: self, devices, stopped, running: false })
    }
}
