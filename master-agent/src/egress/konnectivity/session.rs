//! One call of `Proxy`: many dials and connections over one gRPC stream.
//!
//! The session reads the client's packets and never waits for a dial. It waits for a target whose queue is full: without
//! limit if the connection is the only one of the stream, and otherwise only while the target keeps reading
//! ([`Inbox`]). Each dial is a task, which then carries its connection. The tasks share the queue of packets
//! for the client, which is bounded and fair: a client that does not read makes only its own targets wait.
//!
//! When a client disappears, all of its connections end at once, except those that it has closed in order: what it sent on
//! them still reaches their targets.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
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
    egress::outbound::{Dialled, Outbound, excerpt},
    stream::{
        caller::Caller,
        record::{Opened, Record},
    },
};

/// Packets that wait until the client reads them.
const ANSWERS: usize = 4;
/// The most bytes in one DATA packet.
const CHUNK: usize = 32 * 1024;
/// How long a target may take to read what its client sent before closing. Clients wait 10 s for the answer.
const FLUSH: Duration = Duration::from_secs(8);
/// How long the other direction may take to end after a connection has been closed, before it is reset.
const LINGER: Duration = Duration::from_secs(2);

/// The packets for the client.
pub(super) type Answers = mpsc::Receiver<Result<Packet, Status>>;

/// A session. Its tasks belong to [`Outbound::tasks`].
pub(super) struct Session {
    outbound: Outbound,
    caller: Caller,
    answers: mpsc::Sender<Result<Packet, Status>>,
    gone: CancellationToken,
    slots: Slots,
    table: Mutex<Table>,
}

/// The dials and connections that may exist at once on all gRPC streams of a client's HTTP/2 connection, including those
/// that are being closed.
#[derive(Clone)]
pub(super) struct Slots {
    free: Arc<Semaphore>,
    max: usize,
}

impl Slots {
    pub(super) fn new(max: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(max)), max }
    }

    fn take(&self) -> Result<OwnedSemaphorePermit, DialError> {
        self.free.clone().try_acquire_owned().map_err(|_| {
            let max = self.max;
            let error = format!(
                "this HTTP/2 connection has {max} dials and connections already (konnectivity.max_dials)"
            );
            DialError::TooManyStreams(error)
        })
    }
}

#[derive(Default)]
struct Table {
    dials: HashMap<i64, CancellationToken>,
    open: HashMap<i64, Arc<Inbox>>,
    /// The number of the latest connection that began with a dial of this number.
    dialled: HashMap<i64, i64>,
    last_id: i64,
}

impl Table {
    fn open(&mut self, random: i64) -> (i64, Arc<Inbox>) {
        self.last_id += 1;
        let (id, inbox) = (self.last_id, Arc::new(Inbox::new(random)));
        self.open.insert(id, inbox.clone());
        self.dialled.insert(random, id);
        (id, inbox)
    }

    fn close(&mut self, id: i64) {
        if let Some(inbox) = self.open.remove(&id)
            && self.dialled.get(&inbox.random) == Some(&id)
        {
            self.dialled.remove(&inbox.random);
        }
    }
}

/// A dial that is under way.
struct Dial {
    random: i64,
    given_up: CancellationToken,
    _slot: OwnedSemaphorePermit,
}

/// How a connection ended.
#[derive(Debug)]
enum End {
    ByClient,
    ByTarget,
    Failed(StreamError),
    Aborted(&'static str),
    /// The target did not read everything that the client had sent before closing.
    NotFlushed,
    ClientGone,
}

impl Session {
    /// The owner of `gone` cancels it when the client has left.
    pub(super) fn new(
        outbound: Outbound,
        caller: Caller,
        slots: Slots,
        gone: CancellationToken,
    ) -> (Arc<Self>, Answers) {
        let (answers, queue) = mpsc::channel(ANSWERS);
        (Arc::new(Self { outbound, caller, answers, gone, slots, table: Mutex::default() }), queue)
    }

    /// Serves the client's packets to their end. The queue of answers ends with the last connection.
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
                tracing::debug!(origin = %self.caller.origin, %status, "gRPC stream failed");
                self.answer(Err(status)).await;
                self.gone.cancel();
            }
        }
    }

    async fn on_packet(self: &Arc<Self>, packet: Packet) {
        let kind = packet.r#type;
        self.outbound.metrics.konnectivity.from_client.count(kind);
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
            Some(Payload::DialResponse(_) | Payload::CloseResponse(_) | Payload::Drain(_)) | None => {
                tracing::debug!(origin = %self.caller.origin, kind, "unexpected packet ignored");
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
                        let protocol = excerpt(&protocol);
                        DialError::BadTarget(format!("protocol {protocol:?} is not served; only {TCP:?} is"))
                    }
                    Err(error) => DialError::BadTarget(format!("{:?}: {error}", excerpt(&address))),
                };
                self.outbound.bad_request(self.caller.listener, &self.caller.origin, &error);
                return self.answer(Ok(Packet::dial_failed(random, error.to_string()))).await;
            }
        };
        match self.begin_dial(random) {
            Ok(dial) => {
                let session = self.clone();
                self.outbound.tasks.spawn(async move { session.connection(dial, target).await });
            }
            Err(error) => {
                self.outbound.dial_failed(&target, &self.caller, &error);
                self.answer(Ok(Packet::dial_failed(random, error.to_string()))).await;
            }
        }
    }

    fn begin_dial(&self, random: i64) -> Result<Dial, DialError> {
        let slot = self.slots.take()?;
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
        } else if let Some(late) = table.dialled.get(&random).and_then(|id| table.open.get(id)) {
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
            // Data that follows is answered as that of an unknown connection.
            self.table().close(id);
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

    /// Sends an answer, and waits while the queue is full. If the client has left, another part ends the session.
    async fn answer(&self, answer: Result<Packet, Status>) {
        if let Some(room) = self.room().await {
            room.send(answer);
        }
    }

    /// Waits until the client has room for an answer; `None` if it has left.
    async fn room(&self) -> Option<mpsc::Permit<'_, Result<Packet, Status>>> {
        let began = Instant::now();
        let room = self.answers.reserve().await.ok();
        self.outbound.metrics.konnectivity.write_seconds.observe(began.elapsed().as_secs_f64());
        room
    }

    /// Runs a dial and then its connection to its end.
    async fn connection(&self, dial: Dial, target: Target) {
        let dialled = tokio::select! {
            biased;
            () = self.gone.cancelled() => Err(DialError::Cancelled),
            () = dial.given_up.cancelled() => Err(DialError::Cancelled),
            dialled = Box::pin(self.outbound.dial(&target, &self.caller)) => dialled,
        };
        let opened = self.end_dial(&dial, dialled.is_ok());
        match (dialled, opened) {
            (Ok(dialled), Some((id, inbox))) => {
                self.answer(Ok(Packet::dialled(dial.random, id))).await;
                self.carry(id, &inbox, dialled).await;
            }
            // The dial was cancelled just as it succeeded. Dropping the connection closes it.
            (Ok(_), None) => self.outbound.dial_failed(&target, &self.caller, &DialError::Cancelled),
            (Err(error), _) => {
                self.outbound.dial_failed(&target, &self.caller, &error);
                if error != DialError::Cancelled {
                    self.answer(Ok(Packet::dial_failed(dial.random, error.to_string()))).await;
                }
            }
        }
    }

    /// Returns the connection's number, unless the dial failed or has been cancelled.
    fn end_dial(&self, dial: &Dial, succeeded: bool) -> Option<(i64, Arc<Inbox>)> {
        let mut table = self.table();
        if dial.given_up.is_cancelled() {
            return None;
        }
        table.dials.remove(&dial.random);
        succeeded.then(|| table.open(dial.random))
    }

    async fn carry(&self, id: i64, inbox: &Inbox, dialled: Dialled) {
        let Dialled { connection, target, caller, span } = dialled;
        let Connection { stream, node, reason, permit } = connection;
        let opened = Opened { caller, target, node, reason, span };
        let mut record = Record::open(self.outbound.metrics.clone(), opened);
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

    /// Carries bytes both ways until either side ends the connection, then lets the other side end, too. Returns whether
    /// both directions have ended in order. If so, the client has been told.
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
                // What the target has sent before is still delivered.
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
        self.table().close(id);
        inbox.advance(Phase::Closing);
        let answer = self.answer(Ok(Packet::close_response(id, String::new())));
        let rest = match &end {
            End::ByClient => tokio::join!(answer, tokio::time::timeout(LINGER, down)).1,
            End::ByTarget => tokio::join!(answer, tokio::time::timeout(LINGER, up)).1,
            End::Failed(_) | End::Aborted(_) | End::NotFlushed | End::ClientGone => return (end, false),
        };
        (end, matches!(rest, Ok(Ok(()))))
    }

    /// Carries from the target to the client until the target ends. What arrives after the client has closed is dropped.
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
                    room = self.room() => match room {
                        Some(room) => {
                            room.send(Ok(Packet::data(id, Bytes::copy_from_slice(chunk))));
                            carried.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                            // The next task in the queue is woken, but would find its room taken without this.
                            tokio::task::yield_now().await;
                        }
                        None => std::future::pending().await,
                    },
                }
            }
            // A target that goes on after its client has closed gets no more credit.
            if !closed {
                reader.taken().await?;
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Carries from the client to the target until the client has closed and the target has read everything.
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
    /// The outcome in the stream's record.
    fn outcome(&self) -> &'static str {
        match self {
            Self::ByClient | Self::ByTarget => "closed",
            Self::Failed(_) => "stream_reset",
            Self::Aborted(_) => "aborted",
            Self::NotFlushed => "not_flushed",
            Self::ClientGone => "cancelled",
        }
    }

    /// What the client is told if the end was not in order.
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

    /// What the node is told when the stream is reset.
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
