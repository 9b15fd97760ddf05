//! `eval`

use std::io::{self, IsTerminal, Read, Write};

use serde_json::json;

use super::{Outcome, block_on, connect};
use crate::{
    args::Eval,
    error::Failure,
    output::{self, Output, clean},
};

/// Most bytes of code: the bridge takes lines of 4 MiB, and a byte can take six there.
const MAX_CODE: u64 = 512 << 10;

pub fn run(args: &Eval, output: &Output) -> Outcome {
    let code = code(args)?;
    let home = host::Home::from_env()?;
    let reply = block_on(async {
        let (_, mut channel) = connect(&home, &args.fork).await?;
        Ok(channel.eval(&code, args.timeout).await?)
    })?;
    if !output.json {
        // What the code printed goes out as it is, but not to a terminal.
        let shown = |text: &str, terminal| if terminal { clean::text(text) } else { text.to_owned() };
        output::raw(shown(&reply.stdout, io::stdout().is_terminal()).as_bytes())?;
        let _ = io::stderr().write_all(shown(&reply.stderr, io::stderr().is_terminal()).as_bytes());
    }
    if let Some(error) = reply.error {
        let code = match error.kind.as_str() {
            "exception" => "exception",
            "timeout" => "eval_timeout",
            "runtime-died" => "runtime_died",
            "no-runtime" => "no_runtime",
            "too-large" => "too_large",
            _ => "eval_failed",
        };
        if output.json {
            output.document(&json!({
                "stdout": reply.stdout,
                "stderr": reply.stderr,
                "exception": { "kind": error.kind, "message": error.message, "stack": error.stack },
            }))?;
        }
        let stack = clean::text(error.stack.trim_end());
        let failure = Failure::new(code, error.message);
        return Err(if stack.is_empty() { failure } else { failure.with_causes([stack]) });
    }
    if output.json {
        // The value may hold NaN and Infinity, which are no JSON: then it is text for whoever can read it.
        let value: Option<serde_json::Value> = serde_json::from_str(&reply.value_json).ok();
        output.document(&json!({
            "value": value,
            "value_text": reply.value_json,
            "repr": reply.repr,
            "stdout": reply.stdout,
            "stderr": reply.stderr,
        }))?;
    } else if reply.repr != "None" && !reply.repr.is_empty() {
        output.line(&clean::text(&reply.repr))?;
    }
    Ok(0)
}

fn code(args: &Eval) -> Result<String, Failure> {
    match (args.source.as_deref(), args.code.as_slice()) {
        (Some("-"), _) => {
            let mut code = String::new();
            io::stdin()
                .take(MAX_CODE + 1)
                .read_to_string(&mut code)
                .map_err(|error| Failure::of("standard_input", &error))?;
            if code.len() as u64 > MAX_CODE {
                return Err(Failure::usage(
                    "the code is longer than 512 KiB; copy it with `offshoot cp` and import it",
                ));
            }
            Ok(code)
        }
        (Some(code), _) => Ok(code.to_owned()),
        (None, []) => Err(Failure::usage("no code was given; give it after --, or - to read it from standard input")),
        (None, words) => Ok(words.join(" ")),
    }
}
