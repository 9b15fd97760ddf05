//! The verbs, by what they are about.

pub mod create;
pub mod exec;
pub mod files;
pub mod forks;
pub mod forward;
mod jobs;
pub mod templates;
pub mod tokens;
