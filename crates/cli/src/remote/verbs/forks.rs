//! Forks: listed, asked, moved, ended.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    args::{Eval, Forks, Kill, Logs, OfFork},
    commands::{
        Failures, Outcome, eval as eval_here, kill as kill_here, logs as logs_here, ls, ping as ping_here,
        standby as standby_here,
    },
    error::{FAILED, Failure},
    output::Output,
    remote::{
        client::{Client, ended, list as read_list, part, read},
        events::Events,
        problem::Problem,
    },
};

/// Forks of one page.
const PAGE: usize = 1000;

/// A fork, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Fork {
    id: String,
    name: String,
    state: String,
    template: String,
    created_ms: u64,
    labels: BTreeMap<String, String>,
    ipv4: Option<String>,
    standby: Option<Standby>,
    private_bytes: Option<u64>,
    shared_bytes: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Standby {
    disk_bytes: u64,
}

impl From<Fork> for ls::Row {
    fn from(fork: Fork) -> Self {
        Self {
            name: fork.name,
            id: fork.id,
            template: fork.template,
            // What the API calls running, `ls` has always called alive.
            state: if fork.state == "running" { "alive".into() } else { fork.state },
            address: fork.ipv4,
            created_ms: fork.created_ms,
            memory: fork.private_bytes.zip(fork.shared_bytes),
            labels: fork.labels,
        }
    }
}

fn path(fork: &str) -> String {
    format!("/v1/forks/{}", part(fork))
}

/// All forks, however many pages they fill.
async fn all(client: &mut Client) -> Result<Value, Failure> {
    let mut forks: Vec<Value> = Vec::new();
    let mut after = String::new();
    loop {
        let mut page: Value = client.get(&format!("/v1/forks?limit={PAGE}{after}")).await?;
        forks.extend(read_list::<Value>(&page, "forks")?);
        match page["next"].as_str() {
            Some(next) => after = format!("&after={}", part(next)),
            None => {
                page["forks"] = json!(forks);
                return Ok(page);
            }
        }
    }
}

pub async fn list(client: &mut Client, output: &Output) -> Outcome {
    let all = all(client).await?;
    if output.json {
        output.document(&all)?;
    } else {
        let rows: Vec<ls::Row> = read_list::<Fork>(&all, "forks")?.into_iter().map(ls::Row::from).collect();
        ls::print(&rows, output)?;
    }
    Ok(0)
}

pub async fn inspect(args: &OfFork, client: &mut Client, output: &Output) -> Outcome {
    let fork: Value = client.get(&path(&args.fork)).await?;
    output.document(&fork)?;
    Ok(0)
}

pub async fn kill(args: &Kill, client: &mut Client, output: &Output) -> Outcome {
    let mut failures = Failures::default();
    let mut forks: Vec<Fork> = Vec::new();
    let asked = if args.all {
        forks = read_list(&all(client).await?, "forks")?;
        forks.len()
    } else {
        for wanted in &args.forks {
            match client.get::<Fork>(&path(wanted)).await {
                // The same fork by name and by id is one fork.
                Ok(fork) if forks.iter().any(|other| other.id == fork.id) => {}
                Ok(fork) => forks.push(fork),
                Err(failure) => failures.push(wanted, failure),
            }
        }
        args.forks.len()
    };
    let mut killed = Vec::new();
    for fork in forks {
        match client.delete(&path(&fork.id)).await {
            Ok(()) => killed.push(fork),
            Err(failure) => failures.push(fork.name, failure),
        }
    }
    if output.json {
        let killed: Vec<Value> = killed
            .iter()
            .map(|fork| json!({ "id": fork.id, "name": fork.name, "was_alive": fork.state != "dead" }))
            .collect();
        output.document(&json!({ "killed": killed, "failed": failures.to_json("fork") }))?;
    } else {
        killed.iter().try_for_each(|fork| kill_here::print(&fork.name, fork.state != "dead", output))?;
        if args.all && asked == 0 {
            output.note("no forks");
        }
    }
    failures.finish(asked, "forks could not be removed")?;
    Ok(0)
}

pub async fn standby(args: &Forks, client: &mut Client, output: &Output) -> Outcome {
    each(args, client, output, "standby", "standby").await
}

pub async fn resume(args: &Forks, client: &mut Client, output: &Output) -> Outcome {
    each(args, client, output, "resume", "resumed").await
}

async fn each(args: &Forks, client: &mut Client, output: &Output, verb: &str, done: &str) -> Outcome {
    let mut failures = Failures::default();
    let mut moved: Vec<Value> = Vec::new();
    for wanted in &args.forks {
        let one = async {
            let fork: Fork = client.get(&path(wanted)).await?;
            // The same fork by name and by id is one fork.
            if moved.iter().any(|other| other["fork"]["id"] == fork.id.as_str()) {
                return Ok(None);
            }
            client.post::<Value>(&format!("{}/{verb}", path(&fork.id)), &json!({})).await.map(Some)
        };
        match one.await {
            Ok(one) => moved.extend(one),
            Err(failure) => failures.push(wanted, failure),
        }
    }
    if output.json {
        output.document(&json!({ "forks": moved, "failed": failures.to_json("fork") }))?;
    } else {
        for one in &moved {
            let fork: Fork = read(&one["fork"])?;
            let micros = one["micros"].as_u64().unwrap_or_default();
            let disk_bytes = fork.standby.map(|standby| standby.disk_bytes);
            standby_here::print(&fork.name, done, micros, disk_bytes, output)?;
        }
    }
    failures.finish(args.forks.len(), "forks could not be moved")?;
    Ok(0)
}

/// How a fork is.
#[derive(Debug, Deserialize)]
struct Pong {
    fork: String,
    state: String,
    micros: u64,
}

pub async fn ping(args: &OfFork, client: &mut Client, output: &Output) -> Outcome {
    let fork: Fork = client.get(&path(&args.fork)).await?;
    let document: Value = client.post(&format!("{}/ping", path(&fork.id)), &json!({})).await?;
    let pong: Pong = read(&document)?;
    ping_here::check(&fork.name, &fork.id, &pong.fork)?;
    if output.json {
        output.document(&document)?;
    } else {
        #[allow(clippy::cast_precision_loss)] // A ping takes no years.
        ping_here::print(&fork.name, &pong.state, pong.micros as f64 / 1e3, output)?;
    }
    Ok(if pong.state == "running" { 0 } else { FAILED })
}

pub async fn eval(args: &Eval, client: &mut Client, output: &Output) -> Outcome {
    let millis = u64::try_from(args.timeout.as_millis()).unwrap_or(u64::MAX);
    let body = json!({ "code": eval_here::code(args)?, "timeout_ms": millis });
    let document: Value = client.post(&format!("{}/eval", path(&args.fork)), &body).await?;
    eval_here::report(read(&document)?, &document, output)
}

/// What somebody in a fork wrote.
#[derive(Debug, Deserialize)]
struct Chunk {
    source: String,
    data_base64: String,
}

pub async fn logs(args: &Logs, client: &mut Client, output: &Output) -> Outcome {
    let follow = if args.follow { "?follow=true" } else { "" };
    let mut events = Events::of(client.download(&format!("{}/logs{follow}", path(&args.fork))).await?);
    let mut printer = logs_here::Printer::new(output);
    while let Some(event) = events.next().await? {
        let data: Value = serde_json::from_str(&event.data).unwrap_or_default();
        match event.kind.as_str() {
            "log" => {
                let chunk: Chunk = read(&data)?;
                let bytes = STANDARD.decode(&chunk.data_base64);
                printer.print(&chunk.source, &bytes.map_err(|error| Failure::of("host_answer", &error))?)?;
            }
            "end" => return Ok(0),
            "error" => return Err(read::<Problem>(&data)?.into()),
            _ => {}
        }
    }
    Err(ended())
}
