//! The values a recipe may have, each checked where it is read, so that an error points at its line.

use std::{collections::BTreeMap, fmt::Display};

use guest_api::SIGNALS;
use serde::{Deserialize, Deserializer, de};

pub(super) const MAX_TEXT: usize = 4096;
const MAX_ENV: usize = 256;
const MAX_ENV_VALUE: usize = 32 << 10;
const MAX_ARGUMENTS: usize = 256;

macro_rules! checked {
    ($(#[$doc:meta])* $name:ident: $from:ty => $into:ty, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub(super) struct $name(pub(super) $into);

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let check: fn($from) -> Result<$into, String> = $check;
                check(<$from>::deserialize(deserializer)?).map(Self).map_err(de::Error::custom)
            }
        }
    };
}

fn when<T>(good: bool, value: T, otherwise: impl Display) -> Result<T, String> {
    if good { Ok(value) } else { Err(otherwise.to_string()) }
}

/// A recipe's or a service's name: `[a-z0-9-]{1,32}`.
pub(super) fn is_name(text: &str) -> bool {
    (1..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

fn is_text(text: &str, most: usize) -> bool {
    text.len() <= most && !text.contains('\0')
}

checked!(Name: String => String, |text| {
    when(is_name(&text), text, "a name has 1 to 32 of a-z, 0-9 and -")
});

checked!(Text: String => String, |text| {
    when(is_text(&text, MAX_TEXT), text, "a text has at most 4096 bytes and no zero byte")
});

checked!(
    /// Bytes: a number with K, M or G.
    Size: String => u64, |text| {
        // What a guest can have.
        parse_size(&text).filter(|bytes| bytes % 4096 == 0 && (64 << 20..=1024 << 30).contains(bytes))
            .ok_or_else(|| "a size is a number with K, M or G, from 64M to 1024G, for example \"512M\"".to_owned())
    }
);

checked!(
    /// Bytes, as for [`Size`].
    MemoryLimit: String => u64, |text| {
        parse_size(&text).filter(|bytes| (1 << 20..=1024 << 30).contains(bytes))
            .ok_or_else(|| "a limit of memory is a number with K, M or G, from 1M to 1024G".to_owned())
    }
);

checked!(Pids: i64 => u64, |number| {
    match u64::try_from(number) {
        Ok(count @ 1..=4_194_304) => Ok(count),
        _ => Err("a limit of processes is from 1 to 4194304".to_owned()),
    }
});

checked!(
    /// CPUs, kept as thousandths.
    Cpus: f64 => u64, |number| {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Within the range.
        when((0.01..=1024.0).contains(&number), (number * 1000.0).round() as u64, "a limit of CPUs is from 0.01 to 1024")
    }
);

/// `512M` and the like.
fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let shift = match unit {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return None,
    };
    if !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

checked!(Vcpus: i64 => u32, |number| {
    match u32::try_from(number) {
        Ok(count @ 1..=64) => Ok(count),
        _ => Err("vcpus is from 1 to 64".to_owned()),
    }
});

checked!(
    /// Seconds, kept as milliseconds.
    Seconds: i64 => u32, |number| {
        match u32::try_from(number) {
            Ok(seconds @ 1..=3600) => Ok(seconds * 1000),
            _ => Err("a time is from 1 to 3600 seconds".to_owned()),
        }
    }
);

checked!(FileMode: i64 => u32, |number| {
    match u32::try_from(number) {
        Ok(mode @ 0..=0o7777) => Ok(mode),
        _ => Err("a mode is from 0o000 to 0o7777; write it in octal, 0o644".to_owned()),
    }
});

checked!(
    /// An absolute path in the guest with no `.` or `..` in it.
    GuestPath: String => String, |text| {
        let parts = || text.split('/').skip(1);
        let good = text.starts_with('/') && is_text(&text, MAX_TEXT)
            && (text == "/" || parts().all(|part| !matches!(part, "" | "." | "..")));
        when(good, text, "a path in the guest is absolute and has no empty, \".\" or \"..\" part")
    }
);

checked!(Suite: String => String, |text| {
    let good = (1..=32).contains(&text.len()) && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    when(good, text, "a suite is a name like \"bookworm\"")
});

checked!(Package: String => String, |text| {
    let good = (2..=100).contains(&text.len()) && text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
        // To apt a last + or - is an order to install or remove.
        && (!text.ends_with(['+', '-']) || text.ends_with("++"));
    when(good, text, "a package has a Debian package's name: a-z, 0-9, +, - and .")
});

checked!(Command: Vec<String> => Vec<String>, |words| {
    if words.len() > MAX_ARGUMENTS || !words.iter().all(|word| is_text(word, MAX_ENV_VALUE)) {
        return Err("a command has at most 256 words of at most 32 KiB, none with a zero byte".to_owned());
    }
    when(words.first().is_some_and(|word| !word.is_empty()), words, "a command has at least the program's path")
});

checked!(Env: BTreeMap<String, String> => BTreeMap<String, String>, |env| {
    if env.len() > MAX_ENV {
        return Err("an environment has at most 256 variables".to_owned());
    }
    for (name, value) in &env {
        if !is_env_name(name) {
            return Err(format!("{name:?} is no name of a variable: A-Z, a-z, 0-9 and _, no digit first"));
        }
        if !is_text(value, MAX_ENV_VALUE) {
            return Err(format!("the value of {name} is over 32 KiB or has a zero byte"));
        }
    }
    Ok(env)
});

/// `[A-Za-z_][A-Za-z0-9_]*`, at most 256 bytes.
pub(super) fn is_env_name(name: &str) -> bool {
    name.len() <= 256
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// Whether an image's variable fits into a recipe's environment.
pub(super) fn is_env(name: &str, value: &str) -> bool {
    is_env_name(name) && is_text(value, MAX_ENV_VALUE)
}

checked!(
    /// A user's name, or `uid` or `uid:gid`; empty is root.
    User: String => String, |text| {
        let number = |text: &str| text.parse::<u32>().is_ok_and(|id| id != u32::MAX) && text.bytes().all(|b| b.is_ascii_digit());
        let (first, second) = text.split_once(':').map_or((text.as_str(), None), |(uid, gid)| (uid, Some(gid)));
        let name = second.is_none() && text.len() <= 32
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b));
        let good = text.is_empty() || number(first) && second.is_none_or(number)
            || name && !text.starts_with(|c: char| c.is_ascii_digit() || c == '-');
        when(good, text, "a user is a name, \"uid\" or \"uid:gid\"")
    }
);

checked!(
    /// A signal's name without SIG.
    Signal: String => String, |text| {
        when(SIGNALS.contains(&text.as_str()), text, format!("a signal is one of {}", SIGNALS.join(", ")))
    }
);
