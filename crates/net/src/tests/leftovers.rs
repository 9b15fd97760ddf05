//! What is found and removed afterwards, and what is never touched.

use std::{
    collections::BTreeSet,
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
    thread,
};

use super::rig::{TAP, fork, in_a_world_alone};
use crate::{DEFAULT_PAUSE, Leftover, Network, Policy, Pool, fault::STEPS, named_net, namespace, record};

fn owners(numbers: &[u32]) -> BTreeSet<identity::ForkId> {
    numbers.iter().map(|&number| fork(number)).collect()
}

#[test]
fn o3_only_what_no_owner_needs_is_a_leftover_and_looking_changes_nothing() {
    in_a_world_alone(
        "tests::leftovers::o3_only_what_no_owner_needs_is_a_leftover_and_looking_changes_nothing",
        |world| {
            let network = world.network();
            let _ = network.prepare(&fork(1), TAP).unwrap().open(Policy::default()).unwrap().keep();
            let _ = network.prepare(&fork(2), TAP).unwrap().keep();
            let in_work = network.prepare(&fork(3), TAP).unwrap();
            let before = world.everything(&network);
            let found = network.inventory().unwrap();
            assert_eq!(found.links, owners(&[1, 2, 3]));
            assert_eq!(found.namespaces, owners(&[1, 2, 3]));
            assert_eq!(found.in_work, owners(&[3]));
            assert_eq!((found.wires.len(), found.leases.len(), found.table), (3, 3, true));
            assert_eq!(found.leftovers(&owners(&[1, 2])), BTreeSet::new());
            let leftovers = found.leftovers(&owners(&[1]));
            assert_eq!(leftovers, [Leftover::Link(fork(2))].into());
            assert_eq!(world.everything(&network), before);

            for leftover in &leftovers {
                network.remove_leftover(leftover).unwrap();
            }
            assert_eq!(network.inventory().unwrap().links, owners(&[1, 3]));
            drop(in_work);
            let leftovers = network.inventory().unwrap().leftovers(&BTreeSet::new());
            assert_eq!(leftovers, [Leftover::Link(fork(1)), Leftover::Table].into());
            for leftover in &leftovers {
                network.remove_leftover(leftover).unwrap();
            }
            let nothing = network.inventory().unwrap();
            assert_eq!((nothing.links, nothing.wires, nothing.table), (BTreeSet::new(), BTreeSet::new(), false));
        },
    );
}

#[test]
fn o3_what_another_home_made_is_not_ours_as_long_as_that_home_is_there() {
    in_a_world_alone(
        "tests::leftovers::o3_what_another_home_made_is_not_ours_as_long_as_that_home_is_there",
        |world| {
            let (own, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let network = world.network().for_home(own.path());
            let other = world.network().for_home(home.path());
            let _ = other.prepare(&fork(1), TAP).unwrap().keep();
            let _ = network.prepare(&fork(2), TAP).unwrap().keep();
            let leftovers = |network: &Network| network.inventory().unwrap().leftovers(&BTreeSet::new());
            assert_eq!(leftovers(&network), [Leftover::Link(fork(2))].into());
            assert_eq!(leftovers(&other), [Leftover::Link(fork(1))].into(), "and the other way round");
            drop(home);
            assert_eq!(leftovers(&network), [Leftover::Link(fork(1)), Leftover::Link(fork(2)), Leftover::Table].into());
        },
    );
}

#[test]
fn o3_what_a_crash_left_half_made_is_removed() {
    in_a_world_alone("tests::leftovers::o3_what_a_crash_left_half_made_is_removed", |world| {
        let network = world.network();
        drop(network.prepare(&fork(1), TAP).unwrap());
        let before = world.everything(&network);
        // Without its record, or with one that is torn, all names are still known.
        for torn in [None, Some("{")] {
            let _ = network.prepare(&fork(1), TAP).unwrap().keep();
            let path = record::path(&network.state, &fork(1));
            match torn {
                None => std::fs::remove_file(&path).unwrap(),
                Some(text) => std::fs::write(&path, text).unwrap(),
            }
            let leftovers = network.inventory().unwrap().leftovers(&BTreeSet::new());
            assert!(leftovers.contains(&Leftover::Link(fork(1))), "{torn:?}");
            network.remove(&fork(1)).unwrap();
            assert_eq!(world.everything(&network), before, "{torn:?}");
        }
        // A lease alone may be one that is just being recorded.
        let lease = network.leases.lease(&Pool::default(), &fork(2)).unwrap();
        assert!(!network.inventory().unwrap().leftovers(&BTreeSet::new()).contains(&Leftover::Link(fork(2))));
        drop(lease);
        // Removing what is not there, or not there any more, is fine.
        network.remove(&fork(1)).unwrap();
        network.remove(&fork(3)).unwrap();
        assert_eq!(world.everything(&network), before);
    });
}

const KILLED: &str = "OFFSHOOT_TEST_KILLED";

/// The part of the process that is killed in the test below. By itself it does nothing.
#[test]
fn as_a_process_that_is_killed() {
    if let Some(dir) = std::env::var_os(KILLED) {
        let network = Network::open(dir.as_ref(), Pool::default(), DEFAULT_PAUSE).unwrap();
        let policy = Policy {
            net: Some("web".parse().unwrap()),
            forwards: vec!["8080:80".parse().unwrap()],
            ..Policy::default()
        };
        let _ = network.prepare(&fork(2), TAP).unwrap().open(policy).unwrap().keep();
    }
}

const AT_ONCE: &str = "OFFSHOOT_TEST_LINKS";

/// Links for the forks from `first` on, each made and opened in a thread of its own.
fn link_at_once(network: &Network, first: u32, count: u32) {
    thread::scope(|scope| {
        for number in first..first + count {
            scope.spawn(move || {
                let policy = Policy {
                    net: Some(format!("net-{}", number % 5).parse().unwrap()),
                    forwards: vec![format!("{}:80", 9000 + number).parse().unwrap()],
                    ..Policy::default()
                };
                let _ = network.prepare(&fork(number), TAP).unwrap().open(policy).unwrap().keep();
            });
        }
    });
}

/// The part of another process in the test below. By itself it does nothing.
#[test]
fn as_a_process_that_makes_links() {
    if let Ok(value) = std::env::var(AT_ONCE) {
        let (first, dir) = value.split_once(' ').unwrap();
        let network = Network::open(dir.as_ref(), Pool::default(), DEFAULT_PAUSE).unwrap();
        link_at_once(&network, first.parse().unwrap(), 16);
    }
}

#[test]
fn i11_sixty_four_links_made_at_once_by_four_processes_do_not_collide_and_go_at_once() {
    in_a_world_alone(
        "tests::leftovers::i11_sixty_four_links_made_at_once_by_four_processes_do_not_collide_and_go_at_once",
        |world| {
            let network = world.network();
            drop(network.prepare(&fork(100), TAP).unwrap());
            let before = world.everything(&network);
            let other = |first: u32| {
                let mut process = Command::new(std::env::current_exe().unwrap());
                process.args(["--exact", "tests::leftovers::as_a_process_that_makes_links"]);
                process.env(AT_ONCE, format!("{first} {}", world.path("net").display()));
                process.stdout(Stdio::null()).spawn().unwrap()
            };
            let others = [0, 16, 32].map(other);
            link_at_once(&network, 48, 16);
            for mut other in others {
                assert!(other.wait().unwrap().success());
            }
            let all: Vec<u32> = (0..64).collect();
            let found = network.inventory().unwrap();
            assert_eq!((found.links.clone(), found.namespaces), (owners(&all), owners(&all)));
            assert_eq!((found.wires.len(), found.leases.len(), found.in_work.len()), (64, 64, 0));
            let records: Vec<_> = found.links.iter().map(|id| network.read(id).unwrap().addresses).collect();
            let macs: BTreeSet<_> = records.iter().map(|addresses| addresses.mac.octets()).collect();
            let v4: BTreeSet<_> = records.iter().map(|addresses| addresses.v4).collect();
            assert_eq!((macs.len(), v4.len()), (64, 64));
            // Each is whole: its tap can be opened, which an open link's can once.
            let taps: Vec<_> = all.iter().map(|&number| network.tap(&fork(number)).unwrap()).collect();
            drop(taps);
            thread::scope(|scope| {
                for &number in &all {
                    let network = &network;
                    scope.spawn(move || network.remove(&fork(number)).unwrap());
                }
            });
            assert_eq!(world.everything(&network), before);
        },
    );
}

#[test]
fn o2_what_a_process_leaves_that_is_killed_after_any_step_is_found_and_removed() {
    in_a_world_alone(
        "tests::leftovers::o2_what_a_process_leaves_that_is_killed_after_any_step_is_found_and_removed",
        |world| {
            let network = world.network();
            drop(network.prepare(&fork(1), TAP).unwrap());
            let before = world.everything(&network);
            for step in STEPS {
                let mut process = Command::new(std::env::current_exe().unwrap());
                process.args(["--exact", "tests::leftovers::as_a_process_that_is_killed"]);
                process.env(KILLED, world.path("net")).env("OFFSHOOT_FAULT", format!("{step}:kill"));
                let status = process.stdout(Stdio::null()).status().unwrap();
                assert_eq!(status.signal(), Some(9), "{step}");
                assert_ne!(world.everything(&network), before, "{step}");
                let found = network.inventory().unwrap();
                assert!(found.in_work.is_empty(), "{step}");
                // A lease alone is left for a while: see the test above.
                let left = found.leftovers(&BTreeSet::new());
                assert_eq!(left.contains(&Leftover::Link(fork(2))), step != "net.lease", "{step}");
                network.remove_leftover(&Leftover::Link(fork(2))).unwrap();
                assert_eq!(world.everything(&network), before, "{step}");
            }
        },
    );
}

#[test]
fn o3_links_and_namespaces_of_others_are_safe_whatever_their_names() {
    in_a_world_alone("tests::leftovers::o3_links_and_namespaces_of_others_are_safe_whatever_their_names", |world| {
        let network = world.network();
        let _ = network.prepare(&fork(1), TAP).unwrap().keep();
        let wire = record::wire(&fork(1));
        let near = format!("{}x", &wire[..wire.len() - 1]);
        world.stranger(&near, 0);
        world.stranger("offshoot0", 0);
        // The very name a fork's wire would have, but not a group of ours.
        let taken = record::wire(&fork(2));
        world.stranger(&taken, 7);
        // A group of ours, and no record.
        world.stranger("ofs", named_net::group(0));
        let foreign = network.state.namespaces().join("my-namespace");
        namespace::make(&foreign, || Ok::<_, std::io::Error>(())).unwrap();

        assert!(network.prepare(&fork(2), TAP).is_err(), "its wire's name is taken");
        let leftovers = network.inventory().unwrap().leftovers(&BTreeSet::new());
        assert_eq!(leftovers, [Leftover::Link(fork(1)), Leftover::Table].into());
        for leftover in &leftovers {
            network.remove_leftover(leftover).unwrap();
        }
        network.remove(&fork(2)).unwrap();
        let left = format!("{:?}", world.everything(&network));
        for name in [near.as_str(), "offshoot0", &taken, "ofs"] {
            assert!(left.contains(&format!("{name:?}")), "{name}: {left}");
        }
        assert!(!left.contains(&wire), "{left}");
        namespace::within(&foreign, || Ok::<_, std::io::Error>(())).unwrap();
        namespace::unmake(&foreign).unwrap();
    });
}
