//! `logs`

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::json;

use super::{Outcome, block_on, connect};
use crate::{
    args::Logs,
    output::{self, Output, clean},
};

pub fn run(args: &Logs, output: &Output) -> Outcome {
    let home = host::Home::from_env()?;
    block_on(async {
        let (_, mut channel) = connect(&home, &args.fork).await?;
        let mut chunks = channel.logs(args.follow).await?;
        let mut last = None;
        while let Some(chunk) = chunks.next().await? {
            let source: String = chunk.source.chars().take(64).collect();
            if output.json {
                output.json_line(&json!({ "source": source, "data_base64": STANDARD.encode(&chunk.data) }))?;
                continue;
            }
            // Whose words follow is said on standard error, so that the log itself stays as it was written.
            if last.as_ref() != Some(&source) {
                output.note(&format!("==> {} <==", clean::line(&source)));
                last = Some(source);
            }
            output::raw(&chunk.data)?;
        }
        Ok(0)
    })
}
