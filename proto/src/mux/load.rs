//! Which streams send much, and how many connections they are worth. The time is an argument.

use std::time::{Duration, Instant};

/// A stream that has sent more bytes than this lately is heavy: a transfer, and not an exchange of messages. Its socket
/// may now and then give little at a time all the same.
pub const LIGHT: usize = 256 * 1024;
/// What was sent lately counts half after this time, and so on.
const HALF_LIFE: Duration = Duration::from_millis(100);
/// With a longer round trip, what a connection carries is limited by its congestion window, and by what is lost.
const FAR: Duration = Duration::from_millis(5);

/// The bytes that a stream has sent lately.
#[derive(Debug)]
pub struct Lately {
    bytes: usize,
    halved: Instant,
}

impl Lately {
    pub fn new(now: Instant) -> Self {
        Self { bytes: 0, halved: now }
    }

    /// Adds bytes that are sent now.
    pub fn add(&mut self, bytes: usize, now: Instant) {
        let half_lives = now.saturating_duration_since(self.halved).as_nanos() / HALF_LIFE.as_nanos();
        if half_lives > 0 {
            self.bytes =
                self.bytes.checked_shr(u32::try_from(half_lives).unwrap_or(u32::MAX)).unwrap_or_default();
            self.halved = now;
        }
        self.bytes = self.bytes.saturating_add(bytes);
    }

    pub fn is_heavy(&self) -> bool {
        self.bytes > LIGHT
    }
}

/// How many connections beside the first one are worth having for so many heavy streams. On a short path, one connection
/// carries as much as a thread encrypts, and `threads` may do that. On a long path, several carry more than one even for one
/// stream.
pub fn connections_for(heavy: usize, round_trip: Duration, threads: usize, most: usize) -> usize {
    match heavy {
        0 => 0,
        _ if round_trip > FAR => most,
        _ => heavy.min(threads.saturating_sub(1).max(1)).min(most),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_sends_much_is_heavy_for_some_time() {
        let start = Instant::now();
        let mut lately = Lately::new(start);
        let mut after = |bytes, half_lives: u32| {
            lately.add(bytes, start + HALF_LIFE / 2 * half_lives);
            lately.bytes
        };
        assert_eq!(
            [after(1000, 0), after(1000, 1), after(0, 2), after(0, 8), after(1, 2000)],
            [1000, 2000, 1000, 125, 1]
        );
        // Small answers all the time, and a transfer.
        let heavy = |bytes: usize, pause: Duration| {
            let mut lately = Lately::new(start);
            (1..10_000).any(|i| {
                lately.add(bytes, start + pause * i);
                lately.is_heavy()
            })
        };
        assert!(!heavy(300, Duration::from_micros(500)));
        assert!(heavy(32 * 1024, Duration::from_millis(5)));
    }

    #[test]
    fn connections_follow_the_load_and_the_path() {
        let (near, far) = (Duration::from_micros(100), Duration::from_millis(50));
        for (heavy, round_trip, threads, want) in [
            (0, far, 8, 0),
            (1, near, 2, 1),
            (9, near, 2, 1),
            (9, near, 8, 4),
            (2, near, 8, 2),
            (1, far, 1, 4),
        ] {
            assert_eq!(
                connections_for(heavy, round_trip, threads, 4),
                want,
                "{heavy} {round_trip:?} {threads}"
            );
        }
    }
}
