//! A request to stop, made once for the whole process: by a signal, of whoever runs the command.
//!
//! Nobody is torn out of the middle of something. What is unfinished finds out at its next step
//! ([`crate::fault::point`]) or because the process it waits for is ended ([`end_unfinished`]), fails, and is undone by the
//! guards that every failure is undone by. What is finished stays: after [`request`] nothing new is published any more,
//! so that the two can be told apart by their directories.

use std::{
    collections::BTreeSet,
    fs, io,
    path::Path,
    sync::{LazyLock, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use engine::ProcessRef;
use rustix::process::{Signal, pidfd_send_signal};
use tokio::sync::watch;

use crate::{Home, machines, record};

/// The signal's number; 0 as long as nobody asked.
static ASKED: LazyLock<watch::Sender<i32>> = LazyLock::new(|| watch::Sender::new(0));

/// Machines that this process took over from a pool: not its children.
static ADOPTED: Mutex<Vec<ProcessRef>> = Mutex::new(Vec::new());

/// How often children are looked for while the work comes to its end: one may have been started since the last look.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Time for a program of the distribution to tidy up after itself; then it is killed.
const TIDY_LIMIT: Duration = Duration::from_secs(10);
/// Time for a killed child to be gone; the kernel has to free its memory first.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Asks everything in this process to stop; `signal` is why. Whatever is being published is let through first.
pub fn request(signal: i32) {
    ASKED.send_if_modified(|asked| {
        let first = *asked == 0;
        if first {
            *asked = signal;
        }
        first
    });
}

/// The signal that asked to stop, if one did.
#[must_use]
pub fn requested() -> Option<i32> {
    Some(*ASKED.borrow()).filter(|signal| *signal != 0)
}

/// Waits until somebody asks.
pub async fn wait() -> i32 {
    let mut asked = ASKED.subscribe();
    // The sender is never dropped, so this only fails if it is asked for already.
    asked.wait_for(|signal| *signal != 0).await.map_or_else(|_| requested().unwrap_or_default(), |signal| *signal)
}

/// Fails if somebody asked.
///
/// # Errors
/// `Interrupted`.
pub fn check() -> io::Result<()> {
    publishing().map(drop)
}

/// Notes a machine that this process takes over, and that no fork has yet.
pub(crate) fn adopt(home: &Home, process: &ProcessRef) {
    let forks = home.forks().canonicalize().unwrap_or_else(|_| home.forks());
    let mut adopted = ADOPTED.lock().unwrap_or_else(PoisonError::into_inner);
    adopted.retain(|process| process.is_alive() && !is_published(process.pid, &forks));
    adopted.push(process.clone());
}

/// As long as this is held, [`request`] waits.
///
/// # Errors
/// `Interrupted` if somebody asked already: nothing is published any more.
pub(crate) fn publishing() -> io::Result<watch::Ref<'static, i32>> {
    let asked = ASKED.borrow();
    if *asked == 0 { Ok(asked) } else { Err(io::Error::new(io::ErrorKind::Interrupted, "asked to stop")) }
}

/// After [`request`]: ends the processes that unfinished work of this process waits for, again and again, because the work
/// may just be starting another. The machines of published forks live on. Returns after `limit`; the work is normally
/// undone, and the program over, long before.
pub fn end_unfinished(home: &Home, limit: Duration) {
    let start = Instant::now();
    let forks = home.forks().canonicalize().unwrap_or_else(|_| home.forks());
    let mut asked = BTreeSet::new();
    while start.elapsed() < limit {
        for pid in children_of(std::process::id()) {
            let _ = end(pid, &forks, &mut asked, start.elapsed() > TIDY_LIMIT);
        }
        for process in ADOPTED.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            if process.is_alive() && !is_published(process.pid, &forks) {
                let _ = process.kill(KILL_LIMIT);
            }
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn end(pid: u32, forks: &Path, asked: &mut BTreeSet<u32>, now: bool) -> io::Result<()> {
    let process = ProcessRef::of(pid)?;
    let Some(_held) = process.pidfd()? else { return Ok(()) };
    // Looked at only now that a descriptor holds the pid.
    if parent_of(pid) != Some(std::process::id()) || is_published(pid, forks) {
        return Ok(());
    }
    if machines::is_machine(pid) {
        return process.kill(KILL_LIMIT);
    }
    // All that it started too: a program that waits for a child of its own does not end before that does, and what is
    // orphaned here nobody finds again, while it may hold the pipe that our work reads. Asked once: what is started after
    // that is there to tidy up.
    let ask = asked.insert(pid);
    for pid in [vec![pid], descendants_of(pid)].concat() {
        let Ok(process) = ProcessRef::of(pid) else { continue };
        if now {
            let _ = process.kill(KILL_LIMIT);
        } else if ask && let Ok(Some(fd)) = process.pidfd() {
            let _ = pidfd_send_signal(&fd, Signal::TERM);
        }
    }
    Ok(())
}

/// Whether it is the machine of a fork that is there to stay: it works for that fork's directory.
fn is_published(pid: u32, forks: &Path) -> bool {
    machines::below(pid, forks).is_some_and(|name| !name.starts_with(record::NEW))
}

fn children_of(parent: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| parent_of(*pid) == Some(parent))
        .collect()
}

/// Parents before their children.
fn descendants_of(ancestor: u32) -> Vec<u32> {
    let mut found = children_of(ancestor);
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        // A pid that was given anew while we looked could make a circle.
        let more: Vec<u32> = children_of(pid).into_iter().filter(|pid| !found.contains(pid)).collect();
        found.extend(more);
        next += 1;
    }
    found
}

/// From `/proc/PID/stat`. The command's name may hold anything, so fields are counted after its `)`.
fn parent_of(pid: u32) -> Option<u32> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_what_is_unfinished_is_ended() {
        let state = tempfile::tempdir().unwrap();
        let home = Home::below(state.path()).make().unwrap();
        let (id, unfinished) = ("0".repeat(20), format!(".new-{}", "1".repeat(20)));
        let start_in = |name: &str| {
            let dir = home.forks().join(name);
            fs::create_dir(&dir).unwrap();
            Command::new("sleep").arg("1000").current_dir(dir).spawn().unwrap()
        };
        let (mut published, mut half_made) = (start_in(&id), start_in(&unfinished));
        let forks = home.forks().canonicalize().unwrap();
        assert!(is_published(published.id(), &forks) && !is_published(half_made.id(), &forks));
        assert!(children_of(std::process::id()).contains(&half_made.id()));

        let mut asked = BTreeSet::new();
        for child in [&published, &half_made] {
            end(child.id(), &forks, &mut asked, false).unwrap();
        }
        half_made.wait().unwrap();
        assert!(published.try_wait().unwrap().is_none(), "what is published lives on");
        published.kill().unwrap();
        published.wait().unwrap();
    }

    #[test]
    fn what_a_program_started_goes_with_it() {
        let script = "trap '' TERM; sh -c 'trap \"\" TERM; sleep 1000' & echo; wait";
        let mut shell = Command::new("sh").args(["-c", script]).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut stdout = shell.stdout.take().unwrap();
        io::Read::read_exact(&mut stdout, &mut [0]).unwrap();
        // The inner shell, and what it started: that one is looked for, not what is just being started.
        while descendants_of(shell.id()).len() < 2 {
            thread::sleep(Duration::from_millis(1));
        }
        end(shell.id(), Path::new("/nowhere"), &mut BTreeSet::new(), true).unwrap();
        // Nobody holds the pipe any more.
        assert_eq!(io::Read::read(&mut stdout, &mut [0]).unwrap(), 0);
        shell.wait().unwrap();
    }

    #[test]
    fn a_published_thing_is_told_from_one_in_the_making() {
        let forks = Path::new("/nowhere");
        assert!(!is_published(std::process::id(), forks));
        assert_eq!(
            parent_of(std::process::id()),
            Some(rustix::process::getppid().unwrap().as_raw_nonzero().get().cast_unsigned())
        );
    }
}
