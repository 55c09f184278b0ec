//! How streams begin: one side asks for them, the other accepts or refuses them.

use std::{future::poll_fn, task::Poll, time::Duration};

use proto::{
    DialError, Target,
    mux::{frame::Frame, ids::Opener, window},
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
        let opened = Frame::Opened { stream: entry.id, limit: u64::from(window::INITIAL) };
        entry.mux.send_frame(&opened).await.then(|| entry.into_halves())
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
            entry.mux.send_frame(&Frame::Refused { stream: entry.id, error }).await;
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
            let limit = u64::from(window::INITIAL);
            let open = Frame::Open { stream: entry.id, timeout_ms, limit, target, origin };
            if !self.send_frame(&open).await {
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
        if self.is_full(Opener::This) {
            return Err(DialError::TooManyStreams(format!(
                "the tunnel carries {} streams already (max_streams_per_tunnel)",
                self.0.limit(Opener::This)
            )));
        }
        let Some(id) = streams.ids.of_mut(Opener::This).use_next() else {
            let reason = "the tunnel has carried as many streams as there are ids".to_owned();
            return Err(DialError::TunnelLost { node: String::new(), reason });
        };
        let entry = Entry::insert(self, &mut streams, id, answer);
        // The peer does not know of the stream yet.
        entry.shared.lock().ended = true;
        Ok(entry)
    }
}

/// What an OPEN asks for.
pub(super) struct Asked {
    pub(super) stream: u64,
    pub(super) timeout_ms: u32,
    /// The number of bytes that this side may send.
    pub(super) limit: u64,
    pub(super) target: String,
    pub(super) origin: String,
}

/// Takes an OPEN of the peer: hands the stream on, or refuses it.
pub(super) fn on_open(mux: &Mux, incoming: &mpsc::Sender<Incoming>, asked: Asked) -> Result<(), Violation> {
    let Asked { stream, timeout_ms, limit, target, origin } = asked;
    if mux.0.settings.numbering.opener(stream) == Opener::This || mux.0.limit(Opener::Peer) == 0 {
        return Err(Violation::Opener);
    }
    if limit > u64::from(window::largest(mux.version())) {
        return Err(Violation::Credit);
    }
    if !mux.streams().ids.of_mut(Opener::Peer).take(stream) {
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
        if let Some(reason) = &streams.going_away {
            return refuse(DialError::TunnelLost { node: String::new(), reason: reason.clone() });
        }
        let (Ok(permit), false) = (incoming.try_reserve(), mux.is_full(Opener::Peer)) else {
            let open = mux.streams_of(Opener::Peer);
            let error = format!("the other agent carries {open} streams of this tunnel already");
            return refuse(DialError::TooManyStreams(error));
        };
        (permit, Entry::insert_incoming(mux, &mut streams, stream, limit))
    };
    permit.send(Incoming {
        entry: Some(entry),
        target,
        origin,
        timeout: Duration::from_millis(u64::from(timeout_ms)),
    });
    Ok(())
}
