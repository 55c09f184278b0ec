//! One end of a multiplexer: the table of its streams, and what changes them.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use proto::{
    DialError,
    mux::{
        Version,
        budget::Budget,
        frame::{self, Frame, Hello},
        ids::{Ids, Numbering, Opener},
    },
};

use tokio_util::sync::CancellationToken;

use super::{
    by_opener::{ByOpener, Counts},
    connection::Connection,
    error::Violation,
    further::Further,
    state::{Shared, State},
};
use crate::{
    stalls::{self, Stalls},
    stream::error::StreamError,
};

/// What this process says at the beginning of a connection of `session`.
pub fn hello(capabilities: u64, session: [u8; 16]) -> Hello {
    static INSTANCE: OnceLock<[u8; 16]> = OnceLock::new();
    Hello {
        capabilities: capabilities | Hello::CONNECTIONS | Hello::RETRACT | Hello::RELINK | Hello::DRAIN,
        instance: *INSTANCE.get_or_init(rand::random),
        session,
    }
}

/// What one end of a multiplexer is to be.
#[derive(Clone, Debug)]
pub struct Settings {
    pub numbering: Numbering,
    /// The most streams at once that this side opens.
    pub max_opened: usize,
    /// The most streams at once that the peer may open; with 0 it may open none at all.
    pub max_accepted: usize,
    /// Count what waits for the peer's windows. What this side opens goes up to a target, whichever agent this is, and
    /// what the peer opens comes down.
    pub stalls: stalls::ByDirection,
    /// What the peer has said at the beginning, unless both speak [`Version::V1`].
    pub peer: Option<Hello>,
}

/// One end of a tunnel's multiplexer. Cheap to clone.
#[derive(Clone)]
pub struct Mux(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) settings: Settings,
    /// The connection with which the multiplexer ends.
    pub(super) first: Arc<Connection>,
    pub(super) further: Arc<Further>,
    streams: Mutex<Streams>,
    /// Streams of which this side still holds anything, including those that the peer has given up.
    counts: Arc<Counts>,
    /// Held while an OPEN is sent, so that ids go out in the order in which they grow.
    pub(super) opening: tokio::sync::Mutex<()>,
    /// Bytes by which all windows of the tunnel together may exceed their initial size.
    pub(super) budget: Mutex<Budget>,
    closed: CancellationToken,
}

pub(super) struct Streams {
    pub(super) ids: ByOpener<Ids>,
    pub(super) open: HashMap<u64, Arc<Shared>>,
    pub(super) closed: Option<StreamError>,
    pub(super) going_away: Option<String>,
}

impl Inner {
    /// An end without streams.
    pub(super) fn new(settings: Settings, first: Arc<Connection>, counts: Arc<Counts>) -> Self {
        let numbering = settings.numbering;
        Self {
            settings,
            first,
            further: Arc::default(),
            streams: Mutex::new(Streams {
                ids: ByOpener { this: Ids::new(numbering), peer: Ids::new(numbering) },
                open: HashMap::new(),
                closed: None,
                going_away: None,
            }),
            counts,
            opening: tokio::sync::Mutex::default(),
            budget: Mutex::new(Budget::new(numbering.version())),
            closed: CancellationToken::new(),
        }
    }

    pub(super) fn version(&self) -> Version {
        self.settings.numbering.version()
    }

    pub(super) fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }

    pub(super) fn count(&self, opener: Opener) -> &AtomicUsize {
        self.counts.of(opener)
    }

    /// The most streams at once.
    pub(super) fn limit(&self, opener: Opener) -> usize {
        match opener {
            Opener::This => self.settings.max_opened,
            Opener::Peer => self.settings.max_accepted,
        }
    }

    pub(super) fn stalls(&self, opener: Opener) -> &Stalls {
        match opener {
            Opener::This => &self.settings.stalls.up,
            Opener::Peer => &self.settings.stalls.down,
        }
    }
}

impl Streams {
    fn is_used(&self, id: u64, numbering: Numbering) -> bool {
        self.ids.of(numbering.opener(id)).is_used(id)
    }
}

impl Mux {
    /// Number of streams that one side has opened, including those that are being opened or closed.
    pub fn streams_of(&self, opener: Opener) -> usize {
        self.0.count(opener).load(Ordering::Relaxed)
    }

    /// Number of streams, whoever has opened them.
    pub fn streams_open(&self) -> usize {
        self.0.counts.all()
    }

    pub fn version(&self) -> Version {
        self.0.version()
    }

    /// What the peer has said at the beginning, unless both speak [`Version::V1`].
    pub fn peer(&self) -> Option<&Hello> {
        self.0.settings.peer.as_ref()
    }

    /// The measured round trip between the agents' multiplexers. While a peer has owed an answer for longer than that,
    /// it is at least the time since the question was sent.
    pub fn round_trip(&self) -> Option<Duration> {
        self.0.first.round_trip.get()
    }

    /// Tells the peer that no new streams will be accepted or opened.
    pub async fn go_away(&self, reason: &str) {
        self.streams().going_away = Some(reason.to_owned());
        self.send_frame(&Frame::GoAway { reason: reason.to_owned() }).await;
    }

    /// Sends the node a renewed host certificate.
    pub async fn send_certificate(&self, text: &str) -> bool {
        self.send_frame(&Frame::Certificate { text: text.to_owned() }).await
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
        self.0.closed.cancel();
    }

    /// Waits until the multiplexer has been closed.
    pub async fn closed(&self) {
        self.0.closed.cancelled().await;
    }

    /// Whether either side has said that it takes no new streams.
    pub fn is_going_away(&self) -> bool {
        self.streams().going_away.is_some()
    }

    /// Number of streams that send or receive much.
    pub fn heavy_streams(&self) -> usize {
        self.0.further.heavy()
    }

    /// For how long no stream has sent or received much.
    pub fn unused_for(&self) -> Duration {
        self.0.further.unused_for()
    }

    /// Number of further connections.
    pub fn further_connections(&self) -> usize {
        self.0.further.len()
    }

    /// Number of further connections that there have been, with those that are gone.
    pub fn further_connections_ever(&self) -> u32 {
        self.0.further.ever()
    }

    /// Waits until the number of heavy streams or of further connections has changed since the last time. Cancel-safe.
    pub async fn load_changed(&self) {
        self.0.further.changed().await;
    }

    /// Asks the node to dial one more connection.
    pub async fn call(&self) -> bool {
        self.send_frame(&Frame::Call).await
    }

    /// Asks the side that dials the links for another one in place of this one. Returns whether it was asked: agents of
    /// earlier releases can't be.
    pub async fn ask_to_relink(&self) -> bool {
        self.peer().is_some_and(|peer| peer.can(Hello::RELINK)) && self.send_frame(&Frame::Relink).await
    }

    /// Tells the master that this node is to get no streams that others can carry, and after this time none. With 0, it is to
    /// get all again. Returns whether it was told: masters of earlier releases can't be.
    pub async fn say_drain(&self, left: Duration) -> bool {
        let milliseconds = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        self.understands_drain() && self.send_frame(&Frame::Drain { milliseconds }).await
    }

    /// Whether the peer is a master that can be told of a drain.
    pub fn understands_drain(&self) -> bool {
        self.peer().is_some_and(|peer| peer.can(Hello::DRAIN))
    }

    /// Resets the open streams of one side, and tells the peer why. Returns how many there were. Those that have not been
    /// answered yet stay.
    pub fn reset_streams(&self, opener: Opener, reason: &str) -> usize {
        let numbering = self.0.settings.numbering;
        let mut streams = self.streams();
        let open: Vec<_> = streams
            .open
            .extract_if(|id, shared| numbering.opener(*id) == opener && shared.lock().is_open())
            .collect();
        drop(streams);
        let count = open.len();
        self.reset(open, &StreamError(reason.to_owned()));
        count
    }

    fn reset(&self, streams: Vec<(u64, Arc<Shared>)>, error: &StreamError) {
        for (stream, shared) in streams {
            let end = {
                let mut state = shared.lock();
                state.fail(error.clone());
                Some(state.sent)
            };
            self.answer(&Frame::Reset { stream, end, reason: error.0.clone() });
        }
    }

    /// A further connection is gone. Streams end that have sent bytes on it which are not known to have arrived.
    pub(super) fn lose(&self, connection: &Arc<Connection>) {
        connection.set_lost();
        self.0.further.remove(connection);
        let lost = StreamError("one of the tunnel's connections was lost".to_owned());
        let (_, arrived) = connection.gate.sent_and_arrived();
        let mut streams = self.streams();
        let used: Vec<_> = streams
            .open
            .extract_if(|_, shared| shared.lock().ends_with(connection.number, arrived))
            .collect();
        drop(streams);
        self.reset(used, &lost);
    }

    pub(super) fn is_full(&self, opener: Opener) -> bool {
        self.streams_of(opener) >= self.0.limit(opener)
    }

    pub(super) fn closed_reason(&self) -> String {
        self.streams().closed.as_ref().map_or_else(|| "the SSH session ended".to_owned(), |e| e.0.clone())
    }

    /// Sends a frame on the first connection; `false` once that is gone.
    pub(super) async fn send_frame(&self, frame: &Frame<'_>) -> bool {
        self.0.first.send(frame::encode(self.version(), frame)).await
    }

    /// Queues a frame for the first connection, without waiting.
    pub(super) fn answer(&self, frame: &Frame<'_>) {
        self.0.first.answer(frame);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.streams().closed.is_some()
    }

    pub(super) fn streams(&self) -> MutexGuard<'_, Streams> {
        self.0.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream that a frame is for; `None` if it has ended.
    pub(super) fn find(&self, stream: u64, frame: &'static str) -> Result<Option<Arc<Shared>>, Violation> {
        let streams = self.streams();
        match streams.open.get(&stream) {
            None if !streams.is_used(stream, self.0.settings.numbering) => Err(Violation::NeverOpened(frame)),
            open => Ok(open.cloned()),
        }
    }

    /// Applies a frame to its stream, or ignores it if the stream has ended.
    pub(super) fn change(
        &self,
        stream: u64,
        frame: &'static str,
        change: impl FnOnce(&mut State) -> Result<(), Violation>,
    ) -> Result<(), Violation> {
        self.find(stream, frame)?.map_or(Ok(()), |shared| change(&mut shared.lock()))
    }

    pub(super) fn on_reset(&self, stream: u64, reason: String) -> Result<(), Violation> {
        let opener = self.0.settings.numbering.opener(stream);
        let mut streams = self.streams();
        match streams.open.remove(&stream) {
            Some(shared) => {
                drop(streams);
                shared.lock().fail(StreamError(reason));
            }
            None if !streams.is_used(stream, self.0.settings.numbering)
                && (opener == Opener::This || self.version() == Version::V2) =>
            {
                return Err(Violation::NeverOpened("RESET"));
            }
            // A peer of the first version may give a stream up before it has sent the OPEN.
            None => {
                streams.ids.of_mut(opener).take(stream);
            }
        }
        Ok(())
    }

    pub(super) fn on_opened(&self, stream: u64, limit: u64) -> Result<(), Violation> {
        self.check_opened_here(stream, "OPENED")?;
        self.change(stream, "OPENED", |state| {
            state.on_answer("OPENED", Ok(()))?;
            state.on_limit(limit)
        })
    }

    pub(super) fn on_refused(&self, stream: u64, error: DialError) -> Result<(), Violation> {
        self.check_opened_here(stream, "REFUSED")?;
        self.change(stream, "REFUSED", |state| {
            state.on_answer("REFUSED", Err(error))?;
            state.ended = true;
            Ok(())
        })
    }

    /// Only the side that was asked for a stream answers.
    fn check_opened_here(&self, stream: u64, frame: &'static str) -> Result<(), Violation> {
        match self.0.settings.numbering.opener(stream) {
            Opener::This => Ok(()),
            Opener::Peer => Err(Violation::Answerer(frame)),
        }
    }
}
