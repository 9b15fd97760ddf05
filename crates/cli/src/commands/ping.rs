//! `ping`

use std::time::Instant;

use serde_json::json;

use super::{Outcome, block_on, connect};
use crate::{
    args::OfFork,
    error::{FAILED, Failure},
    output::{Output, clean, format},
};

pub fn run(args: &OfFork, output: &Output) -> Outcome {
    let home = host::Home::from_env()?;
    let (record, pong, millis) = block_on(async {
        let (record, mut channel) = connect(&home, &args.fork).await?;
        let started = Instant::now();
        let pong = channel.ping().await?;
        Ok((record, pong, started.elapsed().as_secs_f64() * 1e3))
    })?;
    if pong.fork_id != record.id.as_str() {
        let seen: String = pong.fork_id.chars().take(40).collect();
        return Err(Failure::new("wrong_identity", format!("fork {} says that it is {seen:?}", record.name))
            .with_next(format!("offshoot kill {}", record.name)));
    }
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
        let (millis, state) = (format::float_millis(millis), clean::line(&state));
        output.line(&format!("{}  {state}, answered in {millis} ms", record.name))?;
    }
    Ok(if state == "running" { 0 } else { FAILED })
}
