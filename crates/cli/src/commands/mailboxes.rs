//! `mailboxes`

use serde_json::json;

use super::{Outcome, open};
use crate::{
    args::OfTemplate,
    output::{
        Output, clean, format,
        table::{Column, Table},
    },
};

pub fn run(args: &OfTemplate, output: &Output) -> Outcome {
    let (_, store) = open()?;
    let template = store.get(&args.tag)?;
    let manifest = template.manifest();
    let mailboxes = || manifest.mailboxes.iter().filter(|mailbox| !mailbox.name.is_reserved());
    if output.json {
        let mailboxes: Vec<_> = mailboxes()
            .map(|mailbox| {
                json!({
                    "name": mailbox.name,
                    "capacity": mailbox.capacity,
                    "planted_by": mailbox.planted_by,
                    "needs_token": !mailbox.token.is_empty(),
                })
            })
            .collect();
        let ambiguous: Vec<_> = manifest
            .ambiguous
            .iter()
            .map(|mailbox| json!({ "name": mailbox.name, "reason": clean::line(&mailbox.reason) }))
            .collect();
        output.document(&json!({ "tag": manifest.tag, "mailboxes": mailboxes, "ambiguous": ambiguous }))?;
        return Ok(0);
    }
    let mut table = Table::new(&[
        Column::whole("MAILBOX"),
        Column::number("CAPACITY"),
        Column::text("PLANTED BY"),
        Column::text("TOKEN"),
    ]);
    for mailbox in mailboxes() {
        let planted_by = match mailbox.planted_by {
            memory::PlantedBy::Agent => "agent",
            memory::PlantedBy::Socket => "a program, through the agent",
            memory::PlantedBy::SelfPlanted => "a program, by itself",
        };
        let token = if mailbox.token.is_empty() { "none" } else { "needed (--mailbox-token)" };
        table.row([mailbox.name.as_str(), &format::bytes(mailbox.capacity as u64), planted_by, token]);
    }
    if table.is_empty() {
        output.note("no mailboxes: no program in this template planted one");
    } else {
        output.table(&table)?;
    }
    for mailbox in &manifest.ambiguous {
        output.note(&format!("warning: {} can not be written to: {}", mailbox.name, clean::line(&mailbox.reason)));
    }
    Ok(0)
}
