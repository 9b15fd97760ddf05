//! `exec`: a command in a fork, with its streams, its terminal and its exit code.

pub mod sink;

use std::io::{self, IsTerminal};

use host::guest::{Control, ExecOptions, ExecResult, GuestError};
use serde_json::json;
use tokio::{io::Stdin, sync::mpsc};

use self::sink::{Heard, Sink, Stream};
use super::{Outcome, block_on, connect};
use crate::{
    args::Exec,
    assignments,
    error::{EXEC_FAILED, Failure, TIMED_OUT},
    output::{Output, PrintError},
    signals::{Caught, Signals},
    terminal::{self, RawMode},
};

/// Signals and sizes on their way to the guest.
const QUEUE: usize = 8;
/// So many signals without a sign of life in between end offshoot itself, if the guest does not react.
const PATIENCE: u32 = 3;
/// What shells show for a command that can not be executed, and for one that is not there.
const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;

pub fn run(args: &Exec, output: &Output) -> Outcome {
    check(args, output)?;
    let options = options(args)?;
    let home = host::Home::from_env().map_err(own)?;
    let exec = async {
        let (_, mut channel) = connect(&home, &args.fork).await?;
        let run = async |streams: Streams| {
            let Streams { stdin, stdout, stderr, controls } = streams;
            channel.exec(options, stdin, stdout, stderr, controls).await.map_err(from_guest)
        };
        drive(args, run, output).await
    };
    block_on(exec).map_err(own)
}

/// What a command is connected to.
#[derive(Debug)]
pub struct Streams {
    pub stdin: Option<Stdin>,
    pub stdout: Sink,
    pub stderr: Sink,
    pub controls: mpsc::Receiver<Control>,
}

/// What excludes each other.
pub fn check(args: &Exec, output: &Output) -> Result<(), Failure> {
    match args.tty && output.json {
        true => Err(Failure::usage("--json and -t exclude each other: a terminal's output is for people")),
        false => Ok(()),
    }
}

/// A failure of offshoot's, unless the command itself is to blame (126, 127).
pub fn own(error: impl Into<Failure>) -> Failure {
    let failure = error.into();
    let exit = failure.exit().max(EXEC_FAILED);
    failure.with_exit(exit)
}

/// What the arguments ask for.
pub fn options(args: &Exec) -> Result<ExecOptions, Failure> {
    let env = assignments::variables(&args.env)?;
    Ok(ExecOptions {
        argv: args.command.clone(),
        env: env.into_iter().map(|(name, value)| (name.to_string(), value)).collect(),
        workdir: args.workdir.clone().unwrap_or_default(),
        user: args.user.clone().unwrap_or_default(),
        terminal: args.tty.then(terminal::size),
        timeout: args.timeout,
    })
}

/// Runs a command with this process' streams, terminal and signals.
pub async fn drive(
    args: &Exec,
    run: impl AsyncFnOnce(Streams) -> Result<ExecResult, Failure>,
    output: &Output,
) -> Outcome {
    let broken = |error: io::Error| Failure::of("terminal_failed", &error);
    let mut signals = Signals::new().map_err(broken)?;
    // Only now, so that errors before are shown in a sane terminal.
    let raw = args.tty && args.interactive && io::stdin().is_terminal();
    let _raw_mode = raw.then(|| RawMode::enter(io::stdin())).transpose().map_err(broken)?;

    let heard = Heard::default();
    let (controls, receiver) = mpsc::channel(QUEUE);
    let stdin = args.interactive.then(tokio::io::stdin);
    let stdout = Sink::new(Stream::Stdout, output.json, &heard);
    let stderr = Sink::new(Stream::Stderr, output.json, &heard);
    let running = run(Streams { stdin, stdout, stderr, controls: receiver });
    tokio::pin!(running);
    let mut unanswered = 0;
    loop {
        tokio::select! {
            result = &mut running => return finish(&result?, output),
            caught = signals.next() => match caught {
                Caught::Resize if args.tty => {
                    let (rows, columns) = terminal::size();
                    let _ = controls.try_send(Control::Resize(rows, columns));
                }
                Caught::Resize => {}
                Caught::Number(number) => {
                    unanswered = if heard.take() { 1 } else { unanswered + 1 };
                    // With a terminal the keys go to the fork themselves: a signal is meant for us. The terminal is
                    // restored on the way out, and the guest ends the command when the channel closes.
                    if raw || unanswered >= PATIENCE {
                        return Ok(exit_code(128 + number));
                    }
                    let _ = controls.try_send(Control::Signal(number));
                }
            },
        }
    }
}

/// A reader of our output that went away is no failure of the guest.
fn from_guest(error: GuestError) -> Failure {
    match error {
        GuestError::Local(source) if source.kind() == io::ErrorKind::BrokenPipe => PrintError::from(source).into(),
        error => error.into(),
    }
}

fn finish(result: &ExecResult, output: &Output) -> Outcome {
    if let Some(reason) = &result.error {
        let failure = Failure::new("command_not_started", format!("the command could not be started: {reason}"));
        let blames_command = matches!(result.code, NOT_EXECUTABLE | NOT_FOUND);
        return Err(failure.with_exit(if blames_command { exit_code(result.code) } else { EXEC_FAILED }));
    }
    if output.json {
        output.json_line(&json!({ "exit": { "code": result.code, "timed_out": result.timed_out } }))?;
    }
    if result.timed_out {
        output.note("the command ran into its --timeout and was ended");
        return Ok(TIMED_OUT);
    }
    Ok(exit_code(result.code))
}

/// What a parent sees of an exit code: eight bits. What can not be one is our failure.
fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(EXEC_FAILED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: i32, timed_out: bool, error: &str) -> u8 {
        let error = (!error.is_empty()).then(|| error.to_owned());
        finish(&ExecResult { code, timed_out, error }, &Output::new(false, true))
            .unwrap_or_else(|failure| failure.exit())
    }

    #[test]
    fn the_exit_code_is_the_commands_unless_offshoot_failed() {
        assert_eq!(exit(0, false, ""), 0);
        assert_eq!(exit(42, false, ""), 42);
        assert_eq!(exit(137, true, ""), TIMED_OUT);
        assert_eq!(exit(127, false, "no such file"), 127);
        assert_eq!(exit(0, false, "no such user"), EXEC_FAILED);
        assert_eq!(exit(-1, false, ""), EXEC_FAILED);
        assert_eq!(exit(300, false, ""), EXEC_FAILED);
    }
}
