//! Delivers the list of revoked certificates to the nodes.
//!
//! The list is read whenever the store changes. If its version is new, the user CA signs it. Connected node-agents get
//! it at once, and the others as soon as they have a tunnel. A plain sshd gets the list only with `master-agent
//! sshd-config`.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::sleep};

use super::{login::MasterLogin, revocation_exchange::Delivery, tunnel::Tunnel};
use crate::identity::{
    Authorities,
    revocation::{Published, Revocations, sign, stored},
    store::Store,
};

/// The pause before a list that could not be read is read again.
const READ_RETRY: Duration = Duration::from_secs(1);
/// The pause before a failed delivery is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Follows the list of revoked certificates in the store, and delivers it.
pub struct RevocationList {
    store: Arc<dyn Store>,
    authorities: Arc<Authorities>,
    /// The login that gets a new certificate when its present one is revoked.
    login: Arc<MasterLogin>,
    published: Revocations,
}

impl RevocationList {
    pub fn new(store: Arc<dyn Store>, authorities: Arc<Authorities>, login: Arc<MasterLogin>) -> Self {
        Self { store, authorities, login, published: watch::Sender::new(None) }
    }

    /// Follows the list in the store. Never returns while the store lasts.
    pub async fn follow(self: Arc<Self>) {
        let mut changes = self.store.changes();
        let (mut seen, mut logged) = (None, String::new());
        loop {
            // A change that is committed after this line is either read now or wakes this task again.
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

    /// Returns the stored list, or `None` if it has the version that was seen last. Blocks.
    fn read(&self, seen: Option<u64>) -> anyhow::Result<Option<Published>> {
        if self.store.revocations_version()? == seen {
            return Ok(None);
        }
        let list = stored(self.store.as_ref())?;
        let signed = sign(&self.authorities, &list)?.encode().into();
        Ok(Some(Published { version: list.version, list, signed }))
    }

    /// Renews the master's own certificate if it is revoked, since later links need a valid one.
    fn replace_revoked_login(&self) {
        let revoked = || {
            let published = self.published.borrow().clone()?;
            published.list.revokes(self.login.current().certificate.as_ref()?)
        };
        if revoked().is_some() {
            self.login.renew();
            match revoked() {
                None => tracing::warn!("this master's certificate was revoked and has been replaced"),
                Some(by) => tracing::error!(%by, "this master is revoked: nodes refuse it"),
            }
        }
    }

    /// Delivers each list that the node of the tunnel does not have yet. Returns if the node does not support lists.
    pub(super) async fn deliver(&self, tunnel: &Tunnel) {
        if !tunnel.is_node_agent() {
            return;
        }
        let mut changes = self.published.subscribe();
        let ca = self.authorities.user_ca_pin();
        loop {
            let published = changes.borrow_and_update().clone();
            if let Some(published) = published {
                match tunnel.deliver_revocations(&ca, published.version, published.signed.clone()).await {
                    Ok(delivery) => {
                        log(tunnel, published.version, &delivery);
                        if delivery == Delivery::Unsupported {
                            return;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(node = %tunnel.node, version = published.version, %error, "can't deliver the list of revoked certificates");
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

fn log(tunnel: &Tunnel, version: u64, delivery: &Delivery) {
    let node = &tunnel.node;
    match delivery {
        Delivery::Accepted => tracing::info!(%node, version, "list of revoked certificates delivered"),
        Delivery::Current => {
            tracing::debug!(%node, version, "the node already has the list of revoked certificates");
        }
        Delivery::Newer(held) => {
            tracing::warn!(%node, version, held, "the node has a newer list of revoked certificates than this master");
        }
        Delivery::Refused(error) => {
            tracing::error!(%node, version, error, "the node refused the list of revoked certificates");
        }
        Delivery::Unsupported => {
            tracing::warn!(%node, "the node-agent does not support lists of revoked certificates: update it");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proto::revocation::krl::Entry;
    use proto_net::{clock::Clock, tasks::Tasks};
    use tokio::time::timeout;

    use super::*;
    use crate::identity::{
        revocation::change,
        sqlite::SqliteStore,
        tests::{TempDir, new_key},
    };

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
        let login = Arc::new(MasterLogin::new(authorities.clone(), HOUR, Clock::System).unwrap());
        let list = Arc::new(RevocationList::new(store.clone(), authorities.clone(), login));
        let mut published = list.published.subscribe();
        tasks.spawn(list.follow());
        assert!(timeout(HOUR, published.changed()).await.is_err(), "there is no list yet");

        revoke(&store, &authorities, "alice");
        published.changed().await.unwrap();
        let first = published.borrow_and_update().as_ref().unwrap().version;
        let node = "n1".parse().unwrap();
        for key in [new_key(), new_key()] {
            store.remember_node(&node, key.public_key(), &[]).unwrap();
        }
        assert!(timeout(HOUR, published.changed()).await.is_err(), "another part of the store has changed");

        revoke(&SqliteStore::open(&dir.0).unwrap(), &authorities, "bob");
        assert!(store.refresh().unwrap());
        published.changed().await.unwrap();
        assert!(published.borrow_and_update().as_ref().unwrap().version > first);
        tasks.cancel();
    }
}
