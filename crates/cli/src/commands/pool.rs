//! `pool`, and the filling up after a fork took from one.

use std::{
    env, io,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use host::{
    engines,
    network::Mode,
    pool::{self, Pool},
};
use identity::Tag;
use serde::Deserialize;
use serde_json::json;

use super::{Outcome, failed, open, open_to_make};
use crate::{
    args,
    output::{
        Output, PrintError, format,
        table::{Column, Table},
    },
};

/// What a process that fills a pool may know of its caller's environment, which may hold secrets.
const VARIABLES: [&str; 12] = [
    "PATH",
    "HOME",
    "OFFSHOOT_DATA_DIR",
    "OFFSHOOT_STATE_DIR",
    "OFFSHOOT_CACHE_DIR",
    "OFFSHOOT_VMM",
    "OFFSHOOT_NETWORK_DIR",
    "OFFSHOOT_NETWORK_POOL",
    "XDG_DATA_HOME",
    "XDG_STATE_HOME",
    "XDG_CACHE_HOME",
    "XDG_RUNTIME_DIR",
];

pub fn run(args: &args::Pool, output: &Output) -> Outcome {
    if args.fill {
        return fill(args);
    }
    let Some(tag) = &args.tag else {
        let (home, _) = open()?;
        print(&pool::list(&home)?, output)?;
        return Ok(0);
    };
    let (home, store) = open_to_make()?;
    if args.size == Some(0) {
        pool::end(&home, tag)?;
    } else if let Some(size) = args.size {
        let template = store.get(tag)?;
        let engine = engines::for_template(template.manifest())?;
        let network = args.network.unwrap_or_else(Mode::default_here);
        pool::set_size(&home, tag, size, network)?;
        pool::fill(&home, engine.as_ref(), &template, true).map_err(failed)?;
    } else {
        let _ = store.get(tag)?;
    }
    let pools: Vec<_> = pool::list(&home)?.into_iter().filter(|pool| pool.template == *tag).collect();
    print(&pools, output)?;
    Ok(0)
}

/// In a process of its own: see [`fill_later`]. It ends early if another one fills the same pool.
fn fill(args: &args::Pool) -> Outcome {
    let (home, store) = open_to_make()?;
    if let Some(tag) = &args.tag {
        let template = store.get(tag)?;
        let engine = engines::for_template(template.manifest())?;
        pool::fill(&home, engine.as_ref(), &template, false)?;
    }
    Ok(0)
}

/// Starts a process that fills the template's pool, and does not wait for it. Without a pool nothing is started; what goes
/// wrong is no concern of a fork that was made.
pub(super) fn fill_later(home: &host::Home, tag: &Tag) {
    if pool::size(home, tag) == 0 {
        return;
    }
    let start = || -> io::Result<()> {
        let mut command = Command::new(env::current_exe()?);
        command.args(["pool", tag.as_str(), "--fill"]).env_clear().current_dir("/");
        command.envs(VARIABLES.iter().filter_map(|name| Some((name, env::var_os(name)?))));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // Out of this terminal's reach: the keys that interrupt a command are not meant for it.
        command.process_group(0);
        command.spawn().map(drop)
    };
    let _ = start();
}

fn print(pools: &[Pool], output: &Output) -> Result<(), PrintError> {
    if output.json {
        return output.document(&json!({ "pools": pools }));
    }
    let row = |pool: &Pool| Row {
        template: pool.template.to_string(),
        network: pool.network.to_string(),
        size: pool.size,
        ready: pool.ready,
        private_bytes: pool.private_bytes,
    };
    print_table(&pools.iter().map(row).collect::<Vec<_>>(), output)
}

/// What is shown of a pool.
#[derive(Debug, Deserialize)]
pub struct Row {
    pub template: String,
    pub network: String,
    pub size: usize,
    pub ready: usize,
    pub private_bytes: u64,
}

/// As text.
pub fn print_table(pools: &[Row], output: &Output) -> Result<(), PrintError> {
    if pools.is_empty() {
        output.note("no spare machines; `offshoot pool TAG 4` keeps four ready");
        return Ok(());
    }
    let mut table = Table::new(&[
        Column::whole("TEMPLATE"),
        Column::text("NETWORK"),
        Column::number("SIZE"),
        Column::number("READY"),
        Column::number("PRIVATE"),
    ]);
    for pool in pools {
        table.row([
            pool.template.clone(),
            pool.network.clone(),
            pool.size.to_string(),
            pool.ready.to_string(),
            format::bytes(pool.private_bytes),
        ]);
    }
    output.table(&table)
}
