//! What is found and removed afterwards, and what is never touched.

use std::collections::BTreeSet;

use super::rig::{TAP, fork, in_a_world_alone};
use crate::{Leftover, Policy, named_net, namespace, record};

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
        let lease = network.leases.lease(&crate::Pool::default(), &fork(2)).unwrap();
        assert!(!network.inventory().unwrap().leftovers(&BTreeSet::new()).contains(&Leftover::Link(fork(2))));
        drop(lease);
        // Removing what is not there, or not there any more, is fine.
        network.remove(&fork(1)).unwrap();
        network.remove(&fork(3)).unwrap();
        assert_eq!(world.everything(&network), before);
    });
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
