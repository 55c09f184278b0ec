//! The body of a response on its way to the caller, and what is held until its last byte has left.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes};
use futures_util::future::BoxFuture;
use http_body_util::Full;
use hyper::body::{Body, Frame, SizeHint};
use proto_net::admin;
use tokio::sync::Notify;

use super::{limits::RequestPermit, recorder::Recorder, upstream::ResponseBody};
use crate::http::{exchange, watched::Busy};

/// How far a response has got on its way to the caller. The body itself can't tell: hyper does not poll it while the
/// caller opens no window.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Pieces that hyper has taken and not sent yet.
    owed: AtomicUsize,
    /// Changes whenever something happens to a piece.
    moves: AtomicUsize,
    sent: Notify,
}

impl Progress {
    /// Completes once the caller has taken nothing of the pieces for `patience`, or for up to twice as long.
    pub(super) async fn stalled(&self, patience: Duration) {
        loop {
            let before = self.moves.load(Ordering::Relaxed);
            tokio::time::sleep(patience).await;
            if self.is_owed() && self.moves.load(Ordering::Relaxed) == before {
                return;
            }
        }
    }

    /// Completes once all pieces have been sent.
    pub(super) async fn sent(&self) {
        while self.is_owed() {
            self.sent.notified().await;
        }
    }

    fn is_owed(&self) -> bool {
        self.owed.load(Ordering::Acquire) > 0
    }

    fn moved(&self) {
        self.moves.fetch_add(1, Ordering::Relaxed);
    }
}

/// What is held for as long as a response is passed on.
pub(super) struct Held {
    pub record: Arc<Recorder>,
    pub _busy: Busy,
    pub _seat: Option<RequestPermit>,
    pub progress: Arc<Progress>,
}

/// Some bytes of a response, until they have been sent.
pub(super) struct Piece {
    bytes: Bytes,
    held: Arc<Held>,
}

impl Piece {
    fn new(bytes: Bytes, held: &Arc<Held>) -> Self {
        held.progress.owed.fetch_add(1, Ordering::Relaxed);
        held.progress.moved();
        Self { bytes, held: held.clone() }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let progress = &self.held.progress;
        progress.moved();
        if progress.owed.fetch_sub(1, Ordering::AcqRel) == 1 {
            progress.sent.notify_one();
        }
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
        self.held.progress.moved();
        self.bytes.advance(count);
    }
}

/// The body of a response.
pub(super) struct Answer {
    content: Content,
    held: Arc<Held>,
    /// Completes when the credential that the response was granted for ends, which cuts the response off.
    end: Option<BoxFuture<'static, ()>>,
}

/// Where the bytes of a response come from.
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
    pub(super) fn new(content: Content, held: Held, end: Option<BoxFuture<'static, ()>>) -> Self {
        Self { content, held: Arc::new(held), end }
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
        let held = &this.held;
        frame.map_ok(|frame| {
            frame.map_data(|bytes| {
                held.record.sent(bytes.len() as u64);
                Piece::new(bytes, held)
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
