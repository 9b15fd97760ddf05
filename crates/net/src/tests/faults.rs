//! Every step fails in turn, and nothing is left.

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::rig::{TAP, fork, in_a_world_alone};
use crate::{
    LinkError, Policy, Rate,
    fault::{STEPS, tests::fail_at},
    namespace,
    netlink::{Socket, link},
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
