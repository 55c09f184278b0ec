//! What each node's tunnels carry now and what happened to them lately. People and metrics are shown it; nothing is decided
//! by it.
//!
//! The registry keeps one [`NodeActivity`] for each node as long as the node is known. Everything here is bounded, and the
//! oldest is forgotten first.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use proto::{DialError, Fault, NodeName, Target};
use proto_net::{dialer::Origin, relay::Counters};

use crate::admin_api::{Detail, Event, EventKind, StreamStatus, Totals};

/// Events that are kept of each node.
const EVENTS: usize = 16;
/// Round trips that are kept of each node, one every [`SAMPLE`].
const ROUND_TRIPS: usize = 120;
/// How often a round trip is kept.
pub const SAMPLE: Duration = Duration::from_secs(5);
/// Characters that are kept of a text which a peer may influence.
const TEXT: usize = 200;
/// Open streams that are listed of a node.
const STREAMS: usize = 500;

/// One open stream.
#[derive(Debug)]
pub struct OpenStream {
    /// The listener's name, for instance `connect-unix`.
    pub listener: &'static str,
    pub origin: Origin,
    pub target: Target,
    /// Why the node was chosen.
    pub reason: String,
    pub began: Instant,
    pub counters: Counters,
}

/// Finds the activity of a node.
pub trait NodeActivities: Send + Sync {
    /// `None` if the node is unknown.
    fn activity(&self, name: &NodeName) -> Option<Arc<NodeActivity>>;
}

/// The activity of one node.
#[derive(Debug, Default)]
pub struct NodeActivity {
    next_id: AtomicU64,
    open: Mutex<HashMap<u64, Arc<OpenStream>>>,
    /// Bytes of streams that have ended.
    ended: Counters,
    dials_failed: FailedDials,
    lost: AtomicU64,
    /// How often the node came back after it had been without a tunnel.
    reconnects: AtomicU64,
    history: Mutex<History>,
}

/// Failed dials, by who is at fault.
#[derive(Debug, Default)]
struct FailedDials {
    caller: AtomicU64,
    route: AtomicU64,
    tunnel: AtomicU64,
    policy: AtomicU64,
    target: AtomicU64,
}

#[derive(Debug, Default)]
struct History {
    events: VecDeque<Event>,
    /// Round trips in microseconds; `None` while there was no tunnel, or none that can be measured.
    round_trips: VecDeque<Option<u32>>,
}

/// The sums that metrics show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    pub up: u64,
    pub down: u64,
    pub failed: Vec<(Fault, u64)>,
    pub lost: u64,
    pub reconnects: u64,
}

/// Keeps a stream listed as open until it is dropped.
#[derive(Debug)]
pub struct OpenStreamGuard {
    activity: Arc<NodeActivity>,
    id: u64,
}

impl NodeActivity {
    fn open_streams(&self) -> MutexGuard<'_, HashMap<u64, Arc<OpenStream>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists a stream while it is open.
    pub fn open(self: &Arc<Self>, stream: Arc<OpenStream>) -> OpenStreamGuard {
        let id = self.next_id.fetch_add(1, Relaxed);
        self.open_streams().insert(id, stream);
        OpenStreamGuard { activity: self.clone(), id }
    }

    /// Records a new tunnel. `again` says that the node had been without one.
    pub fn connected(&self, text: &str, again: bool) {
        self.reconnects.fetch_add(u64::from(again), Relaxed);
        self.event(EventKind::Connected, text);
    }

    pub fn event(&self, kind: EventKind, text: &str) {
        self.event_by(kind, text, None);
    }

    fn event_by(&self, kind: EventKind, text: &str, rule: Option<&str>) {
        if kind == EventKind::Lost {
            self.lost.fetch_add(1, Relaxed);
        }
        let short = |text: &str| text.chars().take(TEXT).collect::<String>();
        let (text, rule) = (short(text), rule.map(short));
        let unix_milliseconds = unix_milliseconds(SystemTime::now());
        let mut history = self.history();
        if let Some(last) =
            history.events.back_mut().filter(|e| e.kind == kind && e.text == text && e.rule == rule)
        {
            last.times += 1;
            last.unix_milliseconds = unix_milliseconds;
            return;
        }
        if history.events.len() >= EVENTS {
            // Events that changed the node's state are worth more than those that any caller can cause.
            let least =
                history.events.iter().position(|e| e.kind.is_refusal_or_failure()).unwrap_or_default();
            history.events.remove(least);
        }
        history.events.push_back(Event { unix_milliseconds, kind, text, rule, times: 1 });
    }

    /// Records a failed dial through this node.
    pub fn failed(&self, target: &Target, error: &DialError) {
        self.dials_failed.of(error.fault()).fetch_add(1, Relaxed);
        let kind = match error.fault() {
            Fault::Policy => EventKind::Policy,
            Fault::Tunnel | Fault::Target => EventKind::DialFailed,
            Fault::Caller | Fault::Route => return,
        };
        let rule = if let DialError::Policy { rule, .. } = error { Some(rule.as_str()) } else { None };
        self.event_by(kind, &format!("{target}: {error}"), rule);
    }

    pub fn sample(&self, round_trip: Option<Duration>) {
        let round_trip = round_trip.map(|time| u32::try_from(time.as_micros()).unwrap_or(u32::MAX));
        let mut history = self.history();
        if history.round_trips.len() >= ROUND_TRIPS {
            history.round_trips.pop_front();
        }
        history.round_trips.push_back(round_trip);
    }

    fn failures(&self) -> impl Iterator<Item = (Fault, u64)> {
        FAULTS.into_iter().map(|fault| (fault, self.dials_failed.of(fault).load(Relaxed)))
    }

    fn bytes(&self) -> (u64, u64) {
        // A stream that ends moves its bytes while it holds the lock.
        let open = self.open_streams();
        let (mut up, mut down) = (self.ended.up.load(Relaxed), self.ended.down.load(Relaxed));
        for stream in open.values() {
            up += stream.counters.up.load(Relaxed);
            down += stream.counters.down.load(Relaxed);
        }
        (up, down)
    }

    /// The sums for metrics.
    pub fn figures(&self) -> Figures {
        let (up, down) = self.bytes();
        Figures {
            up,
            down,
            failed: self.failures().collect(),
            lost: self.lost.load(Relaxed),
            reconnects: self.reconnects.load(Relaxed),
        }
    }

    pub fn totals(&self) -> Totals {
        let (up, down) = self.bytes();
        let failed = self.failures().filter(|(_, times)| *times > 0);
        Totals {
            up,
            down,
            streams: self.next_id.load(Relaxed),
            failed: failed.map(|(fault, times)| (fault.to_string(), times)).collect(),
            lost: self.lost.load(Relaxed),
            changed_unix_milliseconds: {
                let history = self.history();
                let changes = history.events.iter().rev().find(|event| !event.kind.is_refusal_or_failure());
                changes.map(|event| event.unix_milliseconds)
            },
        }
    }

    /// Refusals by the node's policy and of impostors, the newest first.
    pub fn refusals(&self) -> Vec<Event> {
        let refused = |event: &&Event| matches!(event.kind, EventKind::Policy | EventKind::Impostor);
        self.history().events.iter().rev().filter(refused).cloned().collect()
    }

    pub fn detail(&self) -> Detail {
        let mut open: Vec<(u64, Arc<OpenStream>)> =
            self.open_streams().iter().map(|(id, stream)| (*id, stream.clone())).collect();
        open.sort_unstable_by_key(|(id, _)| *id);
        open.truncate(STREAMS);
        let streams = open.into_iter().map(|(id, stream)| StreamStatus {
            id,
            egress: stream.listener.to_owned(),
            origin: stream.origin.0.chars().take(TEXT).collect(),
            target: stream.target.to_string(),
            reason: stream.reason.chars().take(TEXT).collect(),
            seconds: (stream.began.elapsed().as_secs_f64() * 10.0).round() / 10.0,
            up: stream.counters.up.load(Relaxed),
            down: stream.counters.down.load(Relaxed),
        });
        let streams = streams.collect();
        let history = self.history();
        Detail {
            streams,
            events: history.events.iter().rev().cloned().collect(),
            round_trips_microseconds: history.round_trips.iter().copied().collect(),
            sample_seconds: SAMPLE.as_secs(),
        }
    }
}

const FAULTS: [Fault; 5] = [Fault::Caller, Fault::Route, Fault::Tunnel, Fault::Policy, Fault::Target];

impl FailedDials {
    fn of(&self, fault: Fault) -> &AtomicU64 {
        match fault {
            Fault::Caller => &self.caller,
            Fault::Route => &self.route,
            Fault::Tunnel => &self.tunnel,
            Fault::Policy => &self.policy,
            Fault::Target => &self.target,
        }
    }
}

impl Drop for OpenStreamGuard {
    fn drop(&mut self) {
        let mut open = self.activity.open_streams();
        if let Some(stream) = open.remove(&self.id) {
            self.activity.ended.up.fetch_add(stream.counters.up.load(Relaxed), Relaxed);
            self.activity.ended.down.fetch_add(stream.counters.down.load(Relaxed), Relaxed);
        }
    }
}

pub fn unix_milliseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(target: &str) -> Arc<OpenStream> {
        Arc::new(OpenStream {
            listener: "connect-unix",
            origin: Origin("x".repeat(5000)),
            target: target.parse().unwrap(),
            reason: "node name n1".to_owned(),
            began: Instant::now(),
            counters: Counters::default(),
        })
    }

    #[test]
    fn streams_count_while_they_are_open_and_afterwards() {
        let activity = Arc::new(NodeActivity::default());
        let (a, b) = (stream("n1:1"), stream("n1:2"));
        let (guard, _other) = (activity.open(a.clone()), activity.open(b.clone()));
        a.counters.up.store(5, Relaxed);
        b.counters.down.store(7, Relaxed);
        let sums = |totals: Totals| (totals.up, totals.down, totals.streams);
        assert_eq!(sums(activity.totals()), (5, 7, 2));
        let streams = activity.detail().streams;
        assert_eq!((streams.len(), &*streams[0].target, streams[0].up), (2, "n1:1", 5));
        assert_eq!(streams[0].origin.len(), TEXT);
        drop(guard);
        assert_eq!(sums(activity.totals()), (5, 7, 2));
        assert_eq!(activity.detail().streams.len(), 1);
    }

    #[test]
    fn few_events_are_kept_and_state_changes_longest() {
        let activity = NodeActivity::default();
        activity.event(EventKind::Connected, "10.0.0.1:22");
        let policy = DialError::Policy { rule: "default".to_owned(), reason: "no".to_owned() };
        for port in 1..=500 {
            for host in ["10.0.0.1", "10.0.0.1", "10.0.0.2"].iter().take(if port > 1 { 2 } else { 3 }) {
                activity.failed(&format!("{host}:{port}").parse().unwrap(), &policy);
            }
        }
        activity.failed(&"n1:1".parse().unwrap(), &DialError::Cancelled);
        let events = activity.detail().events;
        assert_eq!(
            (events.len(), events[0].kind, events[EVENTS - 1].kind),
            (EVENTS, EventKind::Policy, EventKind::Connected)
        );
        assert!(events[0].text.contains("rule default") && events[0].times == 2, "{events:?}");
        assert_eq!(events[0].rule.as_deref(), Some("default"));
        assert_eq!((events[EVENTS - 1].rule.as_ref(), activity.refusals().len()), (None, EVENTS - 1));
        let totals = activity.totals();
        assert_eq!(totals.failed, HashMap::from([("policy".to_owned(), 1001), ("caller".to_owned(), 1)]));
        assert_eq!(totals.changed_unix_milliseconds, Some(events[EVENTS - 1].unix_milliseconds));
        for i in 0..100 {
            activity.event(EventKind::Lost, &i.to_string());
        }
        assert_eq!((activity.detail().events.len(), activity.totals().lost), (EVENTS, 100));
    }

    #[test]
    fn round_trips_are_the_last_ten_minutes() {
        let activity = NodeActivity::default();
        activity.sample(None);
        for i in 0..ROUND_TRIPS as u64 {
            activity.sample(Some(Duration::from_micros(i)));
        }
        let kept = activity.detail().round_trips_microseconds;
        assert_eq!((kept.len(), kept[0], kept[ROUND_TRIPS - 1]), (ROUND_TRIPS, Some(0), Some(119)));
    }
}
