//! Named nets: forks that share one reach each other. In the kernel a net is a number, the group of its forks' wires.

use std::{collections::BTreeSet, io};

use identity::ForkId;
use serde::{Deserialize, Serialize};

use crate::{
    policy::NetName,
    record::{self, LinkRecord},
    state::{self, State},
};

/// The upper half of the group of every wire of ours: "of".
pub(crate) const OURS: u16 = 0x6f66;

#[derive(Debug, Serialize, Deserialize)]
struct Net {
    number: u16,
}

/// The group of the wires of a net; without one, of a fork by itself. Forks by themselves have one group, which reaches nobody.
pub(crate) fn group(number: u16) -> u32 {
    u32::from(OURS) << 16 | u32::from(number)
}

/// Whether a link's group is one of ours.
pub(crate) fn is_ours(group: u32) -> bool {
    group >> 16 == u32::from(OURS)
}

/// The number of a net, which is made if there is none of that name. The lock of the shared parts is held.
///
/// # Errors
/// `QuotaExceeded` if all numbers are in use.
pub(crate) fn number(state: &State, name: &NetName) -> io::Result<u16> {
    let path = state.nets().join(format!("{name}.json"));
    if let Some(net) = state::read_json::<Net>(&path)? {
        return Ok(net.number);
    }
    let taken: BTreeSet<u16> = numbers(state)?.into_iter().collect();
    let number = (1..=u16::MAX).find(|number| !taken.contains(number)).ok_or(io::ErrorKind::QuotaExceeded)?;
    state::replace_json(&path, &Net { number })?;
    Ok(number)
}

/// The nets that there are.
pub(crate) fn names(state: &State) -> io::Result<Vec<NetName>> {
    let name = |file: String| file.strip_suffix(".json")?.parse().ok();
    Ok(state::entries(&state.nets())?.into_iter().filter_map(name).collect())
}

/// The numbers in use.
pub(crate) fn numbers(state: &State) -> io::Result<Vec<u16>> {
    let mut numbers = Vec::new();
    for name in state::entries(&state.nets())? {
        numbers.extend(state::read_json::<Net>(&state.nets().join(name))?.map(|net| net.number));
    }
    Ok(numbers)
}

/// Forgets a net that no fork but `leaving` is in; its number, if it was forgotten. The lock of the shared parts is held.
pub(crate) fn forget_unused(state: &State, name: &NetName, leaving: &ForkId) -> io::Result<Option<u16>> {
    for id in record::all(state)?.into_iter().filter(|id| id != leaving) {
        // One whose record can not be read may be in it.
        let Ok(record) = LinkRecord::read(state, &id) else { return Ok(None) };
        let policy = record.and_then(|record| record.policy);
        if policy.and_then(|policy| policy.net).as_ref() == Some(name) {
            return Ok(None);
        }
    }
    let path = state.nets().join(format!("{name}.json"));
    let net = state::read_json::<Net>(&path)?;
    state::remove(&path)?;
    Ok(net.map(|net| net.number))
}
