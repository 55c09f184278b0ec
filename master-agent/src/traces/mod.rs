//! Traces: a span for each request that the front end serves and for each stream, sent to an OpenTelemetry collector by
//! OTLP. They are off unless configured, and belong to the process, as the log does.
//!
//! A caller's `traceparent` (W3C Trace Context) says which trace a span is part of, but not whether the spans of a trace are
//! sent: that is decided by the [`Sampler`]. A `tracestate` is passed on and not kept.
//!
//! The propagator of opentelemetry_sdk is not used for `traceparent`: it accepts fields with signs and of wrong lengths, and
//! replaces the `tracestate` of a request.

mod collector;
mod config;
mod sampler;

use std::{
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use hyper::{
    HeaderMap,
    header::{HeaderName, HeaderValue},
};
pub use opentelemetry::trace::SpanContext;
use opentelemetry::{
    Context, KeyValue, SpanId, TraceFlags, TraceId, Value,
    trace::{
        Span as _, SpanBuilder, SpanKind, Status, TraceContextExt, TraceState, Tracer as _,
        TracerProvider as _,
    },
};
use opentelemetry_sdk::{
    Resource,
    trace::{BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider, SpanLimits},
};
use proto_net::tasks::Tasks;

use collector::exporter;
pub use config::TracesConfig;
use sampler::Sampler;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// How long spans are gathered before they are sent.
const GATHER: Duration = Duration::from_secs(1);
/// Spans that are sent in one request.
const BATCH: usize = 512;
/// Characters that are kept of a text which callers may influence.
const TEXT: usize = 1024;

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Sends spans until closed.
pub struct Traces {
    provider: SdkTracerProvider,
    /// The group of the requests to the collector.
    requests: Tasks,
}

impl Traces {
    /// Starts traces for the process. Called in a tokio runtime.
    pub fn start(config: &TracesConfig) -> anyhow::Result<Self> {
        let requests = Tasks::new();
        let exporter = exporter(config, requests.clone())?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(config.queue)
            .with_max_export_batch_size(BATCH.min(config.queue))
            .with_scheduled_delay(GATHER)
            .build();
        let resource = Resource::builder()
            .with_attribute(KeyValue::new("service.name", config.service_name.clone()))
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_resource(resource)
            .with_sampler(Sampler::new(config.sample_ratio))
            .with_span_limits(SpanLimits::default())
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
            .build();
        TRACER.set(provider.tracer("master-agent")).ok().context("traces have already been started")?;
        Ok(Self { provider, requests })
    }

    /// Sends the remaining spans within `timeout`.
    pub async fn close(self, timeout: Duration) {
        let Self { provider, requests } = self;
        let closing = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(timeout));
        match tokio::time::timeout(timeout, closing).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!(%error, "the last spans were not sent"),
            Ok(Err(_)) | Err(_) => tracing::warn!("the last spans were not sent in time"),
        }
        requests.drain(Duration::ZERO).await;
    }
}

/// Returns the span that a request is part of, if it has exactly one `traceparent`. This is meant for requests whose
/// sender has been authenticated.
pub fn parent(headers: &HeaderMap) -> Option<SpanContext> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let value = values.next().filter(|_| values.next().is_none())?;
    parse(value.to_str().ok()?)
}

/// Parses a `traceparent` (W3C Trace Context §3.2): `VERSION-TRACE-SPAN-FLAGS`, which future versions may extend.
fn parse(value: &str) -> Option<SpanContext> {
    let (head, rest) = value.split_at_checked(55)?;
    let mut parts = head.split('-');
    let mut hex = |length: usize| {
        let digits = |part: &&str| {
            part.len() == length && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        parts.next().filter(digits)
    };
    let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    if version == "ff" || !rest.is_empty() && (version == "00" || !rest.starts_with('-')) {
        return None;
    }
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        // Other flags are unknown.
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED,
        true,
        TraceState::default(),
    );
    context.is_valid().then_some(context)
}

/// Sets the `traceparent` of a request, so that whatever the request causes becomes part of `span`.
pub fn inject(span: &SpanContext, headers: &mut HeaderMap) {
    let flags = span.trace_flags().to_u8();
    let value = format!("00-{}-{}-{flags:02x}", span.trace_id(), span.span_id());
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(TRACEPARENT, value);
    }
}

/// A span from [`Span::start`] until it is dropped. It is empty if it will not be sent.
#[derive(Default)]
pub struct Span {
    span: Option<Box<opentelemetry_sdk::trace::Span>>,
    settled: bool,
}

impl Span {
    /// Starts a span that is part of `parent`. Without a parent it begins a trace.
    pub fn start(
        kind: SpanKind,
        parent: Option<&SpanContext>,
        began: SystemTime,
        name: impl FnOnce() -> String,
    ) -> Self {
        let Some(tracer) = TRACER.get() else { return Self::default() };
        let context = Context::new();
        let context = match parent {
            Some(parent) => context.with_remote_span_context(parent.clone()),
            None => context,
        };
        let builder = SpanBuilder::from_name(name()).with_kind(kind).with_start_time(began);
        let span = tracer.build_with_context(builder, &context);
        Self { span: span.is_recording().then(|| Box::new(span)), settled: false }
    }

    /// Returns the parent for further spans, or `None` if this span is not sent.
    pub fn context(&self) -> Option<&SpanContext> {
        self.span.as_ref().map(|span| span.span_context())
    }

    pub fn is_sent(&self) -> bool {
        self.span.is_some()
    }

    /// Renames the span.
    pub fn name(&mut self, name: String) {
        if let Some(span) = &mut self.span {
            span.update_name(name);
        }
    }

    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(span) = &mut self.span {
            span.set_attribute(KeyValue::new(key, value));
        }
    }

    /// Sets an attribute to a text that callers may influence, which is truncated.
    pub fn set_text(&mut self, key: &'static str, value: &str) {
        if self.is_sent() {
            self.set(key, value.chars().take(TEXT).collect::<String>());
        }
    }

    pub fn event(&mut self, name: &'static str) {
        if let Some(span) = &mut self.span {
            span.add_event(name, Vec::new());
        }
    }

    /// Marks the work as complete. A span that is dropped before it was settled or failed counts as cancelled.
    pub fn settle(&mut self) {
        self.settled = true;
    }

    pub fn fail(&mut self, kind: &'static str, error: &str) {
        self.settled = true;
        self.set("error.type", kind);
        if let Some(span) = &mut self.span {
            span.set_status(Status::error(error.chars().take(TEXT).collect::<String>()));
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if !self.settled && self.is_sent() {
            self.fail("cancelled", "the caller left");
        }
    }
}

/// Returns the identifiers of the trace and the span, as records show them.
pub fn ids(context: &SpanContext) -> (String, String) {
    (context.trace_id().to_string(), context.span_id().to_string())
}

#[cfg(test)]
mod tests;
