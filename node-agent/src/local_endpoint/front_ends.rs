//! The front ends that masters offer through their tunnels, and the streams to them.

use std::{
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::Duration,
};

use proto::{DialError, Target, mux::FRONT_END};
use proto_net::{mux::Mux, stream::Stream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::config::LocalEndpointConfig;

/// The masters whose front end can be reached now, in the order in which they offered it.
pub struct FrontEnds {
    offers: watch::Sender<Vec<Offer>>,
    /// The turn of the next caller.
    next: AtomicUsize,
    ids: AtomicU64,
    wait: Duration,
    /// Cancelled when nobody waits for a front end any more.
    draining: CancellationToken,
}

#[derive(Clone)]
struct Offer {
    id: u64,
    mux: Mux,
}

impl FrontEnds {
    pub fn new(config: &LocalEndpointConfig, draining: CancellationToken) -> Self {
        Self {
            offers: watch::Sender::new(Vec::new()),
            next: AtomicUsize::new(0),
            ids: AtomicU64::new(0),
            wait: config.wait,
            draining,
        }
    }

    /// Offers a master's front end to callers until the master's certificate has `expired`. Dropping the future withdraws
    /// the offer.
    pub async fn offer(&self, mux: Mux, expired: impl Future<Output = ()>) {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        self.offers.send_modify(|offers| offers.push(Offer { id, mux }));
        let _withdraw_on_exit = WithdrawOnDrop { front_ends: self, id };
        tracing::info!("the master offers its front end");
        expired.await;
    }

    /// Opens a stream to one of the front ends in turn. Waits a short time for one to be offered.
    pub async fn open(&self, origin: &str, timeout: Duration) -> Result<Stream, DialError> {
        let target: Target = FRONT_END.parse().map_err(|_| DialError::BadTarget(FRONT_END.to_owned()))?;
        let deadline = tokio::time::Instant::now() + self.wait;
        let mut offers = self.offers.subscribe();
        loop {
            let mut failed = None;
            let usable = offers.borrow_and_update().clone();
            let first = self.next.fetch_add(1, Ordering::Relaxed) % usable.len().max(1);
            let in_turn = usable.iter().cycle().skip(first).take(usable.len()).map(|offer| &offer.mux);
            for mux in in_turn.filter(|mux| !mux.is_going_away()) {
                match mux.open(&target, origin, timeout).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) if error.retry_elsewhere() => failed = Some(error),
                    Err(error) => return Err(error),
                }
            }
            if let Some(error @ DialError::TooManyStreams(_)) = failed {
                return Err(error);
            }
            let changed = tokio::select! {
                changed = tokio::time::timeout_at(deadline, offers.changed()) => matches!(changed, Ok(Ok(()))),
                () = self.draining.cancelled() => false,
            };
            if !changed {
                return Err(failed.unwrap_or_else(|| self.none_offered()));
            }
        }
    }

    fn none_offered(&self) -> DialError {
        DialError::NoTunnel {
            node: "this".to_owned(),
            state: format!(
                "within {} no master offered its front end; a master does that where it has `front_end:` with `through_tunnels`",
                humantime::format_duration(self.wait)
            ),
        }
    }
}

struct WithdrawOnDrop<'a> {
    front_ends: &'a FrontEnds,
    id: u64,
}

impl Drop for WithdrawOnDrop<'_> {
    fn drop(&mut self) {
        self.front_ends.offers.send_modify(|offers| offers.retain(|offer| offer.id != self.id));
    }
}
