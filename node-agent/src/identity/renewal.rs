//! Renewal of the host certificate while the agent runs.
//!
//! A master sends the renewed certificate on the multiplexer. Its session submits it here and never waits. One task
//! installs the certificates of a session in the order in which they came, also after that session has ended. The queues
//! of sessions take turns until they are empty. So however many certificates a session submits, it delays those of
//! another session by one for each that is installed. The queue of a session that has ended keeps its turn, so a master
//! that makes many sessions delays the others by one for each of them, and each costs it a handshake. Every certificate
//! is written to its file, on a thread for blocking work, before a handshake shows it.

use std::sync::Arc;

use futures_util::stream::{BoxStream, SelectAll, StreamExt, unfold};
use proto_net::log_throttle::LogThrottle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{current::CurrentIdentity, host::NodeIdentity};
use crate::metrics::{self, Metrics};

/// Certificates of one session that may wait to be installed.
const MAX_WAITING: usize = 16;
/// The number of log lines in ten seconds about certificates that are refused.
const LOG_BURST: u32 = 16;

/// Where sessions get their queues. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Renewals {
    sessions: mpsc::UnboundedSender<mpsc::Receiver<String>>,
    metrics: Arc<Metrics>,
}

/// Where one session submits renewed certificates.
pub struct SessionRenewals {
    waiting: mpsc::Sender<String>,
    metrics: Arc<Metrics>,
    ignored: LogThrottle,
}

impl Renewals {
    pub fn session(&self) -> SessionRenewals {
        let (waiting, submitted) = mpsc::channel(MAX_WAITING);
        // Without an installer the queue is closed, which `submit` says.
        let _ = self.sessions.send(submitted);
        SessionRenewals { waiting, metrics: self.metrics.clone(), ignored: LogThrottle::default() }
    }
}

impl SessionRenewals {
    pub fn submit(&self, certificate: String) {
        let Err(error) = self.waiting.try_send(certificate) else { return };
        count(&self.metrics, "ignored");
        if let Some(certificates) = self.ignored.count(1) {
            let reason = match error {
                mpsc::error::TrySendError::Full(_) => "too many of this session wait to be installed",
                mpsc::error::TrySendError::Closed(_) => "the agent is stopping",
            };
            tracing::warn!(certificates, reason, "ignored renewed host certificates");
        }
    }
}

fn count(metrics: &Metrics, result: &'static str) {
    metrics.renewals.get_or_create(&metrics::ResultLabel { result }).inc();
}

/// Installs what is submitted to [`Renewals`].
pub struct Installer {
    sessions: mpsc::UnboundedReceiver<mpsc::Receiver<String>>,
    identity: CurrentIdentity,
    metrics: Arc<Metrics>,
    refused: LogThrottle,
    /// Called with each new identity.
    on_renewal: Box<dyn Fn(&NodeIdentity) + Send + Sync>,
}

/// Makes the two ends of the queues of renewed certificates for `identity`.
pub fn queue(
    identity: CurrentIdentity,
    metrics: Arc<Metrics>,
    on_renewal: impl Fn(&NodeIdentity) + Send + Sync + 'static,
) -> (Renewals, Installer) {
    let (submit, sessions) = mpsc::unbounded_channel();
    let renewals = Renewals { sessions: submit, metrics: metrics.clone() };
    let refused = LogThrottle::with_burst(LOG_BURST);
    (renewals, Installer { sessions, identity, metrics, refused, on_renewal: Box::new(on_renewal) })
}

impl Installer {
    /// Runs until `stop` is cancelled and everything that was submitted before is installed.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut submitted: SelectAll<BoxStream<'static, String>> = SelectAll::new();
        loop {
            tokio::select! {
                biased;
                Some(session) = self.sessions.recv() => {
                    let next = |mut session: mpsc::Receiver<String>| async move {
                        session.recv().await.map(|certificate| (certificate, session))
                    };
                    submitted.push(unfold(session, next).boxed());
                }
                Some(certificate) = submitted.next() => self.install(certificate).await,
                () = stop.cancelled() => return,
            }
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
                if let Some(times) = self.refused.count(1) {
                    tracing::warn!(%error, times, "refused a renewed host certificate; the present one stays");
                }
                "refused"
            }
            Err(error) => {
                tracing::error!(%error, "installing a renewed host certificate failed");
                "refused"
            }
        };
        count(&self.metrics, result);
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
        let session = renewals.session();
        for end in [NOW + 4000, NOW + 6000, NOW + 5000, NOW + 7000] {
            session.submit(CertificateSpec { valid: (NOW, end), ..host }.text());
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
    async fn a_master_that_sends_many_keeps_nobody_elses_from_being_installed() {
        let (dir, host_ca, user_ca) = (TempDir::new(), new_key(), new_key());
        let mut identity = NodeIdentity::load_or_create(dir.path()).unwrap();
        let key = identity.host_key().public_key().clone();
        let host = CertificateSpec::host(&host_ca, &key);
        identity.install(&accepted(&host.text(), &host_ca, &user_ca)).unwrap();
        let identity = CurrentIdentity::new(identity);
        let metrics = Arc::<Metrics>::default();
        let (renewals, installer) = queue(identity.clone(), metrics.clone(), |_| {});
        let (turned, honest) = (renewals.session(), renewals.session());
        for _ in 0..10 * MAX_WAITING {
            turned.submit("no certificate".to_owned());
        }
        honest.submit(CertificateSpec { valid: (NOW, NOW + 4000), ..host }.text());
        let stop = CancellationToken::new();
        stop.cancel();
        installer.run(stop).await;
        assert_eq!(identity.get().not_after(), Some(now() + Duration::from_secs(4000)));
        let count = |result| metrics.renewals.get_or_create(&metrics::ResultLabel { result }).get();
        let most = u64::try_from(MAX_WAITING).unwrap();
        assert_eq!((count("ok"), count("refused"), count("ignored")), (1, most, 9 * most));
    }
}
