//! Leases, made by many at once.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use proptest::prelude::*;

use super::rig::fork;
use crate::{DEFAULT_PAUSE, LeaseError, LeaseRecord, Leases, Pool};

fn pool(range: &str) -> Pool {
    Pool::new(range.parse().unwrap(), None).unwrap()
}

fn leases(dir: &Path) -> Leases {
    Leases::open(dir, DEFAULT_PAUSE).unwrap()
}

/// Leases for the forks from `first` on, each in a thread of its own.
fn lease_at_once(dir: &Path, first: u32, count: u32) -> Vec<LeaseRecord> {
    thread::scope(|scope| {
        let threads: Vec<_> = (first..first + count)
            .map(|number| scope.spawn(move || leases(dir).lease(&Pool::default(), &fork(number)).unwrap().keep()))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

const OTHER_PROCESS: &str = "OFFSHOOT_TEST_LEASES";

/// The part of another process in the test below. By itself it does nothing.
#[test]
fn as_another_process() {
    if let Some(value) = std::env::var_os(OTHER_PROCESS) {
        let value = value.into_string().unwrap();
        let (first, dir) = value.split_once(' ').unwrap();
        lease_at_once(&PathBuf::from(dir), first.parse().unwrap(), 16);
    }
}

#[test]
fn sixty_four_leases_made_at_once_by_four_processes_do_not_collide() {
    let dir = tempfile::tempdir().unwrap();
    let program = std::env::current_exe().unwrap();
    let other = |first: u32| {
        Command::new(&program)
            .args(["--exact", "tests::leases::as_another_process"])
            .env(OTHER_PROCESS, format!("{first} {}", dir.path().display()))
            .spawn()
            .unwrap()
    };
    let others: Vec<_> = [0, 16, 32].into_iter().map(other).collect();
    lease_at_once(dir.path(), 48, 16);
    for mut other in others {
        assert!(other.wait().unwrap().success());
    }
    let held = leases(dir.path()).held().unwrap();
    let owners: BTreeSet<_> = held.values().map(|(owner, _)| owner.clone()).collect();
    assert_eq!((held.len(), owners), (64, (0..64).map(fork).collect()));
}

#[test]
fn an_address_rests_before_it_is_given_again_and_then_is() {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool("10.0.0.0/30");
    let first = leases(dir.path()).lease(&pool, &fork(1)).unwrap();
    let address = first.record().addresses.v4;
    drop(first);
    let error = leases(dir.path()).lease(&pool, &fork(2)).unwrap_err();
    assert!(matches!(error, LeaseError::Exhausted { held: 0, resting: 1, .. }), "{error}");
    let pause = Duration::from_millis(50);
    let patient = Leases::open(dir.path(), pause).unwrap();
    thread::sleep(pause);
    assert_eq!(patient.lease(&pool, &fork(2)).unwrap().record().addresses.v4, address);
}

#[test]
fn a_pool_that_is_exhausted_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let (leases, pool) = (leases(dir.path()), pool("10.0.0.0/27"));
    let held: Vec<_> = (0..29).map(|number| leases.lease(&pool, &fork(number)).unwrap()).collect();
    let addresses: BTreeSet<_> = held.iter().map(|lease| lease.record().addresses.v4).collect();
    assert_eq!(addresses.len(), 29);
    let text = leases.lease(&pool, &fork(29)).unwrap_err().to_string();
    assert!(
        text.contains("10.0.0.0/27") && text.contains("29 addresses are held") && text.contains("offshoot cleanup"),
        "{text}"
    );
    // Another pool is not.
    assert!(leases.lease(&Pool::default(), &fork(29)).is_ok());
}

#[test]
fn thousands_fit() {
    let dir = tempfile::tempdir().unwrap();
    let leases = leases(dir.path());
    let held: BTreeSet<_> =
        (0..3000).map(|number| leases.lease(&Pool::default(), &fork(number)).unwrap().keep().addresses.v4).collect();
    assert_eq!(held.len(), 3000);
    assert_eq!(leases.held().unwrap().len(), 3000);
}

#[test]
fn a_lease_is_given_back_by_its_owner_only_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let leases = leases(dir.path());
    let lease = leases.lease(&Pool::default(), &fork(1)).unwrap().keep();
    leases.give_back(&LeaseRecord { owner: fork(2), ..lease.clone() }).unwrap();
    assert_eq!(leases.held().unwrap().len(), 1);
    leases.give_back(&lease).unwrap();
    leases.give_back(&lease).unwrap();
    assert_eq!(leases.held().unwrap().len(), 0);
}

#[test]
fn a_lease_of_an_earlier_boot_is_free_and_one_that_can_not_be_read_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let (leases, pool) = (leases(dir.path()), pool("10.0.0.0/30"));
    let lease = leases.lease(&pool, &fork(1)).unwrap().keep();
    let path = dir.path().join("leases").join(lease.addresses.v4.to_string());
    std::fs::write(&path, "{").unwrap();
    assert!(matches!(leases.lease(&pool, &fork(2)), Err(LeaseError::Exhausted { held: 1, resting: 0, .. })));
    let earlier = format!(r#"{{"boot":"another","owner":"{}","since_ms":1}}"#, fork(1));
    std::fs::write(&path, earlier).unwrap();
    assert_eq!(leases.held().unwrap().len(), 0);
    assert!(leases.lease(&pool, &fork(2)).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any order of leasing and giving back, from two pools, of which one is so small that it runs out.
    #[test]
    fn no_two_forks_hold_one_address(steps in proptest::collection::vec((any::<bool>(), any::<bool>(), any::<usize>()), 1..80)) {
        let dir = tempfile::tempdir().unwrap();
        let leases = Leases::open(dir.path(), Duration::ZERO).unwrap();
        let pools = [pool("10.0.0.0/28"), pool("10.0.1.0/24")];
        let mut held = Vec::new();
        for (number, (take, small, which)) in (0..).zip(steps) {
            let pool = &pools[usize::from(!small)];
            let of_pool = |held: &[crate::Lease]| {
                held.iter().filter(|lease| lease.record().addresses.pool_v4 == pool.v4()).count() as u64
            };
            if take || held.is_empty() {
                match leases.lease(pool, &fork(number)) {
                    Ok(lease) => held.push(lease),
                    Err(LeaseError::Exhausted { .. }) => prop_assert_eq!(of_pool(&held), pool.capacity()),
                    Err(error) => return Err(TestCaseError::fail(error.to_string())),
                }
            } else {
                held.swap_remove(which % held.len());
            }
            let addresses: BTreeSet<_> = held.iter().map(|lease| lease.record().addresses.v4).collect();
            prop_assert_eq!(addresses.len(), held.len());
            let recorded: BTreeSet<_> = leases.held().unwrap().into_keys().collect();
            prop_assert_eq!(recorded, addresses);
        }
    }
}
