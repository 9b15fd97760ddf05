//! Every step fails in turn, and nothing is left.

use std::time::{Duration, Instant};

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::rig::{TAP, fork, in_a_world_alone};
use crate::{
    Forward, LinkError, Policy, Protocol, Rate,
    fault::{
        STEPS,
        tests::{fail_at, meanwhile},
    },
    host_table, namespace,
    netlink::{Socket, link},
    nft::Transaction,
    ports::Taken,
    record,
};

/// A policy that needs every step.
fn full() -> Policy {
    Policy {
        net: Some("web".parse().unwrap()),
        forwards: vec!["8080:80".parse().unwrap(), "8080:80/udp".parse().unwrap()],
        rate: Some(Rate::new(1 << 20).unwrap()),
        ..Policy::default()
    }
}

#[test]
fn every_step_that_fails_leaves_no_namespace_wire_lease_port_net_or_record() {
    in_a_world_alone(
        "tests::faults::every_step_that_fails_leaves_no_namespace_wire_lease_port_net_or_record",
        |world| {
            let network = world.network();
            // A link that stays shows that only the failed one's parts go.
            let other = Policy { net: full().net, ..Policy::default() };
            let _other = network.prepare(&fork(1), TAP).unwrap().open(other).unwrap();
            let before = world.everything(&network);
            for step in STEPS {
                fail_at(Some(step));
                let failed = network.prepare(&fork(2), TAP).and_then(|link| link.open(full()));
                fail_at(None);
                let error = failed.expect_err(step);
                assert!(matches!(error, LinkError::Step { .. }), "{step}: {error}");
                assert_eq!(world.everything(&network), before, "{step}");
            }
            // The check sees what is left, and without a fault there is no error.
            let link = network.prepare(&fork(2), TAP).unwrap().open(full()).unwrap();
            assert_ne!(world.everything(&network), before);
            drop(link);
            assert_eq!(world.everything(&network), before);
        },
    );
}

#[test]
fn a_link_that_was_prepared_and_is_dropped_leaves_nothing_also_with_its_tap_open() {
    in_a_world_alone(
        "tests::faults::a_link_that_was_prepared_and_is_dropped_leaves_nothing_also_with_its_tap_open",
        |world| {
            let network = world.network();
            drop(network.prepare(&fork(1), TAP).unwrap());
            let before = world.everything(&network);
            let link = network.prepare(&fork(1), TAP).unwrap();
            let (tap, acks) = (link.tap().unwrap(), link.ack_socket().unwrap());
            assert!(
                matches!(link.tap(), Err(LinkError::Step { source, .. }) if source.kind() == std::io::ErrorKind::ResourceBusy)
            );
            assert!(link.ack_socket().is_err(), "there is one socket for acknowledgements");
            drop(link);
            drop((tap, acks));
            assert_eq!(world.everything(&network), before);
        },
    );
}

#[test]
fn a_missing_right_is_named() {
    in_a_world_alone("tests::faults::a_missing_right_is_named", |world| {
        let network = world.network();
        drop(network.prepare(&fork(1), TAP).unwrap());
        let before = world.everything(&network);
        for (missing, name) in
            [(CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN"), (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN")]
        {
            let all = capabilities(None).unwrap();
            let without = |set: CapabilitySet| set.difference(missing);
            set_capabilities(None, CapabilitySets { effective: without(all.effective), ..all }).unwrap();
            assert_eq!(crate::missing_capability(), Some(name));
            let error = network.prepare(&fork(1), TAP).unwrap_err();
            // Undoing needs the right too, where something was made.
            set_capabilities(None, all).unwrap();
            assert!(matches!(&error, LinkError::Denied { capability, .. } if *capability == name), "{error}");
            assert!(error.to_string().contains("run as root"), "{error}");
            network.remove(&fork(1)).unwrap();
            assert_eq!(world.everything(&network), before, "{name}");
        }
    });
}

#[test]
fn a_link_is_made_once_and_worked_on_by_one() {
    in_a_world_alone("tests::faults::a_link_is_made_once_and_worked_on_by_one", |world| {
        let network = world.network();
        let link = network.prepare(&fork(1), TAP).unwrap();
        assert!(matches!(network.prepare(&fork(1), TAP), Err(LinkError::Busy(_))));
        assert!(matches!(network.remove(&fork(1)), Err(LinkError::Busy(_))));
        let record = link.keep();
        assert!(matches!(network.prepare(&fork(1), TAP), Err(LinkError::Exists(_))));
        assert!(matches!(network.adopt_open(&fork(1)), Err(LinkError::Closed(_))));
        assert!(matches!(network.adopt(&fork(2)), Err(LinkError::Absent(_))));
        // Another process goes on where the first stopped.
        let again = world.network().adopt(&fork(1)).unwrap();
        assert_eq!(*again.record(), record);
        let _ = again.open(Policy::default()).unwrap().keep();
        assert!(matches!(network.adopt(&fork(1)), Err(LinkError::Exists(_))));
        drop(network.adopt_open(&fork(1)).unwrap());
        assert!(matches!(network.read(&fork(1)), Err(LinkError::Absent(_))));
    });
}

#[test]
fn a_link_that_somebody_is_about_to_let_go_is_waited_for() {
    in_a_world_alone("tests::faults::a_link_that_somebody_is_about_to_let_go_is_waited_for", |world| {
        let network = world.network();
        for remove in [false, true] {
            let link = network.prepare(&fork(1), TAP).unwrap();
            std::thread::scope(|scope| {
                let holder = scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(300));
                    link.keep()
                });
                let started = Instant::now();
                if remove {
                    network.remove(&fork(1)).unwrap();
                } else {
                    drop(network.adopt(&fork(1)).unwrap());
                }
                assert!(started.elapsed() >= Duration::from_millis(250), "it was held");
                holder.join().unwrap();
            });
            assert!(matches!(network.read(&fork(1)), Err(LinkError::Absent(_))));
        }
    });
}

#[test]
fn a_link_without_its_record_gives_up_its_ports_and_its_net_too() {
    in_a_world_alone("tests::faults::a_link_without_its_record_gives_up_its_ports_and_its_net_too", |world| {
        let network = world.network();
        // Another fork's stay, also where nobody can say what the first one had.
        let other = Policy {
            net: Some("db".parse().unwrap()),
            forwards: vec!["8081:80".parse().unwrap()],
            ..Policy::default()
        };
        let _other = network.prepare(&fork(1), TAP).unwrap().open(other).unwrap();
        let before = world.everything(&network);
        for torn in [None, Some("{")] {
            let _ = network.prepare(&fork(2), TAP).unwrap().open(full()).unwrap().keep();
            let path = record::path(&network.state, &fork(2));
            match torn {
                None => std::fs::remove_file(&path).unwrap(),
                Some(text) => std::fs::write(&path, text).unwrap(),
            }
            network.remove(&fork(2)).unwrap();
            assert_eq!(world.everything(&network), before, "{torn:?}");
        }
        drop(network.prepare(&fork(3), TAP).unwrap().open(full()).unwrap());
    });
}

#[test]
fn a_link_that_is_opened_while_somebody_flushes_the_hosts_rules_has_them_all_the_same() {
    in_a_world_alone(
        "tests::faults::a_link_that_is_opened_while_somebody_flushes_the_hosts_rules_has_them_all_the_same",
        |world| {
            let network = world.network();
            let link = network.prepare(&fork(1), TAP).unwrap();
            meanwhile("net.shared", || host_table::remove().unwrap());
            let _link = link.open(full()).unwrap();
            assert!(host_table::is_there().unwrap());
            // What is flushed later is seen, and restored as long as a link needs it.
            assert!(!network.restore_rules().unwrap());
            host_table::remove().unwrap();
            assert!(!network.inventory().unwrap().table);
            assert!(network.restore_rules().unwrap() && network.inventory().unwrap().table);
            network.remove(&fork(1)).unwrap_err();
            host_table::remove().unwrap();
            drop(_link);
            assert!(!network.restore_rules().unwrap(), "nobody needs them");
        },
    );
}

#[test]
fn more_rules_than_a_sockets_buffer_holds_are_one_transaction() {
    in_a_world_alone("tests::faults::more_rules_than_a_sockets_buffer_holds_are_one_transaction", |_| {
        host_table::make_empty().unwrap();
        let mut table = Transaction::default();
        for host in 1..=8000 {
            let forward = Forward { protocol: Protocol::Tcp, host, guest: 80 };
            let (v4, v6) = (std::net::Ipv4Addr::new(10, 0, 0, 1), Some(std::net::Ipv6Addr::LOCALHOST));
            host_table::add_port(&mut table, &Taken { owner: fork(1), forward, v4, v6 });
        }
        table.commit().unwrap();
    });
}

#[test]
fn a_link_whose_wire_or_namespace_is_gone_is_not_opened_and_what_is_left_of_it_goes() {
    in_a_world_alone(
        "tests::faults::a_link_whose_wire_or_namespace_is_gone_is_not_opened_and_what_is_left_of_it_goes",
        |world| {
            let network = world.network();
            drop(network.prepare(&fork(1), TAP).unwrap());
            let before = world.everything(&network);
            let link = network.prepare(&fork(1), TAP).unwrap();
            let mut host = Socket::route().unwrap();
            let wire = host.index_of(&link.record().wire()).unwrap();
            host.carry_out(vec![link::delete(wire)]).unwrap();
            drop(host);
            let error = link.open(Policy::default()).unwrap_err();
            assert!(error.to_string().contains("the wire"), "{error}");
            assert_eq!(world.everything(&network), before);

            let link = network.prepare(&fork(1), TAP).unwrap();
            namespace::unmake(&link.record().namespace(&network.state)).unwrap();
            link.open(Policy::default()).unwrap_err();
            assert_eq!(world.everything(&network), before);
        },
    );
}
