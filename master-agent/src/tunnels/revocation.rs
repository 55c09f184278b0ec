//! How the running agent brings the list of revoked certificates to its nodes.
//!
//! The list is looked at once a second in the store, signed by the user CA when it has changed, and brought to each
//! node-agent at once and when a tunnel to it begins. A plain sshd gets it with `master-agent sshd-config` only.

use std::{sync::Arc, time::Duration};

use crate::{
    agent::Agent,
    identity::revocation::{Published, sign, stored},
    tunnel::{Brought, Tunnel},
};

/// How often the store is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How long until a node is asked again that did not take a list.
const RETRY: Duration = Duration::from_secs(5);

/// Follows the list in the store, for ever.
pub async fn follow(agent: Arc<Agent>) {
    let mut interval = tokio::time::interval(LOOK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut seen, mut told) = (None, String::new());
    loop {
        interval.tick().await;
        let looks = agent.clone();
        let looked = tokio::task::spawn_blocking(move || look(&looks, seen)).await;
        let result = looked.map_err(anyhow::Error::from).and_then(|result| result);
        match result {
            Ok(Some(published)) => {
                seen = Some(published.version);
                tracing::info!(version = published.version, "list of revoked certificates changed");
                agent.revocations.send_replace(Some(Arc::new(published)));
                still_good(&agent);
                told.clear();
            }
            Ok(None) => told.clear(),
            Err(error) => {
                let error = format!("{error:#}");
                if told != error {
                    tracing::error!(error, "can't read the list of revoked certificates; the last one stays");
                }
                told = error;
            }
        }
    }
}

/// The stored list, unless it is the one that was seen last.
fn look(agent: &Agent, seen: Option<u64>) -> anyhow::Result<Option<Published>> {
    if agent.store.revocations_version()? == seen {
        return Ok(None);
    }
    let list = stored(agent.store.as_ref())?;
    let signed = sign(&agent.authorities, &list)?.encode().into();
    Ok(Some(Published { version: list.version, list, signed }))
}

/// A master whose present certificate is revoked needs another one before it links again.
fn still_good(agent: &Agent) {
    let revoked = || {
        let published = agent.revocations.borrow().clone()?;
        published.list.revokes(agent.user().certificate.as_ref()?)
    };
    if revoked().is_some() {
        agent.issue_user();
        match revoked() {
            None => tracing::warn!("this master's own certificate was revoked; it has another one"),
            Some(by) => tracing::error!(%by, "this master is revoked: nodes refuse it"),
        }
    }
}

/// Brings a node what it does not have yet, until the tunnel ends.
pub async fn serve(agent: Arc<Agent>, tunnel: Arc<Tunnel>) {
    if !tunnel.is_node_agent() {
        return;
    }
    let mut changes = agent.revocations.subscribe();
    let ca = agent.authorities.user_ca_pin();
    loop {
        let published = changes.borrow_and_update().clone();
        if let Some(published) = published {
            let (node, version) = (&tunnel.node, published.version);
            match tunnel.bring_revocations(&ca, version, published.signed.clone()).await {
                Ok(Brought::Taken) => {
                    tracing::info!(%node, version, "the node has the list of revoked certificates")
                }
                Ok(Brought::Held) => {
                    tracing::debug!(%node, version, "the node had the list of revoked certificates")
                }
                Ok(Brought::Newer(held)) => {
                    tracing::warn!(%node, version, held, "the node has a newer list of revoked certificates than this master");
                }
                Ok(Brought::Refused(error)) => {
                    tracing::error!(%node, version, error, "the node refused the list of revoked certificates");
                }
                Ok(Brought::Unknown) => {
                    tracing::warn!(%node, "the node's agent takes no list of revoked certificates: update it");
                    return;
                }
                Err(error) => {
                    tracing::warn!(%node, version, %error, "can't bring a node the list of revoked certificates");
                    tokio::select! {
                        () = tokio::time::sleep(RETRY) => {}
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
