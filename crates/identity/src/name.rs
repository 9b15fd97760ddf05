//! Names and tags: parsed once, at the door; inside, only valid values exist.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use thiserror::Error;

/// Why a name was refused. The text names the rule and gives an example.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what} {given:?} is not valid: {rule}")]
pub struct NameError {
    /// What kind of name it should have been, e.g. "tag".
    pub what: &'static str,
    /// What was given, cut to 80 characters.
    pub given: String,
    /// The rule, for people.
    pub rule: &'static str,
}

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident, $what:literal, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
        #[serde(transparent)]
        pub struct $type(String);

        impl $type {
            /// The rule this name follows, for people.
            pub const RULE: &'static str = $rule;

            /// Parses a name.
            ///
            /// # Errors
            /// [`NameError`] with the rule if `text` does not follow it.
            pub fn parse(text: &str) -> Result<Self, NameError> {
                let check: fn(&[u8]) -> bool = $check;
                if check(text.as_bytes()) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(NameError { what: $what, given: text.chars().take(80).collect(), rule: $rule })
                }
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::parse(&text).map_err(D::Error::custom)
            }
        }
    };
}

name_type!(
    /// The name of a template.
    Tag,
    "tag",
    "a tag is 1 to 64 letters, digits, '_', '.' or '-', and starts with a letter, a digit or '_' (for example python-3.11)",
    |text| (1..=64).contains(&text.len())
        && matches!(text[0], b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_')
        && text.iter().all(|byte| matches!(byte, b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-'))
);

name_type!(
    /// The name of a fork; also its host name, so it is one DNS-1123 label.
    ForkName,
    "fork name",
    "a fork name is 1 to 63 lower-case letters, digits or '-', and starts and ends with a letter or digit (for example worker-7)",
    |text| (1..=63).contains(&text.len())
        && text.iter().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && text[0] != b'-'
        && text[text.len() - 1] != b'-'
);

name_type!(
    /// The id of a fork: 20 lower-case hexadecimal digits (80 random bits), never used twice.
    ForkId,
    "fork id",
    "a fork id is 20 lower-case hexadecimal digits",
    |text| text.len() == 20 && text.iter().all(|byte| matches!(byte, b'a'..=b'f' | b'0'..=b'9'))
);

name_type!(
    /// The name of a mailbox.
    MailboxName,
    "mailbox name",
    "a mailbox name is 1 to 64 letters, digits, '.', '_', ':' or '-' (for example app:config)",
    |text| (1..=64).contains(&text.len())
        && text.iter().all(|byte| matches!(byte, b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b':' | b'-'))
);

name_type!(
    /// The name of an environment variable.
    EnvName,
    "environment variable",
    "a variable's name is 1 to 128 letters, digits or '_', and does not start with a digit (for example API_URL)",
    |text| (1..=128).contains(&text.len())
        && !text[0].is_ascii_digit()
        && text.iter().all(|byte| matches!(byte, b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_'))
);

name_type!(
    /// The name of a field that a payload carries.
    FieldName,
    "field",
    "a field's name is 1 to 64 letters, digits, '_', '.' or '-', and starts with a letter (for example tenant)",
    |text| (1..=64).contains(&text.len())
        && text[0].is_ascii_alphabetic()
        && text.iter().all(|byte| matches!(byte, b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-'))
);

name_type!(
    /// The name of a secret; also its file name under the identity directory.
    SecretName,
    "secret name",
    "a secret's name is 1 to 64 letters, digits, '.', '_' or '-', and does not start with '.' (for example API_KEY)",
    |text| (1..=64).contains(&text.len())
        && text[0] != b'.'
        && text.iter().all(|byte| matches!(byte, b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
);

/// Variables by which somebody who may set them decides which code a program runs: the loader's (ld.so(8), and all that begin with `LD_`), the
/// shells', and those of interpreters.
const STEERING: [&str; 24] = [
    "BASHOPTS",
    "BASH_ENV",
    "CLASSPATH",
    "ENV",
    "GCONV_PATH",
    "GLIBC_TUNABLES",
    "IFS",
    "JAVA_TOOL_OPTIONS",
    "JDK_JAVA_OPTIONS",
    "NODE_OPTIONS",
    "NODE_PATH",
    "PATH",
    "PERL5LIB",
    "PERL5OPT",
    "PROMPT_COMMAND",
    "PS4",
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "RUBYLIB",
    "RUBYOPT",
    "SHELLOPTS",
    "ZDOTDIR",
    "_JAVA_OPTIONS",
];

impl EnvName {
    /// Whether the variable decides which code a program runs (`PATH`, `LD_PRELOAD`, `PYTHONPATH`…). Who makes a fork may set such a one only
    /// if the recipe says so.
    #[must_use]
    pub fn steers_programs(&self) -> bool {
        self.0.starts_with("LD_") || STEERING.binary_search(&self.0.as_str()).is_ok()
    }
}

impl MailboxName {
    /// The agent's own mailbox, through which the identity document arrives.
    pub const IDENTITY: &'static str = "offshoot:identity";

    /// The agent's own mailbox.
    #[must_use]
    pub fn identity() -> Self {
        Self(Self::IDENTITY.to_owned())
    }

    /// Whether the name belongs to the agent (`offshoot:` and what follows); callers can not use such a name.
    #[must_use]
    pub fn is_reserved(&self) -> bool {
        self.0.starts_with("offshoot:")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t3_tags_follow_one_grammar() {
        for good in ["a", "_", "python-3.11", "0", &"a".repeat(64)] {
            assert!(Tag::parse(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "../x", "/etc", "-a", "a/b", "a b", "a\n", "a\0", "ü", &"a".repeat(65)] {
            assert!(Tag::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn fork_names_are_dns_labels() {
        for good in ["a", "worker-7", "0a", &"a".repeat(63)] {
            assert!(ForkName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "a/b", &"a".repeat(64)] {
            assert!(ForkName::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn i13_variables_that_steer_programs_are_known() {
        assert!(STEERING.is_sorted());
        let steers = |name: &str| EnvName::parse(name).expect("valid").steers_programs();
        for name in STEERING.iter().chain(&["LD_PRELOAD", "LD_LIBRARY_PATH", "LD_"]) {
            assert!(steers(name), "{name}");
        }
        for name in ["path", "PATH_INFO", "MY_PATH", "REGION", "LDAP_URL"] {
            assert!(!steers(name), "{name}");
        }
    }

    #[test]
    fn a_bad_name_is_refused_when_deserialised_too() {
        assert!(serde_json::from_str::<Tag>("\"../x\"").is_err());
        assert!(serde_json::from_str::<SecretName>("\"..\"").is_err());
    }

    #[test]
    fn the_agents_mailbox_name_is_valid_and_reserved() {
        let name = MailboxName::parse(MailboxName::IDENTITY).expect("valid");
        assert!(name.is_reserved());
        assert!(!MailboxName::parse("offshoots").expect("valid").is_reserved());
    }

    #[test]
    fn a_refusal_cuts_what_it_repeats() {
        let error = Tag::parse(&"!".repeat(10_000)).expect_err("refused");
        assert!(error.to_string().len() < 400);
    }
}
