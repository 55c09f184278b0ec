//! The SSH key and certificate with which the master logs in to nodes.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use proto_net::clock::Clock;
use tokio::time::sleep;

use crate::identity::{Authorities, UserIdentity};

/// How often the clock is read again, since it can be set while a certificate is in use.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Holds a valid user certificate. Each certificate has a new key, which never leaves memory.
pub struct MasterLogin {
    authorities: Arc<Authorities>,
    ttl: Duration,
    clock: Clock,
    current: RwLock<Arc<UserIdentity>>,
}

impl MasterLogin {
    pub fn new(authorities: Arc<Authorities>, ttl: Duration, clock: Clock) -> anyhow::Result<Self> {
        let current = authorities.issue_user(clock.now(), ttl)?;
        Ok(Self { authorities, ttl, clock, current: RwLock::new(Arc::new(current)) })
    }

    pub fn current(&self) -> Arc<UserIdentity> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Issues a new certificate whenever a third of the present one's lifetime has passed. Never returns.
    pub async fn keep_renewed(self: Arc<Self>) {
        let longest = CHECK_INTERVAL.min(self.ttl / 3);
        loop {
            let left = self.due_in();
            if left.is_zero() {
                self.renew();
                sleep(longest).await;
            } else {
                sleep(left.min(longest)).await;
            }
        }
    }

    /// How long until the next certificate is due, as the clock stands now.
    fn due_in(&self) -> Duration {
        let Some(expires) = self.current().expires() else { return self.ttl / 3 };
        let left = expires.duration_since(self.clock.now()).unwrap_or_default();
        // No certificate outlasts its lifetime: the clock was set back, perhaps to before this one is valid.
        if left > self.ttl { Duration::ZERO } else { left.saturating_sub(self.ttl * 2 / 3) }
    }

    /// Issues a new certificate, which authenticates all later links.
    pub fn renew(&self) {
        match self.authorities.issue_user(self.clock.now(), self.ttl) {
            Ok(user) => *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(user),
            Err(error) => {
                tracing::error!(%error, "can't issue a new user certificate; the present one stays in use");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{ops::RangeInclusive, time::SystemTime};

    use proto_net::tasks::Tasks;
    use tokio::time::Instant;

    use super::*;
    use crate::identity::tests::TempDir;

    const TTL: Duration = Duration::from_secs(24 * 3600);

    /// Puts a certificate that was issued at another time in the place of the present one, and returns how long it stays.
    async fn lasts(login: &MasterLogin, issued: SystemTime) -> Duration {
        let former = Arc::new(login.authorities.issue_user(issued, TTL).unwrap());
        *login.current.write().unwrap() = former.clone();
        let began = Instant::now();
        while Arc::ptr_eq(&login.current(), &former) {
            sleep(Duration::from_secs(1)).await;
        }
        began.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_certificate_is_renewed_after_a_third_of_its_life_and_soon_after_the_clock_was_set() {
        let (dir, tasks) = (TempDir::new(), Tasks::new());
        let authorities = Arc::new(Authorities::load_or_create(&dir.0).unwrap());
        let clock = Clock::new_virtual();
        let login = Arc::new(MasterLogin::new(authorities, TTL, clock).unwrap());
        tasks.spawn(login.clone().keep_renewed());
        sleep(Duration::from_secs(1)).await;
        let soon = Duration::ZERO..=CHECK_INTERVAL + Duration::from_secs(1);
        let minute = Duration::from_secs(60);
        type Row = (&'static str, fn(SystemTime) -> SystemTime, RangeInclusive<Duration>);
        let table: [Row; 5] = [
            ("not at all", |now| now, TTL / 3 - minute..=TTL / 3 + minute),
            ("forward by half of its life", |now| now - TTL / 2, soon.clone()),
            ("forward by more than its life", |now| now - 2 * TTL, soon.clone()),
            ("back by an hour", |now| now + TTL / 24, soon.clone()),
            ("back by years", |now| now + 1000 * TTL, soon),
        ];
        for (set, issued, expected) in table {
            let lasted = lasts(&login, issued(clock.now())).await;
            assert!(expected.contains(&lasted), "{set}: {lasted:?}");
        }
        let left = login.current().expires().unwrap().duration_since(clock.now()).unwrap();
        assert!(left <= TTL && left > TTL - minute, "{left:?}");
        tasks.cancel();
    }

    #[tokio::test(start_paused = true)]
    async fn a_short_life_is_renewed_in_thirds() {
        let (dir, tasks) = (TempDir::new(), Tasks::new());
        let authorities = Arc::new(Authorities::load_or_create(&dir.0).unwrap());
        let ttl = Duration::from_secs(6);
        let login = Arc::new(MasterLogin::new(authorities, ttl, Clock::new_virtual()).unwrap());
        tasks.spawn(login.clone().keep_renewed());
        for _ in 0..5 {
            let (former, began) = (login.current(), Instant::now());
            while Arc::ptr_eq(&login.current(), &former) {
                sleep(Duration::from_millis(100)).await;
            }
            assert!(began.elapsed() <= ttl / 3 + Duration::from_millis(200), "{:?}", began.elapsed());
        }
        tasks.cancel();
    }
}
