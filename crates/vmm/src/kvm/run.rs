//! A vCPU's thread: runs the guest, answers its accesses to devices, stops when asked.
//!
//! A vCPU is *parked* or *running*. Parked, nobody is in `KVM_RUN`, every access of the guest has been completed, and
//! the vCPU's lock is free: its state can be saved and loaded. That the last access is complete is why a vCPU stops only
//! when `KVM_RUN` itself says that it was interrupted: what an exit for a device answers is carried into the registers by
//! the next `KVM_RUN`, and a state that was saved in between would repeat the access in every copy.

use std::{
    io,
    ptr::NonNull,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::{
    bus::Bus,
    ending::Ending,
    kvm::KvmError,
    machine::Exit,
    worker::seccomp::{self, Role},
};

/// Which real-time signal interrupts `KVM_RUN`, counted from the first.
const KICK: i32 = 0;

/// How soon a thread that ended in the middle of an errand is noticed.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// `KVM_SYSTEM_EVENT_SHUTDOWN` and `_RESET`.
const SYSTEM_RESET: u32 = 2;

/// What a vCPU can reach.
#[derive(Debug)]
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Memory-mapped registers.
    pub mmio: Bus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Parked,
    Running,
    Gone,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    parked: bool,
    errand: Option<Errand>,
    /// What came of the last errand.
    done: Option<Result<(), KvmError>>,
}

/// Something that a parked vCPU's thread does with it.
pub type Errand = fn(&mut VcpuFd) -> Result<(), KvmError>;

#[derive(Debug)]
struct Shared {
    vcpu: Mutex<VcpuFd>,
    state: Mutex<State>,
    changed: Condvar,
    immediate_exit: ImmediateExit,
}

/// The byte in the page shared with the kernel that makes `KVM_RUN` return at once.
#[derive(Debug)]
struct ImmediateExit(NonNull<u8>);

// SAFETY: the pointer is only used for atomic accesses of one byte, which any thread may do.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// `vcpu` must stay in the same [`Shared`].
    fn of(vcpu: &mut VcpuFd) -> Self {
        Self(NonNull::from(&mut vcpu.get_kvm_run().immediate_exit))
    }

    fn set(&self, exit: bool) {
        // SAFETY: the byte lies in the mapping that the vCPU owns until it is dropped, and both are fields of the same
        // `Shared`; a byte is always aligned; all accesses of ours to it are atomic.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr()) }.store(u8::from(exit), Ordering::SeqCst);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One vCPU with its thread. Dropping it stops the thread.
#[derive(Debug)]
pub struct VcpuThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread, with the vCPU parked. The devices must be there before it is resumed.
    ///
    /// # Errors
    /// No thread, or no handler for the signal.
    pub fn start(id: u8, mut vcpu: VcpuFd, buses: Arc<OnceLock<Buses>>, ending: Arc<Ending>) -> io::Result<Self> {
        install_handler()?;
        let immediate_exit = ImmediateExit::of(&mut vcpu);
        let shared = Arc::new(Shared {
            vcpu: Mutex::new(vcpu),
            state: Mutex::new(State { wanted: Wanted::Parked, parked: true, errand: None, done: None }),
            changed: Condvar::new(),
            immediate_exit,
        });
        let of_thread = shared.clone();
        let thread =
            thread::Builder::new().name(format!("vcpu{id}")).spawn(move || serve(&of_thread, &buses, &ending))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Lets the vCPU run. Does not wait.
    pub fn resume(&self) {
        self.want(Wanted::Running);
    }

    /// Asks the vCPU to stop, without waiting; [`VcpuThread::wait_parked`] does. To stop several, ask all first.
    pub fn park(&self) {
        self.want(Wanted::Parked);
    }

    /// Waits until the vCPU is parked.
    pub fn wait_parked(&self) {
        let mut state = self.shared.state();
        while !state.parked {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has the thread of a parked vCPU do something with it, and waits for it.
    ///
    /// # Errors
    /// What it fails of; [`KvmError::Refused`] if the thread is gone.
    pub fn run_errand(&self, errand: Errand) -> Result<(), KvmError> {
        let mut state = self.shared.state();
        state.errand = Some(errand);
        self.shared.changed.notify_all();
        loop {
            if let Some(done) = state.done.take() {
                return done;
            }
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                let source = io::Error::other("its thread has ended");
                return Err(KvmError::Refused { what: "use a vCPU", source });
            }
            let waited = self.shared.changed.wait_timeout(state, LOOK_AGAIN);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The vCPU, for its state. Waits as long as it runs.
    pub fn vcpu(&self) -> MutexGuard<'_, VcpuFd> {
        self.shared.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, wanted: Wanted) {
        let mut state = self.shared.state();
        state.wanted = wanted;
        if wanted == Wanted::Running {
            state.parked = false;
        } else if !state.parked {
            // First the flag, then the signal: a thread that is just before KVM_RUN sees the flag, one that is in it the
            // signal. Under the lock, because the thread takes the flag back under it.
            self.shared.immediate_exit.set(true);
            if let Some(thread) = &self.thread {
                // Fails only for a thread that is gone.
                let _ = thread.kill(SIGRTMIN() + KICK);
            }
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.want(Wanted::Gone);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the thread.
            let _ = thread.join();
        }
    }
}

extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A handler that does nothing, so that the signal interrupts and does not kill.
fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let install = || register_signal_handler(SIGRTMIN() + KICK, interrupted).map_err(|error| error.errno());
    INSTALLED.get_or_init(install).map_err(io::Error::from_raw_os_error)
}

/// Parks when the thread ends for whatever reason, so that nobody waits for it for ever.
struct ParkAtEnd<'a>(&'a Shared, &'a Ending);

impl Drop for ParkAtEnd<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.1.end(Exit::Failed("a vCPU's thread panicked".into()));
        }
        self.0.state().parked = true;
        self.0.changed.notify_all();
    }
}

fn serve(shared: &Shared, buses: &OnceLock<Buses>, ending: &Ending) {
    let _park = ParkAtEnd(shared, ending);
    if let Err(error) = seccomp::enter(Role::Vcpu) {
        return ending.end(Exit::Failed(error.to_string()));
    }
    loop {
        let mut state = shared.state();
        while state.wanted == Wanted::Parked {
            if let Some(errand) = state.errand.take() {
                drop(state);
                let done = errand(&mut shared.vcpu.lock().unwrap_or_else(PoisonError::into_inner));
                state = shared.state();
                state.done = Some(done);
            }
            state.parked = true;
            shared.changed.notify_all();
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.wanted == Wanted::Gone {
            return;
        }
        state.parked = false;
        shared.immediate_exit.set(false);
        drop(state);

        let mut vcpu = shared.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        let exit = match buses.get() {
            Some(buses) => run(shared, &mut vcpu, buses),
            None => Some(Exit::Failed("a vCPU was to run before the machine had devices".into())),
        };
        drop(vcpu);
        if let Some(exit) = exit {
            ending.end(exit);
            let mut state = shared.state();
            // It never runs again, but can still be looked at.
            if state.wanted == Wanted::Running {
                state.wanted = Wanted::Parked;
            }
        }
    }
}

/// Runs until somebody wants the vCPU to stop (`None`), or it cannot go on.
fn run(shared: &Shared, vcpu: &mut VcpuFd, buses: &Buses) -> Option<Exit> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                buses.ports.read(port.into(), data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                buses.ports.write(port.into(), data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                buses.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                buses.mmio.write(address, data);
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            // With interrupt controllers in the kernel a triple fault is all this can be.
            Ok(VcpuExit::Shutdown) => return Some(Exit::Shutdown),
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                return Some(if kind == SYSTEM_RESET { Exit::Reset } else { Exit::Shutdown });
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Some(Exit::Failed(format!("processor {cpu} refused to enter the guest: {reason:#x}")));
            }
            Ok(other) => {
                let what = format!("{other:?}");
                return Some(Exit::Failed(format!("a vCPU stopped with {what}{}", place(vcpu))));
            }
            // A signal, or the flag. Every access is complete now.
            Err(error) if error.errno() == libc::EINTR => {
                let state = shared.state();
                if state.wanted != Wanted::Running {
                    return None;
                }
                shared.immediate_exit.set(false);
            }
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => {
                let error = io::Error::from(error);
                return Some(Exit::Failed(format!("a vCPU could not run: {error}{}", place(vcpu))));
            }
        }
    }
}

/// Where the vCPU was, for whoever looks for the reason.
fn place(vcpu: &VcpuFd) -> String {
    vcpu.get_regs().map(|regs| format!(" at {:#x}", regs.rip)).unwrap_or_default()
}
