//! Brings the list of revoked certificates to the nodes.
//!
//! The list is read whenever the store has changed. If it is a new one, the user CA signs it. Each connected node-agent
//! gets it at once, and every other one as soon as it has a tunnel. A plain sshd gets it with `master-agent sshd-config`
//! only.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::sleep};

use super::{login::MasterLogin, revocation_exchange::Brought, tunnel::Tunnel};
use crate::identity::{
    Authorities,
    revocation::{Published, Revocations, sign, stored},
    store::Store,
};

/// How long until a list that could not be read is read again.
const READ_RETRY: Duration = Duration::from_secs(1);
/// How long until a node that did not answer is asked again.
const RETRY: Duration = Duration::from_secs(5);

/// The list of revoked certificates, kept as it is in the store.
pub struct RevocationList {
    store: Arc<dyn Store>,
    authorities: Arc<Authorities>,
    /// The login that needs a new certificate when its own is revoked.
    login: Arc<MasterLogin>,
    published: Revocations,
}

impl RevocationList {
    pub fn new(store: Arc<dyn Store>, authorities: Arc<Authorities>, login: Arc<MasterLogin>) -> Self {
        Self { store, authorities, login, published: watch::Sender::new(None) }
    }

    /// Follows the list in the store, without an end.
    pub async fn follow(self: Arc<Self>) {
        let mut changes = self.store.changes();
        let (mut seen, mut logged) = (None, String::new());
        loop {
            // A change that is committed from here on is read now or wakes this task again.
            changes.mark_unchanged();
            let list = self.clone();
            let read = tokio::task::spawn_blocking(move || list.read(seen)).await;
            match read.map_err(anyhow::Error::from).and_then(|result| result) {
                Ok(Some(published)) => {
                    seen = Some(published.version);
                    tracing::info!(version = published.version, "list of revoked certificates changed");
                    self.published.send_replace(Some(Arc::new(published)));
                    self.replace_revoked_login();
                    logged.clear();
                }
                Ok(None) => logged.clear(),
                Err(error) => {
                    let error = format!("{error:#}");
                    if logged != error {
                        tracing::error!(
                            error,
                            "can't read the list of revoked certificates; the last one stays"
                        );
                    }
                    logged = error;
                }
            }
            tokio::select! {
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = sleep(READ_RETRY), if !logged.is_empty() => {}
            }
        }
    }

    /// The stored list, unless it is the one that was seen last.
    fn read(&self, seen: Option<u64>) -> anyhow::Result<Option<Published>> {
        if self.store.revocations_version()? == seen {
            return Ok(None);
        }
        let list = stored(self.store.as_ref())?;
        let signed = sign(&self.authorities, &list)?.encode().into();
        Ok(Some(Published { version: list.version, list, signed }))
    }

    /// A master whose present certificate is revoked needs another one before it links again.
    fn replace_revoked_login(&self) {
        let revoked = || {
            let published = self.published.borrow().clone()?;
            published.list.revokes(self.login.current().certificate.as_ref()?)
        };
        if revoked().is_some() {
            self.login.renew();
            match revoked() {
                None => tracing::warn!("this master's own certificate was revoked; it has another one"),
                Some(by) => tracing::error!(%by, "this master is revoked: nodes refuse it"),
            }
        }
    }

    /// Brings the node of a tunnel each list that it does not have yet, until this is dropped.
    pub(super) async fn bring(&self, tunnel: &Tunnel) {
        if !tunnel.is_node_agent() {
            return;
        }
        let mut changes = self.published.subscribe();
        let ca = self.authorities.user_ca_pin();
        loop {
            let published = changes.borrow_and_update().clone();
            if let Some(published) = published {
                match tunnel.bring_revocations(&ca, published.version, published.signed.clone()).await {
                    Ok(brought) => {
                        log(tunnel, published.version, &brought);
                        if brought == Brought::Unknown {
                            return;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(node = %tunnel.node, version = published.version, %error, "can't bring a node the list of revoked certificates");
                        tokio::select! {
                            () = sleep(RETRY) => {}
                            _ = changes.changed() => {}
                        }
                        continue;
                    }
                }
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

fn log(tunnel: &Tunnel, version: u64, brought: &Brought) {
    let node = &tunnel.node;
    match brought {
        Brought::Taken => tracing::info!(%node, version, "the node has the list of revoked certificates"),
        Brought::Held => tracing::debug!(%node, version, "the node had the list of revoked certificates"),
        Brought::Newer(held) => {
            tracing::warn!(%node, version, held, "the node has a newer list of revoked certificates than this master");
        }
        Brought::Refused(error) => {
            tracing::error!(%node, version, error, "the node refused the list of revoked certificates");
        }
        Brought::Unknown => {
            tracing::warn!(%node, "the node's agent takes no list of revoked certificates: update it");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proto::revocation::krl::Entry;
    use proto_net::tasks::Tasks;
    use tokio::time::timeout;

    use super::*;
    use crate::identity::{revocation::change, sqlite::SqliteStore, store, tests::TempDir};

    const HOUR: Duration = Duration::from_secs(3600);

    fn revoke(store: &SqliteStore, authorities: &Authorities, id: &str) {
        let (ca, entry) = (authorities.user_ca(), Entry::KeyId(id.as_bytes().to_vec()));
        change(store, ca, SystemTime::now(), &|list| Ok(list.add(ca, entry.clone()).map(drop)?)).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_is_published_when_this_or_another_process_has_changed_it() {
        let (dir, tasks) = (TempDir::new(), Tasks::new());
        let authorities = Arc::new(Authorities::load_or_create(&dir.0).unwrap());
        let store = Arc::new(SqliteStore::open(&dir.0).unwrap());
        let login = Arc::new(MasterLogin::new(authorities.clone(), HOUR).unwrap());
        let list = Arc::new(RevocationList::new(store.clone(), authorities.clone(), login));
        let mut published = list.published.subscribe();
        tasks.spawn(list.follow());
        assert!(timeout(HOUR, published.changed()).await.is_err(), "there is no list yet");

        revoke(&store, &authorities, "alice");
        published.changed().await.unwrap();
        let first = published.borrow_and_update().as_ref().unwrap().version;
        store.remember_first_use(&"n1".parse().unwrap(), "SHA256:a").unwrap();
        assert!(timeout(HOUR, published.changed()).await.is_err(), "another part of the store has changed");

        tasks.spawn(store::follow(store.clone()));
        revoke(&SqliteStore::open(&dir.0).unwrap(), &authorities, "bob");
        timeout(Duration::from_secs(2), published.changed()).await.unwrap().unwrap();
        assert!(published.borrow_and_update().as_ref().unwrap().version > first);
        tasks.cancel();
    }
}
