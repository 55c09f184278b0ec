//! The body of a response on its way to the caller, and the resources that it holds until its last byte has been sent.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use futures_util::{future::BoxFuture, task::AtomicWaker};
use http_body_util::Full;
use hyper::body::{Body, Frame, SizeHint};
use proto_net::admin;

use super::{limits::RequestPermit, recorder::Recorder, upstream::ResponseBody};
use crate::http::{exchange, watched::Busy};

/// The progress of a response on its way to the caller. The body can't observe it, because hyper does not poll the body
/// while the caller's flow-control window is closed.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The number of pieces that hyper has taken and not sent yet.
    pending: AtomicUsize,
    /// Changes whenever a piece makes progress.
    moves: AtomicUsize,
    /// Wakes whoever waits until all pieces have been sent.
    sent: AtomicWaker,
}

impl Progress {
    /// Completes once all pieces have been sent.
    pub(super) fn poll_sent(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.sent.register(cx.waker());
        if self.is_pending() { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Returns a number that changes whenever a piece makes progress, while pieces have not been sent.
    pub(super) fn pending(&self) -> Option<usize> {
        self.is_pending().then(|| self.moves.load(Ordering::Relaxed))
    }

    fn is_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire) > 0
    }

    fn moved(&self) {
        self.moves.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that hyper has taken a piece.
    pub(super) fn taken(&self) {
        self.pending.fetch_add(1, Ordering::Relaxed);
        self.moved();
    }

    /// Records that hyper has sent or dropped a piece.
    pub(super) fn dropped(&self) {
        self.moved();
        if self.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.sent.wake();
        }
    }
}

/// The resources that a response holds until its last byte has been sent.
pub(super) struct Resources {
    pub record: Arc<Recorder>,
    pub _busy: Busy,
    pub _seat: Option<RequestPermit>,
    pub progress: Arc<Progress>,
}

/// A piece of a response's body. hyper drops it once it has been sent.
pub(super) struct Piece {
    bytes: Bytes,
    resources: Arc<Resources>,
}

impl Piece {
    fn new(bytes: Bytes, resources: &Arc<Resources>) -> Self {
        resources.progress.taken();
        Self { bytes, resources: resources.clone() }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.resources.progress.dropped();
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.resources.progress.moved();
        self.bytes.advance(count);
    }
}

/// The body of a response.
pub(super) struct Answer {
    content: Content,
    resources: Arc<Resources>,
    /// Completes when the credential that the response was granted for is no longer valid, which ends the response.
    end: Option<BoxFuture<'static, ()>>,
}

/// The source of a response's bytes.
pub(super) enum Content {
    /// The front end itself.
    Own(Full<Bytes>),
    /// kube-apiserver.
    Relayed(ResponseBody),
    /// A target behind a proxy URL, through a tunnel.
    Target(exchange::Body),
    /// The agent's page.
    Page(admin::Body),
}

impl Answer {
    pub(super) fn new(content: Content, resources: Resources, end: Option<BoxFuture<'static, ()>>) -> Self {
        Self { content, resources: Arc::new(resources), end }
    }
}

impl Body for Answer {
    type Data = Piece;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, hyper::Error>>> {
        let this = &mut *self;
        if this.end.as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(None);
        }
        let frame = match &mut this.content {
            Content::Own(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Content::Page(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
            Content::Target(body) => Pin::new(body).poll_frame(cx),
            Content::Relayed(body) => Pin::new(body).poll_frame(cx),
        };
        let resources = &this.resources;
        frame.map_ok(|frame| {
            frame.map_data(|bytes| {
                resources.record.sent(bytes.len() as u64);
                Piece::new(bytes, resources)
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Own(body) => body.is_end_stream(),
            Content::Page(body) => body.is_end_stream(),
            Content::Target(body) => body.is_end_stream(),
            Content::Relayed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Own(body) => body.size_hint(),
            Content::Page(body) => body.size_hint(),
            Content::Target(body) => body.size_hint(),
            Content::Relayed(body) => body.size_hint(),
        }
    }
}
