//! `fork`

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    time::Duration,
};

use host::{
    ForkRecord, ForkRequest, LimitRequest, MailboxRequest, NetworkRequest,
    branch::{self, Pause},
    engines,
    fork::{self, ForkError},
    forks,
    network::{Later, OnFailure},
    stop,
};
use identity::{MailboxName, Secret};
use net::{Policy, Rate};
use serde::Deserialize;
use serde_json::json;

use super::{Failures, Outcome, failed, open_to_make, pool, templates::Engine};
use crate::{
    args::{self, Fork},
    assignments::{self, AssignmentError},
    error::Failure,
    output::{
        Output, PrintError, clean, format,
        table::{Column, Table},
    },
};

pub fn run(args: &Fork, output: &Output) -> Outcome {
    // Everything about the arguments first: nothing is begun for a request that is not valid.
    let request = request(args)?;
    let (home, store) = open_to_make()?;
    let (results, pause) = match (&args.from, &args.tag) {
        (Some(source), _) => {
            let source = forks::get(&home, source)?;
            let made = branch::fork_from(&home, &store, &source, std::slice::from_ref(&request));
            let made = made.map_err(|(_, error)| failed(error))?;
            (made.forks, made.pause)
        }
        (None, Some(tag)) => {
            let template = store.get(tag)?;
            let engine = engines::for_template(template.manifest())?;
            let results = fork::fork(&home, engine.as_ref(), &template, &request).map_err(failed)?;
            pool::fill_later(&home, tag);
            (results, None)
        }
        (None, None) => unreachable!("clap asks for one of the two"),
    };
    let mut failures = Failures::default();
    let mut made = Vec::new();
    for (index, result) in results.into_iter().enumerate() {
        made.extend(failures.add::<ForkRecord, ForkError>(&format!("fork {}", index + 1), result));
    }
    print(&made, &failures, pause.as_ref(), output)?;
    if let Some(signal) = stop::requested().filter(|_| made.len() < request.count) {
        let message = match made.len() {
            0 => "interrupted; nothing is left behind".into(),
            made => format!(
                "interrupted; made before, and there to stay: {}; nothing else is left behind",
                format::count(made, "fork")
            ),
        };
        return Err(Failure::interrupted(signal, message));
    }
    failures.finish(request.count, "forks could not be made")?;
    Ok(0)
}

fn print(made: &[ForkRecord], failures: &Failures, pause: Option<&Pause>, output: &Output) -> Result<(), PrintError> {
    if output.json {
        let mut document = json!({ "forks": made, "failed": failures.to_json("fork") });
        if let Some(pause) = pause {
            document["source"] = json!(pause);
        }
        return output.document(&document);
    }
    if output.quiet {
        return made.iter().try_for_each(|record| output.line(record.name.as_str()));
    }
    if made.is_empty() {
        return Ok(());
    }
    let rows = made.iter().map(|record| Row {
        name: record.name.to_string(),
        id: record.id.to_string(),
        acked_micros: record.acked_micros,
        engine: Engine { name: record.engine.name.to_string(), accel: record.engine.accel.to_string() },
    });
    print_table(&rows.collect::<Vec<_>>(), output)?;
    if let Some(pause) = pause {
        note_pause(pause.frozen_micros, output);
    }
    let troubles = made.iter().filter_map(|record| record.network.as_ref()).flat_map(|network| &network.troubles);
    note_troubles(troubles, output);
    Ok(())
}

/// What is shown of a fork that was made.
#[derive(Debug, Deserialize)]
pub struct Row {
    pub name: String,
    pub id: String,
    pub acked_micros: u64,
    pub engine: Engine,
}

/// As text.
pub fn print_table(made: &[Row], output: &Output) -> Result<(), PrintError> {
    let mut table = Table::new(&[
        Column::whole("NAME"),
        Column::text("ID"),
        Column::number("MS TO IDENTITY"),
        Column::text("ENGINE"),
    ]);
    for fork in made {
        table.row([fork.name.clone(), fork.id.clone(), format::millis(fork.acked_micros), fork.engine.to_string()]);
    }
    output.table(&table)
}

/// How long the source of a fork was held up.
pub fn note_pause(frozen_micros: u64, output: &Output) {
    output.note(&format!("nothing of the source ran for {} ms", format::millis(frozen_micros)));
}

/// What went wrong on the way to forks' networks.
pub fn note_troubles<'a>(troubles: impl Iterator<Item = &'a String>, output: &Output) {
    // Most are about the host, and the same for all.
    let troubles: BTreeSet<&String> = troubles.collect();
    troubles.into_iter().for_each(|trouble| output.note(&clean::line(trouble)));
}

/// What the arguments ask for.
pub fn request(args: &Fork) -> Result<ForkRequest, AssignmentError> {
    Ok(ForkRequest {
        count: args.count,
        name: args.name.clone(),
        labels: assignments::labels(&args.label)?,
        env: assignments::variables(&args.env)?,
        secrets: assignments::secrets(&args.secret)?,
        files: assignments::files(&args.file)?,
        mailboxes: mailboxes(args)?,
        limits: LimitRequest { memory: args.memory_limit, cpu_millis: args.cpus, pids: args.pids },
        network: network(&args.network)?,
        origin: None,
    })
}

fn network(args: &args::Network) -> Result<NetworkRequest, AssignmentError> {
    let policy = Policy {
        egress: args.egress.clone(),
        net: args.net.clone(),
        forwards: args.publish.clone(),
        rate: args.rate.map(Rate::new).transpose()?,
    };
    policy.check()?;
    let on_failure = match args.on_network_failure {
        args::OnFailureArg::Kill => OnFailure::Kill,
        args::OnFailureArg::Keep => OnFailure::Keep,
    };
    let later = match args.wait_network {
        true => None,
        false => Some(Later { on_failure, program: env::current_exe().map_err(AssignmentError::OwnProgram)? }),
    };
    Ok(NetworkRequest {
        mode: args.network,
        policy,
        dns: (!args.dns.is_empty()).then(|| args.dns.clone()),
        timeout: Duration::from_millis(args.network_timeout_ms),
        later,
    })
}

fn mailboxes(args: &Fork) -> Result<Vec<MailboxRequest>, AssignmentError> {
    let millis =
        u64::try_from(args.ack_timeout_ms).map_err(|_| AssignmentError::NegativeAckTimeout(args.ack_timeout_ms))?;
    let payloads = assignments::payloads(&args.mailbox)?;
    let mut tokens = assignments::tokens(&args.mailbox_token)?;
    let known = |option, name: &MailboxName| match payloads.contains_key(name) {
        true => Ok(()),
        false => Err(AssignmentError::NoPayload { option, name: name.clone() }),
    };
    args.wait_ack.iter().try_for_each(|name| known("--wait-ack", name))?;
    tokens.keys().try_for_each(|name| known("--mailbox-token", name))?;
    Ok(requests(payloads, &mut tokens, &args.wait_ack, Duration::from_millis(millis)))
}

fn requests(
    payloads: BTreeMap<MailboxName, Secret>,
    tokens: &mut BTreeMap<MailboxName, Secret>,
    wait_ack: &[MailboxName],
    ack_timeout: Duration,
) -> Vec<MailboxRequest> {
    let request = |(name, payload): (MailboxName, Secret)| MailboxRequest {
        token: tokens.remove(&name),
        wait_ack: wait_ack.contains(&name),
        name,
        payload,
        ack_timeout,
    };
    payloads.into_iter().map(request).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{
        args::{Cli, Command},
        error::Coded,
    };

    fn parse(line: &[&str]) -> Result<ForkRequest, AssignmentError> {
        let cli = Cli::try_parse_from([&["offshoot", "fork", "py"], line].concat()).unwrap();
        let Command::Fork(args) = cli.command else { panic!("another verb") };
        request(&args)
    }

    #[test]
    fn a_negative_ack_timeout_is_a_typed_error() {
        assert_eq!(parse(&["--ack-timeout-ms", "-1"]).unwrap_err().code(), "negative_ack_timeout");
        assert!(parse(&["--ack-timeout-ms", "0"]).is_ok());
    }

    #[test]
    fn an_ack_or_a_token_needs_a_payload() {
        for option in [["--wait-ack", "app"], ["--mailbox-token", "app=env:PATH"]] {
            assert_eq!(parse(&option).unwrap_err().code(), "mailbox_without_payload");
        }
    }

    #[test]
    fn mailboxes_get_their_own_token_and_wait() {
        let request = parse(&[
            "--mailbox",
            "a={}",
            "--mailbox",
            "b={\"x\":1}",
            "--wait-ack",
            "b",
            "--mailbox-token",
            "a=env:PATH",
            "--ack-timeout-ms",
            "700",
        ])
        .unwrap();
        let [a, b] = request.mailboxes.as_slice() else { panic!("not two") };
        assert!(a.token.is_some() && !a.wait_ack && b.token.is_none() && b.wait_ack);
        assert_eq!(b.ack_timeout, Duration::from_millis(700));
        assert_eq!(b.payload.expose(), b"{\"x\":1}");
    }
}
