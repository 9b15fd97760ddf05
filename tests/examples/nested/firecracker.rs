//! Firecracker's snapshots: a guest of it that answers lines on its serial port is captured once; then a process is started,
//! loads the snapshot, lets it run, and is asked.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use serde_json::{Value, json};

use crate::{
    CROWD, MEMORY_MIB, Outcome,
    table::{Figures, Table},
};

/// Longest time for anything, also on a machine that has other work.
const LIMIT: Duration = Duration::from_secs(30);
/// As our own guests are started, as far as it makes them quick.
const COMMAND_LINE: &str = "console=ttyS0 quiet reboot=k panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=on \
    cryptomgr.notests 8250.nr_uarts=1 audit=0 rcupdate.rcu_expedited=1 nowatchdog psi=0";

/// `KVM_SET_XCRS` of `linux/kvm.h`.
const SET_XCRS: u64 = 0x4188_aea7;

/// The rig's processor has no XSAVE, and Firecracker starts no machine without `KVM_CAP_XSAVE` and `KVM_CAP_XCRS` unless it is
/// told not to ask for them. Then it still loads the registers that are not there, none of them; KVM refuses that. So nothing
/// is done in that call, in this process from here on and in all that it starts.
fn do_without_xcrs() -> Outcome<()> {
    let is_it = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, SET_XCRS)?;
    let rules = [(libc::SYS_ioctl, vec![SeccompRule::new(vec![is_it])?])].into();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(0), TargetArch::x86_64)?;
    let filter: BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter(&filter)?)
}

/// Captures a guest, then times its copies: one at a time, and a crowd at once, up to the last one's reply.
pub fn measure(files: &Path, root_image: &Path, rounds: usize, table: &mut Table) -> Outcome<()> {
    do_without_xcrs()?;
    let snapshot = Snapshot::of_a_guest(files, root_image)?;
    for at_once in [1, CROWD] {
        let (mut loads, mut replies, mut failed) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            match snapshot.round(at_once) {
                Ok(copies) => {
                    loads.push(copies.iter().map(|copy| copy.loaded).fold(0.0, f64::max));
                    replies.push(copies.iter().map(|copy| copy.replied).fold(0.0, f64::max));
                }
                Err(error) => failed.push(error),
            }
        }
        let what = format!("Firecracker: {} of {rounds} rounds", failed.len());
        if let Some(error) = failed.first() {
            table.failed(&what, at_once, &**error);
        }
        if !replies.is_empty() {
            table.add("Firecracker", at_once, Figures::of(replies));
            table.add("Firecracker, up to its answer to the load", at_once, Figures::of(loads));
        }
    }
    Ok(())
}

/// A captured guest.
struct Snapshot<'a> {
    program: PathBuf,
    files: &'a Path,
}

/// A copy that has answered; it ends when this is dropped. Milliseconds since the round began.
struct Copy {
    loaded: f64,
    replied: f64,
    _process: Process,
}

impl<'a> Snapshot<'a> {
    fn of_a_guest(files: &'a Path, root_image: &Path) -> Outcome<Self> {
        let snapshot = Self { program: files.join("firecracker"), files };
        let mut process = Process::start(&snapshot.program, "template")?;
        let file = |name: &str| files.join(name).display().to_string();
        let boot = json!({ "kernel_image_path": file("vmlinux"), "initrd_path": file("initramfs.cpio"), "boot_args": COMMAND_LINE });
        process.call("PUT", "/boot-source", &boot)?;
        let drive =
            json!({ "drive_id": "root", "path_on_host": root_image, "is_root_device": false, "is_read_only": true });
        process.call("PUT", "/drives/root", &drive)?;
        // KVM_CAP_XSAVE and KVM_CAP_XCRS.
        process.call("PUT", "/cpu-config", &json!({ "kvm_capabilities": ["!55", "!56"] }))?;
        process.call("PUT", "/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB }))?;
        process.call("PUT", "/actions", &json!({ "action_type": "InstanceStart" }))?;
        process.wait_for("ready")?;
        // What answers has run once: its pages are in the snapshot.
        process.ask("warm")?;
        // Firecracker does not save the state of the serial port. If the guest's driver still waited for an interrupt of it, it
        // would wait for ever; nothing says when it has none left.
        thread::sleep(Duration::from_secs(2));
        process.call("PATCH", "/vm", &json!({ "state": "Paused" }))?;
        let create =
            json!({ "snapshot_type": "Full", "snapshot_path": file("state"), "mem_file_path": file("memory") });
        process.call("PUT", "/snapshot/create", &create)?;
        Ok(snapshot)
    }

    /// All at once; they end when this is over.
    fn round(&self, at_once: usize) -> Outcome<Vec<Copy>> {
        let begun = Instant::now();
        thread::scope(|scope| {
            let copy = |number| scope.spawn(move || self.copy(number, begun));
            let threads: Vec<_> = (0..at_once).map(copy).collect();
            threads.into_iter().map(|thread| thread.join().map_err(|_| "a thread panicked")?).collect()
        })
    }

    fn copy(&self, number: usize, begun: Instant) -> Outcome<Copy> {
        let since = || begun.elapsed().as_secs_f64() * 1e3;
        let mut process = Process::start(&self.program, &format!("copy-{number}"))?;
        let memory = json!({ "backend_path": self.files.join("memory"), "backend_type": "File" });
        let load = json!({ "snapshot_path": self.files.join("state"), "mem_backend": memory, "resume_vm": true });
        process.call("PUT", "/snapshot/load", &load)?;
        let loaded = since();
        process.ask("hello")?;
        Ok(Copy { loaded, replied: since(), _process: process })
    }
}

/// One Firecracker. Its guest's serial port is its standard input and output.
struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<UnixStream>,
    socket: PathBuf,
}

impl Process {
    fn start(program: &Path, name: &str) -> Outcome<Self> {
        let socket = env::temp_dir().join(format!("firecracker-{name}"));
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(program);
        command.arg("--api-sock").arg(&socket).args(["--id", name, "--level", "Error"]);
        // A socket, as a wait for what comes from it can have an end. Firecracker reads from terminals and pipes only.
        let (output, its_end) = UnixStream::pair()?;
        let mut child = command.stdin(Stdio::piped()).stdout(OwnedFd::from(its_end)).spawn()?;
        let input = child.stdin.take().ok_or("no standard input")?;
        Ok(Self { child, input, output: BufReader::new(output), socket })
    }

    /// One request of its API.
    fn call(&mut self, method: &str, path: &str, body: &Value) -> Outcome<()> {
        let mut stream = self.connect()?;
        stream.set_read_timeout(Some(LIMIT))?;
        let body = body.to_string();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        // It answers in one piece.
        let mut answer = [0; 4096];
        let length = stream.read(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer[..length]);
        if answer.starts_with("HTTP/1.1 204") { Ok(()) } else { Err(format!("{path}: {answer}").into()) }
    }

    /// It says nowhere when it listens, so this tries again and again, at a thousandth of what is measured.
    fn connect(&mut self) -> Outcome<UnixStream> {
        let end = Instant::now() + LIMIT;
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() > end => return Err(error.into()),
                Err(_) => thread::sleep(Duration::from_micros(200)),
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("Firecracker ended: {status}").into());
            }
        }
    }

    /// Gives the guest a line and waits for its reply.
    fn ask(&mut self, line: &str) -> Outcome<()> {
        self.input.write_all(format!("{line}\n").as_bytes())?;
        self.wait_for(&format!("reply {line}"))
    }

    fn wait_for(&mut self, expected: &str) -> Outcome<()> {
        let (mut said, end) = (String::new(), Instant::now() + LIMIT);
        loop {
            // A guest in trouble may go on saying other things.
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.output.get_ref().set_read_timeout(Some(left))?;
            let mut line = Vec::new();
            match self.output.read_until(b'\n', &mut line) {
                Ok(1..) => {}
                Ok(0) => {
                    return Err(format!("Firecracker ended before its guest said {expected:?}, but: {said}").into());
                }
                Err(error) => return Err(format!("its guest did not say {expected:?} ({error}), but: {said}").into()),
            }
            let line = String::from_utf8_lossy(&line);
            if line.trim() == expected {
                return Ok(());
            }
            said.push_str(&line);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}
