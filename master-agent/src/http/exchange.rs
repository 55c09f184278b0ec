//! The rest of an exchange once its response has begun, which is the body of the response or an upgraded connection.
//! Either keeps the connection to the target open.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use proto_net::relay::{Counters, relay_until};
use tokio::sync::oneshot;

use super::watched::Busy;

/// How long the connection to the target may take to end once the response has been passed on. The upload may still be
/// in progress then, since a target may answer before its end.
const LINGER: Duration = Duration::from_secs(5);

/// The body of a response.
pub struct Body {
    content: Content,
    _busy: Option<Busy>,
}

enum Content {
    Own(Full<Bytes>),
    Relayed { incoming: Incoming, exchange: Exchange },
}

impl Body {
    pub fn empty() -> Self {
        Self::from(Full::default())
    }

    /// Creates a body that is passed on as it comes from the target.
    pub fn relayed(incoming: Incoming, exchange: Exchange) -> Self {
        Self { content: Content::Relayed { incoming, exchange }, _busy: None }
    }

    /// Keeps the caller's connection busy until the body has been passed on or dropped.
    pub fn while_busy(self, busy: Busy) -> Self {
        Self { _busy: Some(busy), ..self }
    }
}

impl From<Full<Bytes>> for Body {
    fn from(body: Full<Bytes>) -> Self {
        Self { content: Content::Own(body), _busy: None }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.content {
            Content::Own(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Content::Relayed { incoming, exchange } => {
                let frame = Pin::new(&mut *incoming).poll_frame(cx);
                if matches!(frame, Poll::Ready(None)) || incoming.is_end_stream() {
                    exchange.complete();
                }
                frame
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Own(body) => body.is_end_stream(),
            Content::Relayed { incoming, .. } => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Own(body) => body.size_hint(),
            Content::Relayed { incoming, .. } => incoming.size_hint(),
        }
    }
}

/// A connection that has changed to another protocol at both ends.
pub struct Upgrade {
    pub caller: OnUpgrade,
    pub target: OnUpgrade,
    pub exchange: Exchange,
    pub busy: Busy,
    pub half_closed_timeout: Duration,
}

impl Upgrade {
    /// Relays raw bytes until both directions have ended, one has ended and the other is silent, or `until` completes.
    pub async fn carry(self, carried: &Counters, until: impl Future<Output = ()>) {
        let Self { caller, target, mut exchange, busy, half_closed_timeout } = self;
        let (Ok(caller), Ok(target)) = (caller.await, target.await) else { return };
        let (caller, target) = (TokioIo::new(caller), TokioIo::new(target));
        match relay_until(caller, target, carried, half_closed_timeout, until).await {
            Ok(true) => exchange.complete(),
            Ok(false) => tracing::debug!(
                "upgraded connection was half-closed and silent for too long, or its time was over"
            ),
            Err(error) => tracing::debug!(%error, "upgraded connection failed"),
        }
        drop(busy);
    }
}

/// Keeps the connection to the target open while its exchange goes on. If it is dropped before the end, the connection
/// is cut at once.
pub struct Exchange(Option<oneshot::Sender<()>>);

impl Exchange {
    /// Creates an exchange. The future completes when the connection to the target is no longer needed.
    pub fn new() -> (Self, impl Future<Output = ()> + Send) {
        let (sender, receiver) = oneshot::channel();
        let unwanted = async {
            if receiver.await.is_ok() {
                tokio::time::sleep(LINGER).await;
            }
        };
        (Self(Some(sender)), unwanted)
    }

    /// Records that the response has been passed on completely.
    fn complete(&mut self) {
        if let Some(sender) = self.0.take() {
            let _ = sender.send(());
        }
    }
}
