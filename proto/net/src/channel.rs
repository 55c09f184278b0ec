//! Streams that are SSH channels of their own (direct-tcpip, RFC 4254 §7.2): the only way to a plain sshd, and what
//! `ssh -L` and `ssh -W` use towards a node-agent.
//!
//! SSH has flow control per channel, but russh opens a channel's window again when data arrives and not when it is
//! consumed. One stream alone can therefore not make its peer wait. Instead, each stream's buffer is bounded, a full one
//! makes the whole SSH connection wait, and a stream is reset if its socket does not drain within the connection's
//! patience and the lead that it has gained by draining faster before.

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use russh::{ChannelId, ChannelWriteHalf, client, server};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{
    gate::{Gate, Reservation, Turn},
    stalls::Stalls,
    stream::error::StreamError,
    tasks::Tasks,
};

/// The most bytes buffered for one stream.
const BUFFER: usize = 2 * 1024 * 1024;
/// A stream has to drain this many bytes within the connection's patience.
const QUANTUM: usize = 256 * 1024;
/// The most lead that a stream gains by draining faster than it must. The kernel of a steady reader takes much at once,
/// and then nothing until the reader has made room for as much again.
const LEAD: Duration = Duration::from_millis(250);
/// The most bytes sent in one message, since OpenSSH accepts no more in a packet.
const CHUNK: usize = 32 * 1024;
/// The most bytes buffered for all streams of a connection together. Each may hold [`LITTLE`] beyond that.
const TOTAL: usize = 32 * 1024 * 1024;
const LITTLE: usize = 64 * 1024;
/// How long a channel that has ended in both directions waits for the peer to close it first, since a server's side of
/// russh keeps some 3.5 KB for every channel that it closes first. `ssh -W` waits for the server to close it.
const CLIENT_CLOSE_WAIT: Duration = Duration::from_secs(5);
const SERVER_CLOSE_WAIT: Duration = Duration::from_millis(500);
/// How long a channel that is abandoned earlier waits: most peers close it when they learn that nothing more comes.
const ABORT_WAIT: Duration = Duration::from_secs(1);

/// The channels of one SSH connection by id, shared between the session's handler, which feeds them, and those who open
/// or accept them.
#[derive(Clone)]
pub struct Channels {
    table: Arc<Mutex<HashMap<ChannelId, Arc<Shared>>>>,
    buffered: Arc<AtomicUsize>,
    gate: Gate,
    tasks: Tasks,
    patience: Duration,
    stalls: Stalls,
    closed_first: Arc<ClosedFirst>,
}

/// The channels that this side has closed before its peer did. russh keeps something for each of them until the session
/// ends, also if the peer closes it later.
struct ClosedFirst {
    count: AtomicUsize,
    most: usize,
    worn_out: CancellationToken,
}

/// The sending half of a channel, of an SSH client or server.
pub enum WriteHalf {
    Client(ChannelWriteHalf<client::Msg>),
    Server(ChannelWriteHalf<server::Msg>),
}

impl Channels {
    /// `patience` is how long one stream may hold up the connection while it takes less than 256 KiB; a stream that took
    /// more before may do so for up to 250 ms longer. `stalls` counts what waits for the peer's windows.
    pub fn new(gate: Gate, tasks: Tasks, patience: Duration, stalls: Stalls) -> Self {
        let closed_first = Arc::new(ClosedFirst::new(usize::MAX));
        Self { table: Arc::default(), buffered: Arc::default(), gate, tasks, patience, stalls, closed_first }
    }

    /// The same channels, which are [worn out](Self::worn_out) once this side has closed `most` of them before the peer.
    #[must_use]
    pub fn closing_first_at_most(self, most: usize) -> Self {
        Self { closed_first: Arc::new(ClosedFirst::new(most)), ..self }
    }

    /// Waits until this side has closed so many channels before its peer that the session should be replaced.
    pub async fn worn_out(&self) {
        self.closed_first.worn_out.cancelled().await;
    }

    pub fn is_worn_out(&self) -> bool {
        self.closed_first.worn_out.is_cancelled()
    }

    /// The same channels, whose streams are counted in `stalls` from now on.
    #[must_use]
    pub fn counted_in(&self, stalls: &Stalls) -> Self {
        Self { stalls: stalls.clone(), ..self.clone() }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<ChannelId, Arc<Shared>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called by the session's handler when a channel is confirmed, before any of its data can come.
    pub fn on_open(&self, id: ChannelId) {
        self.table().insert(id, Arc::default());
    }

    /// To be called when a channel is not opened after all.
    pub fn forget(&self, id: ChannelId) {
        self.table().remove(&id);
    }

    fn entry(&self, id: ChannelId) -> Option<Arc<Shared>> {
        self.table().get(&id).cloned()
    }

    /// The halves of the stream that an open channel is.
    pub(super) fn halves(&self, half: WriteHalf) -> (Reader, Writer) {
        let id = half.id();
        let shared = self.entry(id).unwrap_or_else(|| {
            // The channel was closed, or the session ended, before the stream was asked for.
            let shared = Arc::<Shared>::default();
            let mut state = shared.lock();
            state.received_close = true;
            state.fail("closed by the peer");
            drop(state);
            shared
        });
        let owner = Arc::new(Owner { id, half: Some(Arc::new(half)), channels: self.clone(), shared });
        let reader = Reader { owner: owner.clone(), current: BytesMut::new() };
        let (gate, turn) = (self.gate.clone(), self.gate.turn());
        (reader, Writer { owner, gate, turn })
    }

    pub fn len(&self) -> usize {
        self.table().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// To be called by the session's handler with a channel's data. Waits while the stream's buffer is full. Returns
    /// `false` if the stream was too slow and its channel must be closed.
    pub async fn on_data(&self, id: ChannelId, bytes: &[u8]) -> bool {
        let Some(shared) = self.entry(id) else { return true };
        loop {
            let room = shared.room.notified();
            let wait = {
                let mut state = shared.lock();
                if state.failed.is_some() {
                    return true;
                }
                let total = self.buffered.load(Ordering::Relaxed);
                let room =
                    state.inbox.len() < LITTLE || total < TOTAL && state.inbox.len() + bytes.len() <= BUFFER;
                if room {
                    self.buffered.fetch_add(bytes.len(), Ordering::Relaxed);
                    if state.inbox.is_empty() {
                        state.pace.begin(Instant::now(), self.patience);
                    }
                    state.inbox.extend_from_slice(bytes);
                    wake(&mut state.reader);
                    return true;
                }
                state.pace.due.saturating_duration_since(Instant::now())
            };
            if tokio::time::timeout(wait, room).await.is_err() {
                let mut state = shared.lock();
                if state.pace.due <= Instant::now() {
                    state.overrun = true;
                    state.fail("too slow: it holds up the other streams of an SSH connection without flow control per stream");
                    self.closed_first.note();
                    return false;
                }
            }
        }
    }

    pub fn on_eof(&self, id: ChannelId) {
        let Some(shared) = self.entry(id) else { return };
        let mut state = shared.lock();
        state.received_eof = true;
        wake(&mut state.reader);
    }

    pub fn on_close(&self, id: ChannelId) {
        let removed = self.table().remove(&id);
        let Some(shared) = removed else { return };
        let mut state = shared.lock();
        state.received_close = true;
        if !state.received_eof {
            state.fail("closed by the peer");
        }
        wake(&mut state.reader);
        shared.closed.notify_one();
        shared.room.notify_one();
    }

    /// Fails every stream, so that whoever holds it closes its channel. Returns how many there were.
    pub fn reset(&self, reason: &str) -> usize {
        let table = self.table();
        for shared in table.values() {
            shared.lock().fail(reason);
        }
        table.len()
    }

    /// To be called when the SSH session has ended.
    pub fn close(&self, reason: &str) {
        for shared in self.table().values() {
            shared.lock().fail(reason);
            shared.closed.notify_one();
        }
    }
}

impl ClosedFirst {
    fn new(most: usize) -> Self {
        Self { count: AtomicUsize::new(0), most, worn_out: CancellationToken::new() }
    }

    fn note(&self) {
        if self.count.fetch_add(1, Ordering::Relaxed) + 1 >= self.most {
            self.worn_out.cancel();
        }
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    room: Notify,
    closed: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells whether a stream drains fast enough to be waited for.
struct Pace {
    /// When the next [`QUANTUM`] has to be drained.
    due: Instant,
    /// Bytes of it that have been drained.
    drained: usize,
}

impl Pace {
    /// Data arrives in an empty buffer. The lead from earlier is kept.
    fn begin(&mut self, now: Instant, patience: Duration) {
        self.due = self.due.max(now + patience);
    }

    fn drain(&mut self, bytes: usize, now: Instant, patience: Duration) {
        self.drained += bytes;
        let quanta = self.drained / QUANTUM;
        if quanta > 0 {
            self.drained %= QUANTUM;
            let ahead = self.due + patience.saturating_mul(u32::try_from(quanta).unwrap_or(u32::MAX));
            self.due = ahead.clamp(now + patience, now + patience + LEAD);
        }
    }
}

struct State {
    inbox: BytesMut,
    pace: Pace,
    received_eof: bool,
    received_close: bool,
    sent_eof: bool,
    aborted: bool,
    /// The session has closed the channel because the stream was too slow.
    overrun: bool,
    failed: Option<StreamError>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    watch: Option<Waker>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            inbox: BytesMut::new(),
            pace: Pace { due: Instant::now(), drained: 0 },
            received_eof: false,
            received_close: false,
            sent_eof: false,
            aborted: false,
            overrun: false,
            failed: None,
            reader: None,
            writer: None,
            watch: None,
        }
    }
}

impl State {
    fn fail(&mut self, reason: &str) {
        self.failed.get_or_insert_with(|| StreamError(reason.to_owned()));
        wake(&mut self.reader);
        wake(&mut self.writer);
        wake(&mut self.watch);
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

impl WriteHalf {
    pub fn id(&self) -> ChannelId {
        match self {
            Self::Client(half) => half.id(),
            Self::Server(half) => half.id(),
        }
    }

    async fn data(&self, bytes: BytesMut) -> bool {
        match self {
            Self::Client(half) => half.data_bytes(bytes).await.is_ok(),
            Self::Server(half) => half.data_bytes(bytes).await.is_ok(),
        }
    }

    /// Sends as [`Self::data`] does. If it waits for the peer's window, it gives back the room that was reserved, since
    /// others could not send meanwhile, and counts a stall.
    async fn data_admitted(&self, bytes: BytesMut, reserved: Reservation, stalls: &Stalls) -> bool {
        let mut sending = pin!(self.data(bytes));
        let (mut reserved, mut stall) = (Some(reserved), None);
        let sent = poll_fn(|cx| {
            let sent = sending.as_mut().poll(cx);
            if sent.is_pending() && stall.is_none() && self.has_no_window() {
                stall = Some(stalls.begin());
                reserved = None;
            }
            sent
        })
        .await;
        if let Some(reserved) = reserved.filter(|_| sent) {
            reserved.used();
        }
        sent
    }

    fn has_no_window(&self) -> bool {
        let size = async {
            match self {
                Self::Client(half) => half.writable_packet_size().await,
                Self::Server(half) => half.writable_packet_size().await,
            }
        };
        pin!(size).poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(0)
    }

    async fn eof(&self) -> bool {
        match self {
            Self::Client(half) => half.eof().await.is_ok(),
            Self::Server(half) => half.eof().await.is_ok(),
        }
    }

    async fn close(&self) {
        let _ = match self {
            Self::Client(half) => half.close().await,
            Self::Server(half) => half.close().await,
        };
    }
}

/// Owned by both halves of a stream. Dropping it closes the channel.
struct Owner {
    id: ChannelId,
    half: Option<Arc<WriteHalf>>,
    channels: Channels,
    shared: Arc<Shared>,
}

impl Owner {
    /// Sends unless the stream fails first: russh waits for a window for ever, even after the channel has been closed.
    async fn unless_failed(&self, send: impl AsyncFnOnce(&WriteHalf) -> bool) -> Result<(), StreamError> {
        let shared = &self.shared;
        let failed = poll_fn(|cx| {
            let mut state = shared.lock();
            if let Some(error) = &state.failed {
                return Poll::Ready(error.clone());
            }
            state.writer = Some(cx.waker().clone());
            Poll::Pending
        });
        let Some(half) = &self.half else { return Err(StreamError("closed".to_owned())) };
        tokio::select! {
            biased;
            sent = send(half) => if sent { Ok(()) } else { Err(StreamError("the tunnel was lost".to_owned())) },
            error = failed => Err(error),
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let Some(half) = self.half.take() else { return };
        let (sent_eof, in_order, closed, overrun) = {
            let mut state = self.shared.lock();
            let overrun = state.overrun;
            state.fail("given up");
            let left = std::mem::take(&mut state.inbox).len();
            self.channels.buffered.fetch_sub(left, Ordering::Relaxed);
            let in_order = state.sent_eof && state.received_eof && !state.aborted;
            (state.sent_eof, in_order, state.received_close, overrun)
        };
        self.shared.room.notify_one();
        if closed {
            return;
        }
        let (id, shared, channels) = (self.id, self.shared.clone(), self.channels.clone());
        self.channels.tasks.spawn(async move {
            if !overrun {
                let wait = match half.as_ref() {
                    _ if !in_order => ABORT_WAIT,
                    WriteHalf::Client(_) => CLIENT_CLOSE_WAIT,
                    WriteHalf::Server(_) => SERVER_CLOSE_WAIT,
                };
                if !sent_eof {
                    half.eof().await;
                }
                let closed = tokio::time::timeout(wait, shared.closed.notified()).await;
                if closed.is_err() {
                    channels.closed_first.note();
                    half.close().await;
                }
            }
            // russh reports nothing more about a channel that this side has closed.
            channels.table().remove(&id);
        });
    }
}

/// See [`stream::Watch`](super::stream::Watch).
pub struct Watch(Arc<Shared>);

impl Watch {
    pub(super) async fn failed(&self) {
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

/// See [`stream::Reader`](super::stream::Reader).
pub struct Reader {
    owner: Arc<Owner>,
    current: BytesMut,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("channel::Reader").field(&self.owner.id).finish()
    }
}

impl Reader {
    pub(super) fn watch(&self) -> Watch {
        Watch(self.owner.shared.clone())
    }

    pub(super) async fn fill(&mut self) -> Result<&[u8], StreamError> {
        let Self { owner, current } = self;
        let shared = &owner.shared;
        {
            let mut state = shared.lock();
            state.pace.drain(current.len(), Instant::now(), owner.channels.patience);
        }
        current.clear();
        poll_fn(|cx| {
            let mut state = shared.lock();
            if state.inbox.len() > QUANTUM {
                *current = state.inbox.split_to(QUANTUM);
                owner.channels.buffered.fetch_sub(QUANTUM, Ordering::Relaxed);
            } else if !state.inbox.is_empty() {
                owner.channels.buffered.fetch_sub(state.inbox.len(), Ordering::Relaxed);
                std::mem::swap(&mut state.inbox, current);
            } else if state.received_eof {
                return Poll::Ready(Ok(()));
            } else if let Some(error) = &state.failed {
                return Poll::Ready(Err(error.clone()));
            } else {
                *current = BytesMut::new();
                state.inbox = BytesMut::new();
                state.reader = Some(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(Ok(()))
        })
        .await?;
        shared.room.notify_one();
        Ok(current)
    }
}

/// See [`stream::Writer`](super::stream::Writer).
pub struct Writer {
    owner: Arc<Owner>,
    gate: Gate,
    turn: Turn,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("channel::Writer").field(&self.owner.id).finish()
    }
}

impl Writer {
    pub(super) fn room(&mut self) -> Result<usize, StreamError> {
        match &self.owner.shared.lock().failed {
            Some(error) => Err(error.clone()),
            None => Ok(CHUNK.min(self.gate.share())),
        }
    }

    pub(super) async fn send(&mut self, bytes: BytesMut) -> Result<(), StreamError> {
        let Self { owner, gate, turn } = self;
        let stalls = &owner.channels.stalls;
        owner
            .unless_failed(async |half| {
                let Some(reserved) = gate.reserve(turn, bytes.len()).await else { return false };
                half.data_admitted(bytes, reserved, stalls).await
            })
            .await
    }

    pub(super) async fn finish(&mut self) -> Result<(), StreamError> {
        self.owner.unless_failed(async |half| half.eof().await).await?;
        self.owner.shared.lock().sent_eof = true;
        Ok(())
    }

    pub(super) fn reset(&mut self) {
        self.owner.shared.lock().aborted = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_millis(250);

    fn after(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_session_is_worn_out_by_the_channels_that_this_side_closes_first() {
        let channels = Channels::new(Gate::default(), Tasks::new(), PATIENCE, Stalls::default());
        let channels = channels.closing_first_at_most(2);
        let same = channels.counted_in(&Stalls::default());
        for worn_out in [false, true, true] {
            same.closed_first.note();
            assert_eq!(channels.is_worn_out(), worn_out);
        }
    }

    #[test]
    fn a_steady_pace_in_gulps_is_never_late() {
        let start = Instant::now();
        let mut pace = Pace { due: start, drained: 0 };
        pace.begin(start, PATIENCE);
        // At 2 MB/s the kernel takes 800 KB every 400 ms, and the buffer is empty between any two parts.
        for gulp in 1..100 {
            let now = start + after(gulp * 400);
            for part in [200_000, 256_000, 256_000, 88_000] {
                pace.drain(part, now, PATIENCE);
                pace.begin(now, PATIENCE);
            }
            assert!(pace.due > now + after(400), "gulp {gulp}");
        }
    }

    #[test]
    fn a_stream_that_stops_is_late_however_fast_it_was() {
        let start = Instant::now();
        let mut pace = Pace { due: start, drained: 0 };
        pace.begin(start, PATIENCE);
        pace.drain(1 << 30, start, PATIENCE);
        assert_eq!(pace.due, start + PATIENCE + LEAD);
        pace.drain(QUANTUM - 1, start + after(400), PATIENCE);
        assert_eq!(pace.due, start + PATIENCE + LEAD);
        // A trickle that completes a quantum late gains no lead.
        pace.drain(1, start + after(900), PATIENCE);
        assert_eq!(pace.due, start + after(900) + PATIENCE);
    }
}
