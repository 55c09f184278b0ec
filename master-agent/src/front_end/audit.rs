//! The audit log: one JSON line for every request, to standard output or to a file that is rotated by size.
//!
//! A line says who asked for what, what was decided and by which rule, and what came of it. It never holds bodies,
//! headers or tokens, and of a query's values only those of parameters that are known to hold no secret. Whatever a
//! caller sends, it can't end a line, hide in one (control and direction characters are escaped) or make it long.
//!
//! Lines are written by a thread of its own behind a bounded queue. A request takes its [`Room`] there before it is
//! served, and so what is served is recorded. While there is none it waits a short time, and is then refused, or served
//! and not recorded, as configured. Strangers have a queue of their own, and so do requests that last: neither take
//! others' room. A line that is lost, also where it can't be written, is counted, said in the log, and said in the audit
//! log itself once a line can be written again.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
    fs::File,
    os::fd::AsFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use access::{request_info::RequestInfo, user::User};
use anyhow::Context;
use prometheus_client::metrics::counter::Counter;
use proto_config::Section;
use proto_net::log_throttle::LogThrottle;
use serde::{Serialize, Serializer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use file::Output;

mod file;

/// Characters of a path and its query.
const MAX_PATH: usize = 2048;
/// Characters of any other text.
const MAX_TEXT: usize = 256;
const MAX_GROUPS: usize = 16;
/// How long lines gather before they are written together.
const GATHER: Duration = Duration::from_millis(5);
/// Between lines about lost ones.
const CONFESS: Duration = Duration::from_secs(1);
/// Requests that last, under way or still to be written.
const MAX_LASTING: usize = 65_536;

/// Query parameters whose values are recorded.
const PLAIN_PARAMETERS: [&str; 22] = [
    "allowWatchBookmarks",
    "container",
    "dryRun",
    "fieldManager",
    "follow",
    "gracePeriodSeconds",
    "limit",
    "ports",
    "pretty",
    "previous",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "sinceSeconds",
    "stderr",
    "stdin",
    "stdout",
    "tailLines",
    "timeout",
    "timeoutSeconds",
    "tty",
    "watch",
];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// `None` is standard output.
    pub file: Option<PathBuf>,
    /// A file that would grow beyond these bytes is renamed to `FILE.1`.
    pub max_bytes: u64,
    /// Renamed files.
    pub keep: usize,
    /// Lines that may wait to be written, those of requests under way included.
    pub queue: usize,
    /// The same of callers who have not authenticated.
    pub strangers_queue: usize,
    /// How long a request may wait while they are that many.
    pub wait: Duration,
    pub on_full: OnFull,
}

/// What becomes of a request for whose line there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    Refuse,
    /// It is served, and its line is lost.
    Drop,
}

impl AuditConfig {
    pub fn read(section: &Section<'_>) -> Self {
        let millis = Duration::from_millis;
        Self {
            file: section.optional("file"),
            max_bytes: (section.number("max_megabytes", 100, 1..=100_000) as u64) << 20,
            keep: section.number("keep", 10, 1..=1000),
            queue: section.number("queue", 4096, 1..=1_000_000),
            strangers_queue: section.number("strangers_queue", 1024, 1..=1_000_000),
            wait: section.duration("wait", millis(100), Duration::ZERO..=millis(5000)),
            on_full: match section.or("on_full", "refuse".to_owned()).as_str() {
                "refuse" => OnFull::Refuse,
                "drop" => OnFull::Drop,
                _ => {
                    section.error("on_full", "expected refuse or drop");
                    OnFull::Refuse
                }
            },
        }
    }
}

/// Identifies a request in the audit log, in other logs and upstream. Shown as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestId(u64);

impl RequestId {
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What became of a request before it was handed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Allow,
    Deny,
    Unauthenticated,
    Limited,
    Error,
}

/// All that is recorded of a request.
#[derive(Clone, Debug)]
pub struct Record<'a> {
    pub received: SystemTime,
    pub id: RequestId,
    pub source: &'a str,
    pub user: Option<&'a User>,
    /// The name of what authenticated it.
    pub authenticator: Option<&'a str>,
    pub impersonated: Option<&'a User>,
    pub method: &'a str,
    /// As the caller sent it.
    pub path: &'a str,
    pub query: Option<&'a str>,
    /// `None` where the request could not be read.
    pub request: Option<&'a RequestInfo>,
    pub outcome: Outcome,
    pub authorizer: Option<&'a str>,
    pub rule: &'a str,
    /// The HTTP status that the caller got.
    pub code: u16,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub duration: Duration,
    /// Whose tunnel it came or went through.
    pub node: Option<&'a str>,
    pub stream: Option<u64>,
    /// Of the trace that it is part of.
    pub trace_id: Option<&'a str>,
}

/// Where records go. Cloning gives another handle.
#[derive(Clone)]
pub struct Audit {
    lines: mpsc::UnboundedSender<Message>,
    rooms: Arc<Rooms>,
    wait: Duration,
    on_full: OnFull,
    lost: Arc<Lost>,
}

/// Whose lines wait together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Of callers who have authenticated.
    Known,
    /// Of those whose requests last, such as watches.
    Lasting,
    Strangers,
}

/// For lines of each queue.
struct Rooms {
    known: Arc<Semaphore>,
    lasting: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

impl Rooms {
    fn of(&self, queue: Queue) -> &Arc<Semaphore> {
        match queue {
            Queue::Known => &self.known,
            Queue::Lasting => &self.lasting,
            Queue::Strangers => &self.strangers,
        }
    }
}

/// Room for one line, until it has been written.
pub struct Room(#[expect(dead_code, reason = "held")] OwnedSemaphorePermit);

/// There is no room for a request's line, and without it the request is not to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// The thread that writes.
pub struct Writer {
    lines: mpsc::UnboundedSender<Message>,
    thread: thread::JoinHandle<()>,
}

enum Message {
    Line(String, Room),
    Close,
}

impl Audit {
    /// Opens the output. `lost` counts the records that could not be written.
    pub fn start(config: &AuditConfig, lost: Counter) -> anyhow::Result<(Self, Writer)> {
        let output = match &config.file {
            // Unbuffered: what can't be written is known at once.
            None => Output::stream(File::from(std::io::stdout().as_fd().try_clone_to_owned()?)),
            Some(path) => Output::file(path.clone(), config.max_bytes, config.keep)
                .with_context(|| format!("can't write the audit log {}", path.display()))?,
        };
        let (audit, lines) = Self::new(config, lost);
        let lost = audit.lost.clone();
        let thread =
            thread::Builder::new().name("audit".into()).spawn(move || write(lines, output, &lost))?;
        let writer = Writer { lines: audit.lines.clone(), thread };
        Ok((audit, writer))
    }

    fn new(config: &AuditConfig, lost: Counter) -> (Self, mpsc::UnboundedReceiver<Message>) {
        let room = |lines: usize| Arc::new(Semaphore::new(lines));
        let rooms = Rooms {
            known: room(config.queue),
            lasting: room(MAX_LASTING),
            strangers: room(config.strangers_queue),
        };
        // Bounded by the rooms: each line has one.
        let (lines, written) = mpsc::unbounded_channel();
        let lost = Lost { counter: lost, log: LogThrottle::default(), unwritten: AtomicU64::new(0) };
        let (rooms, lost) = (Arc::new(rooms), Arc::new(lost));
        (Self { lines, rooms, wait: config.wait, on_full: config.on_full, lost }, written)
    }

    /// Room for the line of a request that is to be served, at once or after a short time. `None` where it is to be
    /// served without.
    pub async fn room(&self, queue: Queue) -> Result<Option<Room>, Full> {
        let rooms = self.rooms.of(queue);
        if let Ok(room) = rooms.clone().try_acquire_owned() {
            return Ok(Some(Room(room)));
        }
        match (tokio::time::timeout(self.wait, rooms.clone().acquire_owned()).await, self.on_full) {
            (Ok(Ok(room)), _) => Ok(Some(Room(room))),
            (Ok(Err(_)) | Err(_), OnFull::Drop) => Ok(None),
            (Ok(Err(_)) | Err(_), OnFull::Refuse) => Err(Full),
        }
    }

    /// Never waits: requests end where nothing can. Without room there must be some at once.
    pub fn record(&self, record: &Record<'_>, queue: Queue, room: Option<Room>) {
        let room = room.or_else(|| self.rooms.of(queue).clone().try_acquire_owned().ok().map(Room));
        let Some(room) = room else { return self.lost.add(1, "the queue is full") };
        if self.lines.send(Message::Line(record.line(), room)).is_err() {
            self.lost.add(1, "the audit log is closed");
        }
    }
}

impl Writer {
    /// Writes what has been recorded so far, and ends. Gives whether that was done within `grace`.
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
    /// Those that the audit log does not speak of yet.
    unwritten: AtomicU64,
}

impl Lost {
    fn add(&self, records: u64, why: &str) {
        self.counter.inc_by(records);
        self.unwritten.fetch_add(records, Ordering::Relaxed);
        if let Some(records) = self.log.count(records) {
            tracing::error!(records, why, "audit records are lost");
        }
    }

    /// Says in the audit log how many there were since it last did.
    fn confess(&self, output: &mut Output) {
        let records = self.unwritten.swap(0, Ordering::Relaxed);
        if records == 0 {
            return;
        }
        let ts = humantime::format_rfc3339_millis(SystemTime::now());
        let line = format!("{{\"ts\":\"{ts}\",\"lost\":{records}}}\n");
        output.write(std::iter::once(line), &mut |_, _| {
            self.unwritten.fetch_add(records, Ordering::Relaxed);
        });
    }
}

/// The thread: until it is told to close, or nobody is left to record.
fn write(mut lines: mpsc::UnboundedReceiver<Message>, mut output: Output, lost: &Lost) {
    let mut messages = Vec::new();
    let mut confessed = None::<Instant>;
    while lines.blocking_recv_many(&mut messages, 256) > 0 {
        let mut closing = false;
        let mut rooms = Vec::new();
        let batch = messages.drain(..).filter_map(|message| match message {
            Message::Line(line, room) => {
                rooms.push(room);
                Some(line)
            }
            Message::Close => {
                closing = true;
                None
            }
        });
        output.write(batch, &mut |records, why| lost.add(records, why));
        drop(rooms);
        if closing || confessed.is_none_or(|last| last.elapsed() >= CONFESS) {
            lost.confess(&mut output);
            confessed = Some(Instant::now());
        }
        if closing {
            return;
        }
        // Waking this thread for each line would cost as much as the rest of a request.
        thread::sleep(GATHER);
    }
}

/// The line's fields, in their order.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(serialize_with = "shown")]
    ts: humantime::Rfc3339Timestamp,
    #[serde(serialize_with = "shown")]
    id: RequestId,
    user: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    groups: Vec<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    authenticator: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    impersonated: Option<Cow<'a, str>>,
    source: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verb: Option<Cow<'a, str>>,
    method: Cow<'a, str>,
    path: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resource: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subresource: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<Cow<'a, str>>,
    decision: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    authorizer: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<Cow<'a, str>>,
    code: u16,
    bytes_in: u64,
    bytes_out: u64,
    duration_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<&'a str>,
}

fn shown<S: Serializer>(value: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

impl<'a> Record<'a> {
    /// One line of JSON with its end.
    fn line(&self) -> String {
        let text = |text| shortened(text, MAX_TEXT);
        let some = |part: &'a str| Some(part).filter(|part| !part.is_empty()).map(text);
        let of = |part: fn(&RequestInfo) -> &String| self.request.and_then(|request| some(part(request)));
        let path = recorded_path(self.path, self.query);
        let line = Line {
            ts: humantime::format_rfc3339_millis(self.received),
            id: self.id,
            user: self.user.map(|user| text(&user.name)),
            uid: self.user.and_then(|user| user.uid.as_deref()).map(text),
            groups: self.user.map(groups).unwrap_or_default(),
            authenticator: self.authenticator,
            impersonated: self.impersonated.map(|user| text(&user.name)),
            source: text(self.source),
            verb: of(|request| &request.verb),
            method: text(self.method),
            path: shortened(&path, MAX_PATH),
            group: of(|request| &request.group),
            resource: of(|request| &request.resource),
            subresource: of(|request| &request.subresource),
            namespace: of(|request| &request.namespace),
            name: of(|request| &request.name),
            decision: self.outcome,
            authorizer: self.authorizer,
            rule: some(self.rule),
            code: self.code,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            duration_ms: u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX),
            node: self.node.map(text),
            stream: self.stream,
            trace_id: self.trace_id,
        };
        let mut json = Vec::with_capacity(512);
        // Into memory it can't fail, and it is text.
        let _ = serde_json::to_writer(&mut json, &line);
        let mut json = String::from_utf8(json).unwrap_or_default();
        if json.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
            json.push('\n');
            return json;
        }
        // JSON itself escapes only the first 32.
        let mut plain = String::with_capacity(json.len() + 1);
        for c in json.chars() {
            if is_hidden(c) {
                let _ = write!(plain, "\\u{:04x}", u32::from(c));
            } else {
                plain.push(c);
            }
        }
        plain.push('\n');
        plain
    }
}

fn groups(user: &User) -> Vec<Cow<'_, str>> {
    let mut groups: Vec<_> =
        user.groups.iter().take(MAX_GROUPS).map(|group| shortened(group, MAX_TEXT)).collect();
    if let Some(more) = user.groups.len().checked_sub(MAX_GROUPS).filter(|more| *more > 0) {
        groups.push(format!("… {more} more").into());
    }
    groups
}

/// Controls, ends of lines, and what makes text look like other text. All are in the basic plane.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

fn shortened(text: &str, most: usize) -> Cow<'_, str> {
    // Characters are no fewer bytes.
    if text.len() <= most {
        return text.into();
    }
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()).into(),
        None => text.into(),
    }
}

/// The path, and of the query what can hold no secret.
fn recorded_path<'a>(path: &'a str, query: Option<&str>) -> Cow<'a, str> {
    let Some(query) = query else { return path.into() };
    let mut text = path.to_owned();
    for (i, pair) in query.split('&').enumerate() {
        if text.len() > MAX_PATH * 4 {
            break;
        }
        text.push(if i == 0 { '?' } else { '&' });
        match pair.split_once('=') {
            Some((key, value)) if PLAIN_PARAMETERS.contains(&key) && value.len() <= 128 => {
                let _ = write!(text, "{key}={value}");
            }
            None if PLAIN_PARAMETERS.contains(&pair) => text.push_str(pair),
            // A long key may be a secret itself, as is one without a value.
            Some((key, _)) if key.len() <= 40 => {
                let _ = write!(text, "{key}=***");
            }
            Some(_) | None => text.push_str("***"),
        }
    }
    text.into()
}

#[cfg(test)]
mod tests;
