//! What a fork's network costs: `cargo run --release -p offshoot-net --example net_cost [DIRECTORY]`, as root.
//!
//! It works in a network namespace and a temporary directory of its own. `prepare` can be done ahead of a fork; what a
//! fork with a prepared link waits for is `adopt` + `ends` (tap and socket for acks) + `open`.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, unsafe_code)]

use std::{
    path::Path,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use identity::ForkId;
use net::{Network, Policy, Pool, TapOptions};
use rustix::{
    mount::{MountPropagationFlags, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};

const ROUNDS: usize = 200;
const STEPS: [&str; 6] = ["prepare", "adopt", "ends", "open", "adopt..open", "remove"];
const TAP: TapOptions = TapOptions { owner: 0, vnet_header: false };

fn main() {
    if let Some(capability) = net::missing_capability() {
        eprintln!("it needs {capability}: run it as root");
        std::process::exit(1);
    }
    // SAFETY: the table of file descriptors stays shared, and there is one thread only.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    // Root's state is in /run, which on most hosts is in memory. Where it is not, another directory can be given.
    let parent = std::env::args().nth(1).unwrap_or_else(|| "/run".to_owned());
    let dir = Path::new(&parent).join(format!("offshoot-net-cost-{}", std::process::id()));
    println!(
        "milliseconds, {ROUNDS} forks each; the link is prepared by one thread and taken up by another Network, as across processes"
    );
    println!("{:>8}  {:<12} {:>8} {:>8} {:>8}", "at once", "step", "p50", "p99", "max");
    for at_once in [1, 10, 50] {
        measure(&dir, at_once);
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

fn network(dir: &Path) -> Network {
    Network::open(dir, Pool::default(), Duration::from_secs(60)).unwrap()
}

fn measure(dir: &Path, at_once: usize) {
    let mut times: [Vec<Duration>; STEPS.len()] = Default::default();
    // What is made once for all forks is not any fork's.
    let warm = network(dir);
    drop(warm.prepare(&fork(0), TAP).unwrap());
    for round in 0..ROUNDS / at_once {
        let barrier = Barrier::new(at_once);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..at_once)
                .map(|number| {
                    let barrier = &barrier;
                    scope.spawn(move || one(dir, &fork(1 + round * at_once + number), barrier))
                })
                .collect();
            for thread in threads {
                for (times, took) in times.iter_mut().zip(thread.join().unwrap()) {
                    times.push(took);
                }
            }
        });
    }
    for (step, mut times) in STEPS.into_iter().zip(times) {
        times.sort();
        let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)].as_secs_f64() * 1000.0;
        println!("{at_once:>8}  {step:<12} {:>8.2} {:>8.2} {:>8.2}", at(50), at(99), at(100));
    }
}

/// All steps of one fork. Each begins when all forks of the round are there.
fn one(dir: &Path, id: &ForkId, barrier: &Barrier) -> [Duration; STEPS.len()] {
    let network = network(dir);
    let took = |started: Instant| started.elapsed();
    barrier.wait();
    let started = Instant::now();
    let link = network.prepare(id, TAP).unwrap();
    let prepare = took(started);
    let _ = link.keep();
    barrier.wait();
    let whole = Instant::now();
    let link = network.adopt(id).unwrap();
    let adopt = took(whole);
    let started = Instant::now();
    let ends = link.ends().unwrap();
    let inside = took(started);
    let started = Instant::now();
    let open = link.open(Policy::default()).unwrap();
    let opened = took(started);
    let whole = took(whole);
    drop(ends);
    barrier.wait();
    let started = Instant::now();
    drop(open);
    [prepare, adopt, inside, opened, whole, took(started)]
}

fn fork(number: usize) -> ForkId {
    ForkId::parse(&format!("{:020x}", (number as u128) << 40)).unwrap()
}
