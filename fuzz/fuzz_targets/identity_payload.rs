//! The body of a payload that is posted. What is taken has declared fields only, and becomes no other variables than theirs.
#![no_main]

use std::{collections::BTreeMap, sync::LazyLock};

use agent::payload::Expected;
use guest_api::proto::{self, Delivery};
use libfuzzer_sys::fuzz_target;

static EXPECTED: LazyLock<Expected> = LazyLock::new(|| {
    let fields =
        [("task", "TASK"), ("a", "A"), ("silent", "")].map(|(field, variable)| (field.into(), variable.into()));
    let said = proto::Expected { fields: fields.into(), delivery: Delivery::Post.into(), ..Default::default() };
    Expected::parse(&said).expect("a recipe's word")
});

fuzz_target!(|body: &[u8]| {
    let Ok(payload) = EXPECTED.read(body) else { return };
    assert!(payload.iter().all(|(field, value)| EXPECTED.fields.contains_key(field) && !value.contains('\0')));
    let mut env = BTreeMap::new();
    EXPECTED.set_variables(&payload, &mut env);
    assert!(env.keys().all(|variable| EXPECTED.owns(variable.as_str())));
    // What was understood can be said again.
    let texts: BTreeMap<&str, &str> = payload.iter().map(|(field, value)| (field.as_str(), value.as_str())).collect();
    let again = serde_json::to_vec(&texts).expect("texts have a JSON form");
    assert_eq!(EXPECTED.read(&again).expect("our own payload"), payload);
});
