//! `mailboxes`

use memory::PlantedBy;
use serde::Deserialize;
use serde_json::json;

use super::{Outcome, open};
use crate::{
    args::OfTemplate,
    output::{
        Output, PrintError, clean, format,
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
    let row = |mailbox: &memory::Mailbox| Row {
        name: mailbox.name.to_string(),
        capacity: mailbox.capacity as u64,
        planted_by: mailbox.planted_by,
        needs_token: !mailbox.token.is_empty(),
    };
    let ambiguous = manifest
        .ambiguous
        .iter()
        .map(|mailbox| Ambiguous { name: mailbox.name.to_string(), reason: mailbox.reason.clone() });
    print(&mailboxes().map(row).collect::<Vec<_>>(), &ambiguous.collect::<Vec<_>>(), output)?;
    Ok(0)
}

/// What is shown of a mailbox.
#[derive(Debug, Deserialize)]
pub struct Row {
    pub name: String,
    pub capacity: u64,
    pub planted_by: PlantedBy,
    pub needs_token: bool,
}

/// One that can not be addressed.
#[derive(Debug, Deserialize)]
pub struct Ambiguous {
    pub name: String,
    pub reason: String,
}

/// As text.
pub fn print(mailboxes: &[Row], ambiguous: &[Ambiguous], output: &Output) -> Result<(), PrintError> {
    let mut table = Table::new(&[
        Column::whole("MAILBOX"),
        Column::number("CAPACITY"),
        Column::text("PLANTED BY"),
        Column::text("TOKEN"),
    ]);
    for mailbox in mailboxes {
        let planted_by = match mailbox.planted_by {
            PlantedBy::Agent => "agent",
            PlantedBy::Socket => "a program, through the agent",
            PlantedBy::SelfPlanted => "a program, by itself",
        };
        let token = if mailbox.needs_token { "needed (--mailbox-token)" } else { "none" };
        table.row([mailbox.name.as_str(), &format::bytes(mailbox.capacity), planted_by, token]);
    }
    if table.is_empty() {
        output.note("no mailboxes: no program in this template planted one");
    } else {
        output.table(&table)?;
    }
    for Ambiguous { name, reason } in ambiguous {
        output.note(&format!("warning: {} can not be written to: {}", clean::line(name), clean::line(reason)));
    }
    Ok(())
}
