//! The ways to connect a fork.

use std::{fmt, fs::OpenOptions, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::error::missing_capability;

/// How a fork is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Not at all.
    None,
    /// By a program of the caller's, without privileges ([`UserLink`](crate::UserLink)).
    User,
    /// By a tap in a namespace, with packet rules ([`Network`](crate::Network)).
    Tap,
}

/// A text that is no mode.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the network {given:?} is not valid: it is none, user or tap")]
pub struct ModeError {
    /// What was given, cut.
    pub given: String,
}

impl Mode {
    const ALL: [Self; 3] = [Self::None, Self::User, Self::Tap];

    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::User => "user",
            Self::Tap => "tap",
        }
    }

    /// What a fork gets here that was not asked about: `tap` if the caller has the rights and the host has taps, else `none`. `user` is for
    /// those who ask for it: it does not keep a guest from the host's own services, which nobody should get by default.
    ///
    /// It looks, and tries nothing: [`missing`](crate::missing()) does.
    #[must_use]
    pub fn default_here() -> Self {
        let tun = || OpenOptions::new().read(true).write(true).open("/dev/net/tun").is_ok();
        if missing_capability().is_none() && tun() { Self::Tap } else { Self::None }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Mode {
    type Err = ModeError;

    fn from_str(text: &str) -> Result<Self, ModeError> {
        let given = || ModeError { given: text.chars().take(80).collect() };
        Self::ALL.into_iter().find(|mode| mode.as_str() == text).ok_or_else(given)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_survives_its_text_and_nothing_else_is_one() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.as_str());
        }
        for bad in ["", "Tap", "tap ", "bridge"] {
            assert!(bad.parse::<Mode>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn root_has_a_tap_by_default() {
        let tap = missing_capability().is_none() && std::path::Path::new("/dev/net/tun").exists();
        assert_eq!(Mode::default_here() == Mode::Tap, tap);
    }
}
