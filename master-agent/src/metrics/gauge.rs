//! Numbers as gauges show them.

/// As an integer gauge has it.
pub fn signed(value: impl TryInto<i64>) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}
