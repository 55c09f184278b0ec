//! When a multiplexer sends a PING of its own accord: at the beginning, and later to keep a link alive
//! ([`proto::keep_alive`]) or to measure the round trip anew.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep};

/// The time after which the round trip is measured again. Keep-alives measure it more often, unless messages pass in both
/// directions.
const MEASURE_INTERVAL: Duration = Duration::from_secs(60);

/// When anything last passed a link that is kept alive. Times are microseconds since the beginning.
#[derive(Debug)]
pub(crate) struct Traffic {
    began: Instant,
    quiet: Duration,
    sent: AtomicU64,
    received: AtomicU64,
    /// When the last keep-alive became due.
    asked: AtomicU64,
}

/// Tells one multiplexer when its next PING is due.
#[derive(Debug)]
pub(crate) struct Pings {
    /// The traffic of a link that this side keeps alive.
    traffic: Option<Arc<Traffic>>,
    last: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

impl Traffic {
    /// The traffic of a link that may be quiet for so long in either direction.
    pub(crate) fn new(quiet: Duration) -> Self {
        Self {
            began: Instant::now(),
            quiet,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            asked: AtomicU64::new(0),
        }
    }

    pub(crate) fn on_sent(&self) {
        self.sent.store(self.now(), Ordering::Relaxed);
    }

    pub(crate) fn on_received(&self) {
        self.received.store(self.now(), Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// When a keep-alive is due if nothing passes before. There is one for each time in which the link has been quiet,
    /// whether it is answered or not.
    fn due(&self) -> Instant {
        let quiet_since = self.sent.load(Ordering::Relaxed).min(self.received.load(Ordering::Relaxed));
        let since = quiet_since.max(self.asked.load(Ordering::Relaxed));
        self.began + Duration::from_micros(since) + self.quiet
    }

    /// Whether a keep-alive is due. Of several multiplexers on the link, one is told so.
    fn take(&self) -> bool {
        let asked = self.asked.load(Ordering::Relaxed);
        self.due() <= Instant::now()
            && self.asked.compare_exchange(asked, self.now(), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

impl Pings {
    pub(crate) fn new(traffic: Option<Arc<Traffic>>) -> Self {
        Self { traffic, last: None, timer: Box::pin(sleep(Duration::ZERO)) }
    }

    /// Whether this side keeps the link alive.
    pub(crate) fn keep_alive(&self) -> bool {
        self.traffic.is_some()
    }

    /// Waits until the next PING is due. Cancel-safe.
    pub(crate) async fn due(&mut self) {
        loop {
            self.timer.as_mut().await;
            let now = Instant::now();
            let is_old = self.last.is_none_or(|last| last + MEASURE_INTERVAL <= now);
            let is_quiet = self.traffic.as_ref().is_some_and(|traffic| traffic.take());
            let is_due = is_old || is_quiet;
            let last = self.last.filter(|_| !is_due).unwrap_or(now);
            self.last = Some(last);
            let next = self.traffic.as_ref().map(|traffic| traffic.due());
            let next = next.map_or(last + MEASURE_INTERVAL, |next| next.min(last + MEASURE_INTERVAL));
            self.timer.as_mut().reset(next);
            if is_due {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, timeout};

    use super::*;

    const QUIET: Duration = Duration::from_secs(6);
    const SECOND: Duration = Duration::from_secs(1);

    /// Seconds until the next PING, in which nothing passes.
    async fn next(pings: &mut Pings) -> u64 {
        let began = Instant::now();
        pings.due().await;
        began.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn a_link_is_kept_alive_while_it_is_quiet_in_either_direction() {
        let traffic = Arc::new(Traffic::new(QUIET));
        let mut pings = Pings::new(Some(traffic.clone()));
        assert_eq!(next(&mut pings).await, 0);
        // Nobody answers.
        for _ in 0..3 {
            traffic.on_sent();
            assert_eq!(next(&mut pings).await, 6);
        }
        let directions: [fn(&Traffic); 2] = [Traffic::on_sent, Traffic::on_received];
        for only in directions {
            traffic.on_sent();
            traffic.on_received();
            let passing = async {
                for _ in 0..10 {
                    sleep(SECOND).await;
                    only(&traffic);
                }
            };
            tokio::select! {
                seconds = next(&mut pings) => assert_eq!(seconds, 6),
                () = passing => panic!("there was no PING"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_sent_while_messages_pass_in_both_directions_but_a_rare_measurement() {
        let traffic = Arc::new(Traffic::new(QUIET));
        let mut pings = Pings::new(Some(traffic.clone()));
        pings.due().await;
        let mut last = 0;
        for seconds in 1..=600 {
            advance(SECOND).await;
            traffic.on_sent();
            traffic.on_received();
            if timeout(Duration::ZERO, pings.due()).await.is_ok() {
                assert!(seconds - last >= 59, "{seconds} s");
                last = seconds;
            }
        }
        assert!(last > 500);
        // The keep-alives begin again as soon as nothing passes.
        let ping = next(&mut pings).await;
        assert!((5..=6).contains(&ping), "{ping}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_side_that_keeps_nothing_alive_measures_only() {
        let mut pings = Pings::new(None);
        assert_eq!([next(&mut pings).await, next(&mut pings).await, next(&mut pings).await], [0, 60, 60]);
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_multiplexers_on_a_link_one_keeps_it_alive() {
        let traffic = Arc::new(Traffic::new(QUIET));
        let mut both = [Pings::new(Some(traffic.clone())), Pings::new(Some(traffic))];
        for pings in &mut both {
            pings.due().await;
        }
        let [first, second] = &mut both;
        assert_eq!(next(first).await, 6);
        assert!(timeout(SECOND, second.due()).await.is_err());
    }
}
