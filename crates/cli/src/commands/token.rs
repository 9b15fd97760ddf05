//! `token`

use api::{TokenInfo, Tokens};
use host::Home;
use serde_json::json;

use super::Outcome;
use crate::{
    args::{Token, TokenVerb},
    output::{
        Output, PrintError, clean, format,
        table::{Column, Table},
    },
};

pub fn run(args: &Token, output: &Output) -> Outcome {
    let tokens = Tokens::open(&Home::from_env()?.data)?;
    match &args.verb {
        TokenVerb::Create(args) => {
            let made = tokens.create(&args.name, args.scope, args.expires)?;
            // The one place where it is shown: whoever made it has to have it.
            let text = String::from_utf8_lossy(made.token.expose()).into_owned();
            if output.json {
                let mut value = json!(made.info);
                value["token"] = json!(text);
                output.document(&value)?;
            } else {
                print_made(&text, output)?;
            }
        }
        TokenVerb::Ls => {
            let tokens = tokens.list()?;
            if output.json {
                output.document(&json!({ "tokens": tokens }))?;
            } else {
                print(&tokens, output)?;
            }
        }
        TokenVerb::Rm(args) => {
            tokens.remove(&args.id)?;
            print_removed(&args.id, output)?;
        }
    }
    Ok(0)
}

/// A new token, as text.
pub fn print_made(token: &str, output: &Output) -> Result<(), PrintError> {
    output.line(token)?;
    output
        .note("it is not shown again; a client sends it as: Authorization: Bearer TOKEN, or has it in OFFSHOOT_TOKEN");
    Ok(())
}

/// That it is gone.
pub fn print_removed(id: &str, output: &Output) -> Result<(), PrintError> {
    if output.json {
        return output.document(&json!({ "removed": id }));
    }
    output.note(&format!("token {} is good for nothing any more", clean::line(id)));
    Ok(())
}

/// As text.
pub fn print(tokens: &[TokenInfo], output: &Output) -> Result<(), PrintError> {
    if tokens.is_empty() {
        output.note("no tokens; make one with `offshoot token create NAME --scope fork`");
        return Ok(());
    }
    let mut table = Table::new(&[
        Column::whole("ID"),
        Column::text("NAME"),
        Column::text("SCOPE"),
        Column::number("AGE"),
        Column::text("EXPIRES"),
    ]);
    for token in tokens {
        table.row([
            token.id.clone(),
            clean::line(&token.name),
            token.scope.to_string(),
            format::age(token.created_ms),
            token.expires_ms.map_or_else(|| "never".to_owned(), format::until),
        ]);
    }
    output.table(&table)
}
