//! Values with a form of their own: sizes, CPUs, seconds, places of `cp`.

use std::{fmt, num::NonZero, path::PathBuf, str::FromStr, time::Duration};

use serde::{Serialize, Serializer};

/// Longest time limit that can be given: longer than any fork lives, and far from every overflow.
const MAX_SECONDS: u64 = 365 * 24 * 3600;

/// Bytes: digits, and K, M, G or T (powers of 1024).
///
/// # Errors
/// The rule, for people.
pub fn size(text: &str) -> Result<u64, String> {
    let rule = || format!("{text:?} is not a size; give digits and K, M, G or T, for example 512M");
    let upper = text.to_ascii_uppercase();
    let plain = upper.strip_suffix("IB").or_else(|| upper.strip_suffix('B')).unwrap_or(&upper);
    let (digits, shift) = match plain.as_bytes().last() {
        Some(b'K') => (&plain[..plain.len() - 1], 10),
        Some(b'M') => (&plain[..plain.len() - 1], 20),
        Some(b'G') => (&plain[..plain.len() - 1], 30),
        Some(b'T') => (&plain[..plain.len() - 1], 40),
        _ => (plain, 0),
    };
    let number: u64 = unsigned(digits).ok_or_else(rule)?;
    number.checked_mul(1 << shift).ok_or_else(rule)
}

/// Thousandths of a CPU: `2`, `1.5`, `0.25`.
///
/// # Errors
/// The rule, for people.
pub fn cpu_millis(text: &str) -> Result<u64, String> {
    thousandths(text).ok_or_else(|| format!("{text:?} is not a number of CPUs; give a decimal number, for example 1.5"))
}

/// Seconds, with up to three decimals.
///
/// # Errors
/// The rule, for people.
pub fn seconds(text: &str) -> Result<Duration, String> {
    if text.starts_with('-') {
        return Err("a timeout can not be negative; leave it out to wait without a limit".into());
    }
    let millis = thousandths(text).ok_or_else(|| format!("{text:?} is not a number of seconds, for example 2.5"))?;
    match millis {
        0 => Err("a timeout of 0 would end at once; leave it out to wait without a limit".into()),
        _ if millis > MAX_SECONDS * 1000 => Err("a timeout is at most one year".into()),
        _ => Ok(Duration::from_millis(millis)),
    }
}

/// The same, where 0 is no time at all.
///
/// # Errors
/// The rule, for people.
pub fn seconds_or_none(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    if text.starts_with('-') {
        return Err("a time can not be negative".into());
    }
    seconds(text)
}

/// Permission bits: octal digits.
///
/// # Errors
/// The rule, for people.
pub fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777 && text.len() <= 4);
    mode.ok_or_else(|| format!("{text:?} are no permission bits in octal digits, for example 0660"))
}

/// How long something is good for: a number with s, m, h or d.
///
/// # Errors
/// The rule, for people.
pub fn life(text: &str) -> Result<Duration, String> {
    let units = [("s", 1), ("m", 60), ("h", 3600), ("d", 24 * 3600)];
    let parsed =
        units.iter().find_map(|(unit, seconds)| text.strip_suffix(unit)?.parse::<u64>().ok()?.checked_mul(*seconds));
    let seconds = parsed.filter(|seconds| (1..=10 * MAX_SECONDS).contains(seconds));
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| format!("{text:?} is no time of 1 s to ten years, for example 12h or 30d"))
}

/// A number from 1.
///
/// # Errors
/// The rule, for people.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    NonZero::<usize>::from_str(text).map(NonZero::get).map_err(|_| format!("{text:?} is not a number from 1"))
}

/// One side of `cp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Here.
    Local(PathBuf),
    /// In a fork.
    Fork {
        /// The fork, by name or id.
        fork: String,
        /// The path in it.
        path: String,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(f, "{}", path.display()),
            Self::Fork { fork, path } => write!(f, "{fork}:{path}"),
        }
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `FORK:PATH`, or a local path: one without a colon, or with a slash before it.
///
/// # Errors
/// The rule, for people.
pub fn place(text: &str) -> Result<Place, String> {
    match text.split_once(':') {
        _ if text.is_empty() => Err("a path can not be empty".into()),
        Some((fork, path)) if !fork.is_empty() && !fork.contains('/') => {
            if path.starts_with('/') && !path.contains('\0') {
                Ok(Place::Fork { fork: fork.into(), path: path.into() })
            } else {
                Err("a path in a fork is absolute: FORK:/PATH (a local name with a colon needs ./ before it)".into())
            }
        }
        _ => Ok(Place::Local(text.into())),
    }
}

/// Digits only: no sign, no space.
fn unsigned(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

fn thousandths(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    if fraction.is_empty() || fraction.len() > 3 {
        return None;
    }
    unsigned(whole)?.checked_mul(1000)?.checked_add(unsigned(&format!("{fraction:0<3}"))?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("512M").unwrap(), 512 << 20);
        assert_eq!(size("1g").unwrap(), 1 << 30);
        assert_eq!(size("2GiB").unwrap(), 2 << 30);
        assert_eq!(size("4096").unwrap(), 4096);
        for bad in ["", "M", "-1M", "+1M", "1.5G", "1X", "99999999T", " 1", "1 M", "0x10"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn cpus_are_exact() {
        for (text, millis) in [("1", 1000), ("1.5", 1500), ("0.25", 250), ("0.001", 1), ("64", 64_000)] {
            assert_eq!(cpu_millis(text).unwrap(), millis);
        }
        for bad in ["", ".", "1.", "-1", "1.0001", "1,5", "nan", "inf", "1e3"] {
            assert!(cpu_millis(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_timeout_is_positive_and_finite() {
        assert_eq!(seconds("2.5").unwrap(), Duration::from_millis(2500));
        assert_eq!(seconds_or_none("0"), Ok(Duration::ZERO));
        assert_eq!(seconds_or_none("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["", "-1", "x", "1e9"] {
            assert!(seconds_or_none(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "0", "0.0", "-1", "-0.5", "nan", "inf", "1e9", "99999999999999999999", "40000000"] {
            assert!(seconds(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn places_of_cp() {
        assert_eq!(place("w:/tmp").unwrap(), Place::Fork { fork: "w".into(), path: "/tmp".into() });
        assert_eq!(place("./a:b").unwrap(), Place::Local("./a:b".into()));
        assert_eq!(place("-").unwrap(), Place::Local("-".into()));
        for bad in ["", "w:", "w:tmp"] {
            assert!(place(bad).is_err(), "{bad:?}");
        }
    }
}
