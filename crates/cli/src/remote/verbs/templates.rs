//! Templates: built, listed, verified, removed; and their pools.

use std::time::Instant;

use identity::Tag;
use serde_json::{Value, json};

use super::jobs::{Job, follow};
use crate::{
    args::{Build, EngineArg, OfTemplate, Pool, Rmi, Verify},
    commands::{
        Outcome, build as here, mailboxes as mailboxes_here, pool as pool_here, rmi, templates, verify as verify_here,
    },
    error::{FAILED, Failure},
    output::{Output, progress::Reporter},
    remote::{
        client::{Client, list as read_list, part, read},
        problem::Problem,
    },
};

pub async fn build(args: &Build, client: &mut Client, output: &Output) -> Outcome {
    if Tag::parse(&args.recipe).is_err() {
        let message = "a daemon builds recipes by name only (python, browser, busybox, or one of its own): it never reads a path that a client names";
        return Err(Failure::usage(message)
            .with_code("recipe_by_name")
            .with_next("offshoot serve --recipes DIR, on the daemon's machine"));
    }
    if args.kernel.is_some() || args.accel.is_some() {
        return Err(Failure::usage("--kernel and --accel are about the machine that builds; build there to use them"));
    }
    let mut body = json!({ "recipe": args.recipe, "tag": args.tag });
    let engine = args.engine.map(|engine| match engine {
        EngineArg::Kvm => "kvm",
        EngineArg::Qemu => "qemu",
    });
    let fields = [("memory_bytes", json!(args.memory)), ("vcpus", json!(args.vcpus)), ("engine", json!(engine))];
    for (field, value) in fields.into_iter().filter(|(_, value)| !value.is_null()) {
        body[field] = value;
    }
    if args.strict {
        // A daemon of an older version refuses it, as it must: it would not look.
        body["strict"] = json!(true);
    }
    let begun = Instant::now();
    let job: Job = client.post("/v1/templates", &body).await?;
    let mut reporter = Reporter::new(output);
    let built = follow(client, &job, &mut reporter).await;
    drop(reporter);
    let built = built?;
    if output.json {
        output.document(&built)?;
    } else {
        here::print(&read(&built)?, u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX), output)?;
    }
    Ok(0)
}

pub async fn list(client: &mut Client, output: &Output) -> Outcome {
    let all: Value = client.get("/v1/templates").await?;
    if output.json {
        output.document(&all)?;
    } else {
        let broken: Vec<Problem> = read_list(&all, "broken")?;
        let broken: Vec<Failure> = broken.into_iter().map(Failure::from).collect();
        templates::print(&read_list::<templates::Row>(&all, "templates")?, &broken, output)?;
    }
    Ok(0)
}

pub async fn remove(args: &Rmi, client: &mut Client, output: &Output) -> Outcome {
    client.delete(&format!("/v1/templates/{}", part(args.tag.as_str()))).await?;
    rmi::print(&args.tag, output)?;
    Ok(0)
}

pub async fn mailboxes(args: &OfTemplate, client: &mut Client, output: &Output) -> Outcome {
    let all: Value = client.get(&format!("/v1/templates/{}/mailboxes", part(args.tag.as_str()))).await?;
    if output.json {
        output.document(&all)?;
    } else {
        mailboxes_here::print(
            &read_list::<mailboxes_here::Row>(&all, "mailboxes")?,
            &read_list::<mailboxes_here::Ambiguous>(&all, "ambiguous")?,
            output,
        )?;
    }
    Ok(0)
}

pub async fn verify(args: &Verify, client: &mut Client, output: &Output) -> Outcome {
    let path = format!("/v1/templates/{}/verify", part(args.tag.as_str()));
    let job: Job = client.post(&path, &json!({ "count": args.count })).await?;
    let mut reporter = Reporter::new(output);
    let verdict = follow(client, &job, &mut reporter).await;
    drop(reporter);
    let document = verdict?;
    let verdict: host::verify::Verdict = read(&document)?;
    if output.json {
        output.document(&document)?;
    } else {
        verify_here::print(&verdict, output)?;
    }
    Ok(if verdict.passed { 0 } else { FAILED })
}

pub async fn pool(args: &Pool, client: &mut Client, output: &Output) -> Outcome {
    let mut all: Value = match (&args.tag, args.size) {
        (Some(tag), Some(size)) => {
            let mut body = json!({ "size": size });
            if let Some(network) = args.network {
                body["network"] = json!(network.to_string());
            }
            client.put(&format!("/v1/pools/{}", part(tag.as_str())), &body).await?
        }
        (Some(tag), None) => {
            // That there is such a template is asked as well.
            let _: Value = client.get(&format!("/v1/templates/{}", part(tag.as_str()))).await?;
            client.get("/v1/pools").await?
        }
        (None, _) => client.get("/v1/pools").await?,
    };
    if let (Some(tag), Some(pools)) = (&args.tag, all["pools"].as_array_mut()) {
        pools.retain(|pool| pool["template"] == tag.as_str());
    }
    if output.json {
        output.document(&all)?;
    } else {
        pool_here::print_table(&read_list::<pool_here::Row>(&all, "pools")?, output)?;
    }
    Ok(0)
}
