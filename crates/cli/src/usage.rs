//! Arguments that can not be parsed: clap's text for people, the error object for programs.

use std::{ffi::OsString, process::ExitCode};

use clap::error::ErrorKind;

use crate::{
    error::{Failure, USAGE},
    output::style::Style,
};

/// Reports what clap found; help and version are no errors.
pub fn report(error: &clap::Error, arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let is_help = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    // Nothing was parsed: whether `--json` was among the options has to be seen by ourselves.
    let json = arguments.into_iter().take_while(|argument| argument != "--").any(|argument| argument == "--json");
    if json && !is_help {
        failure(error).report(true, Style::PLAIN);
    } else {
        // Nobody is left to tell if the output is closed.
        let _ = error.print();
    }
    ExitCode::from(if is_help { 0 } else { USAGE })
}

fn failure(error: &clap::Error) -> Failure {
    let text = error.to_string();
    // The first paragraph is the error; the rest is the usage.
    let first = text.split("\n\n").next().unwrap_or_default();
    let message = first.trim().trim_start_matches("error: ");
    let code = match error.kind() {
        ErrorKind::ValueValidation | ErrorKind::InvalidValue => "invalid_value",
        ErrorKind::UnknownArgument => "unknown_argument",
        ErrorKind::InvalidSubcommand | ErrorKind::MissingSubcommand => "unknown_command",
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "unknown_command",
        ErrorKind::MissingRequiredArgument => "missing_argument",
        ErrorKind::ArgumentConflict => "argument_conflict",
        _ => "usage",
    };
    let message = if code == "unknown_command" && message.contains('\n') { "no command was given" } else { message };
    Failure::new(code, message).with_exit(USAGE).with_next("offshoot --help")
}
