//! How much the reader of a stream takes, which tells how large a window it needs. The time is an argument.

use std::time::{Duration, Instant};

/// Shorter round trips count as this long, so that there are few grants on a fast network, too.
pub(super) const SHORTEST_ROUND_TRIP: Duration = Duration::from_millis(1);
/// The shortest time after which it is known what a reader takes, and the same in round trips.
const SHORTEST_PERIOD: Duration = Duration::from_secs(1);
const PERIOD_ROUND_TRIPS: u32 = 4;
/// A window that holds this many times what the reader takes in a round trip does not slow it down, even if it becomes twice
/// as fast.
const AMPLE: u64 = 4;

/// The time after which it is known what a reader takes.
pub(super) fn period(round_trip: Duration) -> Duration {
    SHORTEST_PERIOD.max(round_trip * PERIOD_ROUND_TRIPS)
}

/// The bytes that a reader has taken in the present period and in the one before it.
#[derive(Debug)]
pub(super) struct Demand {
    last: Instant,
    since: Instant,
    bytes: u64,
    before: (u64, Duration),
}

impl Demand {
    pub(super) fn new(now: Instant) -> Self {
        Self { last: now, since: now, bytes: 0, before: (0, SHORTEST_PERIOD) }
    }

    /// The reader takes `bytes` now.
    pub(super) fn add(&mut self, bytes: u64, now: Instant, round_trip: Duration) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.last = now;
        let length = now.saturating_duration_since(self.since);
        if length >= period(round_trip) {
            (self.before, self.since, self.bytes) = ((self.bytes, length), now, 0);
        }
    }

    /// Whether the reader has taken nothing for a whole period.
    pub(super) fn is_idle(&self, now: Instant, round_trip: Duration) -> bool {
        now.saturating_duration_since(self.last) >= period(round_trip)
    }

    /// The size of a window that does not slow the reader down.
    pub(super) fn ample(&self, now: Instant, round_trip: Duration) -> u64 {
        if self.is_idle(now, round_trip) {
            return 0;
        }
        let round_trip = round_trip.max(SHORTEST_ROUND_TRIP);
        let length = now.saturating_duration_since(self.since);
        let present = taken_in(round_trip, self.bytes, length.max(round_trip));
        let before = taken_in(round_trip, self.before.0, self.before.1);
        let taken = if length >= period(round_trip) { present } else { present.max(before) };
        taken.saturating_mul(AMPLE)
    }
}

/// The part of `bytes`, taken during `length`, that falls to `time`.
fn taken_in(time: Duration, bytes: u64, length: Duration) -> u64 {
    let part = u128::from(bytes).saturating_mul(time.as_nanos()) / length.as_nanos().max(1);
    u64::try_from(part).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(100);

    #[test]
    fn a_reader_needs_a_few_times_what_it_takes_in_a_round_trip() {
        let mut now = Instant::now();
        let mut demand = Demand::new(now);
        // 10 MB/s.
        for _ in 0..300 {
            now += RTT / 10;
            demand.add(100_000, now, RTT);
        }
        assert_eq!(demand.ample(now, RTT), 4_000_000);
        // A pause within a period changes nothing, and a long one means that the reader needs nothing.
        assert!(demand.ample(now + RTT * 9, RTT) >= 3_000_000);
        assert!(!demand.is_idle(now + RTT * 9, RTT) && demand.is_idle(now + RTT * 10, RTT));
        assert_eq!(demand.ample(now + RTT * 10, RTT), 0);
    }

    #[test]
    fn a_reader_that_becomes_fast_or_slow_is_noticed() {
        let mut now = Instant::now();
        let mut demand = Demand::new(now);
        demand.add(1, now, RTT);
        now += Duration::from_secs(3600);
        for _ in 0..5 {
            now += RTT / 10;
            demand.add(100_000, now, RTT);
        }
        assert!(demand.ample(now, RTT) >= 1_600_000, "{}", demand.ample(now, RTT));
        for _ in 0..40 {
            now += RTT;
            demand.add(1000, now, RTT);
        }
        assert!(demand.ample(now, RTT) <= 5000, "{}", demand.ample(now, RTT));
    }
}
