//! One end of a multiplexer: the table of its streams, and what changes them.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use proto::{
    DialError,
    mux::{
        flow::PingId,
        frame::{self, Frame},
        ids::Ids,
    },
};
use tokio::sync::mpsc;

use super::{
    error::{ProtocolError, Violation},
    round_trip::RoundTrip,
    state::{Shared, State},
};
use crate::{gate::Gate, stalls::Stalls, stream::error::StreamError};

/// Bytes by which all windows of a tunnel together may exceed their initial size.
pub(super) const GROWTH_BUDGET: i64 = 32 * 1024 * 1024;

/// Hands one frame to the SSH session, waiting while its queue is full; `false` once the session is gone.
pub type SendFrame = Box<dyn Fn(Bytes) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;

/// One end of a tunnel's multiplexer. Cheap to clone.
#[derive(Clone)]
pub struct Mux(pub(super) Arc<Inner>);

pub(super) struct Inner {
    send: SendFrame,
    pub(super) gate: Gate,
    pub(super) stalls: Stalls,
    answers: mpsc::UnboundedSender<Bytes>,
    /// PINGs that the gate asks for.
    pings: mpsc::UnboundedSender<PingId>,
    /// The number of queued answers. It is bounded where the peer causes them, and not here, since a RESET must never
    /// be lost.
    pub(super) waiting_answers: AtomicUsize,
    /// Whether this side opens the streams.
    pub(super) initiator: bool,
    streams: Mutex<Streams>,
    pub(super) max_streams: usize,
    /// Streams of which this side still holds anything, including those that the peer has given up.
    pub(super) count: AtomicUsize,
    /// Held while an OPEN is sent, so that ids go out in the order in which they grow.
    pub(super) opening: tokio::sync::Mutex<()>,
    pub(super) growth_left: AtomicI64,
    pub(super) round_trip: RoundTrip,
}

#[derive(Default)]
pub(super) struct Streams {
    pub(super) ids: Ids,
    pub(super) open: HashMap<u32, Arc<Shared>>,
    pub(super) closed: Option<StreamError>,
    pub(super) going_away: Option<String>,
}

impl Inner {
    /// An end without streams, whose queued answers go to `answers`, and PINGs to `pings`.
    pub(super) fn new(
        initiator: bool,
        max_streams: usize,
        gate: Gate,
        stalls: Stalls,
        send: SendFrame,
        answers: mpsc::UnboundedSender<Bytes>,
        pings: mpsc::UnboundedSender<PingId>,
    ) -> Self {
        Self {
            send,
            gate,
            stalls,
            answers,
            pings,
            waiting_answers: AtomicUsize::new(0),
            initiator,
            streams: Mutex::default(),
            max_streams,
            count: AtomicUsize::new(0),
            opening: tokio::sync::Mutex::default(),
            growth_left: AtomicI64::new(GROWTH_BUDGET),
            round_trip: RoundTrip::default(),
        }
    }
}

impl Mux {
    /// Number of streams, including those that are being opened or closed.
    pub fn streams_open(&self) -> usize {
        self.0.count.load(Ordering::Relaxed)
    }

    /// The measured round trip between the agents' multiplexers. While a peer has owed an answer for longer than that,
    /// it is at least the time since the question was sent.
    pub fn round_trip(&self) -> Option<Duration> {
        self.0.round_trip.get()
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

    /// Resets every stream, and refuses to open others from now on.
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

    pub(super) fn is_full(&self) -> bool {
        self.streams_open() >= self.0.max_streams
    }

    pub(super) fn closed_reason(&self) -> String {
        self.streams().closed.as_ref().map_or_else(|| "the SSH session ended".to_owned(), |e| e.0.clone())
    }

    /// Hands a frame to the SSH session; `false` once the session is gone.
    pub(super) async fn send(&self, frame: Bytes) -> bool {
        (self.0.send)(frame).await
    }

    /// Queues a frame for the task that sends answers, without waiting.
    pub(super) fn answer(&self, frame: &Frame<'_>) {
        // Counted first, since another thread may take the frame out at once, and the count must not go below zero.
        self.0.waiting_answers.fetch_add(1, Ordering::Relaxed);
        if self.0.answers.send(frame::encode(frame)).is_err() {
            self.0.waiting_answers.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub(super) fn streams(&self) -> MutexGuard<'_, Streams> {
        self.0.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream that a frame is for; `None` if it has ended.
    pub(super) fn find(&self, stream: u32, frame: &'static str) -> Result<Option<Arc<Shared>>, Violation> {
        let streams = self.streams();
        match streams.open.get(&stream) {
            None if !streams.ids.is_used(stream) => Err(Violation::NeverOpened(frame)),
            open => Ok(open.cloned()),
        }
    }

    /// Applies a frame to its stream, or ignores it if the stream has ended.
    pub(super) fn change(
        &self,
        stream: u32,
        frame: &'static str,
        change: impl FnOnce(&mut State) -> Result<(), Violation>,
    ) -> Result<(), Violation> {
        self.find(stream, frame)?.map_or(Ok(()), |shared| change(&mut shared.lock()))
    }

    pub(super) fn on_reset(&self, stream: u32, reason: String) -> Result<(), Violation> {
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

    pub(super) fn on_pong(&self, id: PingId) -> Result<(), ProtocolError> {
        let measured = self.0.round_trip.on_pong(id);
        if measured && let Some(round_trip) = self.round_trip() {
            self.0.gate.measure(round_trip, &self.0.pings);
        }
        let marked = self.0.gate.on_pong(id);
        if measured || marked { Ok(()) } else { Err(ProtocolError::Pong) }
    }

    pub(super) fn on_opened(&self, stream: u32) -> Result<(), Violation> {
        if !self.0.initiator {
            return Err(Violation::Answerer("OPENED"));
        }
        self.change(stream, "OPENED", |state| state.on_answer("OPENED", Ok(())))
    }

    pub(super) fn on_refused(&self, stream: u32, error: DialError) -> Result<(), Violation> {
        if !self.0.initiator {
            return Err(Violation::Answerer("REFUSED"));
        }
        self.change(stream, "REFUSED", |state| {
            state.on_answer("REFUSED", Err(error))?;
            state.ended = true;
            Ok(())
        })
    }

    /// Takes what a window grows by from the tunnel's budget. It is never more than half of what is left, so that one
    /// stream leaves something for the others.
    pub(super) fn may_grow(&self, bytes: u32) -> bool {
        let bytes = i64::from(bytes);
        let enough = self.0.growth_left.fetch_sub(bytes, Ordering::Relaxed) / 2 >= bytes;
        if !enough {
            self.0.growth_left.fetch_add(bytes, Ordering::Relaxed);
        }
        enough
    }
}
