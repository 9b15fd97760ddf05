//! Templates.

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode, response::Response};
use engine::{Accel, EngineName};
use host::{
    build::{self, BuildRequest},
    engines::{self, Forced},
    pool, standby, verify as host_verify,
};
use identity::Tag;
use serde::Deserialize;
use serde_json::json;
use utoipa::ToSchema;

use super::{answer, block};
use crate::{
    App,
    auth::{Admin, Forker, Reader},
    extract::{At, Body},
    jobs::Job,
    model::view::{Mailboxes, Template, Templates},
    problem::Problem,
};

/// Most forks of a verification.
const MAX_VERIFY: usize = 100;

pub(super) fn tag(text: &str) -> Result<Tag, Problem> {
    Tag::parse(text).map_err(|error| Problem::invalid("tag", error.to_string()))
}

/// List templates
#[utoipa::path(get, path = "/v1/templates", tag = "templates", responses(
    (status = 200, description = "All", body = Templates),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "The daemon failed", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn list(State(app): State<Arc<App>>, _: Reader) -> Result<Json<Templates>, Problem> {
    block(move || {
        let (mut templates, mut broken) = (Vec::new(), Vec::new());
        for found in app.store.list()? {
            match found {
                Ok(manifest) => templates.push(Template::new(&manifest, app.store.disk_bytes(&manifest.tag))),
                Err(error) => broken.push(Problem::from(error)),
            }
        }
        Ok(Json(Templates { templates, broken }))
    })
    .await
}

/// One template
#[utoipa::path(get, path = "/v1/templates/{tag}", tag = "templates", params(("tag" = String, Path, description = "Its tag")), responses(
    (status = 200, description = "It", body = Template),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn get(
    State(app): State<Arc<App>>,
    _: Reader,
    At(text): At<String>,
) -> Result<Json<Template>, Problem> {
    let tag = tag(&text)?;
    block(move || {
        let manifest = app.store.manifest(&tag)?;
        Ok(Json(Template::new(&manifest, app.store.disk_bytes(&tag))))
    })
    .await
}

/// The mailboxes that a fork request can address
#[utoipa::path(get, path = "/v1/templates/{tag}/mailboxes", tag = "templates", params(("tag" = String, Path, description = "The template's tag")), responses(
    (status = 200, description = "All", body = Mailboxes),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn mailboxes(
    State(app): State<Arc<App>>,
    _: Reader,
    At(text): At<String>,
) -> Result<Json<Mailboxes>, Problem> {
    let tag = tag(&text)?;
    block(move || Ok(Json(Mailboxes::new(&app.store.manifest(&tag)?)))).await
}

/// A template to build.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Build {
    /// A recipe by its name: a built-in one (`python`, `node`, `browser`, `busybox`), or a folder of the daemon's `--recipes`.
    #[schema(example = "python", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$")]
    recipe: String,
    /// The template's tag; one that exists is never replaced.
    #[schema(example = "py", pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$")]
    tag: String,
    /// Guest memory in bytes, instead of the recipe's.
    #[schema(nullable = false)]
    memory_bytes: Option<u64>,
    /// Virtual CPUs, instead of the recipe's.
    #[schema(minimum = 1, maximum = 8, nullable = false)]
    vcpus: Option<u32>,
    /// What runs it: `qemu` or `kvm`; without it what a probe shows to work.
    #[schema(nullable = false)]
    engine: Option<EngineSpec>,
    /// Whether a finding of the audit is an error (`template_not_clean`); else findings are told, and the template is there.
    #[serde(default)]
    #[schema(default = false)]
    strict: bool,
}

/// What runs a template.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum EngineSpec {
    /// QEMU from the distribution.
    Qemu,
    /// offshoot's own monitor.
    Kvm,
}

/// Build a template
///
/// A job: its progress comes as events.
#[utoipa::path(post, path = "/v1/templates", tag = "templates", request_body = Build, responses(
    (status = 202, description = "It is being built", body = Job),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "Too much is being done", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn build(
    State(app): State<Arc<App>>,
    _: Admin,
    Body(asked): Body<Build>,
) -> Result<Response, Problem> {
    let tag = tag(&asked.tag)?;
    // A recipe's name has the form of a tag: it is never a path.
    let name = Tag::parse(&asked.recipe).map_err(|_| {
        Problem::invalid("recipe", "a recipe is given by its name: letters, digits, '_', '.' and '-', never a path")
    })?;
    let recipe = recipe(&app, &name)?;
    if app.store.manifest(&tag).is_ok() {
        return Err(store::StoreError::Exists { tag }.into());
    }
    let forced = asked.engine.map(|engine| match engine {
        EngineSpec::Qemu => EngineName::Qemu,
        EngineSpec::Kvm => EngineName::Kvm,
    });
    let request = BuildRequest {
        recipe,
        tag: tag.clone(),
        memory: asked.memory_bytes,
        vcpus: asked.vcpus,
        kernel: None,
        forced: Forced { engine: forced, accel: None::<Accel> },
        strict: asked.strict,
    };
    let share = app.work.job()?;
    let job = app.jobs.begin("build", tag.as_str()).map_err(|error| Problem::internal(&error))?;
    let id = job.id.clone();
    tokio::task::spawn_blocking(move || {
        let _share = share;
        let built = build::build(&app.home, &app.store, &request, &mut |progress| app.jobs.progress(&id, &progress));
        let result = built
            .map(|manifest| json!(Template::new(&manifest, app.store.disk_bytes(&manifest.tag))))
            .map_err(Problem::from);
        app.jobs.end(&id, result);
        app.waker.wake();
    });
    Ok(answer(StatusCode::ACCEPTED, &job))
}

fn recipe(app: &App, name: &Tag) -> Result<String, Problem> {
    if host::recipe::built_in().contains(&name.as_str()) {
        return Ok(name.to_string());
    }
    let found =
        app.recipes.as_ref().map(|dir| dir.join(name.as_str())).filter(|path| path.join("recipe.toml").is_file());
    found.and_then(|path| path.to_str().map(str::to_owned)).ok_or_else(|| {
        Problem::new(StatusCode::NOT_FOUND, "recipe_not_found", format!("there is no recipe {name}")).in_field("recipe")
    })
}

/// Remove a template
///
/// Forks that were made of it live on; its spare machines end.
#[utoipa::path(delete, path = "/v1/templates/{tag}", tag = "templates", params(("tag" = String, Path, description = "Its tag")), responses(
    (status = 204, description = "It is gone"),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn remove(State(app): State<Arc<App>>, _: Admin, At(text): At<String>) -> Result<StatusCode, Problem> {
    let tag = tag(&text)?;
    let owned = Arc::clone(&app);
    block(move || {
        standby::remove_template(&owned.home, &owned.store, &tag)?;
        Ok(pool::end(&owned.home, &tag)?)
    })
    .await?;
    app.waker.wake();
    Ok(StatusCode::NO_CONTENT)
}

/// How to verify.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Verify {
    /// How many forks to compare.
    #[serde(default = "default_count")]
    #[schema(minimum = 2, maximum = 100, default = 2)]
    count: usize,
}

fn default_count() -> usize {
    2
}

/// Prove that forks of a template share nothing
///
/// A job. The forks are compared pairwise and with the template, and removed again.
#[utoipa::path(post, path = "/v1/templates/{tag}/verify", tag = "templates", params(("tag" = String, Path, description = "Its tag")), request_body = Verify, responses(
    (status = 202, description = "It is being verified", body = Job),
    (status = "4XX", description = "Refused", body = Problem, content_type = "application/problem+json"),
    (status = "5XX", description = "Too much is being done", body = Problem, content_type = "application/problem+json"),
))]
pub(super) async fn verify(
    State(app): State<Arc<App>>,
    _: Forker,
    At(text): At<String>,
    Body(asked): Body<Verify>,
) -> Result<Response, Problem> {
    let tag = tag(&text)?;
    if !(2..=MAX_VERIFY).contains(&asked.count) {
        return Err(Problem::invalid("count", format!("a verification is of 2 to {MAX_VERIFY} forks")));
    }
    let template = app.store.get(&tag)?;
    let engine = engines::for_template(template.manifest())?;
    let share = app.work.job()?;
    let job = app.jobs.begin("verify", tag.as_str()).map_err(|error| Problem::internal(&error))?;
    let id = job.id.clone();
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || {
        let _share = share;
        let mut progress = |progress| app.jobs.progress(&id, &progress);
        let verifying = host_verify::verify(&app.home, engine.as_ref(), &template, asked.count, &mut progress);
        let result = runtime.block_on(verifying).map(|verdict| json!(verdict)).map_err(Problem::from);
        app.jobs.end(&id, result);
        app.waker.wake();
    });
    Ok(answer(StatusCode::ACCEPTED, &job))
}
