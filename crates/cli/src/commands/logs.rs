//! `logs`

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::json;

use super::{Outcome, block_on, connect};
use crate::{
    args::Logs,
    output::{self, Output, PrintError, clean},
};

pub fn run(args: &Logs, output: &Output) -> Outcome {
    let home = host::Home::from_env()?;
    block_on(async {
        let (_, mut channel) = connect(&home, &args.fork).await?;
        let mut chunks = channel.logs(args.follow).await?;
        let mut printer = Printer::new(output);
        while let Some(chunk) = chunks.next().await? {
            printer.print(&chunk.source.chars().take(64).collect::<String>(), &chunk.data)?;
        }
        Ok(0)
    })
}

/// Prints what comes from several sources.
#[derive(Debug)]
pub struct Printer<'a> {
    output: &'a Output,
    last: Option<String>,
}

impl<'a> Printer<'a> {
    pub fn new(output: &'a Output) -> Self {
        Self { output, last: None }
    }

    /// Prints what a source wrote.
    pub fn print(&mut self, source: &str, data: &[u8]) -> Result<(), PrintError> {
        if self.output.json {
            return self.output.json_line(&json!({ "source": source, "data_base64": STANDARD.encode(data) }));
        }
        // Whose words follow is said on standard error, so that the log itself stays as it was written.
        if self.last.as_deref() != Some(source) {
            self.output.note(&format!("==> {} <==", clean::line(source)));
            self.last = Some(source.to_owned());
        }
        output::raw(data)
    }
}
