//! Flow control of one direction of one stream. The time is an argument.

use std::time::{Duration, Instant};

/// The number of bytes that each side may send on a new stream before the first CREDIT. Part of the protocol.
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
    /// The number of bytes that the peer may still send.
    open: u32,
    /// The number of bytes that the reader has taken since the last grant.
    taken: u32,
    last_grant: Instant,
}

/// The peer sent more than it was granted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer sent more than its window")]
pub struct Overrun;

impl Receive {
    pub fn new(now: Instant) -> Self {
        Self { size: INITIAL, open: INITIAL, taken: 0, last_grant: now }
    }

    /// The number of bytes by which this window is larger than a new one, which it holds of a shared budget.
    pub fn extra(&self) -> u32 {
        self.size - INITIAL
    }

    pub fn on_data(&mut self, bytes: usize) -> Result<(), Overrun> {
        let bytes = u32::try_from(bytes).map_err(|_| Overrun)?;
        self.open = self.open.checked_sub(bytes).ok_or(Overrun)?;
        Ok(())
    }

    /// The reader has taken `bytes`. Returns how much to grant the peer now, if anything. `may_grow` gets the number of
    /// bytes by which the window is to grow, and takes them from a shared budget if it agrees.
    pub fn on_taken(
        &mut self,
        bytes: usize,
        now: Instant,
        round_trip: Duration,
        may_grow: impl FnOnce(u32) -> bool,
    ) -> Option<u32> {
        self.taken = self.taken.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.taken < self.size / 2 {
            return None;
        }
        let mut grant = self.taken;
        let round_trip = round_trip.max(SHORTEST_ROUND_TRIP);
        let took =
            now.duration_since(self.last_grant).mul_f64(f64::from(self.size) / 2.0 / f64::from(self.taken));
        if took < round_trip && self.size < MAX && may_grow(self.size) {
            grant = grant.saturating_add(self.size);
            self.size *= 2;
        }
        self.taken = 0;
        self.last_grant = now;
        self.open = self.open.saturating_add(grant);
        Some(grant)
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
        assert_eq!(w.on_data(INITIAL as usize), Ok(()));
        assert_eq!(w.on_data(1), Err(Overrun));
        assert_eq!(w.on_taken(1000, t0 + RTT * 10, RTT, |_| true), None);
        assert_eq!(w.on_taken(INITIAL as usize / 2 - 1000, t0 + RTT * 10, RTT, |_| true), Some(INITIAL / 2));
        assert_eq!(w.on_data(INITIAL as usize / 2), Ok(()));
        assert_eq!(w.on_data(1), Err(Overrun));
    }

    #[test]
    fn grows_while_it_limits_a_fast_reader_and_stops_there() {
        let mut now = Instant::now();
        let mut w = Receive::new(now);
        // A reader of 20 MB/s over 100 ms needs 2 MB on the way, and a window of twice that. Whole windows arrive at
        // once, a round trip apart, for as long as the window is the limit.
        let rate = 20_000_000.0;
        for _ in 0..400 {
            let bytes = w.open as usize;
            now += (RTT + Duration::from_millis(1)).max(Duration::from_secs_f64(bytes as f64 / rate));
            w.on_data(bytes).unwrap();
            w.on_taken(bytes, now, RTT, |_| true);
        }
        assert_eq!(w.size, 4 * 1024 * 1024);
        assert_eq!(w.extra(), 4 * 1024 * 1024 - INITIAL);
    }

    #[test]
    fn a_refused_budget_keeps_the_size() {
        let t0 = Instant::now();
        let mut w = Receive::new(t0);
        w.on_data(INITIAL as usize).unwrap();
        assert_eq!(w.on_taken(INITIAL as usize, t0, RTT, |_| false), Some(INITIAL));
        assert_eq!(w.extra(), 0);
    }

    #[test]
    fn never_exceeds_the_maximum() {
        let t0 = Instant::now();
        let mut w = Receive::new(t0);
        for _ in 0..100 {
            let bytes = w.open as usize;
            w.on_data(bytes).unwrap();
            w.on_taken(bytes, t0, RTT, |_| true);
        }
        assert_eq!(w.size, MAX);
    }
}
