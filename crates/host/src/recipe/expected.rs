//! `[identity]`: what forks are told besides who they are.

use std::collections::{BTreeMap, BTreeSet};

use guest_api::proto;
use identity::{EnvName, FieldName};
use serde::Deserialize;

const MAX_FIELDS: usize = 64;

/// `[identity]` as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IdentityToml {
    #[serde(default)]
    payload: Delivery,
    port: Option<u16>,
    #[serde(default)]
    fields: BTreeMap<FieldName, String>,
    #[serde(default)]
    allow: BTreeSet<EnvName>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Delivery {
    Off,
    #[default]
    Fork,
    Post,
}

/// What the agent is told of it, and the variables that a fork's caller may set though they steer programs.
pub(super) fn expected(toml: IdentityToml) -> Result<(proto::Expected, BTreeSet<EnvName>), String> {
    if toml.port == Some(0) {
        return Err("a port is from 1 to 65535".to_owned());
    }
    if toml.fields.len() > MAX_FIELDS {
        return Err(format!("at most {MAX_FIELDS} fields are allowed"));
    }
    if toml.payload == Delivery::Off && !toml.fields.is_empty() {
        return Err("fields come with a payload: payload = \"fork\" or \"post\"".to_owned());
    }
    let mut variables = BTreeSet::new();
    for (field, variable) in toml.fields.iter().filter(|(_, variable)| !variable.is_empty()) {
        let variable = EnvName::parse(variable).map_err(|error| error.to_string())?;
        if variable.as_str().starts_with("OFFSHOOT_") {
            return Err(format!("the field {field} can not become {variable}: these are offshoot's"));
        }
        if variable.steers_programs() && !toml.allow.contains(&variable) {
            return Err(format!(
                "the field {field} would become {variable}, which decides which code programs run; if that is meant, \
                 add allow = [\"{variable}\"] to [identity]"
            ));
        }
        if !variables.insert(variable.clone()) {
            return Err(format!("two fields become the variable {variable}"));
        }
    }
    let delivery = match toml.payload {
        Delivery::Off => proto::Delivery::Off,
        Delivery::Fork => proto::Delivery::Fork,
        Delivery::Post => proto::Delivery::Post,
    };
    let expected = proto::Expected {
        delivery: delivery.into(),
        port: toml.port.unwrap_or_default().into(),
        fields: toml.fields.into_iter().map(|(field, variable)| (field.to_string(), variable)).collect(),
    };
    Ok((expected, toml.allow))
}
