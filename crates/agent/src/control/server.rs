//! The gRPC service. Requests are checked here; what they ask for is done elsewhere.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use guest_api::proto::{
    self, EvalReply, EvalRequest, ExecInput, ExecOutput, Finding, ForwardInput, ForwardOutput, LogChunk, LogsRequest,
    PingReply, PingRequest, PlantedMailbox, QuiesceReply, QuiesceRequest, ReconfigureNetworkReply,
    ReconfigureNetworkRequest, Step, WarmEvent, WarmRequest, agent_server::Agent,
};
use identity::Network;
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::{
    exec,
    forward::{self, Destination},
};
use crate::{
    boot::mounts,
    endpoint,
    keeper::{self, Findings, ReconfigureError, audit},
    payload::Expected,
    state::{AgentState, Phase},
};

/// Longest code that `eval` takes, in bytes.
const MAX_CODE: usize = 1 << 20;

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service over the agent's state.
#[derive(Debug)]
pub(super) struct Service {
    state: Arc<AgentState>,
}

impl Service {
    pub(super) fn new(state: Arc<AgentState>) -> Self {
        Self { state }
    }

    /// Refuses while the workload is frozen.
    #[allow(clippy::result_large_err)] // tonic's own error type.
    fn check_running(&self) -> Result<(), Status> {
        match self.state.phase() {
            Phase::Template | Phase::Running => Ok(()),
            phase => Err(Status::failed_precondition(format!("the sandbox is {}", phase.as_str()))),
        }
    }

    /// What forks will be told besides, and where.
    #[allow(clippy::result_large_err)] // tonic's own error type.
    fn expect(&self, expected: &proto::Expected) -> Result<(), Status> {
        let port = u16::try_from(expected.port).map_err(|_| Status::invalid_argument("a port is at most 65535"))?;
        let parsed = Expected::parse(expected).map_err(|error| Status::invalid_argument(error.to_string()))?;
        if !self.state.expect(parsed) {
            return Err(Status::failed_precondition("the template was warmed before; build a new one"));
        }
        let path = format!("{}/identity.sock", mounts::IDENTITY);
        endpoint::start(&self.state, &path, port)
            .map_err(|error| Status::aborted(format!("the identity endpoint could not be opened: {error}")))
    }
}

fn told(finding: audit::Finding) -> Finding {
    let (pid, process, service) = match finding.process {
        Some(owner) => (owner.pid, owner.name, owner.service.unwrap_or_default()),
        None => Default::default(),
    };
    let kind = finding.kind.as_str().into();
    Finding { kind, pid, process, service, reason: finding.reason, cure: finding.cure.into_owned() }
}

#[tonic::async_trait]
impl Agent for Service {
    async fn ping(&self, _: Request<PingRequest>) -> Result<Response<PingReply>, Status> {
        let state = &self.state;
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Ok(Response::new(PingReply {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            fork_id: state.identity().map(|identity| identity.fork.id.to_string()).unwrap_or_default(),
            state: state.phase().as_str().into(),
            uptime_ms: u64::try_from(state.booted().elapsed().as_millis()).unwrap_or(u64::MAX),
            wall_clock_ns: u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX),
            network_ack: state.keeper().ack_outcome().as_str().into(),
        }))
    }

    type WarmStream = Replies<WarmEvent>;

    async fn warm(&self, request: Request<WarmRequest>) -> Result<Response<Self::WarmStream>, Status> {
        if self.state.phase() != Phase::Template {
            return Err(Status::failed_precondition("only a template can be warmed"));
        }
        let request = request.into_inner();
        if let Some(expected) = &request.expected {
            self.expect(expected)?;
        }
        let (events, replies) = mpsc::channel(64);
        let supervisor = Arc::clone(self.state.supervisor());
        tokio::task::spawn_blocking(move || {
            let note = |message: String| {
                // Who does not listen misses it; the warm-up goes on.
                let _ = events.blocking_send(Ok(WarmEvent { message, done: false }));
            };
            let last = match supervisor.warm(request, note) {
                Ok(()) => Ok(WarmEvent { message: "ready".into(), done: true }),
                Err(error) => Err(Status::aborted(error.to_string())),
            };
            let _ = events.blocking_send(last);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    async fn quiesce(&self, request: Request<QuiesceRequest>) -> Result<Response<QuiesceReply>, Status> {
        let state = Arc::clone(&self.state);
        let QuiesceRequest { timeout_ms, seal_key } = request.into_inner();
        let timeout = Duration::from_millis(u64::from(timeout_ms.clamp(1, 600_000)));
        let seal_key = if seal_key.is_empty() { None } else { Some(seal_key.as_slice().try_into()) };
        let seal_key = seal_key.transpose().map_err(|_| Status::invalid_argument("the key has 32 bytes"))?;
        let quiesced = tokio::task::spawn_blocking(move || keeper::quiesce(&state, seal_key, timeout))
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        let mailboxes = quiesced.mailboxes.into_iter().map(|planted| PlantedMailbox {
            name: planted.name.to_string(),
            nonce: planted.nonce.to_vec(),
            capacity: u32::try_from(planted.capacity).unwrap_or(u32::MAX),
            planted_by: planted.planted_by.into(),
        });
        let (findings, left_out) = quiesced.audit.clone().map(Findings::finish).unwrap_or_default();
        Ok(Response::new(QuiesceReply {
            mailboxes: mailboxes.collect(),
            frozen_wall_ns: quiesced.frozen_wall_ns,
            frozen_monotonic_ns: quiesced.frozen_monotonic_ns,
            warnings: quiesced.warnings,
            audited: quiesced.audit.is_some(),
            findings_left_out: u32::try_from(left_out).unwrap_or(u32::MAX),
            findings: findings.into_iter().map(told).collect(),
            can_rehearse: quiesced.can_rehearse,
            sealed: u32::try_from(quiesced.sealed).unwrap_or(u32::MAX),
            steps: quiesced
                .steps
                .into_iter()
                .map(|(name, time)| Step {
                    name: name.into(),
                    outcome: String::new(),
                    micros: u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
                })
                .collect(),
        }))
    }

    async fn reconfigure_network(
        &self,
        request: Request<ReconfigureNetworkRequest>,
    ) -> Result<Response<ReconfigureNetworkReply>, Status> {
        let ReconfigureNetworkRequest { fork_id, section } = request.into_inner();
        let section = if section.is_empty() { None } else { Some(Network::from_bytes(&section)) };
        let section = section.transpose().map_err(|error| Status::invalid_argument(error.to_string()))?;
        let state = Arc::clone(&self.state);
        let steps = tokio::task::spawn_blocking(move || keeper::reconfigure(&state, &fork_id, section))
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| match error {
                ReconfigureError::Step(_) => Status::aborted(error.to_string()),
                _ => Status::failed_precondition(error.to_string()),
            })?;
        let steps = steps.into_iter().map(|step| Step { name: step.name, outcome: step.outcome, micros: step.micros });
        Ok(Response::new(ReconfigureNetworkReply { steps: steps.collect() }))
    }

    type ExecStream = Replies<ExecOutput>;

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Result<Response<Self::ExecStream>, Status> {
        self.check_running()?;
        let replies = exec::start(Arc::clone(&self.state), request.into_inner()).await?;
        let mut response: Response<Self::ExecStream> = Response::new(Box::pin(ReceiverStream::new(replies)));
        response.metadata_mut().insert(guest_api::INPUT_WINDOW, exec::INPUT_WINDOW.into());
        Ok(response)
    }

    async fn eval(&self, request: Request<EvalRequest>) -> Result<Response<EvalReply>, Status> {
        self.check_running()?;
        let EvalRequest { code, timeout_ms } = request.into_inner();
        if code.len() > MAX_CODE {
            return Err(Status::invalid_argument("the code is longer than 1 MiB; copy it into the fork and import it"));
        }
        let supervisor = Arc::clone(self.state.supervisor());
        let reply = tokio::task::spawn_blocking(move || supervisor.eval(&code, timeout_ms)).await;
        reply.map(Response::new).map_err(|error| Status::internal(error.to_string()))
    }

    type ForwardStream = Replies<ForwardOutput>;

    async fn forward(
        &self,
        request: Request<Streaming<ForwardInput>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        let mut input = request.into_inner();
        let to = forward::destination(&mut input).await?;
        // A payload may come while its fork takes on its identity.
        if to != Destination::Identity || self.state.phase() == Phase::Quiesced {
            self.check_running()?;
        }
        let replies = forward::start(&self.state, to, input).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    type LogsStream = Replies<LogChunk>;

    async fn logs(&self, request: Request<LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let follow = request.into_inner().follow;
        let supervisor = Arc::clone(self.state.supervisor());
        let (chunks, replies) = mpsc::channel(8);
        tokio::spawn(async move {
            let mut follower = supervisor.logs().follow();
            loop {
                while let Some((source, data)) = follower.take() {
                    if chunks.send(Ok(LogChunk { source, data })).await.is_err() {
                        return;
                    }
                }
                if !follow {
                    return;
                }
                tokio::select! {
                    changed = follower.changed() => if changed.is_err() { return },
                    () = chunks.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }
}
