//! The halves of a stream: what its owner reads from, writes to, and watches.

use std::{
    future::poll_fn,
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::Instant,
};

use bytes::BytesMut;
use proto::{
    DialError,
    mux::frame::{self, Frame},
};

use super::{
    endpoint::{Mux, Streams},
    state::{Answer, Shared, State},
};
use crate::{gate::Turn, stream::error::StreamError};

/// See [`stream::Watch`](crate::stream::Watch).
pub struct Watch(Arc<Shared>);

impl Watch {
    pub(crate) async fn failed(&self) {
        poll_fn(|cx| {
            let mut state = self.0.lock();
            if state.failed.is_some() {
                return Poll::Ready(());
            }
            state.watch = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// See [`stream::Reader`](crate::stream::Reader).
pub struct Reader {
    entry: Arc<Entry>,
    current: BytesMut,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("mux::Reader").field(&self.entry.id).finish()
    }
}

impl Reader {
    pub(crate) fn watch(&self) -> Watch {
        Watch(self.entry.shared.clone())
    }

    pub(crate) async fn fill(&mut self) -> Result<&[u8], StreamError> {
        let Self { entry, current } = self;
        current.clear();
        poll_fn(|cx| {
            let mut state = entry.shared.lock();
            if !state.inbox.is_empty() {
                std::mem::swap(&mut state.inbox, current);
            } else if state.received_eof {
                return Poll::Ready(Ok(()));
            } else if let Some(error) = &state.failed {
                return Poll::Ready(Err(error.clone()));
            } else {
                // An idle stream holds no memory.
                *current = BytesMut::new();
                state.inbox = BytesMut::new();
                state.reader = Some(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(Ok(()))
        })
        .await?;
        Ok(current)
    }

    pub(crate) async fn taken(&mut self) -> Result<(), StreamError> {
        let mux = &self.entry.mux;
        let round_trip = mux.round_trip().unwrap_or_default();
        let grant = {
            let mut state = self.entry.shared.lock();
            if state.received_eof {
                return Ok(());
            }
            state.receive.on_taken(self.current.len(), Instant::now(), round_trip, |n| mux.may_grow(n))
        };
        if let Some(bytes) = grant {
            mux.send(frame::encode(&Frame::Credit { stream: self.entry.id, bytes })).await;
        }
        Ok(())
    }
}

/// See [`stream::Writer`](crate::stream::Writer).
pub struct Writer {
    entry: Arc<Entry>,
    turn: Turn,
    finished: bool,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("mux::Writer").field(&self.entry.id).finish()
    }
}

impl Writer {
    pub(crate) async fn room(&mut self) -> Result<usize, StreamError> {
        let mut stall = None;
        poll_fn(|cx| {
            let mut state = self.entry.shared.lock();
            if let Some(error) = &state.failed {
                return Poll::Ready(Err(error.clone()));
            }
            if state.credit > 0 {
                return Poll::Ready(Ok(state.credit.min(self.entry.mux.0.gate.share())));
            }
            state.writer = Some(cx.waker().clone());
            stall.get_or_insert_with(|| self.entry.mux.0.stalls.begin());
            Poll::Pending
        })
        .await
    }

    pub(crate) async fn send(&mut self, buffer: BytesMut) -> Result<(), StreamError> {
        let payload = buffer.len().saturating_sub(frame::HEADER);
        let Self { entry, turn, .. } = self;
        let (mux, gate) = (&entry.mux, &entry.mux.0.gate);
        let reserved = gate.reserve(turn, buffer.len()).await;
        {
            let mut state = entry.shared.lock();
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            state.credit = state.credit.saturating_sub(payload);
        }
        if let Some(reserved) = reserved
            && mux.send(frame::finish_data(buffer, entry.id)).await
        {
            reserved.used();
            return Ok(());
        }
        Err(StreamError(mux.closed_reason()))
    }

    pub(crate) async fn finish(&mut self) -> Result<(), StreamError> {
        self.finished = true;
        let sent = self.entry.mux.send(frame::encode(&Frame::Eof { stream: self.entry.id })).await;
        if sent { Ok(()) } else { Err(StreamError(self.entry.mux.closed_reason())) }
    }

    pub(crate) fn reset(&mut self, reason: &str) {
        self.entry.shared.lock().reset_reason = Some(reason.to_owned());
        self.finished = false;
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The reader is dropped before its end only together with the writer, so what it has seen by now decides.
        let mut state = self.entry.shared.lock();
        if self.finished && state.received_eof && state.inbox.is_empty() {
            state.ended = true;
        }
    }
}

/// A stream's entry in the table of its [`Mux`]. Dropping it removes the stream, and resets it unless it has ended.
pub(super) struct Entry {
    pub(super) id: u32,
    pub(super) mux: Mux,
    pub(super) shared: Arc<Shared>,
}

impl Entry {
    /// Enters a stream into the locked table of `mux`. `answer` belongs to the side that opens it.
    pub(super) fn insert(mux: &Mux, streams: &mut Streams, id: u32, answer: Option<Answer>) -> Self {
        let shared = Arc::new(Shared::new(State::new(answer)));
        streams.open.insert(id, shared.clone());
        mux.0.count.fetch_add(1, Ordering::Relaxed);
        Self { id, mux: mux.clone(), shared }
    }

    /// Refuses the stream without waiting for the link.
    pub(super) fn reject(self, error: DialError) {
        self.shared.lock().ended = true;
        self.mux.answer(&Frame::Refused { stream: self.id, error });
    }

    pub(super) fn into_halves(self) -> (Reader, Writer) {
        let entry = Arc::new(self);
        let reader = Reader { entry: entry.clone(), current: BytesMut::new() };
        let turn = entry.mux.0.gate.turn();
        (reader, Writer { entry, turn, finished: false })
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        {
            let mut streams = self.mux.streams();
            if streams.open.get(&self.id).is_some_and(|shared| Arc::ptr_eq(shared, &self.shared)) {
                streams.open.remove(&self.id);
            }
            self.mux.0.count.fetch_sub(1, Ordering::Relaxed);
        }
        let mut state = self.shared.lock();
        self.mux.0.growth_left.fetch_add(i64::from(state.receive.extra()), Ordering::Relaxed);
        if !state.ended && state.failed.is_none() {
            let reason = state.reset_reason.take().unwrap_or_else(|| "closed by the other agent".to_owned());
            drop(state);
            self.mux.answer(&Frame::Reset { stream: self.id, reason });
        }
    }
}
