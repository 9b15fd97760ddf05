//! `eval`

use std::io::{self, IsTerminal, Read, Write};

use serde::{Deserialize, Serialize};
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
    let exception = reply.error.map(|error| Exception { kind: error.kind, message: error.message, stack: error.stack });
    // The value may hold NaN and Infinity, which are no JSON: then it is text for whoever can read it.
    let value: Option<serde_json::Value> = serde_json::from_str(&reply.value_json).ok();
    let evaluated = Evaluated { repr: reply.repr, stdout: reply.stdout, stderr: reply.stderr, exception };
    let document = match &evaluated.exception {
        Some(exception) => {
            json!({ "stdout": evaluated.stdout, "stderr": evaluated.stderr, "exception": exception })
        }
        None => json!({
            "value": value,
            "value_text": reply.value_json,
            "repr": evaluated.repr,
            "stdout": evaluated.stdout,
            "stderr": evaluated.stderr,
        }),
    };
    report(evaluated, &document, output)
}

/// What became of code.
#[derive(Debug, Deserialize)]
pub struct Evaluated {
    pub repr: String,
    pub stdout: String,
    pub stderr: String,
    pub exception: Option<Exception>,
}

/// What code raised.
#[derive(Debug, Serialize, Deserialize)]
pub struct Exception {
    pub kind: String,
    pub message: String,
    pub stack: String,
}

/// Prints it; `document` is the whole of it. That code raised something is a failure.
pub fn report(evaluated: Evaluated, document: &serde_json::Value, output: &Output) -> Outcome {
    if output.json {
        output.document(document)?;
    } else {
        // What the code printed goes out as it is, but not to a terminal.
        let shown = |text: &str, terminal| if terminal { clean::text(text) } else { text.to_owned() };
        output::raw(shown(&evaluated.stdout, io::stdout().is_terminal()).as_bytes())?;
        let _ = io::stderr().write_all(shown(&evaluated.stderr, io::stderr().is_terminal()).as_bytes());
    }
    if let Some(error) = evaluated.exception {
        let code = match error.kind.as_str() {
            "exception" => "exception",
            "timeout" => "eval_timeout",
            "runtime-died" => "runtime_died",
            "no-runtime" => "no_runtime",
            "too-large" => "too_large",
            _ => "eval_failed",
        };
        let stack = clean::text(error.stack.trim_end());
        let failure = Failure::new(code, error.message);
        return Err(if stack.is_empty() { failure } else { failure.with_causes([stack]) });
    }
    if !output.json && evaluated.repr != "None" && !evaluated.repr.is_empty() {
        output.line(&clean::text(&evaluated.repr))?;
    }
    Ok(0)
}

/// The code that the arguments give.
pub fn code(args: &Eval) -> Result<String, Failure> {
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
