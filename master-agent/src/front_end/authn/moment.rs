//! The moment at which a call happens, which is passed along so that nothing here reads the clock.

use std::time::{Instant, SystemTime};

/// A moment on both clocks: the wall clock is what credentials are dated by, and the monotonic one is what caches
/// go by, so that setting the clock back does not make them last.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub wall: SystemTime,
    pub monotonic: Instant,
}

impl Moment {
    pub fn now() -> Self {
        Self { wall: SystemTime::now(), monotonic: Instant::now() }
    }

    /// Seconds since 1970, 0 before.
    pub fn unix(&self) -> u64 {
        self.wall.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }
}
