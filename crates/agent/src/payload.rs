//! What the recipe expects of a fork's payload: which fields it may have, which variables they become, and how it comes.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use guest_api::proto;
use identity::{Action, Document, EnvName, FieldName};
use thiserror::Error;

/// Longest payload that is posted, in bytes.
pub const MAX_PAYLOAD: usize = 64 << 10;
/// Most fields that a recipe may declare.
const MAX_FIELDS: usize = 64;

/// Fields and their values.
pub type Payload = BTreeMap<FieldName, String>;

/// How payloads come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Nobody has to wait for one.
    Off,
    /// With the identity: the fork's labels of the fields' names.
    Fork,
    /// Later, as a request over the host's channel. Until then whoever needs it waits.
    Post,
}

/// What a recipe says of payloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// How they come.
    pub delivery: Delivery,
    /// The fields that a payload may have, each with the variable that it becomes, if any.
    pub fields: BTreeMap<FieldName, Option<EnvName>>,
}

/// Why a recipe's word on payloads is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("what the recipe says of payloads is not valid: {0}")]
pub struct ExpectedError(&'static str);

/// Why a payload is refused. It repeats no value.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PayloadError {
    /// Not an object with names and plain values.
    #[error(
        "a payload is one JSON object, and each of its values a text, a number, true, false or null (line {line}, column {column})"
    )]
    Malformed {
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
    },
    /// A field that the recipe does not know.
    #[error("the recipe declares no field {0:?}; it declares {1}")]
    Undeclared(String, String),
    /// A value that no variable can have.
    #[error("the field {0} has a NUL byte in it")]
    Nul(FieldName),
    /// The same field twice.
    #[error("the field {0} is there twice")]
    Twice(FieldName),
}

impl Expected {
    /// Reads the recipe's word.
    ///
    /// # Errors
    /// [`ExpectedError`].
    pub fn parse(expected: &proto::Expected) -> Result<Self, ExpectedError> {
        if expected.fields.len() > MAX_FIELDS {
            return Err(ExpectedError("at most 64 fields"));
        }
        let delivery = match expected.delivery() {
            proto::Delivery::Off => Delivery::Off,
            proto::Delivery::Fork => Delivery::Fork,
            proto::Delivery::Post => Delivery::Post,
        };
        let mut variables = BTreeSet::new();
        let mut fields = BTreeMap::new();
        for (field, variable) in &expected.fields {
            let field = FieldName::parse(field).map_err(|_| ExpectedError("a field's name"))?;
            let variable = if variable.is_empty() { None } else { Some(EnvName::parse(variable)) };
            let variable = variable.transpose().map_err(|_| ExpectedError("a variable's name"))?;
            if variable.iter().any(|variable| !variables.insert(variable.clone())) {
                return Err(ExpectedError("two fields become the same variable"));
            }
            fields.insert(field, variable);
        }
        Ok(Self { delivery, fields })
    }

    /// Whether a variable belongs to the identity: only a payload sets it.
    #[must_use]
    pub fn owns(&self, variable: &str) -> bool {
        self.fields.values().flatten().any(|owned| owned.as_str() == variable)
    }

    /// The payload that comes with an identity; `None` if it comes later.
    #[must_use]
    pub fn payload_of(&self, labels: &BTreeMap<String, String>) -> Option<Payload> {
        let value = |field: &FieldName| labels.get(field.as_str()).map(|value| (field.clone(), value.clone()));
        (self.delivery != Delivery::Post).then(|| self.fields.keys().filter_map(value).collect())
    }

    /// Adds a payload's variables to those that the caller set himself, which win.
    pub fn set_variables(&self, payload: &Payload, env: &mut BTreeMap<EnvName, String>) {
        for (field, value) in payload {
            if let Some(Some(variable)) = self.fields.get(field) {
                env.entry(variable.clone()).or_insert_with(|| value.clone());
            }
        }
    }

    /// Adds the variables of the payload that comes with a document.
    pub fn complete(&self, document: &mut Document) {
        if document.action == Action::Become
            && let Some(payload) = self.payload_of(&document.labels)
        {
            self.set_variables(&payload, &mut document.env);
        }
    }

    /// Reads a payload that was posted. A field that is null counts as absent.
    ///
    /// # Errors
    /// [`PayloadError`].
    pub fn read(&self, body: &[u8]) -> Result<Payload, PayloadError> {
        let Entries(entries) = serde_json::from_slice(body)
            .map_err(|error| PayloadError::Malformed { line: error.line(), column: error.column() })?;
        let mut seen = BTreeSet::new();
        let mut payload = Payload::new();
        for (name, value) in entries {
            let declared = FieldName::parse(&name).ok().filter(|field| self.fields.contains_key(field));
            let Some(field) = declared else {
                let known: Vec<&str> = self.fields.keys().map(FieldName::as_str).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                return Err(PayloadError::Undeclared(name.chars().take(64).collect(), known));
            };
            if !seen.insert(field.clone()) {
                return Err(PayloadError::Twice(field));
            }
            match value {
                Some(value) if value.contains('\0') => return Err(PayloadError::Nul(field)),
                Some(value) => drop(payload.insert(field, value)),
                None => {}
            }
        }
        Ok(payload)
    }
}

/// An object's members in their order, the same name as often as it is there; plain values as texts.
struct Entries(Vec<(String, Option<String>)>);

impl<'de> serde::Deserialize<'de> for Entries {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Entries;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, serde_json::Value>()? {
                    let value = match value {
                        serde_json::Value::Null => None,
                        serde_json::Value::String(text) => Some(text),
                        serde_json::Value::Bool(value) => Some(value.to_string()),
                        serde_json::Value::Number(number) => Some(number.to_string()),
                        _ => return Err(serde::de::Error::custom("not a plain value")),
                    };
                    entries.push((name, value));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn expected(delivery: proto::Delivery) -> Expected {
        let fields = [("tenant", "TENANT"), ("session", "SESSION_ID"), ("note", "")];
        let fields = fields.map(|(field, variable)| (field.to_owned(), variable.to_owned())).into();
        Expected::parse(&proto::Expected { delivery: delivery.into(), port: 0, fields }).unwrap()
    }

    fn field(name: &str) -> FieldName {
        FieldName::parse(name).unwrap()
    }

    #[test]
    fn i13_declared_fields_become_variables_and_the_callers_own_win() {
        let expected = expected(proto::Delivery::Fork);
        let labels = [("tenant", "acme"), ("note", "n"), ("other", "x")];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let payload = expected.payload_of(&labels).unwrap();
        assert_eq!(payload, [(field("tenant"), "acme".to_owned()), (field("note"), "n".to_owned())].into());
        let mut env = BTreeMap::new();
        expected.set_variables(&payload, &mut env);
        assert_eq!(env, [(EnvName::parse("TENANT").unwrap(), "acme".to_owned())].into());
        env.insert(EnvName::parse("TENANT").unwrap(), "own".to_owned());
        expected.set_variables(&payload, &mut env);
        assert_eq!(env[&EnvName::parse("TENANT").unwrap()], "own");
        assert!(expected.owns("SESSION_ID") && !expected.owns("PATH") && !expected.owns(""));
    }

    #[test]
    fn i14_a_payload_is_one_object_of_declared_plain_fields() {
        let expected = expected(proto::Delivery::Post);
        assert_eq!(expected.payload_of(&BTreeMap::new()), None);
        let payload = expected.read(br#"{"tenant": "acme", "session": 7.5, "note": null}"#).unwrap();
        assert_eq!(payload, [(field("tenant"), "acme".to_owned()), (field("session"), "7.5".to_owned())].into());
        assert_eq!(expected.read(b"{}").unwrap(), Payload::new());
        for malformed in ["", "[]", "7", "{", "{} {}", r#"{"tenant": {}}"#, r#"{"tenant": ["a"]}"#, r#"{"tenant"}"#] {
            assert!(matches!(expected.read(malformed.as_bytes()), Err(PayloadError::Malformed { .. })), "{malformed}");
        }
        for undeclared in [r#"{"PATH": "/evil"}"#, r#"{"": "x"}"#, r#"{"tenant\n": "x"}"#] {
            let refused = expected.read(undeclared.as_bytes()).unwrap_err();
            assert!(matches!(refused, PayloadError::Undeclared(..)), "{undeclared}: {refused}");
            assert!(!refused.to_string().contains("evil"));
        }
        assert_eq!(expected.read(br#"{"tenant": "a\u0000b"}"#), Err(PayloadError::Nul(field("tenant"))));
        assert_eq!(expected.read(br#"{"tenant": "a", "tenant": "b"}"#), Err(PayloadError::Twice(field("tenant"))));
    }

    #[test]
    fn two_fields_can_not_become_one_variable() {
        let fields = [("a", "X"), ("b", "X")].map(|(field, variable)| (field.to_owned(), variable.to_owned())).into();
        assert!(Expected::parse(&proto::Expected { delivery: 0, port: 0, fields }).is_err());
    }
}
