//! Verification of host keys with what the inventory and the store say.

use std::{path::Path, sync::Arc, time::SystemTime};

use proto::Target;
use russh::keys::{PublicKey, PublicKeyOrCertificate};

use crate::{
    agent::Agent,
    host_trust::HostTrust,
    identity::{
        Expected, HostKeyError, Proof, VerifiedHost, fingerprint, known_hosts::KnownHosts, verify_host,
    },
    routing::inventory::InventoryNode,
    tunnel::{HostIdentity, Verify},
};

/// For a node that the master dials.
pub fn dialled(agent: &Arc<Agent>, node: &InventoryNode, address: &Target) -> Verify {
    let context = Arc::new((agent.clone(), node.clone(), address.clone()));
    Box::new(move |presented| {
        let context = context.clone();
        Box::pin(async move {
            let (agent, node, address) = &*context;
            verify_dialled(agent, node, address, presented).await
        })
    })
}

async fn verify_dialled(
    agent: &Agent,
    node: &InventoryNode,
    address: &Target,
    presented: &PublicKeyOrCertificate,
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
            first = agent.store.first_use_key(&node.name);
            Proof::FirstUse(first.as_deref())
        }
    };
    let expected = Expected::Dialled { name: &node.name, dialled: address, proof };
    let host = verify_host(presented, &expected, agent.authorities.host_ca(), SystemTime::now())?;
    if matches!(proof, Proof::FirstUse(None)) {
        remember_first_use(agent, &host).await?;
    }
    still_good(agent, &host).map(|()| HostIdentity::Verified(host))
}

/// A known_hosts file, read anew for each handshake. One that can't be read knows no host.
async fn known_hosts(file: &Path) -> KnownHosts {
    KnownHosts::load(file.to_owned()).await.unwrap_or_else(|error| {
        tracing::error!(file = %file.display(), %error, "can't read a known_hosts file");
        KnownHosts::default()
    })
}

/// Records the first key of a node. If another one was recorded meanwhile, that one stays, and the host is refused.
async fn remember_first_use(agent: &Agent, host: &VerifiedHost) -> Result<(), HostKeyError> {
    let (store, node, key) = (agent.store.clone(), host.node.clone(), fingerprint(&host.key));
    tracing::warn!(%node, key, "trusting a host key on first use");
    let recorded = tokio::task::spawn_blocking(move || store.remember_first_use(&node, &key)).await;
    let recorded = recorded.map_err(anyhow::Error::from).and_then(|recorded| recorded);
    recorded.map(drop).map_err(|error| HostKeyError::Store(error.to_string()))
}

/// For a node that calls home. A plain key that nothing is known of may join.
pub fn call_home(agent: &Arc<Agent>) -> Verify {
    let agent = agent.clone();
    Box::new(move |presented| {
        let verified = verify_call_home(&agent, presented);
        Box::pin(std::future::ready(verified))
    })
}

fn verify_call_home(agent: &Agent, presented: &PublicKeyOrCertificate) -> Result<HostIdentity, HostKeyError> {
    let inventory = agent.inventory();
    let expected = Expected::CallHome { pins: inventory.pins() };
    match verify_host(presented, &expected, agent.authorities.host_ca(), SystemTime::now()) {
        Ok(host) => {
            let Some(node) = inventory.node(&host.node) else {
                return Err(HostKeyError::UnknownNode { node: host.node });
            };
            // Otherwise whoever got a certificate with a token could pass by a node's pins.
            if host.not_after.is_some() && node.trust != HostTrust::HostCa {
                let fingerprint = fingerprint(&host.key);
                return Err(HostKeyError::OtherTrust { node: host.node, fingerprint });
            }
            still_good(agent, &host).map(|()| HostIdentity::Verified(host))
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

/// Whether a host that was verified once is still the node it was then: in the inventory, recognised in the
/// same way, and with the key that it joined with last. A known_hosts file is looked at in handshakes only.
pub fn still_good(agent: &Agent, host: &VerifiedHost) -> Result<(), HostKeyError> {
    let (inventory, fingerprint) = (agent.inventory(), fingerprint(&host.key));
    let Some(node) = inventory.node(&host.node) else {
        return Err(HostKeyError::UnknownNode { node: host.node.clone() });
    };
    match &node.trust {
        HostTrust::HostCa => still_current(agent, host),
        HostTrust::Pins(pins) if pins.contains(&fingerprint) => Ok(()),
        HostTrust::Pins(_) => Err(HostKeyError::NotPinned { node: host.node.clone(), fingerprint }),
        HostTrust::KnownHosts(_) => Ok(()),
        HostTrust::FirstUse => match agent.store.first_use_key(&host.node) {
            Some(first) if first == fingerprint => Ok(()),
            first => Err(HostKeyError::Changed {
                node: host.node.clone(),
                first: first.unwrap_or_else(|| "forgotten".to_owned()),
                fingerprint,
            }),
        },
    }
}

/// A certificate is good only with the key that the node joined with last, and that was not forgotten since.
fn still_current(agent: &Agent, host: &VerifiedHost) -> Result<(), HostKeyError> {
    match agent.store.joined_key(&host.node) {
        Some(current) if current == fingerprint(&host.key) => Ok(()),
        Some(current) => Err(HostKeyError::Superseded { node: host.node.clone(), current }),
        None => Err(HostKeyError::Forgotten { node: host.node.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proto::NodeName;
    use russh::keys::PrivateKey;

    use super::*;
    use crate::{
        config::Config,
        identity::{
            Authorities,
            sqlite::SqliteStore,
            tests::{TempDir, new_key},
        },
        routing::inventory::Inventory,
    };

    const HOUR: Duration = Duration::from_secs(3600);

    fn agent(dir: &TempDir, inventory: &str) -> Arc<Agent> {
        let config = Config::parse("", "config", Path::new("/")).unwrap();
        let inventory = Inventory::parse(inventory, "inventory", Path::new("/")).unwrap();
        let authorities = Authorities::load_or_create(&dir.0).unwrap();
        let store = Arc::new(SqliteStore::open(&dir.0).unwrap());
        Arc::new(Agent::new(config.for_agent(), inventory, store, authorities).unwrap())
    }

    fn certificate(agent: &Agent, name: &NodeName, key: &PublicKey) -> PublicKeyOrCertificate {
        agent.authorities.sign_host(key, name, &[], SystemTime::now(), HOUR).unwrap().into()
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
- {{name: known, host_keys: {{known_hosts: kh}}}}
- {{name: first, dial: \"f:22\", host_keys: {{first_use: true}}}}
"
        );
        let agent = agent(&dir, &inventory);
        let now = SystemTime::now();
        for (name, want) in [
            ("ca", Ok("ca".to_owned())),
            ("pinned", Err("other_trust")),
            ("known", Err("other_trust")),
            ("first", Err("other_trust")),
            ("unlisted", Err("unknown_node")),
        ] {
            let (name, key): (NodeName, _) = (name.parse().unwrap(), new_key());
            agent.store.remember_node(&name, key.public_key(), &[], now, now + HOUR).unwrap();
            let shown = certificate(&agent, &name, key.public_key());
            assert_eq!(outcome(call_home(&agent)(&shown).await), want, "{name}");
        }
        let plain = async |key: &PublicKey| outcome(call_home(&agent)(&key.clone().into()).await);
        assert_eq!(plain(pinned.public_key()).await, Ok("pinned".to_owned()));
        assert_eq!(plain(new_key().public_key()).await, Ok("may join".to_owned()));
    }

    #[tokio::test]
    async fn a_certificate_of_a_key_that_was_replaced_is_refused() {
        let dir = TempDir::new();
        let agent = agent(&dir, "nodes: [{name: n1, dial: \"a:22\"}]");
        let name: NodeName = "n1".parse().unwrap();
        let (old, new) = (new_key(), new_key());
        let now = SystemTime::now();
        for key in [&old, &new] {
            agent.store.remember_node(&name, key.public_key(), &[], now, now + HOUR).unwrap();
        }
        let node = agent.inventory().nodes()[0].clone();
        for verify in [dialled(&agent, &node, node.dial.as_ref().unwrap()), call_home(&agent)] {
            let by = |key: &PrivateKey| certificate(&agent, &name, key.public_key());
            assert_eq!(outcome(verify(&by(&old)).await), Err("superseded"));
            assert_eq!(outcome(verify(&by(&new)).await), Ok("n1".to_owned()));
        }
        agent.store.forget_node(&name).unwrap();
        for key in [&old, &new] {
            let shown = certificate(&agent, &name, key.public_key());
            assert_eq!(outcome(call_home(&agent)(&shown).await), Err("forgotten"));
        }
    }

    #[tokio::test]
    async fn the_first_key_is_kept() {
        let dir = TempDir::new();
        let agent = agent(&dir, "nodes: [{name: n1, dial: \"a:22\", host_keys: {first_use: true}}]");
        let node = agent.inventory().nodes()[0].clone();
        let verify = dialled(&agent, &node, node.dial.as_ref().unwrap());
        let (first, second) = (new_key(), new_key());
        for _ in 0..2 {
            assert_eq!(outcome(verify(&first.public_key().clone().into()).await), Ok("n1".to_owned()));
            assert_eq!(outcome(verify(&second.public_key().clone().into()).await), Err("key_changed"));
        }
    }
}
