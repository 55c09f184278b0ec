//! Renewal of the host certificate while the agent runs.
//!
//! A master sends the renewed certificate on the multiplexer. Its session submits it here and never waits. One task
//! installs certificates in the order in which they came, also after the session that brought one has ended. Each is
//! written to its file, on a thread for blocking work, before a handshake shows it.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{current::CurrentIdentity, host::NodeIdentity};
use crate::metrics::{self, Metrics};

/// Certificates that may wait to be installed.
const MAX_WAITING: usize = 64;

/// Where sessions submit renewed certificates. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Renewals(mpsc::Sender<String>);

impl Renewals {
    pub fn submit(&self, certificate: String) {
        if self.0.try_send(certificate).is_err() {
            tracing::warn!(
                waiting = MAX_WAITING,
                "ignored a host certificate: too many wait to be installed"
            );
        }
    }
}

/// Installs what is submitted to [`Renewals`].
pub struct Installer {
    submitted: mpsc::Receiver<String>,
    identity: CurrentIdentity,
    metrics: Arc<Metrics>,
    /// Called with each new identity.
    on_renewal: Box<dyn Fn(&NodeIdentity) + Send + Sync>,
}

/// Makes the two ends of a queue of renewed certificates for `identity`.
pub fn queue(
    identity: CurrentIdentity,
    metrics: Arc<Metrics>,
    on_renewal: impl Fn(&NodeIdentity) + Send + Sync + 'static,
) -> (Renewals, Installer) {
    let (submit, submitted) = mpsc::channel(MAX_WAITING);
    (Renewals(submit), Installer { submitted, identity, metrics, on_renewal: Box::new(on_renewal) })
}

impl Installer {
    /// Runs until `stop` is cancelled and everything that was submitted before is installed.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let certificate = tokio::select! {
                biased;
                certificate = self.submitted.recv() => certificate,
                () = stop.cancelled() => return,
            };
            let Some(certificate) = certificate else { return };
            self.install(certificate).await;
        }
    }

    async fn install(&self, certificate: String) {
        let present = self.identity.get();
        let renewed = tokio::task::spawn_blocking(move || present.renew(&certificate)).await;
        let result = match renewed {
            Ok(Ok(renewed)) => {
                (self.on_renewal)(&renewed);
                self.identity.replace(renewed);
                tracing::info!("host certificate renewed");
                "ok"
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "refused a renewed host certificate; the present one stays");
                "refused"
            }
            Err(error) => {
                tracing::error!(%error, "installing a renewed host certificate failed");
                "refused"
            }
        };
        self.metrics.renewals.get_or_create(&metrics::ResultLabel { result }).inc();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Mutex, PoisonError},
        time::Duration,
    };

    use super::*;
    use crate::testing::{CertificateSpec, NOW, TempDir, accepted, new_key, now};

    #[tokio::test]
    async fn certificates_are_written_in_their_order_also_when_the_agent_stops() {
        let (dir, host_ca, user_ca) = (TempDir::new(), new_key(), new_key());
        let mut identity = NodeIdentity::load_or_create(dir.path()).unwrap();
        let key = identity.host_key().public_key().clone();
        let host = CertificateSpec::host(&host_ca, &key);
        identity.install(&accepted(&host.text(), &host_ca, &user_ca)).unwrap();
        let identity = CurrentIdentity::new(identity);
        let metrics = Arc::<Metrics>::default();
        let seen = Arc::<Mutex<Vec<_>>>::default();
        let on_renewal = {
            let (seen, directory) = (seen.clone(), dir.path().to_owned());
            move |renewed: &NodeIdentity| {
                let written = NodeIdentity::load_or_create(&directory).unwrap();
                assert_eq!(written.not_after(), renewed.not_after(), "it is written first");
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(renewed.not_after());
            }
        };
        let (renewals, installer) = queue(identity.clone(), metrics.clone(), on_renewal);
        // The third is older than the second, so it is refused if the order is kept.
        for end in [NOW + 4000, NOW + 6000, NOW + 5000, NOW + 7000] {
            renewals.submit(CertificateSpec { valid: (NOW, end), ..host }.text());
        }
        let stop = CancellationToken::new();
        stop.cancel();
        installer.run(stop).await;
        let end = |seconds| Some(now() + Duration::from_secs(seconds));
        assert_eq!(*seen.lock().unwrap(), [end(4000), end(6000), end(7000)]);
        assert_eq!(identity.get().not_after(), end(7000));
        let count = |result| metrics.renewals.get_or_create(&metrics::ResultLabel { result }).get();
        assert_eq!((count("ok"), count("refused")), (3, 1));
    }

    #[tokio::test]
    async fn what_is_waiting_is_bounded() {
        let dir = TempDir::new();
        let identity = CurrentIdentity::new(NodeIdentity::load_or_create(dir.path()).unwrap());
        let (renewals, installer) = queue(identity, Arc::default(), |_| {});
        for _ in 0..10 * MAX_WAITING {
            renewals.submit(String::new());
        }
        assert_eq!(installer.submitted.len(), MAX_WAITING);
    }
}
