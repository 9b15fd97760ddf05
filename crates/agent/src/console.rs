//! What the agent says on the guest's console: little, because every byte on the serial line costs an exit to the host.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    sync::OnceLock,
};

static KMSG: OnceLock<File> = OnceLock::new();

/// Opens the kernel's log. Before that, and outside a guest, lines go to standard error.
pub fn open() {
    if let Ok(file) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = KMSG.set(file);
    }
}

/// A line for the kernel's log; the console shows it only if the kernel is not `quiet`.
pub fn note(text: &str) {
    write(6, text);
}

/// A line that the console shows.
pub fn warn(text: &str) {
    write(3, text);
}

/// Says why the guest can not go on, and ends it.
pub fn fatal(text: &str) -> ! {
    write(1, text);
    if std::process::id() == 1 {
        crate::boot::power::off();
    }
    std::process::exit(70)
}

fn write(level: u8, text: &str) {
    // One record of the log is one write of at most about 1000 bytes.
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(900).collect();
    match KMSG.get() {
        Some(mut kmsg) => {
            let _ = kmsg.write_all(format!("<{level}>offshoot: {line}\n").as_bytes());
        }
        None => eprintln!("offshoot: {line}"),
    }
}
