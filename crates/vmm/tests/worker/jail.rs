//! What a worker can see and do.

use std::{fs, os::unix::process::ExitStatusExt};

use super::*;

/// A line of `/proc/PID/status`.
fn status(worker: &Worker, field: &str) -> String {
    let text = worker.proc("status");
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().to_owned()
}

#[test]
fn a_loaded_worker_has_no_rights() {
    let (worker, mut client) = Worker::start(Purpose::Fork);
    assert_eq!(client.phase(), is(Phase::Loaded));
    for field in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status(&worker, field), "0000000000000000", "{field}");
    }
    assert_eq!(status(&worker, "NoNewPrivs"), "1");
    assert_eq!(status(&worker, "Seccomp"), "2");
    let limits: Vec<String> =
        worker.proc("limits").lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for limit in ["core file size 0 0", "file size 4194304 4194304", "locked memory 0 0"] {
        assert!(limits.contains(&format!("Max {limit} bytes")), "{limits:?}");
    }
    if !is_root() {
        return;
    }
    assert_eq!(status(&worker, "CapBnd"), "0000000000000000");
    let user = USER.to_string();
    for field in ["Uid", "Gid"] {
        assert!(status(&worker, field).split_whitespace().all(|id| id == user), "{field}");
    }
    assert_eq!(status(&worker, "Groups"), "");
}

#[test]
fn a_loaded_worker_sees_no_file_system_and_no_network() {
    if !is_root() {
        return;
    }
    let (worker, mut client) = Worker::start(Purpose::Fork);
    client.phase();
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of("self"), of(&worker.pid().to_string()), "{namespace}");
    }
    let mounts = worker.proc("mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / / ro,nosuid,nodev,noexec"), "{mounts}");
    assert_eq!(fs::read_dir(format!("/proc/{}/root", worker.pid())).unwrap().count(), 0);
    let interfaces = worker.proc("net/dev");
    assert_eq!(interfaces.lines().skip(2).count(), 1, "only loopback: {interfaces}");
    assert!(interfaces.contains("lo:"));
}

#[test]
fn what_a_worker_inherits_by_accident_is_closed() {
    let forgotten: OwnedFd = File::open("/etc").unwrap().into();
    let (worker, mut client) = Worker::start_with(Purpose::Fork, vec![forgotten], MEMORY);
    client.phase();
    let open = fs::read_dir(format!("/proc/{}/fd", worker.pid())).unwrap().flatten();
    for entry in open {
        let target = fs::read_link(entry.path()).unwrap();
        assert!(!target.is_dir(), "{} is open", target.display());
    }
}

#[test]
fn a_forbidden_system_call_ends_that_worker_and_no_other() {
    let calls = [
        ("openat", libc::SYS_openat),
        ("socket", libc::SYS_socket),
        ("connect", libc::SYS_connect),
        ("execve", libc::SYS_execve),
        ("fork", libc::SYS_fork),
        ("clone", libc::SYS_clone),
        ("ptrace", libc::SYS_ptrace),
        ("process_vm_readv", libc::SYS_process_vm_readv),
        ("mount", libc::SYS_mount),
        ("unshare", libc::SYS_unshare),
        ("setuid", libc::SYS_setuid),
        ("bpf", libc::SYS_bpf),
        ("keyctl", libc::SYS_keyctl),
        ("io_uring_setup", libc::SYS_io_uring_setup),
        ("kill", libc::SYS_kill),
        ("prctl", libc::SYS_prctl),
        ("ioctl of another kind", libc::SYS_ioctl),
    ];
    let (mut neighbour, mut beside) = Worker::start(Purpose::Fork);
    for (name, number) in calls {
        let (mut worker, mut client) = Worker::start(Purpose::Fork);
        client.write(0, &u32::try_from(number).unwrap().to_le_bytes());
        assert_eq!(client.ask(&Request::Resume, None), None, "{name}");
        assert_eq!(worker.end().signal(), Some(libc::SIGSYS), "{name}");
    }
    assert!(neighbour.is_alive());
    assert_eq!(beside.phase(), is(Phase::Loaded));
}

/// The check above can fail.
#[test]
fn an_allowed_system_call_is_answered() {
    let (mut worker, mut client) = Worker::start(Purpose::Fork);
    client.write(0, &u32::try_from(libc::SYS_getpid).unwrap().to_le_bytes());
    client.done(&Request::Resume);
    assert!(worker.end().success());
    assert!(worker.log().contains("it answered"), "{}", worker.log());
}
