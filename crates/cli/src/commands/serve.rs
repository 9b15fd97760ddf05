//! `serve`

use std::{env, io, io::IsTerminal, thread, time::Duration};

use api::{Config, Listen, TlsFiles};
use host::{Home, stop};
use tokio::signal::unix::SignalKind;
use tracing_subscriber::EnvFilter;

use super::Outcome;
use crate::{args::Serve, error::Failure, output::Output, signals::Signals};

/// Time for what is unfinished at the end to be undone.
const UNDO_LIMIT: Duration = Duration::from_secs(30);

pub fn run(args: &Serve, output: &Output) -> Outcome {
    let home = Home::from_env()?;
    log(output.json);
    let config = Config {
        socket: args.socket.clone().unwrap_or_else(|| api::socket_path(&home)),
        socket_mode: args.socket_mode,
        socket_scope: args.socket_scope,
        listen: args.listen.map(|address| Listen {
            address,
            tls: args
                .tls_cert
                .clone()
                .zip(args.tls_key.clone())
                .map(|(certificate, key)| TlsFiles { certificate, key }),
        }),
        rate: args.rate,
        recipes: args.recipes.clone(),
        program: env::current_exe().map_err(|error| Failure::of("internal", &error))?,
        grace: args.grace,
        home: home.clone(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::of("runtime", &error))?;
    let served = runtime.block_on(async {
        let mut signals = Signals::new().map_err(|error| Failure::of("runtime", &error))?;
        let end = async move {
            let number = signals.end().await;
            tracing::info!(signal = number, "asked to end");
        };
        api::serve(config, end, |what| output.note(what)).await.map_err(Failure::from)
    });
    // What is still being made is undone; forks that are made live on.
    stop::request(SignalKind::terminate().as_raw_value());
    let undoing = thread::spawn(move || stop::end_unfinished(&home, UNDO_LIMIT));
    runtime.shutdown_timeout(UNDO_LIMIT);
    drop(undoing);
    served.map(|()| 0)
}

/// Lines for people on a terminal, JSON for programs. `RUST_LOG` says how much.
fn log(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let set = if json || !io::stderr().is_terminal() {
        builder.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init()
    } else {
        builder.with_ansi(env::var_os("NO_COLOR").is_none()).with_target(false).try_init()
    };
    // There is no other.
    drop(set);
}
