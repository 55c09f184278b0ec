//! The join exchange, by which a host becomes a node.
//!
//! A host that calls home with a key that belongs to no node is offered this exchange and nothing else. Before the host
//! sends its token, it has verified this master by the pin of the user CA. The master signs the host key whose
//! possession the session has proved.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use prometheus_client::metrics::{counter::Counter, family::Family};
use proto::{
    NodeName,
    join::{JoinRequest, JoinResponse, SUBSYSTEM},
};
use proto_net::{log_throttle::LogThrottle, tasks::Tasks};
use russh::{Channel, ChannelMsg, client::Msg, keys::PublicKey};
use tokio::sync::{Semaphore, watch};

use super::{refusals::Refusals, registry::Registry, session::handshake::Session};
use crate::{
    identity::{
        Authorities, HostKeyError,
        store::Store,
        token::{Admission, Applicant, Listed},
    },
    metrics::ReasonLabel,
    routing::inventory::Inventory,
};

/// The type of extended data for text that people read (RFC 4254, section 5.2).
const STDERR: u32 = 1;
/// The number of requests that are decided at once. They wait for each other anyway, and must leave threads for other work
/// that blocks.
pub const MAX_DECISIONS: usize = 4;

/// Lets hosts join.
pub struct Joining {
    pub nodes: watch::Receiver<Arc<Inventory>>,
    pub store: Arc<dyn Store>,
    pub authorities: Arc<Authorities>,
    /// How long host certificates are valid.
    pub host_ttl: Duration,
    pub registry: Arc<Registry>,
    pub refusals: Refusals,
    /// Counts attempts by result.
    pub attempts: Family<ReasonLabel, Counter>,
    /// Has one permit for each request that may be decided at once.
    pub decisions: Arc<Semaphore>,
    /// Bounds the log lines that strangers cause.
    pub log_throttle: Arc<LogThrottle>,
    /// The group of the tasks that close the tunnels of replaced keys.
    pub tasks: Tasks,
}

/// A host whose key belongs to no node.
#[derive(Clone, Copy)]
pub(super) struct UnknownHost<'a> {
    pub(super) key: &'a PublicKey,
    /// Why its key belongs to no node.
    pub(super) why: &'a HostKeyError,
    /// The only name under which it may join, if its call was admitted under one.
    pub(super) name: Option<&'a NodeName>,
    pub(super) peer: SocketAddr,
}

impl Joining {
    /// Offers the exchange and ends the session. Returns `false` if the host does not want to join. Such a host is told
    /// why its key belongs to no node.
    pub(super) async fn serve(self: &Arc<Self>, session: &Session, host: UnknownHost<'_>) -> bool {
        let joined = self.exchange(session, host).await.unwrap_or(false);
        let reason = if joined { "the join exchange has ended".to_owned() } else { host.why.for_peer() };
        session.close(&reason).await;
        joined
    }

    async fn exchange(
        self: &Arc<Self>,
        session: &Session,
        host: UnknownHost<'_>,
    ) -> Result<bool, russh::Error> {
        let mut channel = session.handle.channel_open_session().await?;
        // The messages are read from the channel itself. Otherwise, they would also wait for a stream that nobody opens.
        session.channels.forget(channel.id());
        channel.request_subsystem(true, SUBSYSTEM).await?;
        let request = match self.receive(&mut channel, host.peer).await {
            Received::Request(request) => request,
            Received::Nothing => return Ok(false),
            Received::Refused => {
                // The host can't read the reason with which the session is closed.
                if session.is_with_node_agent() {
                    channel.extended_data_bytes(STDERR, host.why.for_peer()).await?;
                }
                return Ok(false);
            }
        };
        let response = self.respond(request, host).await;
        channel.data_bytes(response.encode()).await?;
        channel.eof().await?;
        // The host closes the channel once it has read the answer.
        while channel.wait().await.is_some() {}
        Ok(true)
    }

    async fn respond(self: &Arc<Self>, mut request: JoinRequest, host: UnknownHost<'_>) -> JoinResponse {
        match (host.name, &request.node) {
            (Some(name), Some(asked)) if name != asked => {
                return self.refuse_name(name, asked, host.peer);
            }
            (Some(name), _) => request.node = Some(name.clone()),
            (None, _) => {}
        }
        let (joining, key, peer) = (self.clone(), host.key.clone(), host.peer);
        let permit = self.decisions.clone().acquire_owned().await;
        let decided = tokio::task::spawn_blocking(move || {
            // A host that gives up does not end what has begun.
            let _permit = permit;
            joining.decide(&request, &key, peer)
        });
        decided.await.unwrap_or_else(|_| JoinResponse::Refused {
            reason: "the master failed".to_owned(),
            hint: "Its log says why.".to_owned(),
        })
    }

    fn refuse_name(&self, admitted: &NodeName, asked: &NodeName, peer: SocketAddr) -> JoinResponse {
        let reason =
            format!("the call was admitted for node {admitted}, but the host asks to join as {asked}");
        self.refusals.count("other_node");
        self.refused(peer, &reason);
        JoinResponse::Refused { reason, hint: "The token was not used up.".to_owned() }
    }

    /// Decides about a request and signs the host's certificate. Blocks.
    fn decide(&self, request: &JoinRequest, key: &PublicKey, peer: SocketAddr) -> JoinResponse {
        let nodes = self.nodes.borrow().clone();
        let admission = Admission {
            authorities: &self.authorities,
            store: self.store.as_ref(),
            listed: nodes.as_ref(),
            host_ttl: self.host_ttl,
        };
        let applicant = Applicant { host_key: key, peer: peer.ip() };
        let response = admission.decide(request, applicant, SystemTime::now());
        match &response {
            JoinResponse::Accepted { node, .. } => {
                tracing::info!(%node, %peer, "host joined");
                self.close_tunnels_of_other_keys(node, key);
                self.count("ok");
            }
            JoinResponse::Refused { reason, .. } => {
                self.refused(peer, reason);
            }
        }
        response
    }

    fn refused(&self, peer: SocketAddr, reason: &str) {
        self.count("refused");
        if let Some(times) = self.log_throttle.count(1) {
            tracing::warn!(%peer, reason, times, "refused to let a host join");
        }
    }

    async fn receive(&self, channel: &mut Channel<Msg>, peer: SocketAddr) -> Received {
        let mut bytes = Vec::new();
        loop {
            match channel.wait().await {
                Some(ChannelMsg::Data { data }) => {
                    bytes.extend_from_slice(&data);
                    match JoinRequest::decode(&bytes) {
                        Ok(Some(request)) => return Received::Request(request),
                        Ok(None) => {}
                        Err(error) => {
                            if let Some(times) = self.log_throttle.count(1) {
                                tracing::warn!(%peer, %error, times, "refused a join request that can't be read");
                            }
                            return Received::Nothing;
                        }
                    }
                }
                Some(ChannelMsg::Failure) => return Received::Refused,
                Some(ChannelMsg::Eof | ChannelMsg::Close) | None => return Received::Nothing,
                Some(_) => {}
            }
        }
    }

    fn close_tunnels_of_other_keys(&self, node: &NodeName, key: &PublicKey) {
        for tunnel in self.registry.tunnels_of(node) {
            if tunnel.host.key.key_data() != key.key_data() {
                self.tasks.spawn(async move { tunnel.close("the node has joined with another key").await });
            }
        }
    }

    fn count(&self, reason: &'static str) {
        self.attempts.get_or_create(&ReasonLabel { reason }).inc();
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

/// The host's answer to the offer of the exchange.
enum Received {
    Request(JoinRequest),
    /// The host does not offer the subsystem.
    Refused,
    /// The host sent nothing that can be read.
    Nothing,
}
