//! The body of a request on its way to an API server.

use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::Sleep;

/// The number of bytes of a body that have been received so far.
pub type ReceivedBytes = Arc<AtomicU64>;

/// A body that is passed on as it arrives, within limits and without trailers.
pub struct RequestBody(Option<LimitedBody>);

struct LimitedBody {
    incoming: Incoming,
    /// The number of bytes that may still arrive.
    left: u64,
    stall_timeout: Duration,
    /// When the body counts as stalled. It is set while the server waits for more of the body.
    deadline: Option<Pin<Box<Sleep>>>,
    received: ReceivedBytes,
    ended: bool,
    fault: Fault,
}

/// Tells why a body was not passed on completely, once it is so. Over HTTP/2, the failure of the exchange does not say it.
pub(super) type Fault = Arc<OnceLock<BodyError>>;

/// The limits on the bodies of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyLimits {
    pub max_bytes: u64,
    /// The longest time between two pieces of a body.
    pub stall_timeout: Duration,
}

/// Why a body was not passed on completely. The caller is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    #[error("the request's body is larger than what is accepted")]
    TooLarge,
    #[error("the request's body stalled")]
    Stalled,
    #[error("the request's body broke off: {0}")]
    Broken(String),
}

impl RequestBody {
    pub fn empty() -> Self {
        Self(None)
    }

    /// Takes a body. `received` makes the counter of its bytes, unless it is empty.
    pub fn new(incoming: Incoming, limits: BodyLimits, received: impl FnOnce() -> ReceivedBytes) -> Self {
        let BodyLimits { max_bytes: left, stall_timeout } = limits;
        if incoming.is_end_stream() {
            return Self(None);
        }
        let received = received();
        let fault = Fault::default();
        Self(Some(LimitedBody {
            incoming,
            left,
            stall_timeout,
            deadline: None,
            received,
            ended: false,
            fault,
        }))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    pub(super) fn fault(&self) -> Option<Fault> {
        self.0.as_ref().map(|body| body.fault.clone())
    }
}

impl LimitedBody {
    fn fail(&mut self, error: BodyError) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.ended = true;
        let _ = self.fault.set(error.clone());
        Poll::Ready(Some(Err(error)))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(body) = self.0.as_mut().filter(|body| !body.ended) else { return Poll::Ready(None) };
        let frame = match Pin::new(&mut body.incoming).poll_frame(cx) {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                let timeout = body.stall_timeout;
                let deadline = body.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
                if deadline.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                return body.fail(BodyError::Stalled);
            }
        };
        let data = match frame {
            Some(Ok(frame)) => frame.into_data(),
            Some(Err(error)) => return body.fail(BodyError::Broken(error.to_string())),
            None => {
                body.ended = true;
                return Poll::Ready(None);
            }
        };
        // Trailers are dropped, because they could contain headers that are removed from the head.
        let Ok(data) = data else {
            body.ended = true;
            return Poll::Ready(None);
        };
        let size = data.remaining() as u64;
        body.received.fetch_add(size, Ordering::Relaxed);
        body.deadline = None;
        match body.left.checked_sub(size) {
            Some(left) => {
                body.left = left;
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            None => body.fail(BodyError::TooLarge),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|body| body.ended || body.incoming.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(|| SizeHint::with_exact(0), |body| body.incoming.size_hint())
    }
}
