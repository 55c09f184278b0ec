//! Waiting for a time of the wall clock, such as the expiry of a certificate.

use std::time::{Duration, SystemTime};

/// How often the wall clock is read again, since it can be set.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Waits until the wall clock has passed `at`, or for ever without it.
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
    async fn a_time_that_has_passed_is_reached_and_no_time_never_is() {
        reached(Some(SystemTime::UNIX_EPOCH)).await;
        let never = tokio::time::timeout(Duration::from_secs(3600), reached(None)).await;
        assert!(never.is_err());
    }
}
