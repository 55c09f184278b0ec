//! Verification of host keys with what the inventory and the store say.

use std::{collections::HashMap, sync::Arc, time::SystemTime};

use proto::Target;
use russh::keys::PublicKey;

use crate::{
    agent::Agent,
    identity::{Expected, HostKeyError, VerifiedHost, fingerprint, verify_host},
    inventory::{HostTrust, InventoryNode},
    tunnel::{HostIdentity, Verify},
};

/// For a node that the master dials.
pub fn dialled(agent: &Arc<Agent>, node: &InventoryNode, address: &Target) -> Verify {
    let (agent, node, address) = (agent.clone(), node.clone(), address.clone());
    Box::new(move |presented| {
        let first = match node.trust {
            HostTrust::FirstUse => agent.store.first_use(&node.name).map_err(|e| HostKeyError::Store(e.to_string()))?,
            HostTrust::HostCa | HostTrust::Pins(_) | HostTrust::KnownHosts(_) => None,
        };
        let expected = Expected::Node {
            name: &node.name,
            dialled: &address,
            trust: &node.trust,
            first_use: first.as_deref(),
        };
        let host = verify_host(presented, &expected, agent.authorities.host_ca(), SystemTime::now())?;
        if node.trust == HostTrust::FirstUse && first.is_none() {
            tracing::warn!(node = %node.name, key = fingerprint(&host.key), "trusting a host key on first use");
            agent
                .store
                .remember_first_use(&node.name, &fingerprint(&host.key))
                .map_err(|e| HostKeyError::Store(e.to_string()))?;
        }
        still_current(&agent, host)
    })
}

/// For a node that calls home. A plain key that nothing is known of may join.
pub fn call_home(agent: &Arc<Agent>) -> Verify {
    let agent = agent.clone();
    Box::new(move |presented| {
        let inventory = agent.inventory();
        let mut pins = HashMap::new();
        for node in &inventory.nodes {
            if let HostTrust::Pins(list) = &node.trust {
                pins.extend(list.iter().map(|pin| (pin.clone(), node.name.clone())));
            }
        }
        let expected = Expected::CallHome { pins: &pins };
        match verify_host(presented, &expected, agent.authorities.host_ca(), SystemTime::now()) {
            Ok(host) => {
                let listed = inventory.nodes.iter().any(|node| node.name == host.node);
                if !listed {
                    return Err(HostKeyError::UnknownNode { node: host.node });
                }
                still_current(&agent, host)
            }
            Err(error) => match (&error, presented) {
                (HostKeyError::NoCertificate { .. }, russh::keys::PublicKeyOrCertificate::PublicKey { key, .. }) => {
                    let key = PublicKey::new(key.key_data().clone(), "");
                    Ok(HostIdentity::Unknown(Box::new(key), Arc::new(error)))
                }
                _ => Err(error),
            },
        }
    })
}

/// A certificate is good only with the key that the node joined with last.
fn still_current(agent: &Agent, host: VerifiedHost) -> Result<HostIdentity, HostKeyError> {
    let known = agent.store.node(&host.node).map_err(|e| HostKeyError::Store(e.to_string()))?;
    match known {
        Some(node) if host.not_after.is_some() && node.key_fingerprint != fingerprint(&host.key) => {
            Err(HostKeyError::Superseded { node: host.node, current: node.key_fingerprint })
        }
        Some(_) | None => Ok(HostIdentity::Verified(host)),
    }
}
