//! Numbers as integer gauges take them.

/// The value of an integer gauge; one that is too large becomes the largest.
pub fn signed(value: impl TryInto<i64>) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}
