//! How much may be under way to the peer on one connection.
//!
//! Whatever is under way is ahead of the next small message. More of it than the path needs makes no byte arrive
//! earlier: it only waits in the sockets and in the peer, where nothing can overtake it. This measures the path as BBR
//! does. From time to time the sender marks a place in what it sends, with a PING. The PONG says that everything before
//! that place has been taken in by the peer's multiplexer, which gives the rate and the round trip, and the limit is the
//! product of both, times a little. The time is an argument.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// The limit, in bytes, until it has once been what held the sender back: what was sent before then says little about
/// the path.
const START: u64 = 512 * 1024;
/// The least and the greatest limit in bytes.
const LEAST: u64 = 64 * 1024;
const MOST: u64 = 256 * 1024 * 1024;
/// How often the round trip is measured again while the limit is what holds the sender back, and how often at most,
/// in round trips. For this, less than the path needs is under way for a moment.
const REMEASURE: Duration = Duration::from_secs(2);
const REMEASURE_ROUND_TRIPS: u32 = 50;
/// A sender that was silent for so long, or for two round trips, begins anew: its rate is measured from then on.
const PAUSE: Duration = Duration::from_millis(10);
/// The PINGs that a peer may leave unanswered. Honest ones owe fewer than ten.
const MOST_MARKS: usize = 256;

/// The identifier that a PING carries and its PONG repeats.
pub type PingId = [u8; 8];

/// Who uses the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Streams that send without end, behind which nobody waits: more may be under way, for fewer PINGs and idle moments.
    Bulk,
    /// Small messages beside others, which wait for what is under way.
    Mixed,
}

impl Use {
    /// How many times what the path holds may be under way.
    fn gain(self) -> u32 {
        match self {
            Self::Bulk => 6,
            Self::Mixed => 2,
        }
    }

    /// What the agents' threads may need to take their turns, in addition to the round trip.
    fn slack(self) -> Duration {
        match self {
            Self::Bulk => Duration::from_micros(500),
            Self::Mixed => Duration::from_micros(200),
        }
    }
}

/// What is under way, and how much may be. All sizes are in bytes.
#[derive(Debug)]
pub struct Flow {
    /// The bytes that were ever sent, and those of them that have arrived as far as is known.
    sent: u64,
    delivered: u64,
    sent_at: Instant,
    since: Since,
    marks: VecDeque<Mark>,
    /// Bytes a second, zero until measured.
    rate: f64,
    /// Whether the limit has ever held the sender back.
    full: bool,
    /// The shortest round trip, and when it was measured.
    round_trip: (Duration, Instant),
    probe: Probe,
}

/// Where a measurement of the rate begins: behind these bytes, at the time at which they had arrived, or at which the
/// first byte behind them was sent after a pause. So a measurement takes a round trip at least, and all the time that
/// the sending took.
#[derive(Clone, Copy, Debug)]
struct Since {
    bytes: u64,
    at: Instant,
}

/// A PING that has not been answered, and how things stood when it was sent.
#[derive(Debug)]
struct Mark {
    id: PingId,
    sent_at: Instant,
    sent: u64,
    since: Since,
    /// The sender had something to send that the limit did not allow, so the rate is the path's and not the sender's.
    limited: bool,
}

/// Where the next measurement of the round trip stands.
#[derive(Debug, PartialEq, Eq)]
enum Probe {
    None,
    /// The path gets empty.
    Draining,
    /// This PING has found it empty.
    Marked(PingId),
}

impl Flow {
    /// `round_trip` is what has been measured before.
    pub fn new(now: Instant, round_trip: Duration) -> Self {
        Self {
            sent: 0,
            delivered: 0,
            sent_at: now,
            since: Since { bytes: 0, at: now },
            marks: VecDeque::new(),
            rate: 0.0,
            full: false,
            round_trip: (round_trip, now),
            probe: Probe::None,
        }
    }

    pub fn on_sent(&mut self, bytes: usize, now: Instant) {
        let pause = PAUSE.max(self.round_trip.0 * 2);
        if now.saturating_duration_since(self.sent_at) > pause {
            self.since = Since { bytes: self.sent, at: now };
        }
        self.sent_at = now;
        self.sent = self.sent.saturating_add(bytes as u64);
    }

    /// The bytes that were ever sent.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Those of them that have arrived as far as is known.
    pub fn arrived(&self) -> u64 {
        self.delivered
    }

    /// The bytes that were sent and are not known to have arrived.
    pub fn under_way(&self) -> u64 {
        self.sent - self.delivered
    }

    /// How many bytes may be under way.
    pub fn limit(&self, used: Use) -> u64 {
        if self.probe != Probe::None {
            return self.drained();
        }
        let limit = self.holds(self.round_trip.0 + used.slack(), f64::from(used.gain()));
        if self.full { limit } else { limit.max(START) }
    }

    /// The bytes that the path carries in `time`, once its rate is known and not only the sender's.
    pub fn carries(&self, time: Duration) -> Option<u64> {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is positive")]
        let bytes = (self.rate * time.as_secs_f64()) as u64;
        self.full.then_some(bytes)
    }

    /// Whether a PING should follow what has been sent. Without one, nothing is known to arrive.
    pub fn mark_due(&self, used: Use) -> bool {
        self.may_mark() && self.sent - self.marked() >= self.limit(used) / 4
    }

    /// Whether nothing will be known to arrive unless a PING is sent now.
    pub fn is_unmarked(&self) -> bool {
        self.may_mark() && self.marked() <= self.delivered && self.under_way() > 0
    }

    /// The bytes in front of the last PING.
    fn marked(&self) -> u64 {
        self.marks.back().map_or(0, |mark| mark.sent).max(self.delivered)
    }

    fn may_mark(&self) -> bool {
        self.marks.len() < MOST_MARKS
    }

    /// A PING has been sent behind everything else. `limited` says whether more would have been sent if the limit had
    /// allowed it.
    pub fn mark(&mut self, id: PingId, now: Instant, limited: bool) {
        if !self.may_mark() {
            return;
        }
        if self.probe == Probe::Draining && self.under_way() <= self.drained() {
            self.probe = Probe::Marked(id);
        }
        self.marks.push_back(Mark {
            id,
            sent_at: now,
            sent: self.sent,
            since: self.since,
            limited: limited && self.probe == Probe::None,
        });
    }

    /// A PONG has come. Returns `false` if it answers no PING of this connection, or one that was answered before.
    pub fn on_answer(&mut self, id: PingId, now: Instant) -> bool {
        // Two multiplexers of one connection may answer a little out of order.
        let Some(index) = self.marks.iter().position(|mark| mark.id == id) else { return false };
        let Some(mark) = self.marks.remove(index) else { return false };
        let round_trip = now.saturating_duration_since(mark.sent_at).max(Duration::from_nanos(1));
        self.measure_rate(&mark, now);
        self.full |= mark.limited;
        self.delivered = self.delivered.max(mark.sent);
        if mark.sent > self.since.bytes {
            self.since = Since { bytes: mark.sent, at: now };
        }
        let (least, measured) = self.round_trip;
        if round_trip <= least || self.probe == Probe::Marked(id) {
            self.round_trip = (round_trip, now);
            self.probe = Probe::None;
        } else if mark.limited
            && self.probe == Probe::None
            && now.saturating_duration_since(measured) > REMEASURE.max(least * REMEASURE_ROUND_TRIPS)
        {
            self.probe = Probe::Draining;
        }
        true
    }

    /// The rate rises at once, and falls slowly, by an eighth with each PONG.
    fn measure_rate(&mut self, mark: &Mark, now: Instant) {
        let interval = now.saturating_duration_since(mark.since.at).max(Duration::from_nanos(1));
        let arrived = mark.sent.saturating_sub(mark.since.bytes);
        #[allow(clippy::cast_precision_loss, reason = "a rate needs no more than 52 bits")]
        let sample = arrived as f64 / interval.as_secs_f64();
        if sample > self.rate {
            self.rate = sample;
        } else if mark.limited {
            self.rate += (sample - self.rate) / 8.0;
        }
    }

    /// What is under way when the path counts as empty: half of what it holds.
    fn drained(&self) -> u64 {
        self.holds(self.round_trip.0, 0.5)
    }

    /// `times` what the path carries in `time`.
    fn holds(&self, time: Duration, times: f64) -> u64 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is clamped")]
        let bytes = (self.rate * time.as_secs_f64() * times) as u64;
        bytes.clamp(LEAST, MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: u64 = 63 * 1024;

    /// A path that takes `rate` bytes a second, and hands each on after half of `round_trip`.
    struct Path {
        flow: Flow,
        now: Instant,
        rate: f64,
        round_trip: Duration,
        /// When the path has taken everything that was sent.
        free: Instant,
        /// When PONGs come, in order.
        pongs: VecDeque<(Instant, PingId)>,
        pings: u64,
        /// The longest time that anything waited for the path, and what has arrived, since the last look.
        waited: Duration,
        arrived: u64,
    }

    impl Path {
        fn new(rate: f64, round_trip: Duration) -> Self {
            let now = Instant::now();
            Self {
                flow: Flow::new(now, round_trip),
                now,
                rate,
                round_trip,
                free: now,
                pongs: VecDeque::new(),
                pings: 0,
                waited: Duration::ZERO,
                arrived: 0,
            }
        }

        fn ping(&mut self, limited: bool) {
            self.pings += 1;
            let id = self.pings.to_be_bytes();
            self.flow.mark(id, self.now, limited);
            self.pongs.push_back((self.free.max(self.now) + self.round_trip, id));
        }

        fn send(&mut self, bytes: u64, used: Use, limited: bool) {
            self.flow.on_sent(bytes as usize, self.now);
            self.free = self.free.max(self.now) + Duration::from_secs_f64(bytes as f64 / self.rate);
            self.waited = self.waited.max(self.free - self.now);
            if self.flow.mark_due(used) {
                self.ping(limited);
            }
        }

        /// Sends whatever the limit allows, for `time`.
        fn run(&mut self, time: Duration, used: Use) {
            let end = self.now + time;
            while self.now < end {
                while self.flow.under_way() + FRAME <= self.flow.limit(used) {
                    self.send(FRAME, used, true);
                    self.arrived += FRAME;
                }
                if self.flow.is_unmarked() {
                    self.ping(true);
                }
                let (at, id) = self.pongs.pop_front().unwrap();
                self.now = at;
                assert!(self.flow.on_answer(id, self.now));
            }
        }

        /// Sends 300 bytes now and then.
        fn trickles(&mut self, times: usize, pause: Duration, used: Use) {
            for _ in 0..times {
                self.now += pause;
                self.send(300, used, false);
                self.take_answers();
            }
        }

        fn take_answers(&mut self) {
            while self.pongs.front().is_some_and(|(at, _)| *at <= self.now) {
                let (at, id) = self.pongs.pop_front().unwrap();
                assert!(self.flow.on_answer(id, at));
            }
        }

        /// The longest wait, and the share of the path's rate that was used, in the last `time` of a run of ten times that.
        fn settles(&mut self, time: Duration, used: Use) -> (Duration, f64) {
            self.run(time * 9, used);
            (self.waited, self.arrived) = (Duration::ZERO, 0);
            self.run(time, used);
            (self.waited, self.arrived as f64 / self.rate / time.as_secs_f64())
        }
    }

    #[test]
    fn paths_are_full_and_little_waits_for_them() {
        for (rate, round_trip) in [
            (500e6, Duration::from_micros(150)),
            (100e6, Duration::from_millis(1)),
            (125e6, Duration::from_millis(50)),
            (125e6, Duration::from_millis(300)),
            (12.5e6, Duration::from_millis(20)),
        ] {
            let least = Duration::from_secs_f64(LEAST as f64 / rate);
            for (used, most) in [(Use::Mixed, 2), (Use::Bulk, 6)] {
                let mut path = Path::new(rate, round_trip);
                let (waited, share) = path.settles(round_trip.max(Duration::from_millis(10)) * 20, used);
                let most = (round_trip + used.slack()) * most * 11 / 10 + least;
                assert!(waited <= most, "{rate} B/s, {round_trip:?}, {used:?}: {waited:?} of {most:?}");
                assert!(share > 0.95, "{rate} B/s, {round_trip:?}, {used:?}: {share}");
            }
        }
    }

    #[test]
    fn a_queue_that_lasts_is_not_taken_for_the_path() {
        // Ten times as long as a measurement is good for.
        let mut path = Path::new(100e6, Duration::from_millis(5));
        let (waited, share) = path.settles(REMEASURE, Use::Mixed);
        assert!(waited < Duration::from_millis(25), "{waited:?}");
        assert!(share > 0.95, "{share}");
    }

    #[test]
    fn a_path_that_changes_is_measured_again() {
        let mut path = Path::new(100e6, Duration::from_millis(2));
        path.run(REMEASURE, Use::Mixed);
        // Longer and slower.
        (path.rate, path.round_trip) = (20e6, Duration::from_millis(40));
        let (waited, share) = path.settles(REMEASURE, Use::Mixed);
        assert!(waited < Duration::from_millis(100) && share > 0.9, "{waited:?}, {share}");
        // And back.
        (path.rate, path.round_trip) = (100e6, Duration::from_millis(2));
        let (waited, share) = path.settles(REMEASURE, Use::Mixed);
        assert!(waited < Duration::from_millis(10) && share > 0.9, "{waited:?}, {share}");
    }

    #[test]
    fn small_exchanges_do_not_lower_the_rate() {
        let mut path = Path::new(100e6, Duration::from_millis(10));
        path.run(Duration::from_secs(1), Use::Mixed);
        let limit = path.flow.limit(Use::Mixed);
        path.trickles(2000, Duration::from_millis(10), Use::Mixed);
        assert!(path.flow.limit(Use::Mixed) >= limit / 2, "{} of {limit}", path.flow.limit(Use::Mixed));
        assert!(path.pings < 300, "{} PINGs", path.pings);
    }

    #[test]
    fn small_exchanges_do_not_raise_the_rate() {
        for (round_trip, pause) in [(200, 10_000), (1000, 10_000), (1000, 30_000), (10_000, 1000)] {
            for used in [Use::Bulk, Use::Mixed] {
                let mut path = Path::new(100e6, Duration::from_micros(round_trip));
                path.run(Duration::from_secs(1), used);
                let limit = path.flow.limit(used);
                path.trickles(500_000, Duration::from_micros(pause), used);
                assert!(path.flow.limit(used) <= limit * 2, "{} of {limit}", path.flow.limit(used));
            }
        }
    }

    #[test]
    fn small_exchanges_take_nothing_from_the_first_transfer() {
        let mut path = Path::new(100e6, Duration::from_millis(100));
        path.trickles(10, Duration::from_millis(300), Use::Mixed);
        path.ping(false);
        path.now += Duration::from_millis(100);
        path.take_answers();
        assert!(path.flow.limit(Use::Bulk) >= START && path.flow.carries(Duration::from_millis(1)).is_none());
    }

    #[test]
    fn a_peer_that_answers_little_is_asked_little() {
        let now = Instant::now();
        let mut flow = Flow::new(now, Duration::from_millis(1));
        for i in 0..10_000u64 {
            flow.on_sent(START as usize, now);
            if flow.mark_due(Use::Mixed) {
                flow.mark(i.to_be_bytes(), now, true);
            }
            if i % 4 == 0 {
                flow.on_answer(i.to_be_bytes(), now);
            }
        }
        assert!(flow.marks.len() <= MOST_MARKS);
    }

    #[test]
    fn an_answer_counts_once_and_only_if_it_was_asked_for() {
        let now = Instant::now();
        let mut flow = Flow::new(now, Duration::from_millis(1));
        flow.on_sent(1000, now);
        assert!(flow.is_unmarked() && !flow.mark_due(Use::Mixed));
        flow.mark(*b"11111111", now, false);
        flow.on_sent(500, now);
        flow.mark(*b"22222222", now, false);
        assert!(!flow.on_answer(*b"33333333", now));
        assert_eq!(flow.under_way(), 1500);
        // The later one says what the earlier one would.
        assert!(flow.on_answer(*b"22222222", now + Duration::from_millis(1)));
        assert_eq!(flow.under_way(), 0);
        assert!(flow.on_answer(*b"11111111", now + Duration::from_millis(2)));
        assert!(!flow.on_answer(*b"11111111", now + Duration::from_millis(3)));
        assert_eq!(flow.under_way(), 0);
    }
}
