//! One SSH connection of a multiplexer: what is sent on it, and how it is measured.

use std::{
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use proto::mux::{
    Version,
    flow::PingId,
    frame::{self, Frame},
};
use tokio::sync::mpsc;

use super::{by_opener::Counts, error::ProtocolError, round_trip::RoundTrip, state::Shared};
use crate::{gate::Gate, keep_alive::Pings, tasks::Tasks};

/// Hands one frame to the SSH session, waiting while its queue is full; `false` once the session is gone.
pub type SendFrame = Box<dyn Fn(Bytes) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;

/// What a multiplexer sends on one SSH connection.
pub(super) struct Connection {
    /// Distinguishes it from the others of its session. The first one has 0.
    pub(super) number: u32,
    version: Version,
    send: SendFrame,
    pub(super) gate: Gate,
    answers: mpsc::UnboundedSender<Answer>,
    /// PINGs that the gate asks for.
    pings: mpsc::UnboundedSender<PingId>,
    /// The number of queued answers. It is bounded where the peer causes them, and not here, since a RESET must never
    /// be lost.
    waiting_answers: AtomicUsize,
    pub(super) round_trip: RoundTrip,
    /// Set before it is decided which streams end with this connection.
    lost: AtomicBool,
    /// The streams of its session.
    streams: Arc<Counts>,
}

impl Connection {
    /// The task that sends answers and measures the round trip belongs to `tasks`, and ends with the connection.
    pub(super) fn start(
        number: u32,
        version: Version,
        gate: Gate,
        send: SendFrame,
        streams: Arc<Counts>,
        tasks: &Tasks,
    ) -> Arc<Self> {
        let (answers, answer_queue) = mpsc::unbounded_channel();
        let (pings, ping_queue) = mpsc::unbounded_channel();
        let queues = Queues { answers: answer_queue, pings: ping_queue };
        let connection = Arc::new(Self {
            number,
            version,
            send,
            gate,
            answers,
            pings,
            waiting_answers: AtomicUsize::new(0),
            round_trip: RoundTrip::default(),
            lost: AtomicBool::new(false),
            streams,
        });
        tasks.spawn(housekeeping(Arc::downgrade(&connection), version, connection.gate.clone(), queues));
        connection
    }

    /// Hands an encoded frame to the SSH session; `false` once the session is gone.
    pub(super) async fn send(&self, frame: Bytes) -> bool {
        (self.send)(frame).await
    }

    /// Queues a frame for the task that sends answers, without waiting.
    pub(super) fn answer(&self, frame: &Frame<'_>) {
        self.queue(frame, Weak::new());
    }

    /// Queues the answer to a RETRACT of the peer. The stream learns when it is sent.
    pub(super) fn answer_retract(&self, stream: u64, limit: u64, shared: &Arc<Shared>) {
        self.queue(&Frame::Retracted { stream, limit }, Arc::downgrade(shared));
    }

    fn queue(&self, frame: &Frame<'_>, retracted: Weak<Shared>) {
        // Counted first, since another thread may take the frame out at once, and the count must not go below zero.
        self.waiting_answers.fetch_add(1, Ordering::Relaxed);
        let answer = Answer { frame: frame::encode(self.version, frame), retracted };
        if self.answers.send(answer).is_err() {
            self.waiting_answers.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub(super) fn set_lost(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    pub(super) fn waiting_answers(&self) -> usize {
        self.waiting_answers.load(Ordering::Relaxed)
    }

    pub(super) fn on_pong(&self, id: PingId) -> Result<(), ProtocolError> {
        let measured = self.round_trip.on_pong(id);
        if measured && let Some(round_trip) = self.round_trip.get() {
            self.gate.measure(round_trip, &self.pings);
        }
        let marked = self.gate.on_pong(id);
        if measured || marked { Ok(()) } else { Err(ProtocolError::Pong) }
    }
}

/// An encoded frame that waits to be sent.
struct Answer {
    frame: Bytes,
    /// The stream whose RETRACT it answers, if there is one. A peer that does not read its answers must not keep streams that
    /// have ended.
    retracted: Weak<Shared>,
}

/// What waits to be sent without a stream.
struct Queues {
    answers: mpsc::UnboundedReceiver<Answer>,
    pings: mpsc::UnboundedReceiver<PingId>,
}

/// Sends queued answers, and the PINGs that the gate asks for or that [`Pings`] says are due, until the connection is gone.
async fn housekeeping(connection: Weak<Connection>, version: Version, gate: Gate, mut queues: Queues) {
    let mut pings = Pings::new(gate.traffic().cloned());
    loop {
        let mut retracted = Weak::new();
        let frame = tokio::select! {
            Some(id) = queues.pings.recv() => frame::encode(version, &Frame::Ping(id)),
            answer = queues.answers.recv() => {
                let (Some(answer), Some(connection)) = (answer, connection.upgrade()) else { return };
                connection.waiting_answers.fetch_sub(1, Ordering::Relaxed);
                retracted = answer.retracted;
                answer.frame
            }
            () = pings.due() => {
                let Some(connection) = connection.upgrade() else { return };
                let round_trip = &connection.round_trip;
                // While there is no stream, nobody needs to know how far away the peer is.
                if round_trip.is_measured() && !pings.keep_alive() && connection.streams.all() == 0 {
                    continue;
                }
                let Some(id) = round_trip.next_ping() else { continue };
                // Before the first answer, the peer may not even have agreed to take frames.
                if round_trip.is_measured() {
                    gate.mark(id);
                }
                frame::encode(version, &Frame::Ping(id))
            }
        };
        gate.settled().await;
        let Some(connection) = connection.upgrade() else { return };
        if let Some(shared) = retracted.upgrade() {
            shared.lock().on_retract_answered();
        }
        if !connection.send(frame).await {
            return;
        }
    }
}
