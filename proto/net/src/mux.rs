//! Runs the multiplexer of [`proto::mux`] over one SSH channel.
//!
//! There is no task between a stream and the SSH session: bytes that arrive are put into their stream's
//! buffer by the session itself ([`Feeder::feed`]), and a stream's frames go straight to the session's queue.
//! What a peer can make this side hold is bounded: by the windows for data, by the caps for streams, by a
//! short queue for answers. A stream counts until both its halves are dropped here, whatever the peer has said of it.
//!
//! A peer that does what no honest one does is found out ([`ProtocolError`]), and loses its tunnel. Frames that cross
//! a stream's end are honest, so whatever comes for a stream that has ended is ignored.

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use tokio::sync::{mpsc, oneshot};

use super::{link::Gate, stalls::Stalls, stream::error::StreamError, tasks::Tasks};
use proto::{
    DialError, Target,
    mux::{
        frame::{self, Decoder, Frame, FrameError},
        ids::Ids,
        window,
    },
    refusal::printable,
};

/// Bytes by which all windows of a tunnel together may exceed their initial size.
const GROWTH_BUDGET: i64 = 32 * 1024 * 1024;
/// Answers (PONG, REFUSED, RESET) that may wait to be sent, beside one for each stream.
const ANSWERS: usize = 4096;
/// How often the round trip is measured.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// Hands one frame to the SSH session, waiting while its queue is full; `false` once the session is gone.
pub type Out = Box<dyn Fn(Bytes) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;

/// One end of a tunnel's multiplexer. Cheap to clone.
#[derive(Clone)]
pub struct Mux(Arc<Inner>);

struct Inner {
    out: Out,
    gate: Gate,
    stalls: Stalls,
    answers: mpsc::UnboundedSender<Bytes>,
    /// Their number. What a peer causes is bounded by [`Feeder::feed`]; a RESET must never be lost.
    waiting_answers: AtomicUsize,
    /// Whether this side opens the streams.
    initiator: bool,
    streams: Mutex<Streams>,
    max_streams: usize,
    /// Streams of which this side still holds anything, those included that the peer has given up.
    count: AtomicUsize,
    /// Held while an OPEN is sent, so that ids go out in the order in which they grow.
    opening: tokio::sync::Mutex<()>,
    growth_left: AtomicI64,
    /// The PING that has not been answered yet, and when it was sent.
    ping: Mutex<Option<([u8; 8], Instant)>>,
    /// Nanoseconds; 0 until measured.
    round_trip: AtomicU64,
}

#[derive(Default)]
struct Streams {
    ids: Ids,
    open: HashMap<u32, Arc<Shared>>,
    closed: Option<StreamError>,
    going_away: Option<String>,
}

/// Takes the bytes of the SSH channel. Owned by the SSH session's handler; dropping it closes the multiplexer.
pub struct Feeder {
    mux: Mux,
    decoder: Decoder,
    incoming: mpsc::Sender<Incoming>,
    notices: mpsc::Sender<Notice>,
}

/// What the peer says about the tunnel as a whole.
#[derive(Debug, PartialEq, Eq)]
pub enum Notice {
    GoAway(String),
    Certificate(String),
}

/// The peer broke the protocol; the tunnel has to be closed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("stream {stream}: {error}")]
    Stream { stream: u32, error: Violation },
    #[error("the peer asks for more answers than it takes")]
    Flood,
    #[error("a PONG answers no PING")]
    Pong,
}

/// What a peer may not do with a stream.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("OPEN by the side that may not open streams")]
    Opener,
    #[error("OPEN with an id that was used before")]
    Reused,
    #[error("{0} for a stream that was never opened")]
    NeverOpened(&'static str),
    #[error("{0} by the side that opens streams")]
    Answerer(&'static str),
    #[error("{0} for a stream that was answered already")]
    Answered(&'static str),
    #[error("{0} before the answer to OPEN")]
    NotAnswered(&'static str),
    #[error("{0} after EOF")]
    Ended(&'static str),
    #[error(transparent)]
    Overrun(#[from] window::Overrun),
    #[error("CREDIT beyond the largest window")]
    Credit,
}

/// The receiving ends that go with a new [`Mux`].
pub struct Events {
    /// Streams that the peer opens. Empty for ever on the side that opens them.
    pub incoming: mpsc::Receiver<Incoming>,
    pub notices: mpsc::Receiver<Notice>,
}

impl Mux {
    /// `initiator` opens streams; the other side gets them as [`Events::incoming`]. The tasks
    /// that send answers and measure the round trip belong to `tasks`. `stalls` counts what waits for the peer's windows.
    pub fn new(
        initiator: bool,
        max_streams: usize,
        gate: Gate,
        stalls: Stalls,
        out: Out,
        tasks: &Tasks,
    ) -> (Self, Feeder, Events) {
        let (answers, answer_queue) = mpsc::unbounded_channel();
        let (incoming_tx, incoming) = mpsc::channel(max_streams.max(1));
        let (notices_tx, notices) = mpsc::channel(16);
        let mux = Self(Arc::new(Inner {
            out,
            gate,
            stalls,
            answers,
            waiting_answers: AtomicUsize::new(0),
            initiator,
            streams: Mutex::default(),
            max_streams,
            count: AtomicUsize::new(0),
            opening: tokio::sync::Mutex::default(),
            growth_left: AtomicI64::new(GROWTH_BUDGET),
            ping: Mutex::default(),
            round_trip: AtomicU64::new(0),
        }));
        tasks.spawn(housekeeping(Arc::downgrade(&mux.0), answer_queue));
        let feeder = Feeder {
            mux: mux.clone(),
            decoder: Decoder::default(),
            incoming: incoming_tx,
            notices: notices_tx,
        };
        (mux, feeder, Events { incoming, notices })
    }

    /// The halves of a new stream: see [`Mux::open`].
    pub(super) async fn open_halves(
        &self,
        target: &Target,
        origin: &str,
        timeout: Duration,
    ) -> Result<(Reader, Writer), DialError> {
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        let (answered, answer) = oneshot::channel();
        let lost = || DialError::TunnelLost { node: String::new(), reason: self.closed_reason() };
        let dial = async {
            let in_order = self.0.opening.lock().await;
            let entry = self.register(answered)?;
            let (target, origin) = (target.to_string(), origin.to_owned());
            let open = Frame::Open { stream: entry.id, timeout_ms, target, origin };
            if !self.send(frame::encode(&open)).await {
                return Err(lost());
            }
            drop(in_order);
            // From now on the peer has to be told if nobody wants the stream any more.
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

    fn register(&self, answered: oneshot::Sender<Result<(), DialError>>) -> Result<Entry, DialError> {
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
        let entry = self.insert(&mut streams, id, Some(answered));
        // The peer has not heard of it yet.
        entry.shared.lock().ended = true;
        Ok(entry)
    }

    fn is_full(&self) -> bool {
        self.streams_open() >= self.0.max_streams
    }

    fn insert(
        &self,
        streams: &mut Streams,
        id: u32,
        answered: Option<oneshot::Sender<Result<(), DialError>>>,
    ) -> Entry {
        let shared = Arc::new(Shared(Mutex::new(State::new(answered))));
        streams.open.insert(id, shared.clone());
        self.0.count.fetch_add(1, Ordering::Relaxed);
        Entry { id, mux: self.clone(), shared }
    }

    /// Number of streams, those being opened and those being closed included.
    pub fn streams_open(&self) -> usize {
        self.0.count.load(Ordering::Relaxed)
    }

    /// The measured round trip between the agents' multiplexers. While a peer owes an answer for longer than that,
    /// it is at least the time that it has owed it.
    pub fn round_trip(&self) -> Option<Duration> {
        let nanos = self.0.round_trip.load(Ordering::Relaxed);
        (nanos > 0).then(|| Duration::from_nanos(nanos))
    }

    /// Tells the peer that no new streams will be accepted or opened.
    pub async fn go_away(&self, reason: &str) {
        self.streams().going_away = Some(reason.to_owned());
        self.send(frame::encode(&Frame::GoAway { reason: reason.to_owned() })).await;
    }

    /// Sends the node a renewed host certificate.
    pub async fn send_certificate(&self, text: &str) -> bool {
        self.send(frame::encode(&Frame::Certificate { text: text.to_owned() })).await
    }

    /// Resets every stream; nothing can be opened any more.
    pub fn close(&self, reason: &str) {
        let open = {
            let mut streams = self.streams();
            streams.closed.get_or_insert_with(|| StreamError(reason.to_owned()));
            std::mem::take(&mut streams.open)
        };
        for shared in open.into_values() {
            shared.lock().fail(StreamError(reason.to_owned()));
        }
    }

    /// Whether either side has said that it takes no new streams.
    pub fn is_going_away(&self) -> bool {
        self.streams().going_away.is_some()
    }

    fn closed_reason(&self) -> String {
        self.streams().closed.as_ref().map_or_else(|| "the SSH session ended".to_owned(), |e| e.0.clone())
    }

    async fn send(&self, frame: Bytes) -> bool {
        (self.0.out)(frame).await
    }

    fn answer(&self, frame: &Frame<'_>) {
        if self.0.answers.send(frame::encode(frame)).is_ok() {
            self.0.waiting_answers.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.0.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream that a frame is for; `None` when it has ended.
    fn find(&self, stream: u32, frame: &'static str) -> Result<Option<Arc<Shared>>, Violation> {
        let streams = self.streams();
        match streams.open.get(&stream) {
            None if !streams.ids.is_used(stream) => Err(Violation::NeverOpened(frame)),
            open => Ok(open.cloned()),
        }
    }

    /// Does what a frame says to its stream; nothing if that has ended.
    fn change(
        &self,
        stream: u32,
        frame: &'static str,
        change: impl FnOnce(&mut State) -> Result<(), Violation>,
    ) -> Result<(), Violation> {
        self.find(stream, frame)?.map_or(Ok(()), |shared| change(&mut shared.lock()))
    }

    fn on_reset(&self, stream: u32, reason: String) -> Result<(), Violation> {
        let mut streams = self.streams();
        match streams.open.remove(&stream) {
            Some(shared) => {
                drop(streams);
                shared.lock().fail(StreamError(reason));
            }
            None if self.0.initiator && !streams.ids.is_used(stream) => {
                return Err(Violation::NeverOpened("RESET"));
            }
            // A peer that opens streams may give one up before it has sent the OPEN.
            None => {
                streams.ids.take(stream);
            }
        }
        Ok(())
    }

    fn on_opened(&self, stream: u32) -> Result<(), Violation> {
        if !self.0.initiator {
            return Err(Violation::Answerer("OPENED"));
        }
        self.change(stream, "OPENED", |state| state.on_answer("OPENED", Ok(())))
    }

    fn on_refused(&self, stream: u32, error: DialError) -> Result<(), Violation> {
        if !self.0.initiator {
            return Err(Violation::Answerer("REFUSED"));
        }
        self.change(stream, "REFUSED", |state| {
            state.on_answer("REFUSED", Err(error))?;
            state.ended = true;
            Ok(())
        })
    }

    fn ping(&self) -> MutexGuard<'_, Option<([u8; 8], Instant)>> {
        self.0.ping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next PING to send. There is none while the one before has no answer, which then takes longer than
    /// what was measured before. Nobody can answer what nobody can guess.
    fn next_ping(&self) -> Option<Bytes> {
        let mut ping = self.ping();
        if let Some((_, sent)) = *ping {
            self.0.round_trip.fetch_max(nanoseconds(sent.elapsed()), Ordering::Relaxed);
            return None;
        }
        let id = rand::random();
        *ping = Some((id, Instant::now()));
        Some(frame::encode(&Frame::Ping(id)))
    }

    fn may_grow(&self, bytes: u32) -> bool {
        let bytes = i64::from(bytes);
        let had = self.0.growth_left.fetch_sub(bytes, Ordering::Relaxed);
        if had < bytes {
            self.0.growth_left.fetch_add(bytes, Ordering::Relaxed);
        }
        had >= bytes
    }

    fn on_pong(&self, id: [u8; 8]) -> Result<(), ProtocolError> {
        let (_, sent) = self.ping().take_if(|(asked, _)| *asked == id).ok_or(ProtocolError::Pong)?;
        let sample = nanoseconds(sent.elapsed());
        let old = self.0.round_trip.load(Ordering::Relaxed);
        // A shorter time is the better measurement; a longer one may be a busy moment, or a new path.
        let new = if old == 0 || sample < old { sample } else { old - old / 8 + sample / 8 };
        self.0.round_trip.store(new, Ordering::Relaxed);
        Ok(())
    }
}

/// At least one, as none stands for what was not measured.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1)
}

/// Sends queued answers, and pings.
async fn housekeeping(mux: std::sync::Weak<Inner>, mut answers: mpsc::UnboundedReceiver<Bytes>) {
    let mut ping = tokio::time::interval(PING_INTERVAL);
    ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let frame = tokio::select! {
            answer = answers.recv() => {
                let (Some(answer), Some(mux)) = (answer, mux.upgrade()) else { return };
                mux.waiting_answers.fetch_sub(1, Ordering::Relaxed);
                answer
            }
            _ = ping.tick() => {
                let Some(mux) = mux.upgrade() else { return };
                let Some(ping) = Mux(mux).next_ping() else { continue };
                ping
            }
        };
        let Some(mux) = mux.upgrade() else { return };
        if !(mux.out)(frame).await {
            return;
        }
    }
}

impl Feeder {
    /// Takes bytes as they came out of the SSH channel. Never waits. After an error the tunnel must be closed.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        let Self { mux, decoder, incoming, notices } = self;
        let on = |stream| move |error| ProtocolError::Stream { stream, error };
        // Consecutive parts of one stream's data need but one look-up.
        let mut last: Option<(u32, Arc<Shared>)> = None;
        while let Some(frame) = decoder.decode(&mut bytes)? {
            if mux.0.waiting_answers.load(Ordering::Relaxed) > ANSWERS + mux.0.max_streams {
                return Err(ProtocolError::Flood);
            }
            match frame {
                Frame::Data { stream, bytes } => {
                    if last.as_ref().is_none_or(|(id, _)| *id != stream) {
                        last = mux.find(stream, "DATA").map_err(on(stream))?.map(|shared| (stream, shared));
                    }
                    if let Some((_, shared)) = &last {
                        shared.lock().on_data(bytes).map_err(on(stream))?;
                    }
                }
                Frame::Credit { stream, bytes } => {
                    mux.change(stream, "CREDIT", |state| state.on_credit(bytes)).map_err(on(stream))?;
                }
                Frame::Eof { stream } => {
                    mux.change(stream, "EOF", State::on_eof).map_err(on(stream))?;
                }
                Frame::Reset { stream, reason } => {
                    last = None;
                    mux.on_reset(stream, reason).map_err(on(stream))?;
                }
                Frame::Opened { stream } => mux.on_opened(stream).map_err(on(stream))?,
                Frame::Refused { stream, error } => mux.on_refused(stream, error).map_err(on(stream))?,
                Frame::Open { stream, timeout_ms, target, origin } => {
                    on_open(mux, incoming, stream, timeout_ms, &target, origin).map_err(on(stream))?;
                }
                Frame::Ping(id) => mux.answer(&Frame::Pong(id)),
                Frame::Pong(id) => mux.on_pong(id)?,
                Frame::GoAway { reason } => {
                    let reason = printable(&reason);
                    mux.streams().going_away = Some(reason.clone());
                    let _ = notices.try_send(Notice::GoAway(reason));
                }
                Frame::Certificate { text } => {
                    let _ = notices.try_send(Notice::Certificate(text));
                }
            }
        }
        Ok(())
    }

    pub fn mux(&self) -> &Mux {
        &self.mux
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.mux.close("the tunnel was lost");
    }
}

fn on_open(
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
        // After all 2^32 of them ids begin again.
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
        (permit, mux.insert(&mut streams, stream, None))
    };
    permit.send(Incoming {
        entry: Some(entry),
        target,
        origin,
        timeout: Duration::from_millis(u64::from(timeout_ms)),
    });
    Ok(())
}

/// A stream that the peer wants; dropping it refuses.
pub struct Incoming {
    entry: Option<Entry>,
    pub target: Target,
    pub origin: String,
    /// How long the caller is going to wait.
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
    pub(super) async fn accept_halves(mut self) -> Option<(Reader, Writer)> {
        let entry = self.entry.take()?;
        let opened = frame::encode(&Frame::Opened { stream: entry.id });
        entry.mux.send(opened).await.then(|| entry.into_halves())
    }

    /// As [`Self::refuse`], without waiting for the link.
    pub fn reject(mut self, error: DialError) {
        if let Some(entry) = self.entry.take() {
            entry.reject(error);
        }
    }

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

/// A stream's place in the table. Dropping it removes the stream, and resets it unless it had ended.
struct Entry {
    id: u32,
    mux: Mux,
    shared: Arc<Shared>,
}

impl Entry {
    fn reject(self, error: DialError) {
        self.shared.lock().ended = true;
        self.mux.answer(&Frame::Refused { stream: self.id, error });
    }

    fn into_halves(self) -> (Reader, Writer) {
        let entry = Arc::new(self);
        let reader = Reader { entry: entry.clone(), current: BytesMut::new() };
        (reader, Writer { entry, finished: false })
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

struct Shared(Mutex<State>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct State {
    inbox: BytesMut,
    receive: window::Receive,
    /// Bytes that may be sent.
    credit: usize,
    received_eof: bool,
    failed: Option<StreamError>,
    /// Both directions ended, or the open was answered with no: nothing to tell the peer.
    ended: bool,
    reset_reason: Option<String>,
    answered: Option<oneshot::Sender<Result<(), DialError>>>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    watch: Option<Waker>,
}

impl State {
    fn new(answered: Option<oneshot::Sender<Result<(), DialError>>>) -> Self {
        Self {
            inbox: BytesMut::new(),
            receive: window::Receive::new(Instant::now()),
            credit: usize::try_from(window::INITIAL).unwrap_or_default(),
            received_eof: false,
            failed: None,
            ended: false,
            reset_reason: None,
            answered,
            reader: None,
            writer: None,
            watch: None,
        }
    }

    /// The side that opens a stream gets nothing on it before the answer; the other side waits for none.
    fn check_answered(&self, frame: &'static str) -> Result<(), Violation> {
        if self.answered.is_some() { Err(Violation::NotAnswered(frame)) } else { Ok(()) }
    }

    fn on_data(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        self.check_answered("DATA")?;
        if self.received_eof {
            return Err(Violation::Ended("DATA"));
        }
        self.receive.on_data(bytes.len())?;
        self.inbox.extend_from_slice(bytes);
        wake(&mut self.reader);
        Ok(())
    }

    fn on_credit(&mut self, bytes: u32) -> Result<(), Violation> {
        self.check_answered("CREDIT")?;
        let credit = usize::try_from(bytes).ok().and_then(|bytes| self.credit.checked_add(bytes));
        let most = usize::try_from(window::MAX).unwrap_or(usize::MAX);
        self.credit = credit.filter(|credit| *credit <= most).ok_or(Violation::Credit)?;
        wake(&mut self.writer);
        Ok(())
    }

    fn on_eof(&mut self) -> Result<(), Violation> {
        self.check_answered("EOF")?;
        if self.received_eof {
            return Err(Violation::Ended("EOF"));
        }
        self.received_eof = true;
        wake(&mut self.reader);
        Ok(())
    }

    fn on_answer(&mut self, frame: &'static str, answer: Result<(), DialError>) -> Result<(), Violation> {
        let answered = self.answered.take().ok_or(Violation::Answered(frame))?;
        // Whoever asked may have left a moment ago.
        let _ = answered.send(answer);
        Ok(())
    }

    fn fail(&mut self, error: StreamError) {
        self.answered = None;
        self.failed.get_or_insert(error);
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
    entry: Arc<Entry>,
    current: BytesMut,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("mux::Reader").field(&self.entry.id).finish()
    }
}

impl Reader {
    pub(super) fn watch(&self) -> Watch {
        Watch(self.entry.shared.clone())
    }

    pub(super) async fn fill(&mut self) -> Result<&[u8], StreamError> {
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
                // Idle: hold no memory.
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

    pub(super) async fn taken(&mut self) -> Result<(), StreamError> {
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

/// See [`stream::Writer`](super::stream::Writer).
pub struct Writer {
    entry: Arc<Entry>,
    finished: bool,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("mux::Writer").field(&self.entry.id).finish()
    }
}

impl Writer {
    pub(super) async fn room(&mut self) -> Result<usize, StreamError> {
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

    pub(super) async fn send(&mut self, buffer: BytesMut) -> Result<(), StreamError> {
        let payload = buffer.len().saturating_sub(frame::HEADER);
        let reserved = self.entry.mux.0.gate.reserve(buffer.len()).await;
        {
            let mut state = self.entry.shared.lock();
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            state.credit = state.credit.saturating_sub(payload);
        }
        if let Some(reserved) = reserved
            && self.entry.mux.send(frame::finish_data(buffer, self.entry.id)).await
        {
            reserved.used();
            return Ok(());
        }
        Err(StreamError(self.entry.mux.closed_reason()))
    }

    pub(super) async fn finish(&mut self) -> Result<(), StreamError> {
        self.finished = true;
        let sent = self.entry.mux.send(frame::encode(&Frame::Eof { stream: self.entry.id })).await;
        if sent { Ok(()) } else { Err(StreamError(self.entry.mux.closed_reason())) }
    }

    pub(super) fn reset(&mut self, reason: &str) {
        self.entry.shared.lock().reset_reason = Some(reason.to_owned());
        self.finished = false;
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The reader is only given up before its end together with the writer, so what it saw by now decides.
        let mut state = self.entry.shared.lock();
        if self.finished && state.received_eof && state.inbox.is_empty() {
            state.ended = true;
        }
    }
}

#[cfg(test)]
mod hostile;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::Stream;

    struct Pair {
        master: Mux,
        node: Mux,
        node_stalls: Stalls,
        incoming: mpsc::Receiver<Incoming>,
        notices: mpsc::Receiver<Notice>,
        tasks: Tasks,
    }

    /// Two ends joined in memory, each fed by a task as an SSH session would.
    fn pair(max_streams: usize) -> Pair {
        let tasks = Tasks::new();
        let end = |initiator| {
            let (tx, rx) = mpsc::channel::<Bytes>(16);
            let gate = Gate::default();
            let link = gate.clone();
            let out: Out = Box::new(move |frame| {
                let (tx, link) = (tx.clone(), link.clone());
                Box::pin(async move {
                    link.release(frame.len());
                    tx.send(frame).await.is_ok()
                })
            });
            let stalls = Stalls::default();
            (Mux::new(initiator, max_streams, gate, stalls.clone(), out, &tasks), rx, stalls)
        };
        let ((master, mut master_feeder, _), mut to_node, _) = end(true);
        let ((node, mut node_feeder, events), mut to_master, node_stalls) = end(false);
        tasks.spawn(async move {
            while let Some(frame) = to_node.recv().await {
                node_feeder.feed(&frame).unwrap();
            }
        });
        tasks.spawn(async move {
            while let Some(frame) = to_master.recv().await {
                master_feeder.feed(&frame).unwrap();
            }
        });
        Pair { master, node, node_stalls, incoming: events.incoming, notices: events.notices, tasks }
    }

    fn target() -> Target {
        "10.0.0.1:80".parse().unwrap()
    }

    async fn connect(pair: &mut Pair) -> (Stream, Stream) {
        let master = pair.master.clone();
        let target = target();
        let open = master.open(&target, "test", Duration::from_secs(5));
        let accept = async { pair.incoming.recv().await.unwrap().accept().await.unwrap() };
        let (near, far) = tokio::join!(open, accept);
        (near.unwrap(), far)
    }

    async fn send(stream: &mut Stream, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = stream.writer.room().await.unwrap().min(bytes.len()).min(frame::MAX_DATA);
            let mut buffer = stream.writer.buffer(room);
            buffer.extend_from_slice(&bytes[..room]);
            stream.writer.send(buffer).await.unwrap();
            bytes = &bytes[room..];
        }
    }

    async fn receive(stream: &mut Stream) -> Result<Vec<u8>, StreamError> {
        let mut all = Vec::new();
        loop {
            let bytes = stream.reader.fill().await?;
            if bytes.is_empty() {
                return Ok(all);
            }
            all.extend_from_slice(bytes);
            stream.reader.taken().await?;
        }
    }

    #[tokio::test]
    async fn carries_both_directions_and_closes_each_alone() {
        let mut pair = pair(10);
        let (mut near, mut far) = connect(&mut pair).await;
        let up: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7) as u8).collect();
        let (got, ()) = tokio::join!(receive(&mut far), async {
            send(&mut near, &up).await;
            near.writer.finish().await.unwrap();
        });
        assert!(got.unwrap() == up);
        send(&mut far, b"answer").await;
        far.writer.finish().await.unwrap();
        assert_eq!(receive(&mut near).await.unwrap(), b"answer");
        drop((near, far));
        assert_eq!((pair.master.streams_open(), pair.node.streams_open()), (0, 0));
        assert_eq!(pair.master.0.growth_left.load(Ordering::Relaxed), GROWTH_BUDGET);
    }

    #[tokio::test]
    async fn a_reader_that_stops_stops_only_its_own_stream() {
        let mut pair = pair(100);
        let mut stalled = Vec::new();
        for _ in 0..8 {
            let (near, mut far) = connect(&mut pair).await;
            let filled = pair.tasks.spawn(async move {
                let mut sent = 0usize;
                // Tiny writes, as many as the window takes.
                while let Ok(room) = tokio::time::timeout(Duration::from_millis(200), far.writer.room()).await
                {
                    let n = room.unwrap().min(100);
                    let mut buffer = far.writer.buffer(n);
                    buffer.resize(buffer.len() + n, 1);
                    far.writer.send(buffer).await.unwrap();
                    sent += n;
                }
                sent
            });
            stalled.push((near, filled));
        }
        let (mut near, mut far) = connect(&mut pair).await;
        let bytes = vec![5; 20_000_000];
        let (got, ()) = tokio::join!(receive(&mut near), async {
            send(&mut far, &bytes).await;
            far.writer.finish().await.unwrap();
        });
        assert_eq!(got.unwrap().len(), bytes.len());
        for (near, filled) in stalled {
            assert_eq!(filled.await.unwrap(), Some(window::INITIAL as usize));
            drop(near);
        }
    }

    #[tokio::test]
    async fn who_waits_for_the_peer_s_window_is_counted_and_nobody_else() {
        let mut pair = pair(10);
        let (mut near, mut far) = connect(&mut pair).await;
        send(&mut far, &vec![1; window::INITIAL as usize]).await;
        assert_eq!((pair.node_stalls.begun(), pair.node_stalls.now()), (0, 0));
        let mut room = Box::pin(far.writer.room());
        let waits = poll_fn(|cx| Poll::Ready(room.as_mut().poll(cx).is_pending())).await;
        assert!(waits);
        assert_eq!((pair.node_stalls.begun(), pair.node_stalls.now()), (1, 1));
        assert_eq!(pair.node_stalls.lasted(), Duration::ZERO);
        let read = async {
            while !near.reader.fill().await.unwrap().is_empty() {
                near.reader.taken().await.unwrap();
            }
        };
        tokio::select! {
            room = room => assert!(room.unwrap() > 0),
            () = read => panic!("the stream has not ended"),
        }
        assert_eq!((pair.node_stalls.begun(), pair.node_stalls.now()), (1, 0));
        assert!(pair.node_stalls.lasted() > Duration::ZERO);
    }

    #[tokio::test]
    async fn refusals_cancellations_and_caps() {
        let mut pair = pair(2);
        let master = pair.master.clone();
        let target = target();
        let refused = tokio::join!(master.open(&target, "", Duration::from_secs(5)), async {
            let error = DialError::Policy { rule: "x".into(), reason: "y".into() };
            pair.incoming.recv().await.unwrap().refuse(error).await;
        });
        assert!(matches!(refused.0, Err(DialError::Policy { rule, .. }) if rule == "x"));

        // A caller who gives up cancels the dial on the other side.
        let given_up = master.open(&target, "", Duration::from_millis(50)).await;
        assert!(matches!(given_up, Err(DialError::TimedOut(_))), "{given_up:?}");
        let incoming = pair.incoming.recv().await.unwrap();
        tokio::time::timeout(Duration::from_secs(5), incoming.cancelled()).await.unwrap();
        drop(incoming);

        let (a, b) = (connect(&mut pair).await, connect(&mut pair).await);
        let third = master.open(&target, "", Duration::from_secs(5)).await;
        assert!(matches!(third, Err(DialError::TooManyStreams(_))), "{third:?}");
        drop((a, b));
        assert_eq!(master.streams_open(), 0);
    }

    #[tokio::test]
    async fn a_reset_and_a_lost_tunnel_reach_the_other_side() {
        let mut pair = pair(10);
        let (mut near, mut far) = connect(&mut pair).await;
        far.writer.reset("the far socket failed");
        drop(far);
        assert_eq!(receive(&mut near).await, Err(StreamError("the far socket failed".into())));

        let (mut near, _far) = connect(&mut pair).await;
        pair.master.close("cut");
        assert_eq!(receive(&mut near).await, Err(StreamError("cut".into())));
        let open = pair.master.open(&target(), "", Duration::from_secs(5)).await;
        assert!(matches!(open, Err(DialError::TunnelLost { .. })), "{open:?}");
    }

    #[tokio::test]
    async fn going_away_and_certificates_are_told() {
        let mut pair = pair(10);
        assert!(pair.master.send_certificate("ssh-ed25519-cert").await);
        assert_eq!(pair.notices.recv().await, Some(Notice::Certificate("ssh-ed25519-cert".into())));
        pair.master.go_away("stopping").await;
        assert_eq!(pair.notices.recv().await, Some(Notice::GoAway("stopping".into())));
        assert!(pair.master.is_going_away() && pair.node.is_going_away());
    }
}
