//! Numbers for people.

use std::time::{Duration, SystemTime};

/// Bytes, in the largest unit that leaves a number of at least 1.
#[must_use]
pub fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut shift = 0;
    while unit + 1 < units.len() && count >> (shift + 10) > 0 {
        unit += 1;
        shift += 10;
    }
    if unit == 0 {
        return format!("{count} B");
    }
    let tenths = (u128::from(count) * 10) >> shift;
    if tenths % 10 == 0 || tenths >= 1000 {
        format!("{} {}", tenths / 10, units[unit])
    } else {
        format!("{}.{} {}", tenths / 10, tenths % 10, units[unit])
    }
}

/// A length of time, in its largest unit: `12 s`, `3 min`, `2 h`, `5 d`.
#[must_use]
pub fn span(length: Duration) -> String {
    match length.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min", seconds / 60),
        seconds @ 3600..86_400 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

/// How long ago a time in milliseconds since the epoch is.
#[must_use]
pub fn age(since_ms: u64) -> String {
    span(now().saturating_sub(Duration::from_millis(since_ms)))
}

/// In how long a time in milliseconds since the epoch comes.
#[must_use]
pub fn until(time_ms: u64) -> String {
    match Duration::from_millis(time_ms).checked_sub(now()) {
        Some(left) if !left.is_zero() => format!("in {}", span(left)),
        _ => "over".into(),
    }
}

/// Milliseconds from microseconds, with one decimal.
#[must_use]
pub fn millis(micros: u64) -> String {
    format!("{}.{}", micros / 1000, micros % 1000 / 100)
}

/// Seconds from milliseconds, with one decimal.
#[must_use]
pub fn seconds(millis: u64) -> String {
    format!("{}.{} s", millis / 1000, millis % 1000 / 100)
}

/// Milliseconds as a float: two decimals below 10, one below 100, else none; a dash where there was nothing to measure.
#[must_use]
pub fn float_millis(millis: f64) -> String {
    match millis {
        _ if !millis.is_finite() => "-".into(),
        _ if millis.abs() < 10.0 => format!("{millis:.2}"),
        _ if millis.abs() < 100.0 => format!("{millis:.1}"),
        _ => format!("{millis:.0}"),
    }
}

/// `1 fork`, `2 forks`.
#[must_use]
pub fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_for_people() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
            (u64::MAX, "15.9 EiB"),
        ];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn times_for_people() {
        assert_eq!(span(Duration::from_secs(59)), "59 s");
        assert_eq!(span(Duration::from_secs(7200)), "2 h");
        assert_eq!(millis(15_678), "15.6");
        assert_eq!(seconds(1_499), "1.4 s");
        assert_eq!(float_millis(f64::NAN), "-");
        assert_eq!(float_millis(2.5), "2.50");
        assert_eq!(age(u64::MAX), "0 s");
    }
}
