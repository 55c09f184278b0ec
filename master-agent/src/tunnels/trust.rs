//! Verifies host keys with the help of the inventory and the store.

use std::{future::ready, path::Path, sync::Arc, time::SystemTime};

use proto::Target;
use russh::keys::{PublicKey, PublicKeyOrCertificate};
use tokio::{sync::watch, task::spawn_blocking};

use super::session::identity::{HostIdentity, Verify};
use crate::{
    host_trust::HostTrust,
    identity::{
        Authorities, Expected, HostKeyError, Proof, VerifiedHost, fingerprint, known_hosts::KnownHosts,
        store::Store, verify_host,
    },
    routing::inventory::{Inventory, InventoryNode},
};

/// Verifies host keys, and checks later whether a verified host is still its node.
pub struct Trust {
    nodes: watch::Receiver<Arc<Inventory>>,
    store: Arc<dyn Store>,
    authorities: Arc<Authorities>,
}

impl Trust {
    pub fn new(
        nodes: watch::Receiver<Arc<Inventory>>,
        store: Arc<dyn Store>,
        authorities: Arc<Authorities>,
    ) -> Self {
        Self { nodes, store, authorities }
    }

    /// Returns the verification for a node that the master dials.
    pub fn dialled(self: &Arc<Self>, node: &InventoryNode, address: &Target) -> Verify {
        let context = Arc::new((self.clone(), node.clone(), address.clone()));
        Box::new(move |presented| {
            let context = context.clone();
            Box::pin(async move {
                let (trust, node, address) = &*context;
                trust.verify_dialled(presented, node, address).await
            })
        })
    }

    /// Returns the verification for calls home. A host with a plain key that belongs to no node may join.
    pub fn call_home(self: &Arc<Self>) -> Verify {
        let trust = self.clone();
        Box::new(move |presented| Box::pin(ready(trust.verify_call_home(presented))))
    }

    /// Checks that a verified host is still its node: the node is in the inventory, its key passes the inventory's
    /// present kind of check, and it has not joined with another key since. A known_hosts file is read in handshakes
    /// only.
    pub fn still_good(&self, host: &VerifiedHost) -> Result<(), HostKeyError> {
        let (nodes, shown) = (self.nodes.borrow().clone(), fingerprint(&host.key));
        let Some(node) = nodes.node(&host.node) else {
            return Err(HostKeyError::UnknownNode { node: host.node.clone() });
        };
        match &node.trust {
            HostTrust::HostCa => self.is_current_key(host, &shown),
            HostTrust::Pins(pins) if pins.contains(&shown) => Ok(()),
            HostTrust::Pins(_) => {
                Err(HostKeyError::NotPinned { node: host.node.clone(), fingerprint: shown })
            }
            HostTrust::KnownHosts(_) => Ok(()),
            HostTrust::FirstUse => match self.store.first_use_key(&host.node) {
                Some(first) if first == shown => Ok(()),
                first => Err(HostKeyError::Changed {
                    node: host.node.clone(),
                    first: first.unwrap_or_else(|| "forgotten".to_owned()),
                    fingerprint: shown,
                }),
            },
        }
    }

    /// Returns a receiver that changes whenever the key of a node may have changed in the store.
    pub(super) fn key_changes(&self) -> watch::Receiver<()> {
        self.store.changes()
    }

    async fn verify_dialled(
        &self,
        presented: &PublicKeyOrCertificate,
        node: &InventoryNode,
        address: &Target,
    ) -> Result<HostIdentity, HostKeyError> {
        let (first, known);
        let proof = match &node.trust {
            HostTrust::HostCa => Proof::HostCa,
            HostTrust::Pins(pins) => Proof::Pins(pins),
            HostTrust::KnownHosts(file) => {
                known = known_hosts(file).await;
                Proof::KnownHosts { file, known: &known }
            }
            HostTrust::FirstUse => {
                first = self.store.first_use_key(&node.name);
                Proof::FirstUse(first.as_deref())
            }
        };
        let expected = Expected::Dialled { name: &node.name, dialled: address, proof };
        let host = verify_host(presented, &expected, self.authorities.host_ca(), SystemTime::now())?;
        if matches!(proof, Proof::FirstUse(None)) {
            self.remember_first_use(&host).await?;
        }
        self.still_good(&host).map(|()| HostIdentity::Verified(host))
    }

    /// Records the first key of a node. If another key has been recorded in the meantime, that one stays and
    /// `still_good` refuses the host.
    async fn remember_first_use(&self, host: &VerifiedHost) -> Result<(), HostKeyError> {
        let (store, node, key) = (self.store.clone(), host.node.clone(), fingerprint(&host.key));
        tracing::warn!(%node, key, "trusting a host key on first use");
        let recorded = spawn_blocking(move || store.remember_first_use(&node, &key)).await;
        let recorded = recorded.map_err(anyhow::Error::from).and_then(|recorded| recorded);
        recorded.map(drop).map_err(|error| HostKeyError::Store(error.to_string()))
    }

    fn verify_call_home(&self, presented: &PublicKeyOrCertificate) -> Result<HostIdentity, HostKeyError> {
        let nodes = self.nodes.borrow().clone();
        let expected = Expected::CallHome { pins: nodes.pins() };
        match verify_host(presented, &expected, self.authorities.host_ca(), SystemTime::now()) {
            Ok(host) => {
                let Some(node) = nodes.node(&host.node) else {
                    return Err(HostKeyError::UnknownNode { node: host.node });
                };
                // A key that is not pinned was verified by a certificate. If certificates counted for all nodes, one
                // that somebody got with a token would replace the key that is pinned for a node. The check does not
                // ask for `not_after`, which is `None` for a certificate that never expires, too.
                let shown = fingerprint(&host.key);
                if node.trust != HostTrust::HostCa && !nodes.pins().contains_key(&shown) {
                    return Err(HostKeyError::OtherTrust { node: host.node, fingerprint: shown });
                }
                self.still_good(&host).map(|()| HostIdentity::Verified(host))
            }
            Err(error) => match (&error, presented) {
                (HostKeyError::NoCertificate { .. }, PublicKeyOrCertificate::PublicKey { key, .. }) => {
                    let key = PublicKey::new(key.key_data().clone(), "");
                    Ok(HostIdentity::Unknown(Box::new(key), Arc::new(error)))
                }
                _ => Err(error),
            },
        }
    }

    /// Checks that a host has the key with which its node joined last, and that this key has not been forgotten.
    fn is_current_key(&self, host: &VerifiedHost, shown: &str) -> Result<(), HostKeyError> {
        match self.store.joined_key(&host.node) {
            Some(current) if current == shown => Ok(()),
            Some(current) => Err(HostKeyError::Superseded { node: host.node.clone(), current }),
            None => Err(HostKeyError::Forgotten { node: host.node.clone() }),
        }
    }
}

/// Reads a known_hosts file, which happens anew for each handshake. A file that can't be read counts as empty.
async fn known_hosts(file: &Path) -> KnownHosts {
    KnownHosts::load(file.to_owned()).await.unwrap_or_else(|error| {
        tracing::error!(file = %file.display(), %error, "can't read a known_hosts file");
        KnownHosts::default()
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proto::NodeName;
    use russh::keys::PrivateKey;

    use super::*;
    use crate::identity::{
        sqlite::SqliteStore,
        tests::{TempDir, new_key},
    };

    const HOUR: Duration = Duration::from_secs(3600);

    fn trust(dir: &TempDir, inventory: &str) -> Arc<Trust> {
        let inventory = Inventory::parse(inventory, "inventory", Path::new("/")).unwrap();
        let nodes = watch::Sender::new(Arc::new(inventory));
        let authorities = Authorities::load_or_create(&dir.0).unwrap();
        let store = SqliteStore::open(&dir.0).unwrap();
        Arc::new(Trust::new(nodes.subscribe(), Arc::new(store), Arc::new(authorities)))
    }

    fn node(trust: &Trust, name: &str) -> InventoryNode {
        trust.nodes.borrow().node(&name.parse().unwrap()).unwrap().clone()
    }

    fn certificate(trust: &Trust, name: &NodeName, key: &PublicKey) -> PublicKeyOrCertificate {
        trust.authorities.sign_host(key, name, &[], SystemTime::now(), HOUR).unwrap().into()
    }

    fn outcome(result: Result<HostIdentity, HostKeyError>) -> Result<String, &'static str> {
        match result {
            Ok(HostIdentity::Verified(host)) => Ok(host.node.to_string()),
            Ok(HostIdentity::Unknown(..)) => Ok("may join".to_owned()),
            Err(error) => Err(error.kind()),
        }
    }

    #[tokio::test]
    async fn a_certificate_is_no_way_around_how_a_node_is_recognised() {
        let (dir, pinned) = (TempDir::new(), new_key());
        let pin = fingerprint(pinned.public_key());
        let inventory = format!(
            "nodes:
- {{name: ca}}
- {{name: pinned, host_keys: {{pins: [\"{pin}\"]}}}}
- {{name: known, dial: \"k:22\", host_keys: {{known_hosts: kh}}}}
- {{name: first, dial: \"f:22\", host_keys: {{first_use: true}}}}
"
        );
        let trust = trust(&dir, &inventory);
        for (name, want) in [
            ("ca", Ok("ca".to_owned())),
            ("pinned", Err("other_trust")),
            ("known", Err("other_trust")),
            ("first", Err("other_trust")),
            ("unlisted", Err("unknown_node")),
        ] {
            let (name, key): (NodeName, _) = (name.parse().unwrap(), new_key());
            trust.store.remember_node(&name, key.public_key(), &[]).unwrap();
            let shown = certificate(&trust, &name, key.public_key());
            assert_eq!(outcome(trust.call_home()(&shown).await), want, "{name}");
        }
        let plain = async |key: &PublicKey| outcome(trust.call_home()(&key.clone().into()).await);
        assert_eq!(plain(pinned.public_key()).await, Ok("pinned".to_owned()));
        assert_eq!(plain(new_key().public_key()).await, Ok("may join".to_owned()));
    }

    #[tokio::test]
    async fn a_certificate_of_a_key_that_was_replaced_is_refused() {
        let dir = TempDir::new();
        let trust = trust(&dir, "nodes: [{name: n1, dial: \"a:22\"}]");
        let name: NodeName = "n1".parse().unwrap();
        let (old, new) = (new_key(), new_key());
        for key in [&old, &new] {
            trust.store.remember_node(&name, key.public_key(), &[]).unwrap();
        }
        let node = node(&trust, "n1");
        for verify in [trust.dialled(&node, node.dial.as_ref().unwrap()), trust.call_home()] {
            let by = |key: &PrivateKey| certificate(&trust, &name, key.public_key());
            assert_eq!(outcome(verify(&by(&old)).await), Err("superseded"));
            assert_eq!(outcome(verify(&by(&new)).await), Ok("n1".to_owned()));
        }
        trust.store.forget_node(&name).unwrap();
        for key in [&old, &new] {
            let shown = certificate(&trust, &name, key.public_key());
            assert_eq!(outcome(trust.call_home()(&shown).await), Err("forgotten"));
        }
    }

    #[tokio::test]
    async fn the_first_key_is_kept() {
        let dir = TempDir::new();
        let trust = trust(&dir, "nodes: [{name: n1, dial: \"a:22\", host_keys: {first_use: true}}]");
        let node = node(&trust, "n1");
        let verify = trust.dialled(&node, node.dial.as_ref().unwrap());
        let (first, second) = (new_key(), new_key());
        for _ in 0..2 {
            assert_eq!(outcome(verify(&first.public_key().clone().into()).await), Ok("n1".to_owned()));
            assert_eq!(outcome(verify(&second.public_key().clone().into()).await), Err("key_changed"));
        }
    }
}
