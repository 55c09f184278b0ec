//! The moment of a call, which callers pass in so that authentication does not read a clock.

use std::time::{Instant, SystemTime};

/// A moment on both clocks. The wall clock decides about the dates of credentials. The monotonic clock decides about
/// caches, so that their entries do not last longer when the wall clock is set back.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub wall: SystemTime,
    pub monotonic: Instant,
}

impl Moment {
    pub fn now() -> Self {
        Self { wall: SystemTime::now(), monotonic: Instant::now() }
    }

    /// Returns the seconds since 1970, or 0 for a time before that.
    pub fn unix(&self) -> u64 {
        self.wall.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }
}
