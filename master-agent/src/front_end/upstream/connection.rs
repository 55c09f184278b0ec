//! A connection to an API server during one exchange.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::{
    Request, Response, StatusCode, Uri,
    body::{Body, Frame, Incoming, SizeHint},
    header,
    http::uri::{PathAndQuery, Scheme},
};

use super::{
    body::RequestBody,
    sender::{Http1, Sender},
    server::{ConnectError, Protocol, Server},
    shared::Stream,
};

/// A connection to an API server that is ready to take a request.
pub(super) struct ServerConnection {
    /// Whether the connection has served a request before.
    pub kept: bool,
    server: Arc<Server>,
    sender: Sender,
}

/// Keeps a connection, or a stream of one, while its response is being read.
pub struct Lease(Option<Leased>);

enum Leased {
    Http1(Http1, Arc<Server>),
    Http2(Stream),
}

impl Lease {
    /// Drives the connection if it has no task of its own. This must be called whenever the response is pending.
    pub fn drive(&mut self, cx: &mut Context<'_>) {
        if let Some(Leased::Http1(connection, _)) = &mut self.0 {
            connection.drive(cx);
        }
    }

    /// Returns the connection to the pool once the response has been read completely. The pool closes the connection if
    /// the request has not been sent completely.
    fn finish(&mut self) {
        match self.0.take() {
            Some(Leased::Http1(connection, server)) => server.keep(connection),
            Some(Leased::Http2(stream)) => stream.finish(),
            None => {}
        }
    }
}

/// The body of a response, which drives its connection and returns it to the pool at its end.
pub struct ResponseBody {
    incoming: Incoming,
    lease: Lease,
}

impl ResponseBody {
    fn of(response: Response<Incoming>, leased: Leased) -> Response<Self> {
        let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let mut response = response.map(|incoming| Self { incoming, lease: Lease(Some(leased)) });
        // hyper does not poll an empty body, so the lease ends here.
        if !upgraded && response.body().incoming.is_end_stream() {
            response.body_mut().lease.finish();
        }
        response
    }

    /// Returns the connection of a response that changes the protocol.
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

impl ServerConnection {
    /// Takes a kept connection to a server, or makes a new one.
    pub(super) async fn to(server: &Arc<Server>, protocol: Protocol) -> Result<Self, ConnectError> {
        let (sender, kept) = server.sender(protocol).await?;
        Ok(Self { kept, server: server.clone(), sender })
    }

    /// Sends a request. An error contains the request if nothing of it has been sent.
    pub(super) async fn send(
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
                match connection.send(request).await {
                    Ok(response) => Ok(ResponseBody::of(response, Leased::Http1(connection, server))),
                    Err(mut error) => {
                        let unsent = error.take_message();
                        Err((error.into_error(), unsent))
                    }
                }
            }
            Sender::Http2(mut sender, stream) => {
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
                    Ok(response) => Ok(ResponseBody::of(response, Leased::Http2(stream))),
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
