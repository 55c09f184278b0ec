//! What comes from the peer: frames out of the bytes of an SSH channel, each handed to its stream.

use std::sync::Arc;

use proto::mux::{
    frame::{Decoder, Frame},
    ids::Numbering,
};
use tokio::sync::mpsc;

use super::{
    by_opener::Counts,
    connection::{Connection, SendFrame},
    endpoint::{Inner, Mux, Settings},
    error::ProtocolError,
    open::{Asked, Incoming, on_open},
    state::Shared,
};
use crate::{gate::Gate, tasks::Tasks};

/// Answers (PONG, REFUSED, RESET, RETRACTED) that may wait to be sent, in addition to one for each stream.
pub(super) const ANSWERS: usize = 4096;

/// Takes the bytes that come out of the SSH channel of one connection. The handler of the SSH session owns it. Dropping that
/// of the first connection closes the multiplexer, and dropping another one ends the streams that have used it.
pub struct Feeder {
    mux: Mux,
    connection: Arc<Connection>,
    decoder: Decoder,
    /// What only the first connection carries goes there.
    first: Option<Outlets>,
}

/// Where what is not of a stream goes.
struct Outlets {
    incoming: mpsc::Sender<Incoming>,
    notices: mpsc::Sender<Notice>,
}

/// What the peer says about the tunnel as a whole.
#[derive(Debug, PartialEq, Eq)]
pub enum Notice {
    GoAway(String),
    Certificate(String),
    /// The peer asks for one more connection.
    Call,
    /// The peer asks for another link in place of this one.
    Relink,
    /// The node is to get no streams that others can carry, and after so many milliseconds none. With 0, it is to get all
    /// again.
    Drain {
        milliseconds: u64,
    },
}

/// The receiving ends that go with a new [`Mux`].
pub struct Events {
    /// Streams that the peer asks for. None ever comes if it may open none.
    pub incoming: mpsc::Receiver<Incoming>,
    pub notices: mpsc::Receiver<Notice>,
}

impl Mux {
    /// A multiplexer on its first connection. The task that sends answers and measures the round trip belongs to `tasks`.
    pub fn new(settings: Settings, gate: Gate, send: SendFrame, tasks: &Tasks) -> (Self, Feeder, Events) {
        let (incoming_tx, incoming) = mpsc::channel(settings.max_accepted.max(1));
        let (notices_tx, notices) = mpsc::channel(16);
        let version = settings.numbering.version();
        let counts = Arc::<Counts>::default();
        let connection = Connection::start(0, version, gate, send, counts.clone(), tasks);
        let mux = Self(Arc::new(Inner::new(settings, connection.clone(), counts)));
        let outlets = Outlets { incoming: incoming_tx, notices: notices_tx };
        let feeder =
            Feeder { mux: mux.clone(), connection, decoder: Decoder::new(version), first: Some(outlets) };
        (mux, feeder, Events { incoming, notices })
    }

    /// Adds a connection over which both sides have agreed on this session. Returns what takes its bytes; `None` if the
    /// session has enough of them.
    pub fn join(&self, gate: Gate, send: SendFrame, tasks: &Tasks) -> Option<Feeder> {
        if self.is_closed() {
            return None;
        }
        let (version, counts) = (self.version(), self.0.counts().clone());
        let start = |number| Connection::start(number, version, gate, send, counts, tasks);
        let connection = self.0.further.add(start)?;
        Some(Feeder { mux: self.clone(), connection, decoder: Decoder::new(version), first: None })
    }
}

impl Feeder {
    /// Takes bytes in the order in which they came out of the SSH channel. Never waits. After an error the SSH session must
    /// be closed.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        let Self { mux, connection, decoder, first } = self;
        let on = |stream| move |error| ProtocolError::Stream { stream, error };
        let is_first = first.is_some();
        // Consecutive parts of one stream's data need only one look-up.
        let mut last: Option<(u64, Arc<Shared>)> = None;
        let most_answers = ANSWERS + mux.0.settings.max_opened + mux.0.settings.max_accepted;
        while let Some(frame) = decoder.decode(&mut bytes)? {
            if connection.waiting_answers() > most_answers {
                return Err(ProtocolError::Flood);
            }
            match frame {
                Frame::Data { stream, offset, bytes } => {
                    if last.as_ref().is_none_or(|(id, _)| *id != stream) {
                        last = mux.find(stream, "DATA").map_err(on(stream))?.map(|shared| (stream, shared));
                    }
                    if let Some((_, shared)) = &last {
                        shared.lock().on_data(is_first, offset, bytes).map_err(on(stream))?;
                    }
                }
                Frame::Ping(id) => connection.answer(&Frame::Pong(id)),
                Frame::Pong(id) => connection.on_pong(id)?,
                Frame::Hello(_) => return Err(ProtocolError::Hello),
                other @ (Frame::Open { .. }
                | Frame::Opened { .. }
                | Frame::Refused { .. }
                | Frame::Credit { .. }
                | Frame::Eof { .. }
                | Frame::Reset { .. }
                | Frame::GoAway { .. }
                | Frame::Certificate { .. }
                | Frame::Call
                | Frame::Retract { .. }
                | Frame::Retracted { .. }
                | Frame::Relink
                | Frame::Drain { .. }) => {
                    last = None;
                    let outlets = first.as_ref().ok_or(ProtocolError::Further(other.name()))?;
                    outlets.take(mux, other)?;
                }
            }
        }
        Ok(())
    }

    pub fn mux(&self) -> &Mux {
        &self.mux
    }
}

impl Outlets {
    /// Takes a frame that only the first connection carries.
    fn take(&self, mux: &Mux, frame: Frame<'_>) -> Result<(), ProtocolError> {
        let on = |stream| move |error| ProtocolError::Stream { stream, error };
        match frame {
            Frame::Open { stream, timeout_ms, limit, target, origin } => {
                let asked = Asked { stream, timeout_ms, limit, target, origin };
                on_open(mux, &self.incoming, asked).map_err(on(stream))
            }
            Frame::Opened { stream, limit } => mux.on_opened(stream, limit).map_err(on(stream)),
            Frame::Refused { stream, error } => mux.on_refused(stream, error).map_err(on(stream)),
            Frame::Credit { stream, credit } => {
                mux.change(stream, "CREDIT", |state| state.on_credit(credit)).map_err(on(stream))
            }
            Frame::Retract { stream, limit } => mux.on_retract(stream, limit).map_err(on(stream)),
            Frame::Retracted { stream, limit } => mux.on_retracted(stream, limit).map_err(on(stream)),
            Frame::Eof { stream, end } => mux.on_eof(stream, end).map_err(on(stream)),
            Frame::Reset { stream, end: _, reason } => mux.on_reset(stream, reason).map_err(on(stream)),
            Frame::GoAway { reason } => {
                mux.streams().going_away = Some(reason.clone());
                self.notice(Notice::GoAway(reason));
                Ok(())
            }
            Frame::Certificate { text } => {
                self.notice(Notice::Certificate(text));
                Ok(())
            }
            Frame::Call => {
                self.notice(Notice::Call);
                Ok(())
            }
            Frame::Relink => {
                self.notice(Notice::Relink);
                Ok(())
            }
            Frame::Drain { milliseconds } => match mux.0.settings.numbering {
                Numbering::Halves { is_client: true } => {
                    self.notice(Notice::Drain { milliseconds });
                    Ok(())
                }
                Numbering::Halves { is_client: false } | Numbering::All { .. } => Err(ProtocolError::Drain),
            },
            Frame::Data { .. } | Frame::Ping(_) | Frame::Pong(_) | Frame::Hello(_) => Ok(()),
        }
    }

    fn notice(&self, notice: Notice) {
        let _ = self.notices.try_send(notice);
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        match self.first {
            Some(_) => self.mux.close("the tunnel was lost"),
            None => self.mux.lose(&self.connection),
        }
    }
}
