//! Exponential back-off with jitter. Random numbers are arguments.

use std::time::Duration;

/// The least ceiling, with which the number of attempts that count is small.
const SHORTEST: Duration = Duration::from_millis(1);

/// The delays before the next attempts. The ceiling of the first is `base`, and that of each further one is twice the one
/// before, up to `max`. Each delay lies between half of its ceiling and all of it, so that peers that lost their tunnels
/// together don't come back together.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    max: Duration,
    attempt: u32,
}

impl Backoff {
    pub fn new(base: Duration, max: Duration) -> Self {
        Self { base, max, attempt: 0 }
    }

    /// The next delay. `random` is a number in 0..1.
    pub fn next_delay(&mut self, random: f64) -> Duration {
        self.next_delay_within(self.max, random)
    }

    /// The next delay, with a ceiling of at most `max`. Attempts beyond that ceiling do not count, so that the delays after
    /// this one grow from there.
    pub fn next_delay_within(&mut self, max: Duration, random: f64) -> Duration {
        let max = max.min(self.max);
        let ceiling = self.ceiling(self.attempt).min(max);
        if self.ceiling(self.attempt) < max {
            self.attempt += 1;
        }
        while self.attempt > 0 && self.ceiling(self.attempt - 1) >= max {
            self.attempt -= 1;
        }
        ceiling.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
    }

    /// The ceiling of an attempt, as if there were no maximum.
    fn ceiling(&self, attempt: u32) -> Duration {
        self.base.max(SHORTEST).saturating_mul(1u32.checked_shl(attempt).unwrap_or(u32::MAX))
    }

    /// Begins anew, once a connection has proved useful.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_maximum_and_resets() {
        let mut b = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let delays: Vec<_> = (0..6).map(|_| b.next_delay(1.0).as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(b.next_delay(0.0), Duration::from_millis(500));
        b.reset();
        assert_eq!(b.next_delay(0.0), Duration::from_millis(50));
        for _ in 0..100 {
            assert!(b.next_delay(0.5) <= Duration::from_secs(1));
        }
    }

    #[test]
    fn attempts_beyond_a_lower_ceiling_do_not_count() {
        let mut b = Backoff::new(Duration::from_millis(250), Duration::from_secs(30));
        let (lower, ms) = (Duration::from_secs(2), |delay: Duration| delay.as_millis());
        let delays: Vec<_> = (0..6).map(|_| ms(b.next_delay_within(lower, 1.0))).collect();
        assert_eq!(delays, [250, 500, 1000, 2000, 2000, 2000]);
        let delays: Vec<_> = (0..6).map(|_| ms(b.next_delay(1.0))).collect();
        assert_eq!(delays, [2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!([b.next_delay_within(lower, 1.0), b.next_delay(1.0)].map(ms), [2000, 2000]);
        let mut b = Backoff::new(Duration::ZERO, Duration::ZERO);
        assert_eq!([b.next_delay(1.0), b.next_delay(1.0)], [Duration::ZERO; 2]);
    }
}
