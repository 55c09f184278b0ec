//! Joining, and the certificates of nodes.
//!
//! A host that calls home with a key that is nobody's is offered the join exchange and nothing else. It has
//! verified this master by the pin of the user CA before it sends its token; what is signed is the host key
//! that the very session has proved.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use proto::{
    NodeName,
    join::{JoinRequest, JoinResponse, SUBSYSTEM},
};
use russh::{ChannelMsg, keys::PublicKey};

use crate::{
    agent::Agent,
    identity::{
        HostKeyError, VerifiedHost,
        token::{Admission, Applicant, Listed},
    },
    metrics::Reason,
    routing::inventory::Inventory,
    tunnel::Session,
};

/// The type of extended data that is for people to read (RFC 4254 §5.2).
const STDERR: u32 = 1;

/// Offers the join exchange on a session; `false` when the other side does not want to join, which is told why it is
/// no node. With a `name` it was admitted under that name and joins under no other.
pub async fn serve(
    agent: &Arc<Agent>,
    session: Session,
    key: &PublicKey,
    why: &HostKeyError,
    name: Option<&NodeName>,
    peer: SocketAddr,
) -> bool {
    let joined = exchange(agent, &session, key, why, name, peer).await.unwrap_or(false);
    let reason = if joined { "the join exchange has ended".to_owned() } else { why.for_peer() };
    session.close(&reason).await;
    joined
}

async fn exchange(
    agent: &Arc<Agent>,
    session: &Session,
    key: &PublicKey,
    why: &HostKeyError,
    name: Option<&NodeName>,
    peer: SocketAddr,
) -> Result<bool, russh::Error> {
    let mut channel = session.handle.channel_open_session().await?;
    channel.request_subsystem(true, SUBSYSTEM).await?;
    let mut bytes = Vec::new();
    let response = loop {
        match channel.wait().await {
            Some(ChannelMsg::Data { data }) => {
                bytes.extend_from_slice(&data);
                match JoinRequest::decode(&bytes) {
                    Ok(Some(mut request)) => match (name, &request.node) {
                        (Some(name), Some(asked)) if name != asked => {
                            break other_name(agent, name, asked, peer);
                        }
                        (Some(name), _) => {
                            request.node = Some(name.clone());
                            break decide(agent, request, key, peer).await;
                        }
                        (None, _) => break decide(agent, request, key, peer).await,
                    },
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%peer, %error, "refused a join request that can't be read");
                        return Ok(false);
                    }
                }
            }
            Some(ChannelMsg::Failure) => {
                // It does not get to see what the session is closed with.
                if session.is_with_node_agent() {
                    channel.extended_data_bytes(STDERR, why.for_peer()).await?;
                }
                return Ok(false);
            }
            Some(ChannelMsg::Eof | ChannelMsg::Close) | None => return Ok(false),
            Some(_) => {}
        }
    };
    channel.data_bytes(response.encode()).await?;
    channel.eof().await?;
    // The host leaves when it has read the answer.
    while channel.wait().await.is_some() {}
    Ok(true)
}

fn other_name(agent: &Agent, admitted: &NodeName, asked: &NodeName, peer: SocketAddr) -> JoinResponse {
    let reason = format!("what admitted this call is for node {admitted}, and it asks to join as {asked}");
    tracing::warn!(%peer, reason, "refused to let a host join");
    agent.count_refused("other_node");
    agent.metrics.joins.get_or_create(&Reason { reason: "refused" }).inc();
    JoinResponse::Refused { reason, hint: "Nothing was used up.".to_owned() }
}

async fn decide(agent: &Arc<Agent>, request: JoinRequest, key: &PublicKey, peer: SocketAddr) -> JoinResponse {
    let (agent, key) = (agent.clone(), key.clone());
    let decided = tokio::task::spawn_blocking(move || {
        let inventory = agent.inventory();
        let admission = Admission {
            authorities: &agent.authorities,
            store: agent.store.as_ref(),
            listed: inventory.as_ref(),
            host_ttl: agent.config.certificates.host_ttl,
        };
        let applicant = Applicant { host_key: &key, peer: peer.ip() };
        let response = admission.decide(&request, applicant, SystemTime::now());
        let result = match &response {
            JoinResponse::Accepted { node, .. } => {
                tracing::info!(%node, %peer, "joined");
                end_former(&agent, node, &key);
                "ok"
            }
            JoinResponse::Refused { reason, .. } => {
                tracing::warn!(%peer, reason, "refused to let a host join");
                "refused"
            }
        };
        agent.metrics.joins.get_or_create(&Reason { reason: result }).inc();
        response
    });
    decided.await.unwrap_or_else(|_| JoinResponse::Refused {
        reason: "the master failed".to_owned(),
        hint: "Its log says why.".to_owned(),
    })
}

/// Ends tunnels of a key that the node no longer has.
fn end_former(agent: &Arc<Agent>, node: &NodeName, key: &PublicKey) {
    for tunnel in agent.registry.tunnels_of(node) {
        if tunnel.host.key.key_data() != key.key_data() {
            agent.sessions.spawn(async move { tunnel.close("the node has joined with another key").await });
        }
    }
}

impl Listed for Inventory {
    fn addresses(&self, node: &NodeName) -> Option<Vec<IpAddr>> {
        self.node(node).map(|node| node.addresses.clone())
    }

    fn owner(&self, address: &IpAddr) -> Option<NodeName> {
        self.node_with_address(address).map(|node| node.name.clone())
    }
}

/// Signs a host key again, for a node that has proved to hold it. Of the addresses that its certificate has, the new one
/// keeps those that the inventory still lists, or all where it lists none: the node takes no certificate that adds any.
/// Gives the certificate in text form, and its addresses.
pub async fn renew(
    agent: &Arc<Agent>,
    host: &VerifiedHost,
    mut addresses: Vec<IpAddr>,
    now: SystemTime,
    ttl: Duration,
) -> anyhow::Result<(String, Vec<IpAddr>)> {
    let (agent, node, key) = (agent.clone(), host.node.clone(), host.key.clone());
    let signed = tokio::task::spawn_blocking(move || {
        let listed = agent.inventory().addresses(&node).unwrap_or_default();
        if let Some(address) = listed.iter().find(|address| !addresses.contains(address)) {
            tracing::warn!(%node, %address, "the inventory lists an address that the node's certificate lacks, and a renewal can't add it: join the node again with `token create --node`");
        }
        addresses.retain(|address| listed.is_empty() || listed.contains(address));
        let certificate = agent.authorities.sign_host(&key, &node, &addresses, now, ttl)?;
        Ok((certificate.to_openssh()?, addresses))
    });
    signed.await?
}
