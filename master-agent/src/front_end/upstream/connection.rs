//! One connection to an API server, and the exchange that goes over it.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use futures_util::FutureExt;
use hyper::{
    Request, Response, StatusCode, Uri,
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::{http1, http2},
    header,
    http::uri::{PathAndQuery, Scheme},
};
use tokio::{sync::OwnedSemaphorePermit, task::coop::unconstrained, time::Instant};

use super::{RequestBody, server::Server};

/// A connection that takes a request.
pub struct Connection {
    /// It has served a request before.
    pub kept: bool,
    pub(super) server: Arc<Server>,
    pub(super) sender: Sender,
}

pub(super) enum Sender {
    Http1(Http1),
    Http2(http2::SendRequest<RequestBody>, Place),
}

/// When a connection was made, and by which files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Made {
    pub generation: u64,
    pub at: Instant,
}

/// A connection without a task of its own: whoever waits for something from it moves it on, so that a request
/// changes no tasks, and one that is given up ends its connection at once.
pub(super) struct Http1 {
    sender: http1::SendRequest<RequestBody>,
    /// `None` once it has ended.
    driver: Option<Driver>,
    pub made: Made,
    pub used: Instant,
    _permit: OwnedSemaphorePermit,
}

pub(super) type Driver = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

impl Http1 {
    pub fn new(
        sender: http1::SendRequest<RequestBody>,
        driver: Driver,
        made: Made,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        Self { sender, driver: Some(driver), made, used: made.at, _permit: permit }
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        drive(&mut self.driver, cx);
    }

    /// Whether it can take a request now. A task that has done much must not hear "not yet" for that alone.
    pub fn is_ready(&mut self) -> bool {
        let ready = poll_fn(|cx| {
            self.drive(cx);
            let takes = self.driver.is_some() && matches!(self.sender.ready().now_or_never(), Some(Ok(())));
            Poll::Ready(takes)
        });
        let ready = Pin::new(&mut unconstrained(ready)).poll(&mut Context::from_waker(Waker::noop()));
        ready == Poll::Ready(true)
    }
}

fn drive(driver: &mut Option<Driver>, cx: &mut Context<'_>) {
    let Some(connection) = driver else { return };
    if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
        *driver = None;
        if let Err(error) = ended {
            tracing::debug!(error = causes(&error), "a connection to an API server failed");
        }
    }
}

/// One stream of a shared connection.
pub(super) struct Place(Arc<AtomicUsize>);

impl Place {
    /// Counted in `streams` for as long as it lives.
    pub fn take(streams: &Arc<AtomicUsize>) -> Self {
        streams.fetch_add(1, Ordering::Relaxed);
        Self(streams.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keeps a connection while its response is read.
pub struct Lease {
    server: Arc<Server>,
    sender: Option<Sender>,
}

impl Lease {
    /// Moves the connection on. To be done whenever its response has nothing more to read yet.
    pub fn drive(&mut self, cx: &mut Context<'_>) {
        if let Some(Sender::Http1(connection)) = &mut self.sender {
            connection.drive(cx);
        }
    }

    /// The response has been read to its end: the connection can serve another request, unless the rest of this
    /// one is still being sent.
    fn finish(&mut self) {
        if let Some(Sender::Http1(connection)) = self.sender.take() {
            self.server.keep(connection);
        }
    }
}

/// The body of a response, which moves its connection on, and gives it back at its end.
pub struct ResponseBody {
    incoming: Incoming,
    lease: Lease,
}

impl ResponseBody {
    fn of(response: Response<Incoming>, lease: Lease) -> Response<Self> {
        let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let mut response = response.map(|incoming| Self { incoming, lease });
        // What has no body is not asked for one.
        if !upgraded && response.body().incoming.is_end_stream() {
            response.body_mut().lease.finish();
        }
        response
    }

    /// The connection, where it changes protocols.
    pub fn into_lease(self) -> Lease {
        self.lease
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Self { incoming, lease } = &mut *self;
        let mut frame = Pin::new(&mut *incoming).poll_frame(cx);
        if frame.is_pending() {
            lease.drive(cx);
            frame = Pin::new(&mut *incoming).poll_frame(cx);
        }
        if matches!(frame, Poll::Ready(None)) || incoming.is_end_stream() {
            lease.finish();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl Connection {
    /// Sends a request. A failure gives the request back where nothing of it has been sent.
    pub async fn send(
        self,
        mut request: Request<RequestBody>,
    ) -> Result<Response<ResponseBody>, (hyper::Error, Option<Request<RequestBody>>)> {
        let Self { server, sender, .. } = self;
        let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        match sender {
            Sender::Http1(mut connection) => {
                *request.uri_mut() = Uri::from(path);
                if let Some(host) = server.host_header() {
                    request.headers_mut().insert(header::HOST, host);
                }
                let Http1 { sender, driver, .. } = &mut connection;
                let mut sending = pin!(sender.try_send_request(request));
                let sent = poll_fn(|cx| {
                    if let Poll::Ready(sent) = sending.as_mut().poll(cx) {
                        return Poll::Ready(sent);
                    }
                    drive(driver, cx);
                    sending.as_mut().poll(cx)
                });
                match sent.await {
                    Ok(response) => {
                        let lease = Lease { server, sender: Some(Sender::Http1(connection)) };
                        Ok(ResponseBody::of(response, lease))
                    }
                    Err(mut error) => {
                        let unsent = error.take_message();
                        Err((error.into_error(), unsent))
                    }
                }
            }
            Sender::Http2(mut sender, place) => {
                request.headers_mut().remove(header::HOST);
                let mut parts = hyper::http::uri::Parts::default();
                parts.scheme = Some(Scheme::HTTPS);
                parts.authority = Some(server.authority().clone());
                parts.path_and_query = Some(path);
                if let Ok(uri) = Uri::from_parts(parts) {
                    *request.uri_mut() = uri;
                }
                *request.version_mut() = hyper::Version::HTTP_2;
                match sender.try_send_request(request).await {
                    Ok(response) => {
                        let lease = Lease { server, sender: Some(Sender::Http2(sender, place)) };
                        Ok(ResponseBody::of(response, lease))
                    }
                    Err(mut error) => {
                        let unsent = error.take_message().map(|mut request| {
                            *request.version_mut() = hyper::Version::HTTP_11;
                            request
                        });
                        Err((error.into_error(), unsent))
                    }
                }
            }
        }
    }
}

/// hyper's errors show their cause only when they are asked for it.
pub fn causes(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
