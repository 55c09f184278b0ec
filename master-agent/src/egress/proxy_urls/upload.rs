//! The body of a request on its way to its target.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::Sleep;

use super::headers;
use crate::http::claims::Claims;

/// A request body whose trailers carry no identity. It fails with [`Stalled`] if the caller sends nothing for too long while
/// the target waits. Once the response has begun there is no such limit, since the request then ends with the response.
pub(super) struct Upload<B = Incoming> {
    body: B,
    timeout: Duration,
    answered: Answered,
    claims: Arc<Claims>,
    /// Set while the target waits.
    deadline: Option<Pin<Box<Sleep>>>,
}

/// Whether the response has begun.
#[derive(Clone, Debug, Default)]
pub(super) struct Answered(Arc<AtomicBool>);

/// The caller has stopped sending its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no bytes of the request's body have arrived for {}", humantime::format_duration(*.0))]
pub(super) struct Stalled(Duration);

impl<B> Upload<B> {
    pub(super) fn new(body: B, timeout: Duration, answered: Answered, claims: Arc<Claims>) -> Self {
        Self { body, timeout, answered, claims, deadline: None }
    }
}

impl Answered {
    pub(super) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Stalled {
    /// Returns the stall that made a request fail, if there was one.
    pub(super) fn cause_of(error: &hyper::Error) -> Option<Self> {
        std::error::Error::source(error)?.downcast_ref().copied()
    }
}

impl<B> Body for Upload<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::error::Error + Send + Sync + 'static,
{
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        let frame = Pin::new(&mut this.body).poll_frame(cx);
        if frame.is_ready() || this.answered.is_set() {
            this.deadline = None;
            let claims = &this.claims;
            let frame = frame.map_ok(|frame| match frame.into_trailers() {
                Ok(mut trailers) => {
                    headers::trailers(&mut trailers, claims);
                    Frame::trailers(trailers)
                }
                Err(frame) => frame,
            });
            return frame.map_err(Into::into);
        }
        let timeout = this.timeout;
        let deadline = this.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        deadline.as_mut().poll(cx).map(|()| Some(Err(Stalled(timeout).into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::{BodyExt, StreamBody};
    use tokio::{sync::mpsc, time::Instant};

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(120);

    type Piece = Result<Frame<Bytes>, Infallible>;

    fn upload(
        answered: Answered,
    ) -> (mpsc::Sender<Piece>, Upload<impl Body<Data = Bytes, Error = Infallible> + Unpin>) {
        let (sender, mut pieces) = mpsc::channel(1);
        let stream = futures_util::stream::poll_fn(move |cx| pieces.poll_recv(cx));
        (sender, Upload::new(StreamBody::new(stream), TIMEOUT, answered, Arc::default()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_body_fails() {
        let (sender, mut upload) = upload(Answered::default());
        let trickle = async {
            for _ in 0..10 {
                tokio::time::sleep(TIMEOUT - Duration::from_secs(1)).await;
                sender.send(Ok(Frame::data(Bytes::from_static(b"x")))).await.unwrap();
            }
            Instant::now()
        };
        let read = async {
            for _ in 0..10 {
                upload.frame().await.unwrap().unwrap();
            }
            let error = upload.frame().await.unwrap().unwrap_err();
            assert_eq!(error.downcast_ref(), Some(&Stalled(TIMEOUT)));
            Instant::now()
        };
        let (last, failed) = tokio::join!(trickle, read);
        assert_eq!(failed - last, TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn only_time_that_the_target_waits_counts_and_none_after_the_answer() {
        let answered = Answered::default();
        let (sender, mut upload) = upload(answered.clone());
        // The target does not read.
        tokio::time::sleep(TIMEOUT * 2).await;
        assert!(tokio::time::timeout(TIMEOUT / 2, upload.frame()).await.is_err());
        answered.set();
        assert!(tokio::time::timeout(TIMEOUT * 9, upload.frame()).await.is_err());
        sender.send(Ok(Frame::data(Bytes::new()))).await.unwrap();
        upload.frame().await.unwrap().unwrap();
        drop(sender);
        assert!(upload.frame().await.is_none());
    }
}
