//! With what rights a machine's process runs.
//!
//! As root every fork gets a user id of its own, every template a group id of its own, and namespaces without network,
//! so that a guest that breaks out of its machine's process finds nothing. An ordinary user can not give rights away that
//! finely; the process keeps that user's, under QEMU's own system call filter.

use engine::Confinement;
use identity::ForkId;

/// First id of our range. It lies far above what distributions hand out (systemd-nspawn's containers end at
/// 1,879,048,191) and below 2^31, which some file systems treat as negative.
const FIRST: u32 = 1_900_000_000;
/// Number of ids in our range.
const RANGE: u32 = 1 << 26;

/// The rights of a fork's process.
#[must_use]
pub fn of_fork(id: &ForkId, template_id: &str) -> Confinement<'static> {
    if rustix::process::geteuid().is_root() {
        Confinement { user: Some((from_hex(id.as_str()), template_group(template_id))), namespaces: true, cgroups: &[] }
    } else {
        Confinement::default()
    }
}

/// The rights of the process that a template is built with: its own user id, like a fork's.
#[must_use]
pub fn of_build(template_id: &str) -> Confinement<'static> {
    match of_template(template_id) {
        Some(group) => Confinement { user: Some((group, group)), namespaces: true, cgroups: &[] },
        None => Confinement::default(),
    }
}

/// The group that a template's files belong to; only root can set one.
#[must_use]
pub fn of_template(template_id: &str) -> Option<u32> {
    rustix::process::geteuid().is_root().then(|| template_group(template_id))
}

fn template_group(template_id: &str) -> u32 {
    from_hex(template_id)
}

/// Ids are random: two of 1,000 living forks share a user id with a probability of 0.7 %, and are then as far apart as two
/// forks of an ordinary user.
fn from_hex(id: &str) -> u32 {
    let digits: String = id.chars().filter(char::is_ascii_hexdigit).take(8).collect();
    FIRST + u32::from_str_radix(&digits, 16).unwrap_or_default() % RANGE
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ids_stay_in_our_range_and_differ() {
        let ids =
            ["00000000000000000000", "ffffffff000000000000"].map(|id| from_hex(ForkId::parse(id).unwrap().as_str()));
        assert_ne!(ids[0], ids[1]);
        assert!(ids.iter().all(|&id| (FIRST..FIRST + RANGE).contains(&id)));
        assert!(i32::try_from(FIRST + RANGE).is_ok());
    }
}
