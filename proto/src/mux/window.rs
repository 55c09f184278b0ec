//! Flow control of one direction of one stream, in bytes since the stream began. The time is an argument.

use std::time::{Duration, Instant};

/// The number of bytes that each side may send on a new stream before the first CREDIT. Part of the first version of the
/// protocol; later ones say it.
pub const INITIAL: u32 = 256 * 1024;
/// The largest window of a stream in bytes. Part of the protocol: a peer that grants more breaks it.
pub const MAX: u32 = 32 * 1024 * 1024;

/// Shorter round trips count as this long, so that there are few grants on a fast network, too.
const SHORTEST_ROUND_TRIP: Duration = Duration::from_millis(1);

/// The window that the receiver of one direction grants. It grows while the reader takes more than half a window in a round
/// trip, since then the window and not the reader limits the stream. It never grows for a reader that doesn't read.
#[derive(Debug)]
pub struct Receive {
    size: u32,
    /// The number of bytes that the peer may send in all.
    limit: u64,
    /// The number of bytes that the reader has taken since the last grant.
    taken: u32,
    last_grant: Instant,
}

/// How far the peer may send from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// So many bytes more than before.
    pub by: u32,
    pub limit: u64,
}

/// What a peer may not do with a window.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    #[error("the peer sent more than its window")]
    Overrun,
    #[error("the peer left out or repeated bytes")]
    Offset,
    #[error("the peer leaves too many gaps")]
    Gaps,
}

impl Receive {
    pub fn new(now: Instant) -> Self {
        Self { size: INITIAL, limit: u64::from(INITIAL), taken: 0, last_grant: now }
    }

    /// The number of bytes by which this window is larger than a new one, which it holds of a shared budget.
    pub fn extra(&self) -> u32 {
        self.size - INITIAL
    }

    /// The peer has sent `end` bytes, or more.
    pub fn check(&self, end: u64) -> Result<(), WindowError> {
        if end > self.limit { Err(WindowError::Overrun) } else { Ok(()) }
    }

    /// The reader has taken `bytes`. Returns how much to grant the peer now, if anything. `may_grow` gets the number of
    /// bytes by which the window is to grow, and takes them from a shared budget if it agrees.
    pub fn on_taken(
        &mut self,
        bytes: usize,
        now: Instant,
        round_trip: Duration,
        may_grow: impl FnOnce(u32) -> bool,
    ) -> Option<Grant> {
        self.taken = self.taken.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.taken < self.size / 2 {
            return None;
        }
        let mut by = self.taken;
        let round_trip = round_trip.max(SHORTEST_ROUND_TRIP);
        let took =
            now.duration_since(self.last_grant).mul_f64(f64::from(self.size) / 2.0 / f64::from(self.taken));
        if took < round_trip && self.size < MAX && may_grow(self.size) {
            by = by.saturating_add(self.size);
            self.size *= 2;
        }
        self.taken = 0;
        self.last_grant = now;
        self.limit = self.limit.saturating_add(u64::from(by));
        Some(Grant { by, limit: self.limit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(100);

    #[test]
    fn no_more_is_granted_than_was_taken() {
        let t0 = Instant::now();
        let mut w = Receive::new(t0);
        let initial = u64::from(INITIAL);
        assert_eq!((w.check(initial), w.check(initial + 1)), (Ok(()), Err(WindowError::Overrun)));
        assert_eq!(w.on_taken(1000, t0 + RTT * 10, RTT, |_| true), None);
        let grant = w.on_taken(INITIAL as usize / 2 - 1000, t0 + RTT * 10, RTT, |_| true);
        assert_eq!(grant, Some(Grant { by: INITIAL / 2, limit: initial * 3 / 2 }));
        assert_eq!(
            (w.check(initial * 3 / 2), w.check(initial * 3 / 2 + 1)),
            (Ok(()), Err(WindowError::Overrun))
        );
    }

    #[test]
    fn grows_while_it_limits_a_fast_reader_and_stops_there() {
        let mut now = Instant::now();
        let mut w = Receive::new(now);
        // A reader of 20 MB/s over 100 ms needs 2 MB on the way, and a window of twice that. Whole windows arrive at
        // once, a round trip apart, for as long as the window is the limit.
        let (rate, mut received) = (20_000_000.0, 0);
        for _ in 0..400 {
            let bytes = usize::try_from(w.limit - received).unwrap();
            now += (RTT + Duration::from_millis(1)).max(Duration::from_secs_f64(bytes as f64 / rate));
            received = w.limit;
            w.on_taken(bytes, now, RTT, |_| true);
        }
        assert_eq!(w.size, 4 * 1024 * 1024);
        assert_eq!(w.extra(), 4 * 1024 * 1024 - INITIAL);
    }

    #[test]
    fn a_refused_budget_keeps_the_size() {
        let t0 = Instant::now();
        let mut w = Receive::new(t0);
        let grant = w.on_taken(INITIAL as usize, t0, RTT, |_| false);
        assert_eq!(grant, Some(Grant { by: INITIAL, limit: 2 * u64::from(INITIAL) }));
        assert_eq!(w.extra(), 0);
    }

    #[test]
    fn never_exceeds_the_maximum() {
        let t0 = Instant::now();
        let (mut w, mut received) = (Receive::new(t0), 0);
        for _ in 0..100 {
            let bytes = usize::try_from(w.limit - received).unwrap();
            received = w.limit;
            w.on_taken(bytes, t0, RTT, |_| true);
        }
        assert_eq!(w.size, MAX);
    }
}
