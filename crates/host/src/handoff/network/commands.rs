//! The last way to configure a fork's network: the commands that a person would type.

use std::{path::Path, time::Instant};

use identity::Network as Section;

use super::{RECONFIGURE_LIMIT, in_guest};
use crate::guest::{GuestChannel, GuestError};

/// How commands in the guest call the card: the only one that a guest of ours has.
const CARD: &str = "eth0";

/// Runs them in the guest, up to the first that fails, until `deadline` at the latest.
pub(super) fn run(dir: &Path, section: &Section, deadline: Instant) -> Result<(), GuestError> {
    in_guest(deadline, async {
        let mut guest = GuestChannel::connect(dir, RECONFIGURE_LIMIT).await?;
        for command in commands(section) {
            let text = command.join(" ");
            let result = guest.run_command(command, RECONFIGURE_LIMIT).await?;
            if result.code != 0 {
                return Err(GuestError::Refused(format!("`{text}` ended with {}", result.code)));
            }
        }
        Ok(())
    })
}

/// The section as commands that iproute2 and busybox know, each as its arguments: no shell reads them.
fn commands(section: &Section) -> Vec<Vec<String>> {
    let mut lines = vec![
        format!("ip link set dev {CARD} down"),
        format!("ip link set dev {CARD} address {}", section.mac),
        format!("ip link set dev {CARD} mtu {}", section.mtu),
        format!("ip link set dev {CARD} up"),
    ];
    if let Some(inet) = &section.ipv4 {
        lines.push(format!("ip addr replace {}/{} dev {CARD}", inet.address, inet.prefix));
        if let Some(gateway) = inet.gateway {
            lines.push(format!("ip route replace {gateway} dev {CARD}"));
            lines.push(format!("ip route replace default via {gateway} dev {CARD}"));
        }
    }
    // Taking the card down took this too. That nobody else has the address is asked for a second; busybox can not leave that out.
    if let Some(inet) = &section.ipv6 {
        lines.push(format!("ip -6 addr replace {}/{} dev {CARD}", inet.address, inet.prefix));
        if let Some(gateway) = inet.gateway {
            lines.push(format!("ip -6 route replace {gateway} dev {CARD}"));
            lines.push(format!("ip -6 route replace default via {gateway} dev {CARD}"));
        }
    }
    lines.iter().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
}
