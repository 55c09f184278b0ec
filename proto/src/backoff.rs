//! Exponential back-off with jitter. Random numbers are arguments.

use std::time::Duration;

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
        let ceiling =
            self.base.saturating_mul(1u32.checked_shl(self.attempt).unwrap_or(u32::MAX)).min(self.max);
        self.attempt = self.attempt.saturating_add(1).min(30);
        ceiling.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
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
}
