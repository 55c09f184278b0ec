//! An OpenTelemetry collector that keeps the spans that are posted to it.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::any_value,
    trace::v1::{Span, status::StatusCode as SpanStatus},
};
use prost::Message;
use proto_net::tasks::Tasks;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

/// A span as it was sent; numbers in hexadecimal.
#[derive(Clone, Debug)]
pub struct Sent {
    pub name: String,
    pub trace: String,
    pub id: String,
    /// Empty where it begins a trace.
    pub parent: String,
    pub kind: i32,
    pub nanoseconds: u64,
    pub attributes: HashMap<String, String>,
    pub failed: bool,
    pub message: String,
    pub events: Vec<String>,
    pub state: String,
    /// The resource attribute `service.name`.
    pub service: String,
}

/// The running collector.
pub struct Collector {
    pub address: SocketAddr,
    heard: Arc<Heard>,
    tasks: Tasks,
}

#[derive(Default)]
struct Heard {
    spans: Mutex<Vec<Sent>>,
    heads: Mutex<Vec<HeaderMap>>,
    requests: AtomicUsize,
    /// The status with which it refuses everything; 0 accepts everything.
    refuses: AtomicUsize,
}

impl Collector {
    pub async fn start(tls: Option<TlsAcceptor>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (heard, tasks) = (Arc::<Heard>::default(), Tasks::new());
        let collector = Self { address: listener.local_addr()?, heard: heard.clone(), tasks: tasks.clone() };
        collector.tasks.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (heard, tls) = (heard.clone(), tls.clone());
                tasks.spawn(async move {
                    match tls {
                        None => serve(heard, socket).await,
                        Some(tls) => {
                            if let Ok(socket) = tls.accept(socket).await {
                                serve(heard, socket).await;
                            }
                        }
                    }
                });
            }
        });
        Ok(collector)
    }

    pub fn url(&self) -> String {
        format!("http://{}/v1/traces", self.address)
    }

    /// In the order in which they were sent.
    pub fn spans(&self) -> Vec<Sent> {
        self.heard.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Heads of the requests that it has received.
    pub fn heads(&self) -> Vec<HeaderMap> {
        self.heard.heads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn requests(&self) -> usize {
        self.heard.requests.load(Ordering::SeqCst)
    }

    /// Answers with this from now on; 200 takes spans again.
    pub fn answer(&self, status: StatusCode) {
        let refuses = if status.is_success() { 0 } else { usize::from(status.as_u16()) };
        self.heard.refuses.store(refuses, Ordering::SeqCst);
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

async fn serve(heard: Arc<Heard>, socket: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(|request| answer(heard.clone(), request));
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
}

async fn answer(heard: Arc<Heard>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    heard.requests.fetch_add(1, Ordering::SeqCst);
    let refuses = u16::try_from(heard.refuses.load(Ordering::SeqCst)).unwrap_or_default();
    let mut response = Response::new(Full::default());
    if let Ok(status) = StatusCode::from_u16(refuses) {
        *response.status_mut() = status;
        return Ok(response);
    }
    let (head, body) = request.into_parts();
    assert_eq!((head.method.as_str(), head.uri.path()), ("POST", "/v1/traces"));
    assert_eq!(head.headers["content-type"], "application/x-protobuf");
    heard.heads.lock().unwrap_or_else(PoisonError::into_inner).push(head.headers);
    let Ok(body) = body.collect().await else { return Ok(response) };
    let request = ExportTraceServiceRequest::decode(body.to_bytes()).expect("OTLP");
    let mut spans = heard.spans.lock().unwrap_or_else(PoisonError::into_inner);
    for resource in request.resource_spans {
        let attributes = resource.resource.map(|resource| texts(resource.attributes)).unwrap_or_default();
        let service = attributes.get("service.name").cloned().unwrap_or_default();
        let all = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
        spans.extend(all.map(|span| sent(span, &service)));
    }
    *response.body_mut() = Full::new(ExportTraceServiceResponse::default().encode_to_vec().into());
    Ok(response)
}

fn sent(span: Span, service: &str) -> Sent {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let status = span.status.unwrap_or_default();
    Sent {
        name: span.name,
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        kind: span.kind,
        nanoseconds: span.end_time_unix_nano - span.start_time_unix_nano,
        attributes: texts(span.attributes),
        failed: status.code == SpanStatus::Error as i32,
        message: status.message,
        events: span.events.into_iter().map(|event| event.name).collect(),
        state: span.trace_state,
        service: service.to_owned(),
    }
}

fn texts(attributes: Vec<opentelemetry_proto::tonic::common::v1::KeyValue>) -> HashMap<String, String> {
    let text = |value: any_value::Value| match value {
        any_value::Value::StringValue(text) => text,
        any_value::Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    };
    let of = |attribute: opentelemetry_proto::tonic::common::v1::KeyValue| {
        (attribute.key, attribute.value.and_then(|value| value.value).map(text).unwrap_or_default())
    };
    attributes.into_iter().map(of).collect()
}
