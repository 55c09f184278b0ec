//! Bounds and readers of configuration fields that several sections share.

use std::{ops::RangeInclusive, time::Duration};

use proto_config::{Section, Value};

pub(crate) const DAY: Duration = secs(24 * 60 * 60);
/// For timeouts and intervals: long enough for any network, and short enough to catch a wrong unit.
pub(crate) const WAIT: RangeInclusive<Duration> = Duration::from_millis(10)..=DAY;
pub(crate) const COUNT: RangeInclusive<usize> = 1..=1_000_000;

pub(crate) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Reads a list and reports values that it has twice.
pub(crate) fn unique<T: Value + PartialEq>(s: &Section<'_>, name: &'static str) -> Vec<T> {
    let mut values = Vec::new();
    for at in s.items(name) {
        match at.read::<T>() {
            Some(value) if values.contains(&value) => at.error("is listed already"),
            Some(value) => values.push(value),
            None => {}
        }
    }
    values
}
