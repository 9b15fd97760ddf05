//! Forks: made, listed, asked, ended.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use host::{
    ForkRecord, ForkRequest, Home, branch, codes::Coded, engines, fork::ForkError, forks as host_forks, pool,
    standby::StandbyError,
};
use identity::Tag;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use store::Store;
use utoipa::{IntoParams, ToSchema};
use zeroize::Zeroizing;

use super::{answer, block, connect, find};
use crate::{
    App,
    auth::{Forker, Reader},
    extract::{self, Asked, At, Body},
    jobs::interrupted,
    keys::{Answer, Claim, Key},
    model::{
        create::{Child, CreateForks, Source},
        view::{Fork, Pause, State as Life, Summary},
    },
    problem::{self, Problem},
    watch::{self, state_now},
};

/// Most forks of one page.
const MAX_PAGE: usize = 1000;
/// Longest time that code may take.
const MAX_EVAL: u64 = 24 * 3600 * 1000;
/// Most bytes of code: the bridge takes lines of 4 MiB, and a byte can take six there.
const MAX_CODE: usize = 512 << 10;

/// How long after a fork its template's pool is filled up again.
const REFILL_AFTER: Duration = Duration::from_millis(20);
/// The code of what was made and undone.
const UNDONE: &str = "undone";

/// What became of one fork of a request: it is there, or why not.
#[derive(Debug, Serialize, ToSchema)]
struct Outcome {
    /// Which, from 0.
    index: usize,
    /// The fork.
    #[serde(skip_serializing_if = "Option::is_none")]
    fork: Option<Fork>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Problem>,
}

/// What became of each fork of a request, in order.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Outcomes {
    results: Vec<Outcome>,
    /// How long the source was held up; only of forks of a fork that ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<Pause>,
}

/// What was made, and how long its source was held up.
#[derive(Debug)]
struct Made {
    results: Vec<Result<ForkRecord, Problem>>,
    source: Option<Pause>,
}

/// Make forks
///
/// Each has its identity before any of its workload runs. One result for each child: one that fails does not undo the others, unless
/// `all_or_nothing` is asked. The answer is 201 if at least one was made, else the first failure with all `results`.
#[utoipa::path(
    post,
    path = "/v1/forks",
    tag = "forks",
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 printable characters: the same request sent again within a day is given the same answer")),
    request_body = CreateForks,
    responses(
        (status = 201, description = "Made, at least one of them", body = Outcomes),
        (status = "4XX", description = "Nothing was made", body = Problem, content_type = "application/problem+json"),
        (status = "5XX", description = "None could be made", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    forker: Forker,
    headers: HeaderMap,
    extract::Raw(bytes): extract::Raw,
) -> Result<Response, Problem> {
    // To its end even if the client goes away: what it asked for is there then, and its key knows it.
    let work = tokio::spawn(async move { create_once(&app, &forker, &headers, bytes).await });
    work.await.map_err(|error| Problem::internal(&error))?
}

async fn create_once(
    app: &Arc<App>,
    forker: &Forker,
    headers: &HeaderMap,
    bytes: Zeroizing<Vec<u8>>,
) -> Result<Response, Problem> {
    let create: CreateForks = extract::parse(&bytes)?;
    let source = create.source()?;
    let key = match app.keys.claim(headers, &forker.0.id, "POST /v1/forks", &bytes)? {
        None => None,
        Some(Claim::New(key)) => Some(key),
        Some(Claim::Answered(Answer { status, body })) => {
            return Ok(reply(StatusCode::from_u16(status).unwrap_or(StatusCode::CREATED), &body));
        }
        Some(Claim::Interrupted(key)) => return after_a_crash(app, key, &create).await,
    };
    drop(bytes);
    let made = match app.work.moving() {
        Ok(share) => {
            let app = Arc::clone(app);
            let origin = key.as_ref().map(|key| key.hash.clone());
            block(move || {
                let _share = share;
                make(&app, &create, &source, origin.as_deref())
            })
            .await
        }
        Err(busy) => Err(busy),
    };
    app.waker.wake();
    let made = match made {
        Ok(made) => made,
        Err(problem) => {
            // Nothing was begun, unless the work itself broke off: then the next request with the key is told what there is.
            if let Some(key) = &key
                && problem.code() != "internal"
            {
                app.keys.give_back(key);
            }
            return Err(problem);
        }
    };
    finish(app, key, made)
}

/// Notes the answer and gives it.
fn finish(app: &App, key: Option<Key>, made: Made) -> Result<Response, Problem> {
    let Made { results: made, source } = made;
    // Those that were undone were so because of another.
    let mut problems: Vec<_> = made.iter().filter_map(|result| result.as_ref().err()).collect();
    problems.sort_by_key(|problem| problem.code() == UNDONE);
    let first = problems.first().map(|problem| (*problem).clone());
    let any = made.iter().any(Result::is_ok);
    let results = made.into_iter().enumerate().map(|(index, result)| match result {
        Ok(record) => {
            let fork = Fork::new(&record, Life::Running, &watch::dir(&app.home, &record));
            Outcome { index, fork: Some(fork), error: None }
        }
        Err(problem) => Outcome { index, fork: None, error: Some(problem) },
    });
    let outcomes = Outcomes { results: results.collect(), source };
    let (status, body) = match first {
        Some(problem) if !any => {
            let mut body = json!(problem);
            body["results"] = json!(outcomes.results);
            (problem.status(), body)
        }
        _ => (StatusCode::CREATED, json!(outcomes)),
    };
    if let Some(key) = &key
        && let Err(error) = app.keys.answer(key, &Answer { status: status.as_u16(), body: body.clone() })
    {
        tracing::warn!(%error, "the answer to an idempotent request could not be noted");
    }
    Ok(reply(status, &body))
}

/// What is answered, the first time and again.
fn reply(status: StatusCode, body: &Value) -> Response {
    if status.is_success() {
        return answer(status, body);
    }
    problem::failed(status, body["code"].as_str().unwrap_or_default().to_owned().into(), body)
}

/// The daemon died while it worked on this. What was finished is there; what was not is undone.
async fn after_a_crash(app: &Arc<App>, key: Key, create: &CreateForks) -> Result<Response, Problem> {
    let requests = create.requests(&app.program, None)?;
    let asked: usize = requests.iter().map(|request| request.count).sum();
    let hash = key.hash.clone();
    let searched = Arc::clone(app);
    let mut found = block(move || {
        let list = searched.forks.list().map_err(|error| Problem::internal(&error))?;
        let ours = list.into_iter().filter(|(record, _)| record.origin.as_deref() == Some(&hash));
        Ok(ours.map(|(record, _)| (*record).clone()).collect::<Vec<_>>())
    })
    .await?;
    if found.is_empty() {
        app.keys.give_back(&key);
        return Err(interrupted());
    }
    // Those with a name of their own are told apart by it; the others are as good as each other.
    let names: Vec<_> = match requests.as_slice() {
        [one] => (0..one.count).map(|index| one.name_of(index)).collect(),
        each => each.iter().map(|request| request.name.clone()).collect(),
    };
    let mut made: Vec<Result<ForkRecord, Problem>> = Vec::with_capacity(asked);
    for name in names {
        let at = match &name {
            Some(name) => found.iter().position(|record| record.name == *name),
            None => (!found.is_empty()).then_some(0),
        };
        made.push(at.map(|at| found.remove(at)).ok_or_else(interrupted));
    }
    if create.all_or_nothing && made.iter().any(Result::is_err) {
        let undone = Arc::clone(app);
        block(move || {
            let all = made.into_iter().flatten().map(|record| host_forks::kill(&undone.home, &record));
            Ok(all.collect::<Result<(), _>>()?)
        })
        .await?;
        app.waker.wake();
        app.keys.give_back(&key);
        return Err(interrupted());
    }
    finish(app, Some(key), Made { results: made, source: None })
}

/// One result for each fork; an error as a whole if nothing was begun.
fn make(app: &App, create: &CreateForks, source: &Source, origin: Option<&str>) -> Result<Made, Problem> {
    let requests = create.requests(&app.program, origin)?;
    let begun = SystemTime::now();
    let wrong = |(number, error): (usize, ForkError)| {
        let field = field_of(&error).map(|field| match create.children.is_empty() || !Child::has(field) {
            true => field.to_owned(),
            false => format!("children[{number}].{field}"),
        });
        let problem = Problem::from(error);
        match field {
            Some(field) => problem.in_field(field),
            None => problem,
        }
    };
    let (results, template, source) = match source {
        Source::Template(tag) => (from_template(app, tag, &requests, wrong)?, tag.to_string(), None),
        Source::Fork(fork) => {
            let record = host_forks::get(&app.home, fork).map_err(|error| Problem::from(error).in_field("from"))?;
            let branched = branch::fork_from(&app.home, &app.store, &record, &requests).map_err(wrong)?;
            (branched.forks, record.template.to_string(), branched.pause.as_ref().map(Pause::from))
        }
    };
    for result in &results {
        match result {
            Ok(record) => {
                app.metrics.made(record);
                app.traces.fork(record);
            }
            Err(error) => {
                app.metrics.failed(error, error.code());
                app.traces.failed(&template, error.code(), begun);
            }
        }
    }
    let failed = results.iter().any(Result::is_err);
    let results = match failed && create.all_or_nothing {
        true => undo(app, results),
        false => results.into_iter().map(|result| result.map_err(Problem::from)).collect(),
    };
    Ok(Made { results, source })
}

fn from_template(
    app: &App,
    tag: &Tag,
    requests: &[ForkRequest],
    wrong: impl Fn((usize, ForkError)) -> Problem,
) -> Result<Vec<Result<ForkRecord, ForkError>>, Problem> {
    let template = app.store.get(tag)?;
    let engine = engines::for_template(template.manifest())?;
    let results = host::fork::fork_each(&app.home, engine.as_ref(), &template, requests).map_err(wrong)?;
    if pool::size(&app.home, tag) > 0 {
        let home = app.home.clone();
        tokio::spawn(async move {
            // Who asked is answered first: starting a machine takes all that a small host has.
            tokio::time::sleep(REFILL_AFTER).await;
            tokio::task::spawn_blocking(move || {
                if let Err(error) = pool::fill(&home, engine.as_ref(), &template, false) {
                    tracing::warn!(%error, "a pool could not be filled");
                }
            });
        });
    }
    Ok(results)
}

/// The forks that were made go, because others were not.
fn undo(app: &App, results: Vec<Result<ForkRecord, ForkError>>) -> Vec<Result<ForkRecord, Problem>> {
    let undone = |record: ForkRecord| {
        let detail = "it was made, and undone because another fork of the request failed";
        match host_forks::kill(&app.home, &record) {
            Ok(()) => Problem::new(StatusCode::CONFLICT, UNDONE, detail),
            Err(error) => Problem::from(error),
        }
    };
    results
        .into_iter()
        .map(|result| match result {
            Ok(record) => Err(undone(record)),
            Err(error) => Err(Problem::from(error)),
        })
        .collect()
}

/// The request's field that is to blame.
fn field_of(error: &ForkError) -> Option<&'static str> {
    match error {
        ForkError::Request(error) => Some(error.field()),
        ForkError::NotSupported { .. } => Some("mailboxes"),
        ForkError::Network(_) => Some("network"),
        ForkError::Limit(_) => Some("limits"),
        _ => None,
    }
}

/// Which forks.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Filter {
    /// Only those of this template.
    #[param(nullable = false)]
    template: Option<String>,
    /// Only those in this state: `running`, `standby` or `dead`.
    #[param(value_type = Life, required = false)]
    state: Option<Life>,
    /// Only those with these labels: `key=value`, several with commas between.
    #[param(nullable = false)]
    label: Option<String>,
    /// At most this many.
    #[serde(default = "default_page")]
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: usize,
    /// Only those after this one: the `next` of the page before.
    #[param(nullable = false)]
    after: Option<String>,
}

fn default_page() -> usize {
    100
}

/// A page of forks, oldest first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Page {
    forks: Vec<Summary>,
    /// How many there are that the filter lets through.
    total: usize,
    /// What to give as `after` for the page after this one.
    next: Option<String>,
}

/// List forks
#[utoipa::path(get, path = "/v1/forks", tag = "forks", params(Filter), responses(
    (status = 200, description = "A page", body = Page),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    _: Reader,
    Asked(filter): Asked<Filter>,
) -> Result<Json<Page>, Problem> {
    if !(1..=MAX_PAGE).contains(&filter.limit) {
        return Err(Problem::invalid("limit", format!("a page has 1 to {MAX_PAGE} forks")));
    }
    let labels: BTreeMap<&str, &str> = match &filter.label {
        None => BTreeMap::new(),
        Some(text) => text
            .split(',')
            .map(|label| label.split_once('='))
            .collect::<Option<_>>()
            .ok_or_else(|| Problem::invalid("label", "a label is key=value"))?,
    };
    let list = app.forks.list().map_err(|error| Problem::internal(&error))?;
    let fits = |record: &ForkRecord, state: Life| {
        filter.template.as_ref().is_none_or(|tag| record.template.as_str() == tag)
            && filter.state.is_none_or(|wanted| wanted == state)
            && labels.iter().all(|(key, value)| record.labels.get(*key).is_some_and(|other| other == value))
    };
    let fitting: Vec<_> = list.into_iter().filter(|(record, state)| fits(record, *state)).collect();
    let after = match &filter.after {
        None => None,
        Some(after) => Some(
            after
                .split_once('-')
                .and_then(|(time, id)| Some((time.parse::<u64>().ok()?, id)))
                .ok_or_else(|| Problem::invalid("after", "give the next of the page before"))?,
        ),
    };
    let place = |record: &ForkRecord| (record.created_ms, record.id.to_string());
    let rest: Vec<_> = {
        let mut rest: Vec<_> = fitting
            .iter()
            .filter(|(record, _)| after.is_none_or(|(time, id)| place(record) > (time, id.to_owned())))
            .collect();
        rest.sort_by_key(|(record, _)| place(record));
        rest
    };
    let page = &rest[..rest.len().min(filter.limit)];
    let next = (rest.len() > page.len())
        .then(|| page.last().map(|(record, _)| format!("{}-{}", record.created_ms, record.id)))
        .flatten();
    let forks = page.iter().map(|(record, state)| Summary::new(record, *state)).collect();
    Ok(Json(Page { forks, total: fitting.len(), next }))
}

/// One fork, with its identity report
#[utoipa::path(get, path = "/v1/forks/{fork}", tag = "forks", params(("fork" = String, Path, description = "Name or id")), responses(
    (status = 200, description = "It", body = Fork),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn get(State(app): State<Arc<App>>, _: Reader, At(fork): At<String>) -> Result<Json<Fork>, Problem> {
    let record = find(&app, fork).await?;
    block(move || Ok(Json(Fork::with_memory(&record, state_now(&record), &watch::dir(&app.home, &record))))).await
}

/// End a fork
///
/// Everything it had is removed.
#[utoipa::path(delete, path = "/v1/forks/{fork}", tag = "forks", params(("fork" = String, Path, description = "Name or id")), responses(
    (status = 204, description = "It is gone"),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "It could not be ended", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn remove(
    State(app): State<Arc<App>>,
    _: Forker,
    At(fork): At<String>,
) -> Result<StatusCode, Problem> {
    let record = find(&app, fork).await?;
    let owned = Arc::clone(&app);
    block(move || host_forks::kill(&owned.home, &record).map_err(Problem::from)).await?;
    app.waker.wake();
    Ok(StatusCode::NO_CONTENT)
}

/// What became of a fork that was put into standby, or resumed.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Moved {
    /// The fork as it is now.
    fork: Fork,
    /// What it took, in microseconds.
    micros: u64,
    /// Bytes of memory that were written to disk: what it had for itself. Only for standby.
    data_bytes: Option<u64>,
}

/// Put a running fork to disk
///
/// The memory it has for itself, its disk and its devices are kept, its machine ends. It comes back by `resume`, as the same fork.
#[utoipa::path(post, path = "/v1/forks/{fork}/standby", tag = "forks", params(("fork" = String, Path, description = "Name or id")), responses(
    (status = 200, description = "It is in standby", body = Moved),
    (status = "4XX", description = "Refused; it is as it was", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "It could not be put to disk, and runs on", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn standby(
    State(app): State<Arc<App>>,
    _: Forker,
    At(fork): At<String>,
) -> Result<Json<Moved>, Problem> {
    moved(app, fork, host::standby::standby).await
}

/// Bring a fork back from standby
///
/// With its identity, at the right time and with fresh randomness.
#[utoipa::path(post, path = "/v1/forks/{fork}/resume", tag = "forks", params(("fork" = String, Path, description = "Name or id")), responses(
    (status = 200, description = "It runs", body = Moved),
    (status = "4XX", description = "Refused; it is as it was", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "It could not be brought back, and is still in standby", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn resume(
    State(app): State<Arc<App>>,
    _: Forker,
    At(fork): At<String>,
) -> Result<Json<Moved>, Problem> {
    moved(app, fork, host::standby::resume).await
}

type Mover = fn(&Home, &Store, &ForkRecord) -> Result<host::standby::Moved, StandbyError>;

async fn moved(app: Arc<App>, fork: String, mover: Mover) -> Result<Json<Moved>, Problem> {
    let share = app.work.moving()?;
    let record = find(&app, fork).await?;
    // To its end even if the client goes away.
    block(move || {
        let _share = share;
        let moved = mover(&app.home, &app.store, &record);
        app.waker.wake();
        let moved = moved?;
        let fork = Fork::new(&moved.record, state_now(&moved.record), &watch::dir(&app.home, &moved.record));
        Ok(Json(Moved { fork, micros: moved.micros, data_bytes: moved.size.map(|size| size.data) }))
    })
    .await
}

/// How a fork is.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Pong {
    /// Its id, as the agent in it knows it.
    fork: String,
    /// `running`, or what is the matter.
    state: String,
    /// The agent's version.
    agent: String,
    /// Milliseconds since the template's boot.
    uptime_ms: u64,
    /// How far its clock is ahead of the host's, in milliseconds.
    clock_ahead_ms: i64,
    /// What asking took, in microseconds.
    micros: u64,
}

/// Ask a fork whether it is well
#[utoipa::path(post, path = "/v1/forks/{fork}/ping", tag = "forks", params(("fork" = String, Path, description = "Name or id")), responses(
    (status = 200, description = "It answered", body = Pong),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "It did not answer", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn ping(State(app): State<Arc<App>>, _: Reader, At(fork): At<String>) -> Result<Json<Pong>, Problem> {
    let (_, mut channel) = connect(&app, fork).await?;
    let begun = Instant::now();
    let reply = channel.ping().await?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let millis = |nanos: u128| i64::try_from(nanos / 1_000_000).unwrap_or(i64::MAX);
    Ok(Json(Pong {
        fork: reply.fork_id.chars().take(64).collect(),
        state: reply.state.chars().take(64).collect(),
        agent: reply.agent_version.chars().take(64).collect(),
        uptime_ms: reply.uptime_ms,
        clock_ahead_ms: millis(u128::from(reply.wall_clock_ns)) - millis(now.as_nanos()),
        micros: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
    }))
}

/// Code to evaluate.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Code {
    /// The code; the value of its last expression is the answer.
    #[schema(example = "import random; random.random()")]
    code: String,
    /// How long it may take, in milliseconds.
    #[serde(default = "default_eval")]
    #[schema(minimum = 1, maximum = 86_400_000, default = 30000)]
    timeout_ms: u64,
}

fn default_eval() -> u64 {
    30_000
}

/// What code raised.
#[derive(Debug, Serialize, ToSchema)]
struct Exception {
    /// `exception`, `timeout`, `runtime-died`, `no-runtime` or `too-large`.
    kind: String,
    /// Its message.
    message: String,
    /// Where.
    stack: String,
}

/// What became of code.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Evaluated {
    /// The value; null also where it is no JSON (NaN, Infinity): `value_text` has it then.
    #[schema(value_type = Value)]
    value: Option<Value>,
    /// The value as JSON in which NaN, Infinity and -Infinity may stand for numbers.
    value_text: String,
    /// The value as the runtime prints it.
    repr: String,
    /// What the code printed.
    stdout: String,
    /// What it printed as errors.
    stderr: String,
    /// What it raised; the rest is empty then, but for what was printed.
    exception: Option<Exception>,
}

/// Evaluate code in the warmed runtime of a fork
///
/// That the code raised something is no failure of the request.
#[utoipa::path(post, path = "/v1/forks/{fork}/eval", tag = "forks", params(("fork" = String, Path, description = "Name or id")), request_body = Code, responses(
    (status = 200, description = "Evaluated", body = Evaluated),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "It did not answer", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn eval(
    State(app): State<Arc<App>>,
    _: Forker,
    At(fork): At<String>,
    Body(code): Body<Code>,
) -> Result<Json<Evaluated>, Problem> {
    if !(1..=MAX_EVAL).contains(&code.timeout_ms) {
        return Err(Problem::invalid("timeout_ms", "a timeout is 1 ms to one day"));
    }
    if code.code.len() > MAX_CODE {
        return Err(Problem::invalid("code", "code has at most 512 KiB; send a file and import it"));
    }
    let (_, mut channel) = connect(&app, fork).await?;
    let reply = channel.eval(&code.code, Duration::from_millis(code.timeout_ms)).await?;
    Ok(Json(Evaluated {
        value: serde_json::from_str(&reply.value_json).ok(),
        value_text: reply.value_json,
        repr: reply.repr,
        stdout: reply.stdout,
        stderr: reply.stderr,
        exception: reply.error.map(|error| Exception { kind: error.kind, message: error.message, stack: error.stack }),
    }))
}
