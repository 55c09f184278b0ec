//! What comes from the peer: frames out of the bytes of the SSH channel, each handed to its stream.

use std::sync::{Arc, Weak, atomic::Ordering};

use bytes::Bytes;
use proto::mux::{
    flow::PingId,
    frame::{self, Decoder, Frame},
};
use tokio::sync::mpsc;

use super::{
    endpoint::{Inner, Mux, SendFrame},
    error::ProtocolError,
    open::{Incoming, on_open},
    state::{Shared, State},
};
use crate::{gate::Gate, keep_alive::Pings, stalls::Stalls, tasks::Tasks};

/// Answers (PONG, REFUSED, RESET) that may wait to be sent, in addition to one for each stream.
pub(super) const ANSWERS: usize = 4096;

/// Takes the bytes that come out of the SSH channel. The handler of the SSH session owns it; dropping it closes the
/// multiplexer.
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

/// The receiving ends that go with a new [`Mux`].
pub struct Events {
    /// Streams that the peer asks for. Nothing ever comes on the side that opens the streams.
    pub incoming: mpsc::Receiver<Incoming>,
    pub notices: mpsc::Receiver<Notice>,
}

impl Mux {
    /// `initiator` opens streams; the other side receives them as [`Events::incoming`]. The task that sends answers and
    /// measures the round trip belongs to `tasks`. `stalls` counts what waits for the peer's windows.
    pub fn new(
        initiator: bool,
        max_streams: usize,
        gate: Gate,
        stalls: Stalls,
        send: SendFrame,
        tasks: &Tasks,
    ) -> (Self, Feeder, Events) {
        let (answers, answer_queue) = mpsc::unbounded_channel();
        let (pings, ping_queue) = mpsc::unbounded_channel();
        let queues = Queues { answers: answer_queue, pings: ping_queue };
        let (incoming_tx, incoming) = mpsc::channel(max_streams.max(1));
        let (notices_tx, notices) = mpsc::channel(16);
        let mux =
            Self(Arc::new(Inner::new(initiator, max_streams, gate.clone(), stalls, send, answers, pings)));
        tasks.spawn(housekeeping(Arc::downgrade(&mux.0), gate, queues));
        let feeder = Feeder {
            mux: mux.clone(),
            decoder: Decoder::default(),
            incoming: incoming_tx,
            notices: notices_tx,
        };
        (mux, feeder, Events { incoming, notices })
    }
}

impl Feeder {
    /// Takes bytes in the order in which they came out of the SSH channel. Never waits. After an error the tunnel must be
    /// closed.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        let Self { mux, decoder, incoming, notices } = self;
        let on = |stream| move |error| ProtocolError::Stream { stream, error };
        // Consecutive parts of one stream's data need only one look-up.
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

/// What waits to be sent without a stream.
struct Queues {
    answers: mpsc::UnboundedReceiver<Bytes>,
    pings: mpsc::UnboundedReceiver<PingId>,
}

/// Sends queued answers, and the PINGs that the gate asks for or that [`Pings`] says are due, until the multiplexer is gone.
async fn housekeeping(mux: Weak<Inner>, gate: Gate, mut queues: Queues) {
    let mut pings = Pings::new(gate.traffic().cloned());
    loop {
        let frame = tokio::select! {
            Some(id) = queues.pings.recv() => frame::encode(&Frame::Ping(id)),
            answer = queues.answers.recv() => {
                let (Some(answer), Some(mux)) = (answer, mux.upgrade()) else { return };
                mux.waiting_answers.fetch_sub(1, Ordering::Relaxed);
                answer
            }
            () = pings.due() => {
                let Some(mux) = mux.upgrade().map(Mux) else { return };
                let round_trip = &mux.0.round_trip;
                // While there is no stream, nobody needs to know how far away the peer is.
                if round_trip.is_measured() && !pings.keep_alive() && mux.streams_open() == 0 {
                    continue;
                }
                let Some(id) = round_trip.next_ping() else { continue };
                // Before the first answer, the peer may not even have agreed to take frames.
                if round_trip.is_measured() {
                    gate.mark(id);
                }
                frame::encode(&Frame::Ping(id))
            }
        };
        gate.settled().await;
        let Some(mux) = mux.upgrade() else { return };
        if !Mux(mux).send(frame).await {
            return;
        }
    }
}
