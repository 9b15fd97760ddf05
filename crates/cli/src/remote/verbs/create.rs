//! `fork`: the request as the API takes it.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use host::{ForkRequest, MailboxRequest, NetworkRequest, network::OnFailure};
use hyper::body::Bytes;
use identity::Secret;
use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};
use zeroize::Zeroizing;

use crate::{
    args::Fork,
    commands::{Failures, Outcome, fork as here},
    error::Failure,
    output::{Output, clean},
    remote::{
        client::{Client, list, read},
        problem::Problem,
    },
};

/// What is not secret in a request takes less.
const ROOM: usize = 64 << 10;

#[derive(Debug, Serialize)]
struct Create<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    template: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<&'a str>,
    count: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    labels: &'a BTreeMap<String, String>,
    env: BTreeMap<&'a str, &'a str>,
    secrets: BTreeMap<&'a str, &'a str>,
    files: Vec<File<'a>>,
    mailboxes: Vec<Mailbox<'a>>,
    limits: Limits,
    network: Network,
}

#[derive(Debug, Serialize)]
struct File<'a> {
    path: &'a str,
    content_base64: &'a str,
    mode: String,
}

#[derive(Debug, Serialize)]
struct Mailbox<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<&'a str>,
    payload: &'a RawValue,
    wait_for_ack: bool,
    ack_timeout_ms: u64,
}

#[derive(Debug, Serialize)]
struct Limits {
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_millis: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pids: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Network {
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<String>,
    egress: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    net: Option<String>,
    publish: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_bytes: Option<u64>,
    dns: Vec<String>,
    timeout_ms: u64,
    wait: bool,
    on_failure: &'static str,
}

impl From<&NetworkRequest> for Network {
    fn from(request: &NetworkRequest) -> Self {
        let policy = &request.policy;
        Self {
            mode: request.mode.map(|mode| mode.to_string()),
            egress: policy.egress.to_string(),
            net: policy.net.as_ref().map(ToString::to_string),
            publish: policy.forwards.iter().map(ToString::to_string).collect(),
            rate_bytes: policy.rate.map(net::Rate::bytes_per_second),
            dns: request.dns.iter().flatten().map(ToString::to_string).collect(),
            timeout_ms: u64::try_from(request.timeout.as_millis()).unwrap_or(u64::MAX),
            wait: request.later.is_none(),
            on_failure: match request.later.as_ref().map(|later| later.on_failure) {
                Some(OnFailure::Keep) => "keep",
                Some(OnFailure::Kill) | None => "kill",
            },
        }
    }
}

/// What became of one fork.
#[derive(Debug, Deserialize)]
struct Made {
    index: usize,
    fork: Option<Value>,
    error: Option<Problem>,
}

/// How long the source was held up.
#[derive(Debug, Deserialize)]
struct Pause {
    frozen_micros: u64,
}

#[derive(Debug, Deserialize)]
struct WithNetwork {
    network: Option<Troubled>,
}

#[derive(Debug, Deserialize)]
struct Troubled {
    troubles: Vec<String>,
}

pub async fn fork(args: &Fork, client: &mut Client, output: &Output) -> Outcome {
    let request = here::request(args)?;
    let body = body(args, &request)?;
    let document: Value = client.post_bytes("/v1/forks", body).await?;
    let mut failures = Failures::default();
    let mut made: Vec<Value> = Vec::new();
    for result in list::<Made>(&document, "results")? {
        match (result.fork, result.error) {
            (Some(fork), _) => made.push(fork),
            (None, Some(problem)) => failures.push(format!("fork {}", result.index + 1), problem.into()),
            (None, None) => failures.push(format!("fork {}", result.index + 1), crate::remote::client::ended()),
        }
    }
    if output.json {
        output.document(&document)?;
    } else {
        let rows: Vec<here::Row> = made.iter().map(read).collect::<Result<_, _>>()?;
        if output.quiet {
            rows.iter().try_for_each(|fork| output.line(&clean::line(&fork.name)))?;
        } else if !rows.is_empty() {
            here::print_table(&rows, output)?;
            if let Some(pause) = document.get("source") {
                here::note_pause(read::<Pause>(pause)?.frozen_micros, output);
            }
            let networks: Vec<WithNetwork> = made.iter().map(read).collect::<Result<_, _>>()?;
            let troubles =
                networks.iter().filter_map(|fork| fork.network.as_ref()).flat_map(|network| &network.troubles);
            here::note_troubles(troubles, output);
        }
    }
    failures.finish(request.count, "forks could not be made")?;
    Ok(0)
}

/// The request as JSON, in memory that is wiped.
fn body(args: &Fork, request: &ForkRequest) -> Result<Bytes, Failure> {
    let mut secrets = BTreeMap::new();
    for (name, secret) in &request.secrets {
        secrets.insert(name.as_str(), text("--secret", name.as_str(), secret)?);
    }
    let contents: Vec<_> = request
        .files
        .iter()
        .map(|(path, (content, mode))| (path, Zeroizing::new(STANDARD.encode(content.expose())), *mode))
        .collect();
    let lengths: usize = contents.iter().map(|(path, content, _)| path.len() + content.len()).sum();
    let create = Create {
        template: args.tag.as_ref().map(identity::Tag::as_str),
        from: args.from.as_deref(),
        count: request.count,
        name: request.name.as_ref().map(identity::ForkName::as_str),
        labels: &request.labels,
        env: request.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect(),
        secrets,
        files: contents
            .iter()
            .map(|(path, content, mode)| File { path, content_base64: content, mode: format!("{mode:o}") })
            .collect(),
        mailboxes: request.mailboxes.iter().map(mailbox).collect::<Result<_, _>>()?,
        limits: Limits {
            memory_bytes: request.limits.memory,
            cpu_millis: request.limits.cpu_millis,
            pids: request.limits.pids,
        },
        network: Network::from(&request.network),
    };
    // Room for all of it at once: growing would leave copies behind. A byte can take six as JSON.
    let secrets = request.secrets.values().chain(request.mailboxes.iter().map(|mailbox| &mailbox.payload));
    let room = ROOM + lengths + 6 * secrets.map(|secret| secret.expose().len()).sum::<usize>();
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    serde_json::to_writer(&mut *bytes, &create).map_err(|error| Failure::of("internal", &error))?;
    Ok(Bytes::from_owner(Wiped(bytes)))
}

/// Bytes that are wiped when the last that has them drops them.
struct Wiped(Zeroizing<Vec<u8>>);

impl AsRef<[u8]> for Wiped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn mailbox(request: &MailboxRequest) -> Result<Mailbox<'_>, Failure> {
    let name = request.name.as_str();
    // The message of serde would repeat it.
    let payload = serde_json::from_slice(request.payload.expose()).map_err(|_| {
        Failure::usage(format!("--mailbox {name}: the payload is no JSON object")).with_code("payload_not_an_object")
    })?;
    Ok(Mailbox {
        name,
        token: request.token.as_ref().map(|token| text("--mailbox-token", name, token)).transpose()?,
        payload,
        wait_for_ack: request.wait_ack,
        ack_timeout_ms: u64::try_from(request.ack_timeout.as_millis()).unwrap_or(u64::MAX),
    })
}

/// The API takes secrets as text.
fn text<'a>(option: &str, name: &str, secret: &'a Secret) -> Result<&'a str, Failure> {
    std::str::from_utf8(secret.expose()).map_err(|_| {
        Failure::usage(format!("{option} {name}: over --host it must be UTF-8; encode it, or give it as --file"))
            .with_code("secret_not_text")
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;
    use crate::args::{Cli, Command};

    fn sent(line: &[&str]) -> Result<Value, Failure> {
        let cli = Cli::try_parse_from([&["offshoot", "fork"], line].concat()).unwrap();
        let Command::Fork(args) = cli.command else { panic!("another verb") };
        let body = body(&args, &here::request(&args)?)?;
        Ok(serde_json::from_slice(&body).unwrap())
    }

    #[test]
    fn every_option_is_in_the_request() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"a\xff").unwrap();
        let file = format!("/etc/a=@{}:0600", path.display());
        let request = sent(&[
            "py",
            "-n",
            "2",
            "--name",
            "w",
            "-e",
            "A=1",
            "-l",
            "b=2",
            "--secret",
            "S=env:PATH",
            "--file",
            &file,
            "--mailbox",
            "m={\"x\":1.50}",
            "--mailbox-token",
            "m=env:PATH",
            "--wait-ack",
            "m",
            "--ack-timeout-ms",
            "7",
            "--memory-limit",
            "64M",
            "--cpus",
            "1.5",
            "--pids",
            "9",
            "--network",
            "tap",
            "--egress",
            "10.0.0.0/8",
            "--net",
            "n",
            "--rate",
            "1M",
            "--dns",
            "192.0.2.1",
            "--network-timeout-ms",
            "8",
            "--wait-network=false",
            "--on-network-failure",
            "keep",
        ])
        .unwrap();
        let path = std::env::var("PATH").unwrap();
        assert_eq!(
            request,
            json!({
                "template": "py", "count": 2, "name": "w", "labels": {"b": "2"}, "env": {"A": "1"}, "secrets": {"S": path},
                "files": [{"path": "/etc/a", "content_base64": "Yf8=", "mode": "600"}],
                "mailboxes": [{"name": "m", "token": path, "payload": {"x": 1.5}, "wait_for_ack": true, "ack_timeout_ms": 7}],
                "limits": {"memory_bytes": 64 << 20, "cpu_millis": 1500, "pids": 9},
                "network": {"mode": "tap", "egress": "10.0.0.0/8", "net": "n", "publish": [], "rate_bytes": 1 << 20,
                    "dns": ["192.0.2.1"], "timeout_ms": 8, "wait": false, "on_failure": "keep"},
            })
        );
        let request = sent(&["--from", "w-1", "-p", "8080:80/udp"]).unwrap();
        assert_eq!((&request["from"], &request["network"]["publish"]), (&"w-1".into(), &json!(["8080:80/udp"])));
        assert_eq!(request.get("template"), None);
    }

    #[test]
    fn what_can_not_be_sent_is_a_typed_error_that_does_not_repeat_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"hunter2\xff").unwrap();
        let from_file = format!("S=@{}", path.display());
        for (line, code) in [
            (["py", "--secret", &from_file], "secret_not_text"),
            (["py", "--mailbox", "m={hunter2"], "payload_not_an_object"),
        ] {
            let failure = sent(&line).unwrap_err();
            assert_eq!((failure.code(), failure.exit()), (code, crate::error::USAGE));
            assert!(!failure.to_value().to_string().contains("hunter2"));
        }
    }
}
