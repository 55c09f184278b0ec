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
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::Stream;
use hyper::{Request, Response, body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::TokioIo;
use proto::konnectivity::{PROXY, Packet};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Status, Streaming,
    body::Body,
    server::{Grpc, StreamingService},
};
use tonic_prost::ProstCodec;

use super::{listener::EgressListener, outbound::Outbound, socket::CallerSocket};
use crate::{http::Executor, stream::caller::Caller};
use authority::WithAuthority;
use session::{Answers, Session};

/// Concurrent gRPC streams on one HTTP/2 connection.
const STREAMS: u32 = 1024;
/// Bytes that a client may send on a gRPC stream before they are read.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Bytes that a client may send on an HTTP/2 connection: streams with slow targets leave room for all others.
const CONNECTION_WINDOW: u32 = STREAMS * STREAM_WINDOW;
/// Uncompressed bytes of a request's header fields.
const HEADER_LIST: u32 = 16 * 1024;
/// Bytes of a packet: the default limit of gRPC libraries.
const MESSAGE: usize = 4 * 1024 * 1024;
/// Bytes that wait for the client on one gRPC stream, beside the session's own queue.
const SEND_BUFFER: usize = 64 * 1024;
/// Streams that a client may reset before they are accepted, and streams that it may make this side reset
/// (CVE-2023-44487, CVE-2025-8671).
const PENDING_RESETS: usize = 20;
const OWN_RESETS: usize = 1024;

/// The egress listener.
pub struct Konnectivity {
    pub outbound: Outbound,
    /// Once cancelled, HTTP/2 connections accept no new streams and end with their last one.
    pub draining: CancellationToken,
}

impl EgressListener for Konnectivity {
    fn outbound(&self) -> &Outbound {
        &self.outbound
    }

    async fn serve<S: CallerSocket>(self: Arc<Self>, socket: S, caller: Caller) {
        let called = Arc::new(AtomicBool::new(false));
        let service = {
            let (outbound, caller, called) = (self.outbound.clone(), caller.clone(), called.clone());
            service_fn(move |request| {
                let call = Call { outbound: outbound.clone(), caller: caller.clone() };
                let called = called.clone();
                async move { Ok::<_, Infallible>(call.answer(request, &called).await) }
            })
        };
        let connection = http2::Builder::new(Executor(self.outbound.tasks.clone()))
            .max_concurrent_streams(STREAMS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(authority::MAX_FRAME)
            .max_header_list_size(HEADER_LIST)
            .max_send_buf_size(SEND_BUFFER)
            .max_pending_accept_reset_streams(PENDING_RESETS)
            .max_local_error_reset_streams(OWN_RESETS)
            .serve_connection(TokioIo::new(WithAuthority::new(socket)), service);
        let mut connection = pin!(connection);
        let mut late = pin!(tokio::time::sleep(self.outbound.limits.head_timeout));
        let (mut waiting, mut accepting) = (true, true);
        let error = loop {
            tokio::select! {
                ended = connection.as_mut() => match ended {
                    Err(error) if !called.load(Ordering::Relaxed) => break cause(&error),
                    Err(error) => {
                        let error = cause(&error);
                        return tracing::debug!(origin = %caller.origin, error, "HTTP/2 connection failed");
                    }
                    Ok(()) => return,
                },
                () = &mut late, if waiting => {
                    if !called.load(Ordering::Relaxed) {
                        break "no gRPC call in time".to_owned();
                    }
                    waiting = false;
                }
                () = self.draining.cancelled(), if accepting => {
                    accepting = false;
                    connection.as_mut().graceful_shutdown();
                }
            }
        };
        self.outbound.bad_request(caller.listener, &caller.origin, &error);
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

/// One request.
struct Call {
    outbound: Outbound,
    caller: Caller,
}

impl Call {
    async fn answer(self, request: Request<Incoming>, called: &AtomicBool) -> Response<Body> {
        let path = request.uri().path();
        if path != PROXY {
            let error = format!("{path:?} is not served; only {PROXY} is");
            self.outbound.bad_request(self.caller.listener, &self.caller.origin, &error);
            return Status::unimplemented(error).into_http();
        }
        called.store(true, Ordering::Relaxed);
        let mut grpc = Grpc::new(ProstCodec::<Packet, Packet>::default()).max_decoding_message_size(MESSAGE);
        grpc.streaming(Proxy(self), request).await
    }
}

/// The method. Its response begins at once, so that the client learns that the method is served.
struct Proxy(Call);

impl StreamingService<Packet> for Proxy {
    type Response = Packet;
    type ResponseStream = Outgoing;
    type Future = Ready<Result<tonic::Response<Outgoing>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<Packet>>) -> Self::Future {
        let Call { outbound, caller } = &self.0;
        let gone = CancellationToken::new();
        let (session, answers) = Session::new(outbound.clone(), caller.clone(), gone.clone());
        outbound.tasks.spawn(session.run(request.into_inner()));
        ready(Ok(tonic::Response::new(Outgoing { answers, _gone: gone.drop_guard() })))
    }
}

/// The packets for the client. Dropping them, as happens when the client leaves, ends the session.
struct Outgoing {
    answers: Answers,
    _gone: DropGuard,
}

impl Stream for Outgoing {
    type Item = Result<Packet, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.answers.poll_recv(cx)
    }
}
