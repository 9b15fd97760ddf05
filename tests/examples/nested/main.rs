//! What `bench/nested` runs in the rig: one table of forks by each engine, and of Firecracker's snapshots.
//!
//! Arguments: `offshoot`, the folder with Firecracker's files, the number of rounds.
#![forbid(unsafe_code)]

mod firecracker;
mod offshoot;
mod table;

use std::{env, fs, path::PathBuf, process::ExitCode};

use table::Table;

/// Of every guest.
const MEMORY_MIB: u32 = 128;
/// How many at once.
const CROWD: usize = 8;

/// What is timed, for who reads the table alone.
const TIMED: &str = "kvm, qemu: from the request to the acknowledged identity. Firecracker: from the start of its process to its \
    guest's first reply, with no identity applied. Of several at once: until the last.";

/// Errors are only told.
type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [program, files, rounds] = arguments.as_slice() else {
        eprintln!("give: OFFSHOOT FILES ROUNDS; bench/nested does");
        return ExitCode::from(2);
    };
    let Ok(rounds) = rounds.parse::<usize>() else {
        eprintln!("{rounds} is no number");
        return ExitCode::from(2);
    };
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("Load inside before: {}, rounds: {rounds}\n\n{TIMED}\n", load.trim());

    let mut table = Table::default();
    let offshoot = offshoot::Offshoot { program: PathBuf::from(program), rounds };
    let ours = ["kvm", "qemu"].map(|engine| offshoot.measure(engine, &mut table));
    let files = PathBuf::from(files);
    let theirs = match &ours[0] {
        Some(root_image) => firecracker::measure(&files, root_image, rounds, &mut table),
        None => Err("no root image: our own template could not be built".into()),
    };
    if let Err(error) = theirs {
        table.failed("Firecracker", 1, &*error);
    }
    table.print_all();
    table.print_ratios("kvm, no pool", &["qemu, no pool", "Firecracker"]);
    table.print_ratios("kvm, pool", &["qemu, pool", "Firecracker"]);
    if table.is_whole() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
