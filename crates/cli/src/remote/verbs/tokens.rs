//! Tokens, and what answers.

use serde_json::{Value, json};

use crate::{
    args::{Token, TokenVerb},
    commands::{Outcome, token as here},
    output::{Output, clean},
    remote::client::{Client, list, part},
};

pub async fn token(args: &Token, client: &mut Client, output: &Output) -> Outcome {
    match &args.verb {
        TokenVerb::Create(args) => {
            let mut body = json!({ "name": args.name, "scope": args.scope });
            if let Some(expires) = args.expires {
                body["expires_s"] = json!(expires.as_secs());
            }
            let made: Value = client.post("/v1/tokens", &body).await?;
            if output.json {
                output.document(&made)?;
            } else {
                here::print_made(&clean::line(made["token"].as_str().unwrap_or_default()), output)?;
            }
        }
        TokenVerb::Ls => {
            let all: Value = client.get("/v1/tokens").await?;
            if output.json {
                output.document(&all)?;
            } else {
                here::print(&list::<api::TokenInfo>(&all, "tokens")?, output)?;
            }
        }
        TokenVerb::Rm(args) => {
            client.delete(&format!("/v1/tokens/{}", part(&args.id))).await?;
            here::print_removed(&args.id, output)?;
        }
    }
    Ok(0)
}

pub async fn version(client: &mut Client, output: &Output) -> Outcome {
    let there: Value = client.get("/v1/version").await?;
    if output.json {
        output.document(&there)?;
    } else {
        let text = |field: &str| clean::line(there[field].as_str().unwrap_or("unknown"));
        output.line(&format!("offshoot {}", env!("CARGO_PKG_VERSION")))?;
        output.line(&format!("daemon   {}, API {}", text("version"), text("api")))?;
    }
    Ok(0)
}
