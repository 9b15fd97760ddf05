//! Figures, and what is said about them.

use std::fmt::Display;

/// Milliseconds of all runs of one case.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    pub count: usize,
    pub p50: f64,
    pub p99: f64,
}

impl Figures {
    /// By the nearest rank, as `offshoot bench` has it: every figure is a value that was seen.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let rank = |percent: usize| {
            let index = (values.len() * percent).div_ceil(100).max(1) - 1;
            values.get(index).copied().unwrap_or(f64::NAN)
        };
        Self { count: values.len(), p50: rank(50), p99: rank(99) }
    }
}

struct Row {
    what: String,
    at_once: usize,
    result: Result<Figures, String>,
}

/// Everything that was measured, and everything that failed.
#[derive(Default)]
pub struct Table {
    rows: Vec<Row>,
}

impl Table {
    pub fn add(&mut self, what: &str, at_once: usize, figures: Figures) {
        eprintln!("{what}, {at_once} at once: {:.0} ms", figures.p50);
        self.rows.push(Row { what: what.to_owned(), at_once, result: Ok(figures) });
    }

    pub fn failed(&mut self, what: &str, at_once: usize, error: &(impl Display + ?Sized)) {
        eprintln!("{what}, {at_once} at once FAILED: {error}");
        self.rows.push(Row { what: what.to_owned(), at_once, result: Err(error.to_string()) });
    }

    pub fn is_whole(&self) -> bool {
        self.rows.iter().all(|row| row.result.is_ok())
    }

    pub fn print_all(&self) {
        println!("| what | at once | times | p50 ms | p99 ms |\n|---|---|---|---|---|");
        for Row { what, at_once, result } in &self.rows {
            match result {
                Ok(Figures { count, p50, p99 }) => println!("| {what} | {at_once} | {count} | {p50:.1} | {p99:.1} |"),
                // One line, whatever was said.
                Err(error) => println!("| {what} | {at_once} | FAILED: {} | | |", error.replace(['\n', '|'], " ")),
            }
        }
        println!();
    }

    /// How many times longer than `base` the others take, by the medians.
    pub fn print_ratios(&self, base: &str, others: &[&str]) {
        for at_once in [1, super::CROWD] {
            for other in others {
                let median = |what: &str| {
                    let row = self.rows.iter().find(|row| row.what == what && row.at_once == at_once)?;
                    row.result.as_ref().ok().map(|figures| figures.p50)
                };
                let ratio = match (median(base), median(other)) {
                    (Some(base), Some(other)) => format!("1 : {:.1}", other / base),
                    _ => "FAILED".to_owned(),
                };
                println!("{base} : {other}, {at_once} at once: {ratio}");
            }
        }
    }
}
