//! Progress of long steps: a spinner on a terminal, a line per step elsewhere.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use host::progress::Progress;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Output, clean, format};

/// Shows progress on standard error; nothing is left on a terminal when it is dropped.
#[derive(Debug)]
pub struct Reporter(Kind);

#[derive(Debug)]
enum Kind {
    Silent,
    Spinner(ProgressBar),
    Lines { last: String },
}

impl Reporter {
    /// Silent with `--quiet` and `--json`.
    #[must_use]
    pub fn new(output: &Output) -> Self {
        if output.quiet || output.json {
            return Self(Kind::Silent);
        }
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        if !io::stderr().is_terminal() || dumb {
            return Self(Kind::Lines { last: String::new() });
        }
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Self(Kind::Spinner(bar))
    }

    /// Shows a report; it replaces the one before.
    pub fn show(&mut self, progress: &Progress) {
        match &mut self.0 {
            Kind::Silent => {}
            Kind::Spinner(bar) => bar.set_message(text(progress)),
            Kind::Lines { last } => {
                // How far a step has come would be a line per percent: only the steps themselves.
                if *last != progress.step {
                    last.clone_from(&progress.step);
                    let _ = writeln!(io::stderr(), "{}", clean::line(&progress.step));
                }
            }
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        if let Kind::Spinner(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

fn text(progress: &Progress) -> String {
    let step = clean::line(&progress.step);
    match (progress.done, progress.total) {
        (Some(done), Some(total)) if total >= BYTES_FROM => {
            format!("{step}: {} of {}", format::bytes(done), format::bytes(total))
        }
        (Some(done), Some(total)) => format!("{step}: {done} of {total}"),
        (Some(done), None) => format!("{step}: {}", format::bytes(done)),
        _ => step,
    }
}

/// Counts of forks and rounds are small, those of bytes are not.
const BYTES_FROM: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_bytes_are_told_apart() {
        assert_eq!(text(&Progress::step("warming up")), "warming up");
        assert_eq!(text(&Progress::of("asking", 3, 10)), "asking: 3 of 10");
        assert_eq!(text(&Progress::of("unpacking", 1 << 20, 2 << 20)), "unpacking: 1 MiB of 2 MiB");
        assert_eq!(text(&Progress::step("a\x1b[2Jb")), "a\\u{1b}[2Jb");
    }
}
