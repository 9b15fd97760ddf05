//! `route`: HTTP and WebSocket by host name to forks.

use std::time::Duration;

use host::Home;
use route::{Access, Config, Log, Router};
use serde_json::json;

use super::Outcome;
use crate::{
    args::Route,
    error::Failure,
    output::{Output, clean},
    signals::Signals,
};

/// Time for what is still under way when the grace is over.
const END_LIMIT: Duration = Duration::from_secs(1);

pub fn run(args: Route, output: &Output) -> Outcome {
    let home = Home::from_env()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::of("runtime", &error))?;
    let routed = runtime.block_on(serve(args, home, output));
    runtime.shutdown_timeout(END_LIMIT);
    routed
}

async fn serve(args: Route, home: Home, output: &Output) -> Outcome {
    let mut signals = Signals::new().map_err(|error| Failure::of("runtime", &error))?;
    let config = Config {
        home,
        listen: args.listen,
        allow_remote: args.allow_remote,
        suffix: args.suffix.clone(),
        port: args.port,
        hold: args.hold,
        answer_timeout: Some(args.answer_timeout).filter(|limit| !limit.is_zero()),
        max_connections: usize::try_from(args.max_connections).unwrap_or(usize::MAX),
        grace: args.grace,
    };
    let router = Router::bind(config, args.log.then(|| log(*output))).await?;
    let address = router.address().map_err(|error| Failure::of("runtime", &error))?;
    if output.json {
        output.json_line(
            &json!({ "listening": address.to_string(), "suffix": args.suffix.as_str(), "port": args.port }),
        )?;
    } else {
        output.line(&format!(
            "{address}: http://NAME.{}:{} -> port {} of fork NAME",
            args.suffix,
            address.port(),
            args.port
        ))?;
    }
    output.note("Ctrl-C ends it");
    let (asked, ask) = tokio::sync::oneshot::channel();
    let serving = router.serve(async { drop(ask.await) });
    tokio::pin!(serving);
    tokio::select! {
        () = &mut serving => return Ok(0),
        _ = signals.end() => {}
    }
    let _ = asked.send(());
    // Whoever asks again does not want to wait.
    tokio::select! {
        () = serving => {}
        _ = signals.end() => {}
    }
    Ok(0)
}

fn log(output: Output) -> Log {
    Box::new(move |access| {
        // Nobody is left to tell if standard output is closed.
        let _ = if output.json { output.json_line(access) } else { output.line(&line(access)) };
    })
}

fn line(access: &Access) -> String {
    let to = match (&access.fork, access.port) {
        (Some(fork), Some(port)) => format!("{fork}:{port}"),
        _ => "-".into(),
    };
    format!(
        "{} {} {}{} {to} {} {} {:.1} ms",
        access.client,
        clean::line(&access.method),
        clean::line(&access.host),
        clean::line(&access.path),
        access.status,
        access.code.unwrap_or("-"),
        Duration::from_micros(access.micros).as_secs_f64() * 1000.0
    )
}
