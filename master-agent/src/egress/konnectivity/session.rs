//! One call of `Proxy`: many dials and connections over one gRPC stream.
//!
//! The session reads the client's packets and never waits for a dial or, as long as there are several, for a
//! target. Each dial is a task that becomes its connection's. They share the queue of answers, which is bounded
//! and fair: a client that does not read makes all its targets wait, and nobody else's.
//!
//! A client that vanishes takes everything with it at once, but for connections that it has closed in order:
//! what it sent before still reaches their targets.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use proto::{
    DialError, Target,
    konnectivity::{DialRequest, Packet, Payload, TCP},
    mux::frame::MAX_DATA,
};
use proto_net::{
    dialer::Connection,
    stream::{Reader, Stream as Tunnelled, StreamError, Writer},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::inbox::{Inbox, Overrun, Phase};
use crate::{
    egress::door::{Common, Dialled},
    stream::{caller::Caller, record::Record},
};

/// Dials and connections at once on one gRPC stream, those that are still being closed included.
const CONNECTIONS: usize = 4096;
/// Packets that wait for the client to read.
const ANSWERS: usize = 4;
/// The most bytes in one DATA packet.
const CHUNK: usize = 32 * 1024;
/// How long a target may take for what its client sent before it closed; clients wait 10 s for the answer.
const FLUSH: Duration = Duration::from_secs(8);
/// After a connection's end, how long the other direction may take to end as well before it is reset.
const LINGER: Duration = Duration::from_secs(2);

/// What goes to the client.
pub(super) type Answers = mpsc::Receiver<Result<Packet, Status>>;

/// A session. Its tasks belong to [`Common::connections`].
pub(super) struct Session {
    common: Common,
    caller: Caller,
    answers: mpsc::Sender<Result<Packet, Status>>,
    gone: CancellationToken,
    slots: Arc<Semaphore>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    dials: HashMap<i64, CancellationToken>,
    open: HashMap<i64, Arc<Inbox>>,
    last_id: i64,
}

/// A dial under way.
struct Dial {
    random: i64,
    given_up: CancellationToken,
    _slot: OwnedSemaphorePermit,
}

/// How a connection came to its end.
#[derive(Debug)]
enum End {
    ByClient,
    ByTarget,
    Failed(StreamError),
    Aborted(&'static str),
    /// The target did not take all that came before the client's end.
    NotFlushed,
    ClientGone,
}

impl Session {
    /// `gone` is to be cancelled when the client is no longer there.
    pub(super) fn new(common: Common, caller: Caller, gone: CancellationToken) -> (Arc<Self>, Answers) {
        let (answers, queue) = mpsc::channel(ANSWERS);
        let (slots, table) = (Arc::new(Semaphore::new(CONNECTIONS)), Mutex::default());
        (Arc::new(Self { common, caller, answers, gone, slots, table }), queue)
    }

    /// Serves the client's packets to their end. The queue of answers ends when its last connection has.
    pub(super) async fn run(self: Arc<Self>, packets: impl Stream<Item = Result<Packet, Status>>) {
        let mut packets = pin!(packets);
        let serve = async {
            while let Some(packet) = packets.next().await {
                match packet {
                    Ok(packet) => self.on_packet(packet).await,
                    Err(status) => return Err(status),
                }
            }
            Ok(())
        };
        let ended = tokio::select! {
            biased;
            () = self.gone.cancelled() => return,
            ended = serve => ended,
        };
        match ended {
            Ok(()) => self.close_all(),
            Err(status) => {
                tracing::debug!(origin = %self.caller.origin, %status, "a gRPC stream failed");
                self.answer(Err(status)).await;
                self.gone.cancel();
            }
        }
    }

    async fn on_packet(self: &Arc<Self>, packet: Packet) {
        match packet.into_payload() {
            Some(Payload::DialRequest(request)) => self.on_dial(request).await,
            Some(Payload::CloseDial(dial)) => self.on_close_dial(dial.random),
            Some(Payload::Data(data)) => self.on_data(data.connect_id, data.data).await,
            Some(Payload::CloseRequest(request)) => {
                let inbox = self.table().open.get(&request.connect_id).cloned();
                match inbox {
                    Some(inbox) => inbox.advance(Phase::Closing),
                    None => self.answer_unknown(request.connect_id).await,
                }
            }
            ignored @ (Some(Payload::DialResponse(_) | Payload::CloseResponse(_) | Payload::Drain(_))
            | None) => {
                tracing::debug!(origin = %self.caller.origin, ?ignored, "a packet that clients don't send");
            }
        }
    }

    async fn on_dial(self: &Arc<Self>, request: DialRequest) {
        let DialRequest { protocol, address, random } = request;
        let target = match address.parse::<Target>() {
            Ok(target) if protocol == TCP => target,
            parsed => {
                let error = match parsed {
                    Ok(_) => {
                        DialError::BadTarget(format!("protocol {protocol:?} is not served, only {TCP:?} is"))
                    }
                    Err(error) => DialError::BadTarget(format!("{address:?}: {error}")),
                };
                self.common.bad_request(self.caller.door, &self.caller.origin, &error);
                return self.answer(Ok(Packet::dial_failed(random, error.to_string()))).await;
            }
        };
        match self.begin_dial(random) {
            Ok(dial) => {
                let session = self.clone();
                self.common.connections.spawn(async move { session.connection(dial, target).await });
            }
            Err(error) => {
                self.common.dial_failed(&target, &self.caller, &error);
                self.answer(Ok(Packet::dial_failed(random, error.to_string()))).await;
            }
        }
    }

    fn begin_dial(&self, random: i64) -> Result<Dial, DialError> {
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| {
            DialError::TooManyStreams(format!("this gRPC stream has {CONNECTIONS} connections already"))
        })?;
        let given_up = CancellationToken::new();
        let mut table = self.table();
        if table.dials.contains_key(&random) {
            return Err(DialError::BadTarget(format!("a dial with random {random} is under way already")));
        }
        table.dials.insert(random, given_up.clone());
        Ok(Dial { random, given_up, _slot: slot })
    }

    fn on_close_dial(&self, random: i64) {
        let mut table = self.table();
        if let Some(given_up) = table.dials.remove(&random) {
            given_up.cancel();
        } else if let Some(late) = table.open.values().find(|inbox| inbox.random == random) {
            late.advance(Phase::Aborted("the dial was given up"));
        }
    }

    async fn on_data(&self, id: i64, data: Bytes) {
        let Some(inbox) = self.table().open.get(&id).cloned() else {
            return self.answer_unknown(id).await;
        };
        let alone = || {
            let table = self.table();
            table.open.len() + table.dials.len() <= 1
        };
        if let Err(Overrun) = inbox.push(data, alone).await {
            inbox.advance(Phase::Aborted(
                "the target is too slow: it holds up the other connections of its gRPC stream",
            ));
            // Another one now.
            self.table().open.remove(&id);
        }
    }

    fn close_all(&self) {
        let mut table = self.table();
        for (_, given_up) in table.dials.drain() {
            given_up.cancel();
        }
        for inbox in table.open.values() {
            inbox.advance(Phase::Closing);
        }
    }

    async fn answer_unknown(&self, id: i64) {
        let error = format!("there is no connection {id}");
        self.answer(Ok(Packet::close_response(id, error))).await;
    }

    /// Waits for room in the queue. A client that is gone is noticed elsewhere.
    async fn answer(&self, answer: Result<Packet, Status>) {
        let _ = self.answers.send(answer).await;
    }

    /// A dial and the connection that comes of it, to its end.
    async fn connection(&self, dial: Dial, target: Target) {
        let dialled = tokio::select! {
            biased;
            () = self.gone.cancelled() => Err(DialError::Cancelled),
            () = dial.given_up.cancelled() => Err(DialError::Cancelled),
            dialled = Box::pin(self.common.dial(&target, &self.caller)) => dialled,
        };
        let opened = self.end_dial(&dial, dialled.is_ok());
        match (dialled, opened) {
            (Ok(dialled), Some((id, inbox))) => {
                self.answer(Ok(Packet::dialled(dial.random, id))).await;
                self.carry(id, &inbox, dialled, target).await;
            }
            // Given up just as it opened; dropping it closes it.
            (Ok(_), None) => self.common.dial_failed(&target, &self.caller, &DialError::Cancelled),
            (Err(error), _) => {
                self.common.dial_failed(&target, &self.caller, &error);
                if error != DialError::Cancelled {
                    self.answer(Ok(Packet::dial_failed(dial.random, error.to_string()))).await;
                }
            }
        }
    }

    /// The connection's number, unless the dial failed or was given up meanwhile.
    fn end_dial(&self, dial: &Dial, succeeded: bool) -> Option<(i64, Arc<Inbox>)> {
        let mut table = self.table();
        if dial.given_up.is_cancelled() {
            return None;
        }
        table.dials.remove(&dial.random);
        if !succeeded {
            return None;
        }
        table.last_id += 1;
        let (id, inbox) = (table.last_id, Arc::new(Inbox::new(dial.random)));
        table.open.insert(id, inbox.clone());
        Some((id, inbox))
    }

    async fn carry(&self, id: i64, inbox: &Inbox, dialled: Dialled, target: Target) {
        let Dialled { connection: Connection { stream, node, reason, permit }, span } = dialled;
        let (metrics, caller) = (self.common.metrics.clone(), self.caller.clone());
        let mut record = Record::new(metrics, caller, target, node, reason, span);
        let Tunnelled { mut reader, mut writer } = stream;
        let (end, in_order) = self.converse(id, inbox, &mut reader, &mut writer, &record).await;
        if !in_order {
            writer.reset(end.reset_reason());
        }
        drop((reader, writer, permit));
        record.outcome = end.outcome();
        drop(record);
        if let Some(error) = end.error() {
            self.answer(Ok(Packet::close_response(id, error))).await;
        }
    }

    /// Carries bytes both ways until either side ends the connection, then lets the other end too. Gives
    /// whether both directions have ended in order. An end in order has been answered.
    async fn converse(
        &self,
        id: i64,
        inbox: &Inbox,
        reader: &mut Reader,
        writer: &mut Writer,
        record: &Record,
    ) -> (End, bool) {
        let mut up = pin!(upload(inbox, writer, &record.counters().up));
        let mut down = pin!(self.download(id, inbox, reader, &record.counters().down));
        let carried = async {
            let uploaded = tokio::select! {
                uploaded = &mut up => uploaded,
                downloaded = &mut down => return downloaded.map_or_else(End::Failed, |()| End::ByTarget),
            };
            match uploaded {
                Ok(()) => End::ByClient,
                // What came from the target before is still to be delivered.
                Err(error) => match down.as_mut().await {
                    Ok(()) => End::Failed(error),
                    Err(error) => End::Failed(error),
                },
            }
        };
        let client_gone = async {
            self.gone.cancelled().await;
            if inbox.phase() != Phase::Open {
                std::future::pending().await
            }
        };
        let not_flushed = async {
            inbox.reached(|phase| *phase == Phase::Closing).await;
            tokio::time::sleep(FLUSH).await;
        };
        let end = tokio::select! {
            biased;
            phase = inbox.reached(|phase| matches!(phase, Phase::Aborted(_))) => match phase {
                Phase::Aborted(reason) => End::Aborted(reason),
                Phase::Open | Phase::Closing | Phase::Flushed => End::ClientGone,
            },
            end = carried => end,
            () = client_gone => End::ClientGone,
            () = not_flushed => End::NotFlushed,
        };
        self.table().open.remove(&id);
        inbox.advance(Phase::Closing);
        let answer = self.answer(Ok(Packet::close_response(id, String::new())));
        let rest = match &end {
            End::ByClient => tokio::join!(answer, tokio::time::timeout(LINGER, down)).1,
            End::ByTarget => tokio::join!(answer, tokio::time::timeout(LINGER, up)).1,
            End::Failed(_) | End::Aborted(_) | End::NotFlushed | End::ClientGone => return (end, false),
        };
        (end, matches!(rest, Ok(Ok(()))))
    }

    /// From the target to the client, until the target ends; after the client has closed, to nowhere.
    async fn download(
        &self,
        id: i64,
        inbox: &Inbox,
        reader: &mut Reader,
        carried: &AtomicU64,
    ) -> Result<(), StreamError> {
        let mut closed = false;
        loop {
            let bytes = reader.fill().await?;
            if bytes.is_empty() {
                return Ok(());
            }
            for chunk in bytes.chunks(CHUNK) {
                if closed {
                    break;
                }
                tokio::select! {
                    biased;
                    _ = inbox.reached(|phase| *phase == Phase::Flushed) => closed = true,
                    room = self.answers.reserve() => match room {
                        Ok(room) => {
                            room.send(Ok(Packet::data(id, Bytes::copy_from_slice(chunk))));
                            carried.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                            // Whoever else waits for room is woken, but would find it taken.
                            tokio::task::yield_now().await;
                        }
                        Err(_) => std::future::pending().await,
                    },
                }
            }
            // A target that goes on after its connection's end gets no more credit.
            if !closed {
                reader.taken().await?;
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// From the client to the target, until the client has closed and the target has got all.
async fn upload(inbox: &Inbox, writer: &mut Writer, carried: &AtomicU64) -> Result<(), StreamError> {
    loop {
        if inbox.filled().await == 0 {
            writer.finish().await?;
            inbox.advance(Phase::Flushed);
            return Ok(());
        }
        let room = writer.room().await?.min(MAX_DATA);
        let n = inbox.filled().await.min(room);
        let mut buffer = writer.buffer(n);
        inbox.take(n, &mut buffer);
        writer.send(buffer).await?;
        carried.fetch_add(n as u64, Ordering::Relaxed);
    }
}

impl End {
    /// A short, fixed word for logs.
    fn outcome(&self) -> &'static str {
        match self {
            Self::ByClient | Self::ByTarget => "closed",
            Self::Failed(_) => "stream_reset",
            Self::Aborted(_) => "aborted",
            Self::NotFlushed => "not_flushed",
            Self::ClientGone => "cancelled",
        }
    }

    /// What the client is told of an end that is not in order.
    fn error(&self) -> Option<String> {
        match self {
            Self::ByClient | Self::ByTarget | Self::ClientGone => None,
            Self::Failed(error) => Some(error.to_string()),
            Self::Aborted(reason) => Some((*reason).to_owned()),
            Self::NotFlushed => Some(format!(
                "the target did not take everything within {} s after the connection was closed",
                FLUSH.as_secs()
            )),
        }
    }

    /// What the node is told.
    fn reset_reason(&self) -> &'static str {
        match self {
            Self::ByClient => "closed by the caller",
            Self::ByTarget | Self::Failed(_) => "",
            Self::Aborted(reason) => reason,
            Self::NotFlushed => "closed by the caller, and too slow to take the rest",
            Self::ClientGone => "the caller is gone",
        }
    }
}

#[cfg(test)]
mod tests;
