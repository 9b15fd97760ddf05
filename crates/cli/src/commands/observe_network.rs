//! `observe-network`: what waits for a fork's network after `fork --wait-network=false`. Nobody types it.

use std::io;

use host::{
    Home,
    handoff::network::observer::{Task, observe},
};

use super::Outcome;
use crate::error::Failure;

pub fn run() -> Outcome {
    let task = Task::read(io::stdin()).map_err(|error| Failure::of("internal", &error))?;
    if let Some(task) = task {
        observe(&Home::from_env()?, &task)?;
    }
    Ok(0)
}
