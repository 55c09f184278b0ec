//! Renews the host certificates of nodes over their tunnels.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use prometheus_client::metrics::counter::Counter;
use proto_net::clock::Clock;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{trust::Trust, tunnel::Tunnel};
use crate::{
    identity::{Authorities, VerifiedHost},
    routing::inventory::Inventory,
};

/// The longest time to send a certificate. A stuck link must not stop the supervision of its tunnel.
const SEND_TIMEOUT: Duration = Duration::from_millis(1500);

/// Renews host certificates.
pub struct Renewal {
    pub nodes: watch::Receiver<Arc<Inventory>>,
    pub trust: Arc<Trust>,
    pub authorities: Arc<Authorities>,
    /// How long host certificates are valid.
    pub host_ttl: Duration,
    /// Counts renewed certificates.
    pub renewed: Counter,
    pub clock: Clock,
}

impl Renewal {
    /// Renews the certificate of the tunnel's node whenever that is due. Returns if the node has no certificate.
    pub(super) async fn run(&self, tunnel: &Tunnel) {
        let mut addresses = tunnel.host.addresses.clone();
        // A node without a certificate is recognised by its key and gets none.
        while let Some(expires) = tunnel.certificate_expires().filter(|_| tunnel.is_node_agent()) {
            until_due(self.clock, expires, self.host_ttl).await;
            self.renew(tunnel, &mut addresses).await;
        }
    }

    /// Signs and sends one certificate. `addresses` are those of the node's present certificate.
    async fn renew(&self, tunnel: &Tunnel, addresses: &mut Vec<IpAddr>) {
        let now = self.clock.now();
        let signed = match self.trust.still_good(&tunnel.host) {
            Ok(()) => self.sign(&tunnel.host, addresses.clone(), now).await,
            Err(why) => Err(why.into()),
        };
        let (certificate, certified) = match signed {
            Ok(signed) => signed,
            Err(error) => {
                tracing::error!(node = %tunnel.node, %error, "can't renew the host certificate");
                return;
            }
        };
        let sent = timeout(SEND_TIMEOUT, tunnel.send_certificate(&certificate)).await;
        if sent.unwrap_or(false) {
            *addresses = certified;
            self.renewed.inc();
            tunnel.set_certificate_expires(now + self.host_ttl);
            tracing::info!(node = %tunnel.node, "host certificate renewed");
        }
    }

    /// Signs the key of a host again. A node rejects a certificate that adds an address, so the new certificate keeps
    /// those of `addresses` that the inventory still lists, or all if it lists none. Returns the certificate in
    /// OpenSSH's format and its addresses.
    async fn sign(
        &self,
        host: &VerifiedHost,
        mut addresses: Vec<IpAddr>,
        now: SystemTime,
    ) -> anyhow::Result<(String, Vec<IpAddr>)> {
        let (authorities, ttl) = (self.authorities.clone(), self.host_ttl);
        let (node, key) = (host.node.clone(), host.key.clone());
        let listed = self.nodes.borrow().node(&node).map(|node| node.addresses.clone()).unwrap_or_default();
        if let Some(address) = listed.iter().find(|address| !addresses.contains(address)) {
            tracing::warn!(%node, %address, "the inventory lists an address that the node's certificate lacks, and a renewal can't add it: join the node again with `token create --node`");
        }
        addresses.retain(|address| listed.is_empty() || listed.contains(address));
        let signed = tokio::task::spawn_blocking(move || {
            let certificate = authorities.sign_host(&key, &node, &addresses, now, ttl)?;
            Ok((certificate.to_openssh()?, addresses))
        });
        signed.await?
    }
}

/// Waits until a third of the certificate's lifetime is left. Even if less is left, there is a pause.
async fn until_due(clock: Clock, expires: SystemTime, ttl: Duration) {
    sleep(pause(ttl)).await;
    clock.reached(Some(expires.checked_sub(ttl / 3).unwrap_or(SystemTime::UNIX_EPOCH))).await;
}

/// Returns the shortest time between two attempts.
fn pause(ttl: Duration) -> Duration {
    (ttl / 100).clamp(Duration::from_secs(1), Duration::from_secs(60))
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_certificate_is_renewed_when_a_third_of_its_life_is_left_and_late_ones_soon() {
        let (clock, hour) = (Clock::new_virtual(), Duration::from_secs(3600));
        for (left, ttl, want) in [
            (3 * hour, 3 * hour, 2 * hour),
            (2 * hour, 3 * hour, hour),
            (hour, 3 * hour, Duration::from_secs(60)),
            (Duration::ZERO, hour, Duration::from_secs(36)),
            (Duration::ZERO, Duration::from_secs(10), Duration::from_secs(1)),
        ] {
            let began = Instant::now();
            until_due(clock, clock.now() + left, ttl).await;
            assert_eq!(began.elapsed(), want, "{left:?} of {ttl:?}");
        }
        let began = Instant::now();
        until_due(clock, clock.now() - hour, hour).await;
        assert_eq!(began.elapsed(), Duration::from_secs(36), "it has expired");
    }
}
