//! The audit log: one JSON line for every request, to standard output or to a file that is rotated by size.
//!
//! A line names the caller, the request, the decision with its rule, and the result (`audit/record.rs`).
//!
//! A thread writes the lines of a bounded queue. A request takes a [`QueuePermit`] before it is served, so that every
//! served request is also recorded. While the queue is full, by the number of its lines or by their bytes
//! (`audit/room.rs`), a request waits for a short time. Then it is either rejected or served without a record,
//! depending on the configuration. Unauthenticated callers and long-running requests have queues of their own, so that
//! they can't take room from others. A lost line, for instance on a full disk, is counted and logged, and the audit log
//! itself reports the number of missing lines once it can be written again.

mod config;
mod file;
mod record;
mod room;

use std::{
    fs::File,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use prometheus_client::metrics::counter::Counter;
use proto_net::log_throttle::LogThrottle;
use tokio::sync::mpsc;

use self::{
    file::Output,
    room::{Occupied, Room},
};

pub use config::{AuditConfig, OnFull};
pub use record::{Outcome, Record, RequestId};
pub use room::QueuePermit;

/// How long lines are collected before they are written together.
const BATCH_INTERVAL: Duration = Duration::from_millis(5);
/// The shortest time between two lines about lost records.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// A handle to the audit log, which takes records.
#[derive(Clone)]
pub struct Audit {
    lines: mpsc::UnboundedSender<Message>,
    rooms: Arc<Rooms>,
    wait: Duration,
    on_full: OnFull,
    lost: Arc<Lost>,
}

/// A class of records with its own limit of waiting lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// The short requests of authenticated callers.
    Authenticated,
    /// The long-running requests, such as watches.
    LongRunning,
    /// The requests of unauthenticated callers.
    Unauthenticated,
}

/// The room of each queue.
struct Rooms {
    authenticated: Arc<Room>,
    long_running: Arc<Room>,
    unauthenticated: Arc<Room>,
}

impl Rooms {
    fn of(&self, queue: Queue) -> &Arc<Room> {
        match queue {
            Queue::Authenticated => &self.authenticated,
            Queue::LongRunning => &self.long_running,
            Queue::Unauthenticated => &self.unauthenticated,
        }
    }
}

/// The error of a request whose line has no room, and that must not be served without a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueFull;

/// The thread that writes the log.
pub struct Writer {
    lines: mpsc::UnboundedSender<Message>,
    thread: thread::JoinHandle<()>,
}

enum Message {
    Line(String, Occupied),
    Close,
}

impl Audit {
    /// Opens the output and starts the writer. All of `max_long_running` requests at once have room for their lines.
    /// `lost` counts the records that could not be written.
    pub fn start(
        config: &AuditConfig,
        max_long_running: usize,
        lost: Counter,
    ) -> anyhow::Result<(Self, Writer)> {
        let output = match &config.file {
            // The stream is unbuffered, so that a failed write is noticed at once.
            None => Output::stream(File::from(std::io::stdout().as_fd().try_clone_to_owned()?)),
            Some(path) => Output::file(path.clone(), config.max_bytes, config.keep)
                .with_context(|| format!("can't write the audit log {}", path.display()))?,
        };
        let (audit, lines) = Self::new(config, max_long_running, lost);
        let lost = audit.lost.clone();
        let thread =
            thread::Builder::new().name("audit".into()).spawn(move || write(lines, output, &lost))?;
        let writer = Writer { lines: audit.lines.clone(), thread };
        Ok((audit, writer))
    }

    fn new(
        config: &AuditConfig,
        max_long_running: usize,
        lost: Counter,
    ) -> (Self, mpsc::UnboundedReceiver<Message>) {
        let rooms = Rooms {
            authenticated: Room::new(config.queue),
            // The lines of those that have ended may still wait to be written.
            long_running: Room::new(max_long_running + config.queue),
            unauthenticated: Room::new(config.unauthenticated_queue),
        };
        // Each line in the channel occupies room, which bounds the channel.
        let (lines, written) = mpsc::unbounded_channel();
        let lost = Lost { counter: lost, log: LogThrottle::default(), unreported: AtomicU64::new(0) };
        let (rooms, lost) = (Arc::new(rooms), Arc::new(lost));
        (Self { lines, rooms, wait: config.wait, on_full: config.on_full, lost }, written)
    }

    /// Reserves room for the line of a request, and waits for a short time if the queue is full. Returns `None` if the
    /// request is to be served without a line.
    pub async fn reserve(&self, queue: Queue) -> Result<Option<QueuePermit>, QueueFull> {
        let room = self.rooms.of(queue);
        if let Some(permit) = room.try_reserve() {
            return Ok(Some(permit));
        }
        match (tokio::time::timeout(self.wait, room.reserve()).await, self.on_full) {
            (Ok(Some(permit)), _) => Ok(Some(permit)),
            (Ok(None) | Err(_), OnFull::Drop) => Ok(None),
            (Ok(None) | Err(_), OnFull::Refuse) => Err(QueueFull),
        }
    }

    /// Records a request. Since requests end in places that can't wait, a record without reserved room is lost if the
    /// queue is full.
    pub fn record(&self, record: &Record<'_>, queue: Queue, permit: Option<QueuePermit>) {
        let permit = permit.or_else(|| self.rooms.of(queue).try_reserve());
        let Some(permit) = permit else { return self.lost.add(1, "the queue is full") };
        let line = record.line();
        let occupied = permit.occupy(line.len());
        if self.lines.send(Message::Line(line, occupied)).is_err() {
            self.lost.add(1, "the audit log is closed");
        }
    }
}

impl Writer {
    /// Writes all records and ends the thread. Returns whether that took less than `grace`.
    pub async fn close(self, grace: Duration) -> bool {
        let Self { lines, thread } = self;
        let closed = async {
            let _ = lines.send(Message::Close);
            lines.closed().await;
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        };
        tokio::time::timeout(grace, closed).await.is_ok()
    }
}

/// Records that could not be written.
struct Lost {
    counter: Counter,
    log: LogThrottle,
    /// The number of lost records that the audit log has not reported yet.
    unreported: AtomicU64,
}

impl Lost {
    fn add(&self, records: u64, why: &str) {
        self.counter.inc_by(records);
        self.unreported.fetch_add(records, Ordering::Relaxed);
        if let Some(records) = self.log.count(records) {
            tracing::error!(records, why, "audit records lost");
        }
    }

    /// Writes to the audit log how many records have been lost since the last report.
    fn report(&self, output: &mut Output) {
        let records = self.unreported.swap(0, Ordering::Relaxed);
        if records == 0 {
            return;
        }
        let ts = humantime::format_rfc3339_millis(SystemTime::now());
        let line = format!("{{\"ts\":\"{ts}\",\"lost\":{records}}}\n");
        output.write(std::iter::once(line), &mut |_, _| {
            self.unreported.fetch_add(records, Ordering::Relaxed);
        });
    }
}

/// Writes lines until the writer is closed or all handles to the log are gone.
fn write(mut lines: mpsc::UnboundedReceiver<Message>, mut output: Output, lost: &Lost) {
    let mut messages = Vec::new();
    let mut reported = None::<Instant>;
    while lines.blocking_recv_many(&mut messages, 256) > 0 {
        let mut closing = false;
        let mut written = Vec::new();
        let batch = messages.drain(..).filter_map(|message| match message {
            Message::Line(line, occupied) => {
                written.push(occupied);
                Some(line)
            }
            Message::Close => {
                closing = true;
                None
            }
        });
        output.write(batch, &mut |records, why| lost.add(records, why));
        drop(written);
        if reported.is_none_or(|last| last.elapsed() >= REPORT_INTERVAL) {
            lost.report(&mut output);
            reported = Some(Instant::now());
        }
        if closing {
            // The lines that are already in the channel are still written, and those that come later count as lost.
            lines.close();
        }
        // Waking this thread for each line would cost as much as the rest of a request.
        thread::sleep(BATCH_INTERVAL);
    }
    lost.report(&mut output);
}

#[cfg(test)]
mod tests;
