//! What a fork's network without privileges costs: `cargo run --release -p offshoot-net --example user_cost`.
#![allow(clippy::unwrap_used)]

use std::{fs, time::Instant};

use identity::ForkId;
use net::{Policy, RunAs, UserAddresses, UserLink};

const ROUNDS: usize = 50;

fn main() {
    let mut times = Vec::new();
    let mut private = 0;
    for number in 1..=ROUNDS {
        let id = ForkId::parse(&format!("{:020x}", (number as u128) << 40)).unwrap();
        let (link, machine) = UserLink::new(UserAddresses::of(&id)).unwrap();
        let started = Instant::now();
        let process = link.start(&Policy::default(), RunAs::default()).unwrap();
        times.push(started.elapsed());
        let memory = fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid)).unwrap_or_default();
        let line = memory.lines().find_map(|line| line.strip_prefix("Private_Dirty:"));
        private = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(private);
        drop(machine);
    }
    times.sort();
    let at = |percent: usize| times[(ROUNDS * percent / 100).min(ROUNDS - 1)].as_secs_f64() * 1000.0;
    println!("start: p50 {:.1} ms, p99 {:.1} ms; memory of its own: {private} KiB", at(50), at(99));
}
