//! System calls that the threads of a worker may make.
//!
//! A thread that makes any other ends the whole process, and so its fork, and nothing else. The first filter, that of
//! [`Role::Start`], is taken on before a byte of a guest or template is read, and is inherited by every thread; each thread
//! then adds the shorter list of its own role. Nothing here applies outside of a worker: in tests that use a machine as a
//! library [`enter`] does nothing.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use thiserror::Error;

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The process until its machine is loaded: what the others do, and making them.
    Start,
    /// The main thread once the machine is loaded: serves the control socket.
    Main,
    /// The device thread: host-side events.
    Devices,
    /// A virtual CPU.
    Vcpu,
}

/// Why a filter could not be taken on.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// It could not be built.
    #[error("the list of system calls can not be compiled")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel refused it.
    #[error("the kernel does not take the list of system calls")]
    Apply(#[from] seccompiler::Error),
}

/// Whether this process is a worker.
static JAILED: AtomicBool = AtomicBool::new(false);

/// Makes [`enter`] effective in this process, for good.
pub(super) fn arm() {
    JAILED.store(true, Ordering::Release);
}

/// Restricts the calling thread to the system calls of its role, for good; does nothing outside of a worker.
///
/// # Errors
/// [`SeccompError`]; the thread must then do nothing more.
pub fn enter(role: Role) -> Result<(), SeccompError> {
    if JAILED.load(Ordering::Acquire) {
        apply(role)?;
    }
    Ok(())
}

/// Restricts the calling thread, in any process.
pub(super) fn apply(role: Role) -> Result<(), SeccompError> {
    Ok(seccompiler::apply_filter(&program(role)?)?)
}

fn program(role: Role) -> Result<BpfProgram, SeccompError> {
    let filter =
        SeccompFilter::new(rules(role)?, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// What the allocator, locks, the clock and the end of a thread or process take.
const EVERY: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    // To a thread of this process: a virtual CPU is made to leave the guest by a signal. In a pid namespace of its own a
    // worker can name no other process.
    libc::SYS_tgkill,
    libc::SYS_write,
];

/// Disk, sockets and pipes that are open already.
const TRANSFER: &[libc::c_long] = &[
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_writev,
];

/// Waiting for descriptors, and taking connections on sockets that listen already.
const WAIT: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_shutdown,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
];

/// What loading a machine and making its threads takes besides.
const START: &[libc::c_long] = &[
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_dup,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_prctl,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_sched_getaffinity,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_statx,
    libc::SYS_setsockopt,
];

/// What a state file and a control connection take besides.
const SERVE: &[libc::c_long] =
    &[libc::SYS_fstat, libc::SYS_ftruncate, libc::SYS_lseek, libc::SYS_setsockopt, libc::SYS_statx];

/// Every ioctl of KVM has this in its second byte.
const KVM_IOCTLS: u64 = 0xae00;
const IOCTL_TYPE: u64 = 0xff00;
/// To run the guest.
const KVM_RUN: u64 = 0xae80;
/// To find out where a vCPU was when it failed.
const KVM_GET_REGS: u64 = 0x8090_ae81;
/// To raise an interrupt.
const KVM_IRQ_LINE: u64 = 0x4008_ae61;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn rules(role: Role) -> Result<Rules, SeccompError> {
    let lists: &[&[libc::c_long]] = match role {
        Role::Start => &[EVERY, TRANSFER, WAIT, START],
        Role::Main => &[EVERY, TRANSFER, WAIT, SERVE],
        Role::Devices => &[EVERY, TRANSFER, WAIT],
        // Its devices write to sockets, files and event descriptors; a first connection's events change with them.
        Role::Vcpu => &[EVERY, TRANSFER, &[libc::SYS_epoll_ctl]],
    };
    let mut rules: Rules = lists.iter().copied().flatten().map(|&call| (call, Vec::new())).collect();
    let ioctls = match role {
        // They load and save the machine.
        Role::Start | Role::Main => vec![masked(1, IOCTL_TYPE, KVM_IOCTLS)?, equals(1, libc::FIONBIO)?],
        Role::Devices => vec![equals(1, KVM_IRQ_LINE)?, equals(1, libc::FIONBIO)?],
        Role::Vcpu => vec![equals(1, KVM_RUN)?, equals(1, KVM_IRQ_LINE)?, equals(1, KVM_GET_REGS)?],
    };
    rules.insert(libc::SYS_ioctl, ioctls);
    // Memory, but none that could be executed.
    let exec = u64::from(libc::PROT_EXEC.cast_unsigned());
    rules.insert(libc::SYS_mmap, vec![masked(2, exec, 0)?]);
    rules.insert(libc::SYS_mprotect, vec![masked(2, exec, 0)?]);
    Ok(rules)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, SeccompError> {
    rule(argument, SeccompCmpOp::MaskedEq(mask), value)
}

fn equals(argument: u8, value: u64) -> Result<SeccompRule, SeccompError> {
    rule(argument, SeccompCmpOp::Eq, value)
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, SeccompError> {
    Ok(SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?])?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// How a process ends that takes a role on and makes a system call with these arguments: 0, or the signal that killed it.
    fn end_of(role: Role, call: libc::c_long, arguments: [u64; 3]) -> i32 {
        let program = program(role).unwrap();
        // SAFETY: the child makes two system calls and ends; it allocates nothing and takes no lock.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            let [one, two, three] = arguments;
            // SAFETY: as above; none of the calls that the tests ask for touches memory of ours.
            unsafe {
                if seccompiler::apply_filter(&program).is_ok() {
                    libc::syscall(call, one, two, three, 0, 0, 0);
                    libc::_exit(0);
                }
                libc::_exit(1);
            }
        }
        let mut status = 0;
        // SAFETY: a child of ours, and a place for its status.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        if libc::WIFSIGNALED(status) {
            return libc::WTERMSIG(status);
        }
        assert_eq!(libc::WEXITSTATUS(status), 0, "the filter was not taken");
        0
    }

    const ALL: [Role; 4] = [Role::Start, Role::Main, Role::Devices, Role::Vcpu];

    #[test]
    fn no_role_opens_connects_executes_or_changes_what_it_is() {
        for role in ALL {
            for call in [
                libc::SYS_open,
                libc::SYS_openat,
                libc::SYS_openat2,
                libc::SYS_socket,
                libc::SYS_connect,
                libc::SYS_bind,
                libc::SYS_execve,
                libc::SYS_fork,
                libc::SYS_setuid,
                libc::SYS_ptrace,
                libc::SYS_kill,
                libc::SYS_unlinkat,
                libc::SYS_memfd_create,
            ] {
                assert_eq!(end_of(role, call, [0; 3]), libc::SIGSYS, "{role:?} {call}");
            }
            assert_eq!(end_of(role, libc::SYS_getpid, [0; 3]), 0, "{role:?}");
        }
    }

    #[test]
    fn only_a_process_that_starts_makes_threads() {
        for role in ALL {
            // Refused by the kernel itself where the filter lets it through: such flags exclude each other.
            let flags = (libc::CLONE_THREAD | libc::CLONE_NEWPID).cast_unsigned();
            let allowed = role == Role::Start;
            assert_eq!(end_of(role, libc::SYS_clone, [flags.into(), 0, 0]) == 0, allowed, "{role:?}");
        }
    }

    #[test]
    fn no_role_has_memory_that_can_be_executed() {
        let exec = libc::PROT_EXEC.cast_unsigned();
        for role in ALL {
            for call in [libc::SYS_mmap, libc::SYS_mprotect] {
                assert_eq!(end_of(role, call, [0, 4096, exec.into()]), libc::SIGSYS, "{role:?}");
            }
            assert_eq!(end_of(role, libc::SYS_mprotect, [0, 0, 0]), 0, "{role:?}");
        }
    }

    #[test]
    fn ioctls_are_those_of_kvm_that_the_role_needs() {
        let nobody = u64::MAX;
        // KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION.
        let (create, map) = (0xae41, 0x4020_ae46);
        for (request, allowed) in [
            (KVM_IRQ_LINE, &ALL[..]),
            (KVM_RUN, &[Role::Start, Role::Main, Role::Vcpu]),
            (create, &[Role::Start, Role::Main]),
            (map, &[Role::Start, Role::Main]),
        ] {
            for role in ALL {
                let ended = end_of(role, libc::SYS_ioctl, [nobody, request, 0]);
                assert_eq!(ended == 0, allowed.contains(&role), "{role:?} {request:#x}");
            }
        }
        for role in ALL {
            for other in [0x5412, 0x4004_54ca, 0xae] {
                assert_eq!(end_of(role, libc::SYS_ioctl, [nobody, other, 0]), libc::SIGSYS, "{role:?} {other:#x}");
            }
        }
    }

    #[test]
    fn a_vcpu_takes_no_connections() {
        for (role, signal) in [(Role::Devices, 0), (Role::Main, 0), (Role::Vcpu, libc::SIGSYS)] {
            assert_eq!(end_of(role, libc::SYS_accept4, [u64::MAX, 0, 0]), signal, "{role:?}");
        }
    }

    #[test]
    fn what_a_network_card_does_the_threads_that_do_it_may() {
        let nobody = u64::MAX;
        let set_flags = libc::F_SETFL.cast_unsigned().into();
        let calls = [libc::SYS_read, libc::SYS_write, libc::SYS_sendto, libc::SYS_recvfrom, libc::SYS_close];
        for role in [Role::Devices, Role::Vcpu] {
            for call in calls {
                assert_eq!(end_of(role, call, [nobody, 0, 0]), 0, "{role:?} {call}");
            }
        }
        assert_eq!(end_of(Role::Start, libc::SYS_fcntl, [nobody, set_flags, 0]), 0);
        assert_eq!(end_of(Role::Vcpu, libc::SYS_fcntl, [nobody, set_flags, 0]), libc::SIGSYS);
    }

    #[test]
    fn outside_of_a_worker_nothing_is_taken_on() {
        enter(Role::Vcpu).unwrap();
        assert!(std::fs::File::open("/proc/self/status").is_ok());
    }
}
