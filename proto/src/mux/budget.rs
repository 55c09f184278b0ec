//! What all windows of a tunnel together may hold beyond their initial size. The time is an argument.
//!
//! The peer can never make this side buffer more than the initial window of each stream and this budget: a window takes from
//! it before it grows, and gives back only what the peer can no longer use. One stream may use all of it. When a window can't
//! grow, the others are looked through: they give up what their readers don't need, and if that stream has less than its
//! share, what they have beyond theirs.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{Version, demand::period, window::INITIAL};

/// The shortest time between two looks through the windows.
const LEAST_PAUSE: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub struct Budget {
    version: Version,
    left: u32,
    /// The streams that hold something of it.
    grown: BTreeSet<u64>,
    looked: Option<Instant>,
    share: Option<Share>,
}

/// The size beyond which no window grows for now, since others have less.
#[derive(Clone, Copy, Debug)]
struct Share {
    size: u32,
    until: Instant,
}

impl Budget {
    pub fn new(version: Version) -> Self {
        Self { version, left: Self::total(version), grown: BTreeSet::new(), looked: None, share: None }
    }

    /// The whole budget in bytes.
    pub fn total(version: Version) -> u32 {
        match version {
            Version::V1 => 32 * 1024 * 1024,
            Version::V2 => 64 * 1024 * 1024,
        }
    }

    /// The number of bytes that no window holds.
    pub fn left(&self) -> u32 {
        self.left
    }

    /// The window of `stream`, which has `size` bytes, is to grow by `by` bytes. Returns how many it gets.
    pub fn grow(&mut self, stream: u64, size: u32, by: u32, now: Instant) -> u32 {
        let gets = match self.version {
            // Nothing can be taken back from a peer of this version, so one stream leaves something for the others.
            Version::V1 if self.left / 2 >= by => by,
            Version::V1 => 0,
            Version::V2 => {
                let share = self.share.filter(|share| now < share.until);
                let room = share.map_or(u32::MAX, |share| share.size.saturating_sub(size));
                by.min(room).min(self.left)
            }
        };
        // A little more is worth no grant.
        if gets < INITIAL {
            return 0;
        }
        self.left = self.left.saturating_sub(gets);
        self.grown.insert(stream);
        gets
    }

    /// The window of `stream` gives `bytes` bytes back, and still holds `held`.
    pub fn give_back(&mut self, stream: u64, bytes: u32, held: u32) {
        self.left = self.left.saturating_add(bytes);
        if held == 0 {
            self.grown.remove(&stream);
        }
    }

    /// The streams that hold something of the budget, for a look through them; `None` if the last one was a moment ago, or if
    /// nothing can be taken back from the peer.
    pub fn look(&mut self, now: Instant, round_trip: Duration) -> Option<Vec<u64>> {
        let pause = LEAST_PAUSE.max(round_trip);
        let is_early = self.looked.is_some_and(|looked| now.saturating_duration_since(looked) < pause);
        if self.version == Version::V1 || is_early {
            return None;
        }
        self.looked = Some(now);
        Some(self.grown.iter().copied().collect())
    }

    /// The size to which larger windows shrink, for the sake of one that has only `size` bytes and can't grow; `None` if that
    /// has its share. `active` streams share the budget, including that one.
    pub fn share(&mut self, size: u32, active: u32, now: Instant, round_trip: Duration) -> Option<u32> {
        let share = INITIAL.saturating_add(Self::total(self.version) / active.max(1));
        if size >= share {
            return None;
        }
        self.share = Some(Share { size: share, until: now + period(round_trip) });
        Some(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(100);
    const MB: u32 = 1024 * 1024;

    #[test]
    fn one_stream_may_use_all_of_it() {
        let now = Instant::now();
        let mut budget = Budget::new(Version::V2);
        let mut size = INITIAL;
        while size < 64 * MB {
            let gets = budget.grow(1, size, size, now);
            assert_eq!(gets, size);
            size += gets;
        }
        assert_eq!(budget.left(), INITIAL);
        // Too little is left, or it goes to another.
        assert_eq!(budget.grow(2, INITIAL, INITIAL - 1, now), 0);
        assert_eq!(budget.grow(2, INITIAL, INITIAL, now), INITIAL);
        assert_eq!(budget.grow(2, 2 * INITIAL, 2 * INITIAL, now), 0);
        assert_eq!(budget.look(now, RTT), Some(vec![1, 2]));
        budget.give_back(1, MB, 62 * MB);
        budget.give_back(2, INITIAL, 0);
        assert_eq!(budget.look(now + RTT, RTT), Some(vec![1]));
        assert_eq!(budget.grow(1, 63 * MB, 4 * MB, now), MB + INITIAL);
        assert_eq!(budget.left(), 0);
    }

    #[test]
    fn the_first_version_leaves_half_of_what_is_left() {
        let now = Instant::now();
        let mut budget = Budget::new(Version::V1);
        assert_eq!(budget.grow(1, 17 * MB, 17 * MB, now), 0);
        assert_eq!(budget.grow(1, 16 * MB, 16 * MB, now), 16 * MB);
        assert_eq!(budget.grow(2, 16 * MB, 16 * MB, now), 0);
        assert_eq!(budget.grow(2, 8 * MB, 8 * MB, now), 8 * MB);
        assert_eq!(budget.look(now, RTT), None);
    }

    #[test]
    fn there_is_one_look_in_a_round_trip() {
        let now = Instant::now();
        let mut budget = Budget::new(Version::V2);
        assert!(budget.look(now, RTT).is_some());
        assert!(budget.look(now + RTT * 9 / 10, RTT).is_none());
        assert!(budget.look(now + RTT, RTT).is_some());
        let soon = now + RTT + Duration::from_millis(1);
        assert!(budget.look(soon, Duration::ZERO).is_none());
        assert!(budget.look(soon + LEAST_PAUSE, Duration::ZERO).is_some());
    }

    #[test]
    fn nobody_grows_beyond_its_share_while_another_has_less() {
        let now = Instant::now();
        let mut budget = Budget::new(Version::V2);
        let share = INITIAL + 16 * MB;
        assert_eq!(budget.share(share, 4, now, RTT), None);
        assert_eq!(budget.grow(1, share, share, now), share);
        assert_eq!(budget.share(MB, 4, now, RTT), Some(share));
        assert_eq!(budget.grow(2, share, share, now), 0);
        assert_eq!(budget.grow(3, 15 * MB, 15 * MB, now), MB + INITIAL);
        let later = now + period(RTT);
        assert_eq!(budget.grow(2, share, share, later), share);
        // A stream that is alone shares with nobody.
        assert_eq!(budget.share(63 * MB, 1, later, RTT), Some(64 * MB + INITIAL));
    }
}
