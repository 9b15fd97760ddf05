//! Traces: one span for each fork, with one for each of its steps, to whoever `OTEL_EXPORTER_OTLP_ENDPOINT` names (gRPC).

use std::time::{Duration, SystemTime};

use host::{ForkRecord, record::StepTime};
use opentelemetry::{
    Context, KeyValue,
    trace::{Span, SpanKind, Status, TraceContextExt, Tracer, TracerProvider},
};
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::{
    Resource,
    trace::{SdkTracer, SdkTracerProvider},
};

/// Where traces go; nowhere without an endpoint.
#[derive(Debug)]
pub(crate) struct Traces(Option<(SdkTracerProvider, SdkTracer)>);

impl Traces {
    /// As the environment says. An exporter that can not be made is said in the log and is no reason not to serve.
    pub(crate) fn from_env() -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        if !set("OTEL_EXPORTER_OTLP_ENDPOINT") && !set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") {
            return Self(None);
        }
        let exporter = match SpanExporter::builder().with_tonic().build() {
            Ok(exporter) => exporter,
            Err(error) => {
                tracing::warn!(%error, "traces can not be exported");
                return Self(None);
            }
        };
        let resource = Resource::builder().with_service_name("offshoot").build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        let tracer = provider.tracer("offshoot");
        Self(Some((provider, tracer)))
    }

    /// A fork was made; it ended when its identity was acknowledged.
    pub(crate) fn fork(&self, record: &ForkRecord) {
        let Some((_, tracer)) = &self.0 else { return };
        let end = SystemTime::UNIX_EPOCH + Duration::from_millis(record.created_ms);
        let start = end - Duration::from_micros(record.acked_micros);
        let span = tracer
            .span_builder("fork")
            .with_kind(SpanKind::Server)
            .with_start_time(start)
            .with_attributes([
                KeyValue::new("offshoot.fork.id", record.id.to_string()),
                KeyValue::new("offshoot.fork.name", record.name.to_string()),
                KeyValue::new("offshoot.template", record.template.to_string()),
                KeyValue::new("offshoot.engine", record.engine.name.to_string()),
                KeyValue::new("offshoot.accel", record.engine.accel.to_string()),
            ])
            .start(tracer);
        let context = Context::new().with_span(span);
        steps(tracer, &context, "host", start, &record.host_steps);
        // The guest's come last: they end with the ack.
        let guest: u64 = record.guest_steps.iter().map(|step| step.micros).sum();
        steps(tracer, &context, "guest", end - Duration::from_micros(guest), &record.guest_steps);
        context.span().end_with_timestamp(end);
    }

    /// A fork was not made.
    pub(crate) fn failed(&self, template: &str, code: &str, begun: SystemTime) {
        let Some((_, tracer)) = &self.0 else { return };
        let mut span = tracer
            .span_builder("fork")
            .with_kind(SpanKind::Server)
            .with_start_time(begun)
            .with_attributes([KeyValue::new("offshoot.template", template.to_owned())])
            .start(tracer);
        span.set_status(Status::error(code.to_owned()));
        span.end();
    }

    /// Sends what is left.
    pub(crate) fn end(&self) {
        if let Some((provider, _)) = &self.0
            && let Err(error) = provider.shutdown()
        {
            tracing::warn!(%error, "the last traces could not be sent");
        }
    }
}

fn steps(tracer: &SdkTracer, context: &Context, side: &'static str, mut at: SystemTime, steps: &[StepTime]) {
    for step in steps {
        let end = at + Duration::from_micros(step.micros);
        let mut span = tracer
            .span_builder(step.step.clone())
            .with_start_time(at)
            .with_attributes([
                KeyValue::new("offshoot.side", side),
                KeyValue::new("offshoot.outcome", step.outcome.clone()),
            ])
            .start_with_context(tracer, context);
        span.end_with_timestamp(end);
        at = end;
    }
}
