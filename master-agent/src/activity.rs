//! What each node's tunnels carry now and did lately: for people and for metrics, never for decisions.
//!
//! The registry has one [`NodeActivity`] for each node, as long as the node is known. Everything here is bounded: what is
//! older goes.

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
use serde::{Deserialize, Serialize};

/// Of each node.
const EVENTS: usize = 16;
/// Of each node; a point every [`SAMPLE`].
const ROUND_TRIPS: usize = 120;
/// How often round trips are kept.
pub const SAMPLE: Duration = Duration::from_secs(5);
/// Characters of a text that peers have a part in.
const TEXT: usize = 200;
/// Streams that are told of a node.
const STREAMS: usize = 500;

/// One open stream.
#[derive(Debug)]
pub struct Live {
    /// The listener's name, for instance `connect-unix`.
    pub door: &'static str,
    /// The caller who opened the stream.
    pub origin: Origin,
    pub target: Target,
    /// Why its node was chosen.
    pub reason: String,
    pub began: Instant,
    pub counters: Counters,
}

/// Where what each node carries and did is kept.
pub trait NodeActivities: Send + Sync {
    /// `None` of a node that is not known.
    fn activity(&self, name: &NodeName) -> Option<Arc<NodeActivity>>;
}

/// Of one node.
#[derive(Debug, Default)]
pub struct NodeActivity {
    next: AtomicU64,
    live: Mutex<HashMap<u64, Arc<Live>>>,
    /// Bytes of streams that have ended.
    ended: Counters,
    dials_failed: [AtomicU64; 5],
    lost: AtomicU64,
    /// How often it came back after it had been without a tunnel.
    reconnects: AtomicU64,
    lately: Mutex<Lately>,
}

#[derive(Debug, Default)]
struct Lately {
    events: VecDeque<Event>,
    /// In microseconds; `None` while there was no tunnel, or none that can be measured.
    round_trips: VecDeque<Option<u32>>,
}

/// Something that happened to a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub unix_milliseconds: u64,
    pub kind: EventKind,
    pub text: String,
    /// Of the node's policy, where it refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// How often, one after the other; the time is that of the last.
    pub times: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    Connected,
    /// A tunnel ended.
    Lost,
    /// An attempt to make a tunnel failed.
    Retrying,
    /// Someone who claimed to be the node was refused.
    Impostor,
    /// The node's policy refused a dial.
    Policy,
    DialFailed,
}

impl EventKind {
    /// What changes nothing of the node's state.
    fn is_refusal_or_failure(self) -> bool {
        matches!(self, Self::Policy | Self::Impostor | Self::DialFailed)
    }
}

/// A stream, as `/nodes/NAME` of the admin socket shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamStatus {
    pub id: u64,
    #[serde(alias = "front_door")]
    pub egress: String,
    pub origin: String,
    pub target: String,
    pub reason: String,
    pub seconds: f64,
    pub up: u64,
    pub down: u64,
}

/// Sums, as `/nodes` of the admin socket shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Bytes to targets and from them, since the node is known.
    pub up: u64,
    pub down: u64,
    /// Streams since the node is known.
    pub streams: u64,
    /// Dials that failed, by who is at fault.
    pub failed: HashMap<String, u64>,
    /// Tunnels that have ended.
    pub lost: u64,
    /// When its state last changed.
    pub changed_unix_milliseconds: Option<u64>,
}

/// Sums, as metrics show them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    pub up: u64,
    pub down: u64,
    pub failed: Vec<(Fault, u64)>,
    pub lost: u64,
    pub reconnects: u64,
}

/// What `/nodes/NAME` adds to what `/nodes` tells.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Detail {
    /// The oldest ones first, at most 500.
    pub streams: Vec<StreamStatus>,
    /// The newest first.
    pub events: Vec<Event>,
    /// The oldest first; one every [`SAMPLE`].
    pub round_trips_microseconds: Vec<Option<u32>>,
    pub sample_seconds: u64,
}

/// A stream's place among the open ones; dropping it takes it away.
#[derive(Debug)]
pub struct Place {
    activity: Arc<NodeActivity>,
    id: u64,
}

impl NodeActivity {
    fn live(&self) -> MutexGuard<'_, HashMap<u64, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lately(&self) -> MutexGuard<'_, Lately> {
        self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a stream known while it is open.
    pub fn open(self: &Arc<Self>, stream: Arc<Live>) -> Place {
        let id = self.next.fetch_add(1, Relaxed);
        self.live().insert(id, stream);
        Place { activity: self.clone(), id }
    }

    /// There is one more tunnel; `again` after there was none for a while.
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
        let mut lately = self.lately();
        if let Some(last) =
            lately.events.back_mut().filter(|e| e.kind == kind && e.text == text && e.rule == rule)
        {
            last.times += 1;
            last.unix_milliseconds = unix_milliseconds;
            return;
        }
        if lately.events.len() >= EVENTS {
            // What changed the node's state is worth more than what anybody can bring about.
            let least = lately.events.iter().position(|e| e.kind.is_refusal_or_failure()).unwrap_or_default();
            lately.events.remove(least);
        }
        lately.events.push_back(Event { unix_milliseconds, kind, text, rule, times: 1 });
    }

    /// Counts a dial through this node that failed.
    pub fn failed(&self, target: &Target, error: &DialError) {
        if let Some(count) = self.dials_failed.get(error.fault() as usize) {
            count.fetch_add(1, Relaxed);
        }
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
        let mut lately = self.lately();
        if lately.round_trips.len() >= ROUND_TRIPS {
            lately.round_trips.pop_front();
        }
        lately.round_trips.push_back(round_trip);
    }

    fn failures(&self) -> impl Iterator<Item = (Fault, u64)> {
        FAULTS.into_iter().zip(self.dials_failed.each_ref().map(|count| count.load(Relaxed)))
    }

    fn bytes(&self) -> (u64, u64) {
        // Under the lock, as a stream that ends moves its bytes under it.
        let live = self.live();
        let (mut up, mut down) = (self.ended.up.load(Relaxed), self.ended.down.load(Relaxed));
        for stream in live.values() {
            up += stream.counters.up.load(Relaxed);
            down += stream.counters.down.load(Relaxed);
        }
        (up, down)
    }

    /// The counters, without what is for people.
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
        let state = |kind: EventKind| !kind.is_refusal_or_failure();
        Totals {
            up,
            down,
            streams: self.next.load(Relaxed),
            failed: failed.map(|(fault, times)| (fault.to_string(), times)).collect(),
            lost: self.lost.load(Relaxed),
            changed_unix_milliseconds: {
                let lately = self.lately();
                lately.events.iter().rev().find(|event| state(event.kind)).map(|e| e.unix_milliseconds)
            },
        }
    }

    /// Who was refused: by the node's policy, or as an impostor of the node. The newest first.
    pub fn refusals(&self) -> Vec<Event> {
        let refused = |event: &&Event| matches!(event.kind, EventKind::Policy | EventKind::Impostor);
        self.lately().events.iter().rev().filter(refused).cloned().collect()
    }

    pub fn detail(&self) -> Detail {
        let mut open: Vec<(u64, Arc<Live>)> =
            self.live().iter().map(|(id, stream)| (*id, stream.clone())).collect();
        open.sort_unstable_by_key(|(id, _)| *id);
        open.truncate(STREAMS);
        let streams = open.into_iter().map(|(id, stream)| StreamStatus {
            id,
            egress: stream.door.to_owned(),
            origin: stream.origin.0.chars().take(TEXT).collect(),
            target: stream.target.to_string(),
            reason: stream.reason.chars().take(TEXT).collect(),
            seconds: (stream.began.elapsed().as_secs_f64() * 10.0).round() / 10.0,
            up: stream.counters.up.load(Relaxed),
            down: stream.counters.down.load(Relaxed),
        });
        let streams = streams.collect();
        let lately = self.lately();
        Detail {
            streams,
            events: lately.events.iter().rev().cloned().collect(),
            round_trips_microseconds: lately.round_trips.iter().copied().collect(),
            sample_seconds: SAMPLE.as_secs(),
        }
    }
}

/// All of them, in the order of their numbers.
const FAULTS: [Fault; 5] = [Fault::Caller, Fault::Route, Fault::Tunnel, Fault::Policy, Fault::Target];

impl Drop for Place {
    fn drop(&mut self) {
        let mut live = self.activity.live();
        if let Some(stream) = live.remove(&self.id) {
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

    fn stream(target: &str) -> Arc<Live> {
        Arc::new(Live {
            door: "connect-unix",
            origin: Origin("x".repeat(5000)),
            target: target.parse().unwrap(),
            reason: "node name n1".to_owned(),
            began: Instant::now(),
            counters: Counters::default(),
        })
    }

    #[test]
    fn streams_count_while_they_are_open_and_after() {
        let activity = Arc::new(NodeActivity::default());
        let (a, b) = (stream("n1:1"), stream("n1:2"));
        let (place, _other) = (activity.open(a.clone()), activity.open(b.clone()));
        a.counters.up.store(5, Relaxed);
        b.counters.down.store(7, Relaxed);
        let sums = |totals: Totals| (totals.up, totals.down, totals.streams);
        assert_eq!(sums(activity.totals()), (5, 7, 2));
        let streams = activity.detail().streams;
        assert_eq!((streams.len(), &*streams[0].target, streams[0].up), (2, "n1:1", 5));
        assert_eq!(streams[0].origin.len(), TEXT);
        drop(place);
        assert_eq!(sums(activity.totals()), (5, 7, 2));
        assert_eq!(activity.detail().streams.len(), 1);
    }

    #[test]
    fn events_are_few_and_those_of_the_node_s_state_stay() {
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
