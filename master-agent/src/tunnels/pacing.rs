//! Paces calls home when more nodes call than this master takes at once, as after its restart.
//!
//! A handshake takes a millisecond or two of a thread that also carries streams. A caller beyond [`BUSY`] handshakes is
//! therefore told when to come again, and every caller gets a time of its own, so that a storm becomes a queue in which
//! waiting costs nothing.
//!
//! Strangers can fill up the handshakes, too, but they can't keep a node away. A source is sent away by this queue once a
//! minute at most, and comes again within [`LONGEST_WAIT`]. The master then takes its call unless all permits are in use.
//! In that case chance decides whether the call is taken, as if there were no pacing, or has to come again a little later.
//! Who loses a permit for a call that is taken is for [`HandshakePermits`](proto_net::handshake::HandshakePermits) to say.

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use proto::{NodeName, refusal::LONGEST_WAIT};
use tokio::time::Instant;

/// The number of handshakes in progress beyond which callers are told to come again.
pub(super) const BUSY: usize = 64;
/// The time between two of those who were told to come again.
const INTERVAL: Duration = Duration::from_millis(2);
/// The shortest time after which a caller is told to come again.
const SHORTEST_WAIT: Duration = Duration::from_secs(1);
/// The probability that a caller who has come again is told so once more while all permits are in use.
const AGAIN: f64 = 0.5;
/// How long it is remembered, at least, that a source was told to come again. It exceeds the time that the source waits.
const MEMORY: Duration = Duration::from_secs(60);
/// The number of sources that are remembered in this time. Further ones are not told to come again.
const MAX_SOURCES: usize = 20_000;

/// Whom a call comes from, as far as that is known before the handshake.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source {
    /// Nodes that share an address, as behind a NAT, are one source, of which one call a minute is sent away.
    Address(IpAddr),
    /// The node whose credential the front end has admitted.
    Node(NodeName),
}

/// Decides which calls have to come again, and when.
#[derive(Debug, Default)]
pub struct Pacing(Mutex<Option<Queue>>);

#[derive(Debug)]
struct Queue {
    /// When the last of those who were told to come again will come.
    last: Instant,
    /// The sources that were told so since `since`, and those that were told so in the period before.
    present: HashSet<Source>,
    former: HashSet<Source>,
    since: Instant,
}

impl Pacing {
    /// Returns after what time a caller has to come again, or `None` if its call is taken. It is for callers that find
    /// many handshakes in progress. `exhausted` says that all permits are in use.
    pub(super) fn turn_away(&self, source: Source, exhausted: bool) -> Option<Duration> {
        let now = Instant::now();
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        queue.get_or_insert_with(|| Queue::new(now)).turn_away(source, exhausted, now, rand::random())
    }
}

impl Queue {
    fn new(now: Instant) -> Self {
        Self { last: now, present: HashSet::new(), former: HashSet::new(), since: now }
    }

    /// `random` is a number in 0..1.
    fn turn_away(&mut self, source: Source, exhausted: bool, now: Instant, random: f64) -> Option<Duration> {
        self.forget(now);
        if self.present.contains(&source) || self.former.contains(&source) {
            // Such a caller gets no place in the queue, so that nobody can make the queue longer by calling often.
            return (exhausted && random < AGAIN).then(|| SHORTEST_WAIT.mul_f64(1.0 + random / AGAIN));
        }
        if self.present.len() >= MAX_SOURCES {
            return None;
        }
        self.present.insert(source);
        self.last = self.last.max(now + SHORTEST_WAIT) + INTERVAL;
        let wait = self.last - now;
        if wait <= LONGEST_WAIT {
            return Some(wait);
        }
        self.last = now + LONGEST_WAIT;
        Some(LONGEST_WAIT.mul_f64(0.5 + 0.5 * random))
    }

    fn forget(&mut self, now: Instant) {
        let age = now - self.since;
        if age < MEMORY {
            return;
        }
        let present = std::mem::take(&mut self.present);
        self.former = if age < 2 * MEMORY { present } else { HashSet::new() };
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn address(number: u32) -> Source {
        Source::Address(IpAddr::from(number.to_be_bytes()))
    }

    #[test]
    fn a_storm_becomes_a_queue_in_which_each_has_a_time_of_its_own() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        let times: Vec<_> =
            (0..5000).map(|i| queue.turn_away(address(i), false, now, 0.5).unwrap()).collect();
        assert_eq!((times[0], times[4999]), (SHORTEST_WAIT + INTERVAL, SHORTEST_WAIT + 5000 * INTERVAL));
        assert!(times.is_sorted_by(|a, b| a < b));
        // All of them come again, and their calls are taken.
        for (i, time) in (0..).zip(&times) {
            assert_eq!(queue.turn_away(address(i), false, now + *time, 0.5), None);
        }
        // The queue is empty by then.
        let later = now + 20 * SECOND;
        assert_eq!(queue.turn_away(address(5000), false, later, 0.5), Some(SHORTEST_WAIT + INTERVAL));
    }

    #[test]
    fn nobody_waits_for_longer_than_the_bound_and_few_come_at_the_same_time() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        let mut late = 0;
        for i in 0..MAX_SOURCES {
            let random = (i % 100) as f64 / 100.0;
            let time = queue.turn_away(address(i as u32), true, now, random).unwrap();
            assert!(time <= LONGEST_WAIT && time > SHORTEST_WAIT, "{time:?}");
            late += usize::from(time > LONGEST_WAIT * 3 / 4 && i > 14_500);
        }
        assert!((2000..3500).contains(&late), "{late}");
        // Sources that can't be remembered would be sent away again and again.
        assert_eq!(queue.turn_away(address(u32::MAX), false, now, 0.5), None);
    }

    #[test]
    fn a_source_that_calls_often_is_sent_away_once_and_moves_nobody_back() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        let node = |name: &str| Source::Node(name.parse().unwrap());
        assert!(queue.turn_away(node("n1"), false, now, 0.5).is_some());
        for random in [0.0, 0.2, 0.4, 0.5, 0.9] {
            assert_eq!(queue.turn_away(node("n1"), false, now, random), None);
            // While all permits are in use, half of the calls have to come again.
            let again = queue.turn_away(node("n1"), true, now, random);
            assert_eq!(again.is_some(), random < AGAIN);
            assert!(again.is_none_or(|time| time >= SHORTEST_WAIT && time < 2 * SHORTEST_WAIT));
        }
        assert_eq!(queue.turn_away(node("n2"), false, now, 0.5), Some(SHORTEST_WAIT + 2 * INTERVAL));
        // It is forgotten after a while, but not before it has come again.
        let mut now = now;
        for _ in 0..59 {
            now += SECOND;
            assert_eq!(queue.turn_away(node("n1"), false, now, 0.9), None);
        }
        assert!(queue.turn_away(node("n3"), false, now + SECOND, 0.9).is_some());
        assert_eq!(queue.turn_away(node("n1"), false, now + LONGEST_WAIT, 0.9), None);
        assert!(queue.turn_away(node("n1"), false, now + 61 * SECOND, 0.9).is_some());
        assert!(queue.turn_away(node("n3"), false, now + 200 * SECOND, 0.9).is_some());
        assert_eq!((queue.present.len(), queue.former.len()), (1, 0));
    }
}
