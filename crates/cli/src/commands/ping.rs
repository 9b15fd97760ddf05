//! `ping`

use std::time::Instant;

use serde_json::json;

use super::{Outcome, block_on, connect};
use crate::{
    args::OfFork,
    error::{FAILED, Failure},
    output::{Output, PrintError, clean, format},
};

pub fn run(args: &OfFork, output: &Output) -> Outcome {
    let home = host::Home::from_env()?;
    let (record, pong, millis) = block_on(async {
        let (record, mut channel) = connect(&home, &args.fork).await?;
        let started = Instant::now();
        let pong = channel.ping().await?;
        Ok((record, pong, started.elapsed().as_secs_f64() * 1e3))
    })?;
    check(record.name.as_str(), record.id.as_str(), &pong.fork_id)?;
    let state: String = pong.state.chars().take(40).collect();
    if output.json {
        output.document(&json!({
            "id": record.id,
            "name": record.name,
            "state": state,
            "round_trip_ms": millis,
            "uptime_ms": pong.uptime_ms,
            "agent_version": pong.agent_version.chars().take(40).collect::<String>(),
            "wall_clock_ns": pong.wall_clock_ns.to_string(),
        }))?;
    } else {
        print(record.name.as_str(), &state, millis, output)?;
    }
    Ok(if state == "running" { 0 } else { FAILED })
}

/// Nothing if the fork is who it should be.
pub fn check(name: &str, id: &str, seen: &str) -> Result<(), Failure> {
    if seen == id {
        return Ok(());
    }
    let seen: String = seen.chars().take(40).collect();
    let failure = Failure::new("wrong_identity", format!("fork {name} says that it is {seen:?}"));
    Err(failure.with_next(format!("offshoot kill {name}")))
}

/// As text.
pub fn print(name: &str, state: &str, millis: f64, output: &Output) -> Result<(), PrintError> {
    let (name, state) = (clean::line(name), clean::line(state));
    output.line(&format!("{name}  {state}, answered in {} ms", format::float_millis(millis)))
}
