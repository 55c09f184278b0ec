//! Konnectivity's `ProxyService`, as kube-apiserver's egress selector speaks it in `GRPC` mode: gRPC over HTTP/2
//! on a Unix socket, or on TCP with mutual TLS.

pub mod authority;
mod hpack;
mod inbox;
mod session;

use std::{
    convert::Infallible,
    error::Error,
    future::{Ready, ready},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::Stream;
use hyper::{Request, Response, body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::TokioIo;
use proto::konnectivity::{PROXY, Packet};
use proto_net::log_throttle::LogThrottle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Code, Status, Streaming,
    body::Body,
    server::{Grpc, StreamingService},
};
use tonic_prost::ProstCodec;

use super::{
    listener::EgressListener,
    outbound::{LOG_BURST, Outbound, excerpt},
    socket::CallerSocket,
};
use crate::{
    http::{Executor, generations::Generations},
    stream::{caller::Caller, metrics::KonnectivityCounts},
};
use access::rates::{Bucket, Rate};
use authority::WithAuthority;
use session::{Answers, Session, Slots};

/// Concurrent gRPC streams on one HTTP/2 connection in addition to one for each of its dials. A client with more of them
/// waits in silence (RFC 9113 §5.1.2), so there must be streams left on which it is told that there are too many dials.
const SPARE_STREAMS: u32 = 1024;
/// Bytes that a client may send on a gRPC stream before they are read.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Bytes that a client may send on an HTTP/2 connection, which is the largest window (RFC 9113 §6.9.1): 8191 streams with
/// slow targets leave room for all others.
const CONNECTION_WINDOW: u32 = i32::MAX as u32;
/// Uncompressed bytes of a request's header fields.
const HEADER_LIST: u32 = 16 * 1024;
/// Bytes of a packet: the default limit of gRPC libraries.
const MESSAGE: usize = 4 * 1024 * 1024;
/// Bytes that wait for the client on one gRPC stream, beside the session's own queue.
const SEND_BUFFER: usize = 64 * 1024;
/// Calls that a client may give up before any answer, or that are not for the method: so many at once, and then so many in
/// each second. Hardly any honest client can make and cancel as many. A client that gives up more is a flood
/// (CVE-2023-44487) and loses its connection.
const GIVEN_UP: u32 = 10_000;
/// Streams that a client may make this side reset by errors (CVE-2025-8671).
const OWN_RESETS: usize = 1024;

/// The egress listener.
pub struct Konnectivity {
    pub outbound: Outbound,
    /// An HTTP/2 connection that drains accepts no new streams and ends with its last one.
    pub generations: Generations,
    /// Dials and connections at once on one HTTP/2 connection.
    pub max_dials: usize,
}

/// A client's HTTP/2 connection, as all of its calls see it.
struct Client {
    outbound: Outbound,
    caller: Caller,
    slots: Slots,
    /// Whether the client has ever made a call.
    called: AtomicBool,
    /// How many calls the client may still give up.
    given_up: Mutex<Bucket>,
    /// Bounds the log lines about calls of other methods.
    unserved: LogThrottle,
    /// Cancelled when the client has given up too many calls.
    flooding: CancellationToken,
}

impl EgressListener for Konnectivity {
    fn outbound(&self) -> &Outbound {
        &self.outbound
    }

    async fn serve<S: CallerSocket>(self: Arc<Self>, socket: S, caller: Caller) {
        let draining = self.generations.present().draining;
        let client = Arc::new(Client {
            outbound: self.outbound.clone(),
            caller,
            slots: Slots::new(self.max_dials),
            called: AtomicBool::new(false),
            given_up: Mutex::new(Bucket::new(Rate::new(GIVEN_UP, GIVEN_UP), Instant::now().into_std())),
            unserved: LogThrottle::with_burst(LOG_BURST),
            flooding: CancellationToken::new(),
        });
        let service = service_fn(|request| {
            let client = client.clone();
            async move { Ok::<_, Infallible>(client.answer(request).await) }
        });
        let streams = u32::try_from(self.max_dials).unwrap_or(u32::MAX).saturating_add(SPARE_STREAMS);
        let connection = http2::Builder::new(Executor(self.outbound.tasks.clone()))
            .max_concurrent_streams(streams)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(authority::MAX_FRAME)
            .max_header_list_size(HEADER_LIST)
            .max_send_buf_size(SEND_BUFFER)
            // The library reads all that has arrived before it accepts the first of it, so a client may cancel all of its
            // dials before they are accepted. Each takes some KB until then.
            .max_pending_accept_reset_streams(streams as usize)
            .max_local_error_reset_streams(OWN_RESETS)
            .serve_connection(TokioIo::new(WithAuthority::new(socket)), service);
        let mut connection = pin!(connection);
        let mut late = pin!(tokio::time::sleep(self.outbound.limits.head_timeout));
        let (mut waiting, mut accepting) = (true, true);
        let error = loop {
            tokio::select! {
                ended = connection.as_mut() => match ended {
                    Err(error) if !client.called.load(Ordering::Relaxed) => break cause(&error),
                    Err(error) => {
                        let error = cause(&error);
                        return tracing::debug!(origin = %client.caller.origin, error, "HTTP/2 connection failed");
                    }
                    Ok(()) => return,
                },
                () = client.flooding.cancelled() => break "too many calls given up before their answer".to_owned(),
                () = &mut late, if waiting => {
                    if !client.called.load(Ordering::Relaxed) {
                        break "no gRPC call in time".to_owned();
                    }
                    waiting = false;
                }
                () = draining.cancelled(), if accepting => {
                    accepting = false;
                    connection.as_mut().graceful_shutdown();
                }
            }
        };
        self.outbound.bad_request(client.caller.listener, &client.caller.origin, &error);
    }
}

/// The innermost cause of an error, which is the most specific one.
fn cause(error: &hyper::Error) -> String {
    let mut cause: &dyn Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

impl Client {
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let answer = self.clone().call(request).await;
        // The method's own answers have their status in the trailers.
        if answer.headers().contains_key("grpc-status") {
            self.gave_up();
        }
        answer
    }

    async fn call(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path();
        if path != PROXY {
            let error = format!("{:?} is not served; only {PROXY} is", excerpt(path));
            let Caller { listener, origin, .. } = &self.caller;
            self.outbound.bad_requests(&self.unserved, listener, origin, &error);
            return Status::unimplemented(error).into_http();
        }
        self.called.store(true, Ordering::Relaxed);
        let mut grpc = Grpc::new(ProstCodec::<Packet, Packet>::default()).max_decoding_message_size(MESSAGE);
        // It answers by itself what is encoded in a way that it can't read.
        grpc.streaming(Proxy(self), request).await
    }

    fn counts(&self) -> &KonnectivityCounts {
        &self.outbound.metrics.konnectivity
    }

    /// Counts a call that the client has given up before any answer, or that has none but an error.
    fn gave_up(&self) {
        let mut given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        if given_up.take(Instant::now().into_std()).is_err() {
            self.flooding.cancel();
        }
    }
}

/// The method. Its response begins at once, so that the client learns that the method is served.
struct Proxy(Arc<Client>);

impl StreamingService<Packet> for Proxy {
    type Response = Packet;
    type ResponseStream = Outgoing;
    type Future = Ready<Result<tonic::Response<Outgoing>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<Packet>>) -> Self::Future {
        let client = self.0.clone();
        let gone = CancellationToken::new();
        let (outbound, caller) = (client.outbound.clone(), client.caller.clone());
        let (session, answers) = Session::new(outbound, caller, client.slots.clone(), gone.clone());
        client.outbound.tasks.spawn(session.run(request.into_inner()));
        client.counts().calls.inc();
        let outgoing = Outgoing { answers, client, answered: false, ended: false, _gone: gone.drop_guard() };
        ready(Ok(tonic::Response::new(outgoing)))
    }
}

/// The packets for the client. Dropping them, as happens when the client leaves, ends the session.
struct Outgoing {
    answers: Answers,
    client: Arc<Client>,
    /// Whether there has been any answer, or the end.
    answered: bool,
    /// Whether the session has ended before the client has left.
    ended: bool,
    _gone: DropGuard,
}

impl Stream for Outgoing {
    type Item = Result<Packet, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = self.answers.poll_recv(cx);
        match &polled {
            Poll::Ready(Some(Ok(packet))) => self.client.counts().to_client.count(packet.r#type),
            Poll::Ready(Some(Err(status))) => self.client.counts().call_failed(status.code()),
            Poll::Ready(None) | Poll::Pending => {}
        }
        self.answered |= polled.is_ready();
        self.ended |= matches!(&polled, Poll::Ready(None | Some(Err(_))));
        polled
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.client.counts().calls.dec();
        if !self.ended {
            self.client.counts().call_failed(Code::Cancelled);
        }
        if !self.answered {
            self.client.gave_up();
        }
    }
}

#[cfg(test)]
mod tests;
