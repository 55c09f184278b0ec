//! How streams begin: one side asks for them, the other accepts or refuses them.

use std::{future::poll_fn, task::Poll, time::Duration};

use proto::{
    DialError, Target,
    mux::frame::{self, Frame},
};
use tokio::sync::{mpsc, oneshot};

use super::{
    endpoint::Mux,
    error::Violation,
    halves::{Entry, Reader, Writer},
    state::Answer,
};

/// The longest time before the end of a dial at which the peer gives it up, so that its answer, which has the cause, still
/// arrives.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// A stream that the peer asks for. Dropping it refuses the stream.
pub struct Incoming {
    pub(super) entry: Option<Entry>,
    pub target: Target,
    pub origin: String,
    /// How long the dial may take. The caller waits a little longer for the answer.
    pub timeout: Duration,
}

impl Incoming {
    /// Completes when the peer no longer wants the stream.
    pub async fn cancelled(&self) {
        if let Some(entry) = &self.entry {
            poll_fn(|cx| {
                let mut state = entry.shared.lock();
                if state.failed.is_some() {
                    return Poll::Ready(());
                }
                state.reader = Some(cx.waker().clone());
                Poll::Pending
            })
            .await;
        }
    }

    /// The halves of the stream: see [`Incoming::accept`].
    pub(crate) async fn accept_halves(mut self) -> Option<(Reader, Writer)> {
        let entry = self.entry.take()?;
        let opened = frame::encode(&Frame::Opened { stream: entry.id });
        entry.mux.send(opened).await.then(|| entry.into_halves())
    }

    /// Refuses the stream as [`Self::refuse`] does, without waiting for the link.
    pub fn reject(mut self, error: DialError) {
        if let Some(entry) = self.entry.take() {
            entry.reject(error);
        }
    }

    /// Tells the peer why the stream is not opened.
    pub async fn refuse(mut self, error: DialError) {
        if let Some(entry) = self.entry.take() {
            entry.shared.lock().ended = true;
            entry.mux.send(frame::encode(&Frame::Refused { stream: entry.id, error })).await;
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            let reason = "the other agent is stopping".into();
            entry.reject(DialError::TunnelLost { node: String::new(), reason });
        }
    }
}

impl Mux {
    /// The halves of a new stream: see [`Mux::open`].
    pub(crate) async fn open_halves(
        &self,
        target: &Target,
        origin: &str,
        timeout: Duration,
    ) -> Result<(Reader, Writer), DialError> {
        let for_peer = timeout.saturating_sub(ANSWER_TIME.min(timeout / 8));
        let timeout_ms = u32::try_from(for_peer.as_millis()).unwrap_or(u32::MAX);
        let (sender, answer) = oneshot::channel();
        let lost = || DialError::TunnelLost { node: String::new(), reason: self.closed_reason() };
        let dial = async {
            let in_order = self.0.opening.lock().await;
            let entry = self.register(sender)?;
            let (target, origin) = (target.to_string(), origin.to_owned());
            let open = Frame::Open { stream: entry.id, timeout_ms, target, origin };
            if !self.send(frame::encode(&open)).await {
                return Err(lost());
            }
            drop(in_order);
            // From now on the peer has to be told when the stream is dropped.
            entry.shared.lock().ended = false;
            let answer = answer.await.unwrap_or_else(|_| Err(lost()));
            if answer.is_err() {
                entry.shared.lock().ended = true;
            }
            answer.map(|()| entry.into_halves())
        };
        tokio::time::timeout(timeout, dial).await.unwrap_or_else(|_| {
            Err(DialError::TimedOut(format!(
                "{target}: the other agent gave no answer within {}",
                humantime::format_duration(timeout)
            )))
        })
    }

    fn register(&self, answer: Answer) -> Result<Entry, DialError> {
        let mut streams = self.streams();
        if let Some(closed) = &streams.closed {
            return Err(DialError::TunnelLost { node: String::new(), reason: closed.0.clone() });
        }
        if let Some(reason) = &streams.going_away {
            return Err(DialError::TunnelLost { node: String::new(), reason: reason.clone() });
        }
        if self.is_full() {
            return Err(DialError::TooManyStreams(format!(
                "the tunnel carries {} streams already (max_streams_per_tunnel)",
                self.0.max_streams
            )));
        }
        let id = loop {
            let id = streams.ids.use_next();
            if !streams.open.contains_key(&id) {
                break id;
            }
        };
        let entry = Entry::insert(self, &mut streams, id, Some(answer));
        // The peer does not know of the stream yet.
        entry.shared.lock().ended = true;
        Ok(entry)
    }
}

/// Takes an OPEN of the peer: hands the stream on, or refuses it.
pub(super) fn on_open(
    mux: &Mux,
    incoming: &mpsc::Sender<Incoming>,
    stream: u32,
    timeout_ms: u32,
    target: &str,
    origin: String,
) -> Result<(), Violation> {
    if mux.0.initiator {
        return Err(Violation::Opener);
    }
    if !mux.streams().ids.take(stream) {
        return Err(Violation::Reused);
    }
    let refuse = |error| {
        mux.answer(&Frame::Refused { stream, error });
        Ok(())
    };
    let target: Target = match target.parse() {
        Ok(target) => target,
        Err(e) => return refuse(DialError::BadTarget(e.to_string())),
    };
    let (permit, entry) = {
        let mut streams = mux.streams();
        // Ids begin again after all 2^32 have been used.
        if streams.open.contains_key(&stream) {
            return Err(Violation::Reused);
        }
        if let Some(reason) = &streams.going_away {
            return refuse(DialError::TunnelLost { node: String::new(), reason: reason.clone() });
        }
        let (Ok(permit), false) = (incoming.try_reserve(), mux.is_full()) else {
            let error =
                format!("the other agent carries {} streams of this tunnel already", mux.streams_open());
            return refuse(DialError::TooManyStreams(error));
        };
        (permit, Entry::insert(mux, &mut streams, stream, None))
    };
    permit.send(Incoming {
        entry: Some(entry),
        target,
        origin,
        timeout: Duration::from_millis(u64::from(timeout_ms)),
    });
    Ok(())
}
