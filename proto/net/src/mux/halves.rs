//! The halves of a stream: what its owner reads from, writes to, and watches.

use std::{
    future::poll_fn,
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use proto::{
    DialError,
    mux::{
        Version,
        frame::{self, Credit, Frame},
        ids::Opener,
        load::Lately,
    },
};

use super::{
    endpoint::{Mux, Streams},
    further::HeavyMark,
    route::Route,
    state::{Answer, Shared, State},
};
use crate::{gate::Reservation, stream::error::StreamError};

/// A buffer of this capacity is always kept for what comes next.
const LEAST_KEPT: usize = 64 * 1024;

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
    /// What has come lately.
    lately: Lately,
    mark: HeavyMark,
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
        let Self { entry, current, .. } = self;
        current.clear();
        poll_fn(|cx| {
            let mut state = entry.shared.lock();
            if !state.inbox.is_empty() {
                // The memory that a large window has needed does not outlast it.
                if current.capacity() / 4 > state.inbox.len().max(LEAST_KEPT) {
                    *current = BytesMut::new();
                }
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
        let round_trip = self.entry.mux.round_trip().unwrap_or_default();
        self.taken_at(Instant::now(), round_trip).await;
        Ok(())
    }

    pub(super) async fn taken_at(&mut self, now: Instant, round_trip: Duration) {
        let Entry { id, mux, shared, .. } = &*self.entry;
        let bytes = self.current.len();
        self.lately.add(bytes, now);
        self.mark.set(self.lately.is_heavy());
        if let Some(grant) = mux.on_taken(*id, shared, bytes, now, round_trip) {
            let credit = match mux.version() {
                Version::V1 => Credit::By(grant.by),
                Version::V2 => Credit::UpTo(grant.limit),
            };
            if mux.send_frame(&Frame::Credit { stream: *id, credit }).await {
                shared.lock().on_granted();
            }
        }
    }
}

/// See [`stream::Writer`](crate::stream::Writer).
pub struct Writer {
    entry: Arc<Entry>,
    route: Route,
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
            let (entry, room) = (&self.entry, state.promise(self.route.share()));
            if room > 0 {
                return Poll::Ready(Ok(room));
            }
            state.writer = Some(cx.waker().clone());
            stall.get_or_insert_with(|| entry.mux.0.stalls(entry.opener).begin());
            Poll::Pending
        })
        .await
    }

    pub(crate) fn buffer(&self, max: usize) -> BytesMut {
        frame::start_data(self.entry.mux.version(), max)
    }

    pub(crate) async fn send(&mut self, buffer: BytesMut) -> Result<(), StreamError> {
        let Self { entry, route, .. } = self;
        let (mux, version) = (&entry.mux, entry.mux.version());
        let payload = buffer.len().saturating_sub(version.data_header()) as u64;
        let Some((reserved, offset)) = admit(entry, route, buffer.len()).await? else {
            return Err(StreamError(mux.closed_reason()));
        };
        if route.send(frame::finish_data(version, buffer, entry.id, offset)).await {
            reserved.used();
            let mut state = entry.shared.lock();
            state.on_sent(payload);
            if let Some((connection, sent)) = route.further() {
                state.on_sent_further(connection, sent);
            }
            return Ok(());
        }
        Err(StreamError(mux.closed_reason()))
    }

    pub(crate) async fn finish(&mut self) -> Result<(), StreamError> {
        self.finished = true;
        let end = Some(self.entry.shared.lock().sent);
        let sent = self.entry.mux.send_frame(&Frame::Eof { stream: self.entry.id, end }).await;
        if sent { Ok(()) } else { Err(StreamError(self.entry.mux.closed_reason())) }
    }

    pub(crate) fn reset(&mut self, reason: &str) {
        self.entry.shared.lock().reset_reason = Some(reason.to_owned());
        self.finished = false;
    }
}

/// Waits until a stream may send `bytes` bytes. Returns the room for them, and the number of the stream's bytes before them;
/// `None` once the session is gone.
async fn admit(
    entry: &Entry,
    route: &mut Route,
    bytes: usize,
) -> Result<Option<(Reservation, u64)>, StreamError> {
    loop {
        let Some(reserved) = route.reserve(&entry.mux, bytes).await else { return Ok(None) };
        let mut state = entry.shared.lock();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let Some((connection, _)) = route.further() else { return Ok(Some((reserved, state.sent))) };
        // Until it is known how much that is, in case that the connection is lost at this moment.
        state.on_sent_further(connection, u64::MAX);
        if !route.is_lost() {
            return Ok(Some((reserved, state.sent)));
        }
        state.forget_further(connection);
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
    pub(super) id: u64,
    opener: Opener,
    pub(super) mux: Mux,
    pub(super) shared: Arc<Shared>,
}

impl Entry {
    /// Enters a stream into the locked table of `mux`. The side that opens it waits for an `answer`.
    pub(super) fn insert(mux: &Mux, streams: &mut Streams, id: u64, answer: Answer) -> Self {
        Self::insert_state(mux, streams, id, State::new(mux.version(), Some(answer), 0))
    }

    /// Enters a stream that the peer asks for, on which this side may send `limit` bytes.
    pub(super) fn insert_incoming(mux: &Mux, streams: &mut Streams, id: u64, limit: u64) -> Self {
        Self::insert_state(mux, streams, id, State::new(mux.version(), None, limit))
    }

    fn insert_state(mux: &Mux, streams: &mut Streams, id: u64, state: State) -> Self {
        let shared = Arc::new(Shared::new(state));
        streams.open.insert(id, shared.clone());
        let opener = mux.0.settings.numbering.opener(id);
        mux.0.count(opener).fetch_add(1, Ordering::Relaxed);
        Self { id, opener, mux: mux.clone(), shared }
    }

    /// Refuses the stream without waiting for the link.
    pub(super) fn reject(self, error: DialError) {
        self.shared.lock().ended = true;
        self.mux.answer(&Frame::Refused { stream: self.id, error });
    }

    pub(super) fn into_halves(self) -> (Reader, Writer) {
        let entry = Arc::new(self);
        let mux = &entry.mux;
        let (mark, lately) = (HeavyMark::new(&mux.0.further), Lately::new(Instant::now()));
        let reader = Reader { entry: entry.clone(), current: BytesMut::new(), lately, mark };
        let route = Route::new(mux);
        (reader, Writer { entry, route, finished: false })
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        {
            let mut streams = self.mux.streams();
            if streams.open.get(&self.id).is_some_and(|shared| Arc::ptr_eq(shared, &self.shared)) {
                streams.open.remove(&self.id);
            }
            self.mux.0.count(self.opener).fetch_sub(1, Ordering::Relaxed);
        }
        let mut state = self.shared.lock();
        self.mux.close_window(self.id, &mut state.receive);
        if !state.ended && state.failed.is_none() {
            let reason = state.reset_reason.take().unwrap_or_else(|| "closed by the other agent".to_owned());
            let end = Some(state.sent);
            drop(state);
            self.mux.answer(&Frame::Reset { stream: self.id, end, reason });
        }
    }
}
