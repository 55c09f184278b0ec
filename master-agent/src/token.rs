//! Join tokens, and the decision whether a host may join.

use std::{
    net::IpAddr,
    time::{Duration, SystemTime},
};

use anyhow::bail;
use proto::{
    NodeName,
    join::{JoinRequest, JoinResponse, JoinToken},
};
use russh::keys::PublicKey;

use crate::{
    identity::Authorities,
    store::{Store, TokenError, TokenRecord},
};

/// The most addresses a host may ask for.
const MAX_ADDRESSES: usize = 32;

/// Makes a token and stores its hash.
pub fn create(store: &dyn Store, node: Option<NodeName>, ttl: Duration, now: SystemTime) -> anyhow::Result<JoinToken> {
    let token = JoinToken::from_random(rand::random(), rand::random());
    store.add_token(&token.id, &token.hash(), node.as_ref(), now + ttl)?;
    Ok(token)
}

/// Tokens that have not expired.
pub fn list(store: &dyn Store, now: SystemTime) -> anyhow::Result<Vec<TokenRecord>> {
    store.tokens(now)
}

pub fn revoke(store: &dyn Store, id: &str) -> anyhow::Result<()> {
    if !store.remove_token(id)? {
        bail!("there is no token {id:?}: `master-agent token list` shows the ids");
    }
    Ok(())
}

/// What the inventory says, as far as joining needs it.
pub trait Listed {
    /// The addresses listed for a node; `None` when the node is not listed.
    fn addresses(&self, node: &NodeName) -> Option<Vec<IpAddr>>;

    /// The node that an address is listed for.
    fn owner(&self, address: &IpAddr) -> Option<NodeName>;
}

/// Decides about a request. `host_key` is the key that the session has proved; addresses come from the
/// inventory where it lists some, else from the request, but never another node's.
pub fn handle_join(
    request: &JoinRequest,
    host_key: &PublicKey,
    authorities: &Authorities,
    store: &dyn Store,
    listed: &dyn Listed,
    now: SystemTime,
    host_ttl: Duration,
) -> JoinResponse {
    match decide(request, host_key, authorities, store, listed, now, host_ttl) {
        Ok(accepted) => accepted,
        Err((reason, hint)) => JoinResponse::Refused { reason, hint },
    }
}

type Refusal = (String, String);

fn decide(
    request: &JoinRequest,
    host_key: &PublicKey,
    authorities: &Authorities,
    store: &dyn Store,
    listed: &dyn Listed,
    now: SystemTime,
    host_ttl: Duration,
) -> Result<JoinResponse, Refusal> {
    let internal = |e: anyhow::Error| {
        tracing::error!(error = %e, "joining failed");
        ("the master failed".to_owned(), "Its log says why.".to_owned())
    };
    if request.version != 1 {
        return Err(("this node-agent speaks another version of joining".to_owned(), "Install the same version on both sides.".to_owned()));
    }
    let token = JoinToken::parse(&request.token).map_err(|e| (e.to_string(), "Nothing was used up.".to_owned()))?;
    // What can be refused without using the token up comes first.
    if request.addresses.len() > MAX_ADDRESSES {
        return Err((format!("more than {MAX_ADDRESSES} addresses"), "Give the node's own addresses with --address.".to_owned()));
    }
    let node = store.redeem(&token.id, &token.hash(), request.node.as_ref(), now).map_err(|e| {
        let hint = match &e {
            TokenError::Store(_) => "The master's log says more.",
            TokenError::Unknown
            | TokenError::Expired
            | TokenError::Used
            | TokenError::WrongNode { .. }
            | TokenError::NoName
            | TokenError::Joined(_) => "Tokens are made on the master.",
        };
        (e.to_string(), hint.to_owned())
    })?;
    let addresses = match listed.addresses(&node) {
        Some(addresses) if !addresses.is_empty() => addresses,
        Some(_) | None => unclaimed(&request.addresses, &node, store, listed).map_err(internal)?,
    };
    let accept = || -> anyhow::Result<JoinResponse> {
        let certificate = authorities.sign_host(host_key, &node, &addresses, now, host_ttl)?;
        store.remember_node(&node, host_key, &addresses, now, now + host_ttl)?;
        Ok(JoinResponse::Accepted {
            node: node.clone(),
            host_certificate: certificate.to_openssh()?,
            host_ca: authorities.host_ca().to_openssh()?,
            user_ca: authorities.user_ca().to_openssh()?,
        })
    };
    accept().map_err(internal)
}

fn offerable(address: &IpAddr) -> bool {
    let address = address.to_canonical();
    let link_local = match address {
        IpAddr::V4(a) => a.is_link_local() || a.is_broadcast(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    };
    !(address.is_loopback() || address.is_unspecified() || address.is_multicast() || link_local)
}

fn unclaimed(
    asked: &[IpAddr],
    node: &NodeName,
    store: &dyn Store,
    listed: &dyn Listed,
) -> anyhow::Result<Vec<IpAddr>> {
    let mut granted = Vec::new();
    for address in asked.iter().map(IpAddr::to_canonical) {
        if !offerable(&address) {
            tracing::warn!(%node, %address, "a joining host asked for an address that only the inventory can give; not granted");
            continue;
        }
        let owner = match listed.owner(&address) {
            Some(owner) => Some(owner),
            None => store.address_owner(&address)?,
        };
        match owner {
            Some(owner) if owner != *node => {
                tracing::warn!(%node, %address, %owner, "a joining host asked for another node's address; not granted");
            }
            Some(_) | None => granted.push(address),
        }
    }
    Ok(granted)
}
