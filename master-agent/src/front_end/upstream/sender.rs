//! The sender of requests on one connection to an API server, which is an HTTP/1.1 connection or a stream of a shared
//! HTTP/2 connection.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use futures_util::FutureExt;
use hyper::{
    Request, Response,
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use proto_net::causes::causes;
use tokio::{sync::OwnedSemaphorePermit, task::coop::unconstrained, time::Instant};

use super::{body::RequestBody, established::Established, shared::Stream};

/// Sends requests over one connection.
pub(super) enum Sender {
    Http1(Http1),
    Http2(http2::SendRequest<RequestBody>, Stream),
}

/// An HTTP/1.1 connection. It has no task of its own and is driven by the task that waits for it. Therefore a request
/// never changes tasks, and an abandoned request closes its connection at once.
pub(super) struct Http1 {
    sender: http1::SendRequest<RequestBody>,
    /// `None` once the connection has ended.
    driver: Option<Driver>,
    pub established: Established,
    pub used: Instant,
    _permit: OwnedSemaphorePermit,
}

pub(super) type Driver = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

impl Http1 {
    pub(super) fn new(
        sender: http1::SendRequest<RequestBody>,
        driver: Driver,
        established: Established,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        Self { sender, driver: Some(driver), established, used: established.at, _permit: permit }
    }

    /// Sends a request, and drives the connection until the head of the response has arrived.
    pub(super) async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        let Self { sender, driver, .. } = self;
        let mut sending = pin!(sender.try_send_request(request));
        let sent = poll_fn(|cx| {
            if let Poll::Ready(sent) = sending.as_mut().poll(cx) {
                return Poll::Ready(sent);
            }
            drive(driver, cx);
            sending.as_mut().poll(cx)
        });
        sent.await
    }

    pub(super) fn drive(&mut self, cx: &mut Context<'_>) {
        drive(&mut self.driver, cx);
    }

    /// Whether the connection can take a request now. The check is exempt from tokio's cooperative scheduling, which
    /// would make every connection look busy to a task that has used up its budget.
    pub(super) fn is_ready(&mut self) -> bool {
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
            tracing::debug!(error = causes(&error), "connection to an API server failed");
        }
    }
}
