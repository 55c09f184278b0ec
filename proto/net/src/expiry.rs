//! Waiting for a time of the wall clock, such as a certificate's end.

use std::time::{Duration, SystemTime};

/// The wall clock can be set, so it is read again this often.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Waits until the wall clock has passed a time; without one, for ever.
pub async fn reached(at: Option<SystemTime>) {
    let Some(at) = at else { return std::future::pending().await };
    while let Ok(left) = at.duration_since(SystemTime::now())
        && !left.is_zero()
    {
        tokio::time::sleep(left.min(CHECK_INTERVAL)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_has_passed_is_reached_and_what_never_comes_is_not() {
        reached(Some(SystemTime::UNIX_EPOCH)).await;
        let never = tokio::time::timeout(Duration::from_secs(3600), reached(None)).await;
        assert!(never.is_err());
    }
}
