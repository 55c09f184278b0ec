//! What must outlive the process: hashed join tokens, the keys by which nodes are known, the list of revoked
//! certificates, and which nodes are drained.
//!
//! The keys that are needed to establish and to recheck a tunnel are read from memory ([`Store::joined_key`],
//! [`Store::first_use_key`]), and so are the drains ([`Store::drains`]). Every other method reads or writes the store itself, so it blocks and belongs on a thread
//! for blocking work. Commands of other processes change the same store, which [`Store::refresh`] notices.

use std::{collections::HashMap, net::IpAddr, time::SystemTime};

use proto::NodeName;
use russh::keys::PublicKey;
use serde::{Serialize, Serializer};
use tokio::sync::watch;

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TokenRecord {
    pub id: String,
    pub node: Option<NodeName>,
    #[serde(serialize_with = "rfc3339")]
    pub expires: SystemTime,
    pub used_by: Option<String>,
}

/// What a host gets under a name.
#[derive(Debug, Default)]
pub struct Grant {
    /// Whether a token that is bound to no node is valid for the name.
    pub listed: bool,
    /// The addresses that the host is certified for.
    pub addresses: Vec<IpAddr>,
}

/// Why a token is refused. The text says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("the token is not known here: make a new one with `master-agent token create`")]
    Unknown,
    #[error("the token has expired: make a new one with `master-agent token create`")]
    Expired,
    #[error(
        "the token has been used before: each is good for one host; make a new one with `master-agent token create`"
    )]
    Used,
    #[error(
        "the token is bound to node {bound}: join as that node, or make one with `master-agent token create --node {asked}`"
    )]
    WrongNode { bound: NodeName, asked: NodeName },
    #[error("the token is not bound to a node: say which with `--node`")]
    NoName,
    #[error("node {0} is not in the master's inventory: add it there first; the token was not used up")]
    NotListed(NodeName),
    #[error(
        "node {0} has joined before: to join it anew, make a token bound to it with `master-agent token create --node {0}`"
    )]
    Joined(NodeName),
    #[error("the store failed: {0}")]
    Store(String),
}

/// The store of a master. A replicated one can take the place of the embedded one.
pub trait Store: Send + Sync {
    /// The fingerprint of the key for which a node was last certified. Never blocks.
    fn joined_key(&self, node: &NodeName) -> Option<String>;

    /// The fingerprint that was trusted on first use. Never blocks.
    fn first_use_key(&self, node: &NodeName) -> Option<String>;

    /// Returns a receiver that changes when this or another process has replaced or forgotten the key of a node, has changed
    /// the list of revoked certificates, or has drained a node or undone that. Changes by other processes are noticed by [`Store::refresh`]. The first
    /// key of a node is left out, since there is no tunnel that it could concern: with many nodes, each join would
    /// otherwise have all tunnels checked.
    fn changes(&self) -> watch::Receiver<()>;

    /// Reads what other processes have changed since the last call. Returns whether there was a change.
    fn refresh(&self) -> anyhow::Result<bool>;

    fn add_token(
        &self,
        id: &str,
        hash: &[u8; 32],
        node: Option<&NodeName>,
        expires: SystemTime,
    ) -> anyhow::Result<()>;

    /// The tokens that have not expired.
    fn tokens(&self, now: SystemTime) -> anyhow::Result<Vec<TokenRecord>>;

    /// Returns `false` if there was no such token.
    fn remove_token(&self, id: &str) -> anyhow::Result<bool>;

    /// Returns the node that a token is bound to, if there is one, or an error if no host could use the token now. One
    /// that a node has used passes until it expires, bound to that node: the host may have to ask again, and only
    /// [`Store::redeem`] can tell whether it is that host. The token is not used up.
    fn check(&self, id: &str, hash: &[u8; 32], now: SystemTime) -> Result<Option<NodeName>, TokenError>;

    /// Uses a token up, records what the host is to be certified for, and returns the node's name and addresses. This is
    /// one transaction: of any number of hosts that try at the same time, one succeeds, and if nothing can be written, the
    /// token remains as it was. `grant` decides what a host gets under a name.
    ///
    /// `key` is the fingerprint of the host key that the host has proved. Until the token expires, a node that has used
    /// it may do so again with the key for which it was certified last, since the first answer may have been lost.
    fn redeem(
        &self,
        id: &str,
        hash: &[u8; 32],
        asked: Option<&NodeName>,
        key: &str,
        now: SystemTime,
        grant: &dyn Fn(&NodeName) -> Grant,
    ) -> Result<(NodeName, Vec<IpAddr>), TokenError>;

    /// The node that an address was certified for.
    fn address_owner(&self, address: &IpAddr) -> anyhow::Result<Option<NodeName>>;

    /// Records what was certified, in place of what was known of the node.
    fn remember_node(&self, node: &NodeName, key: &PublicKey, addresses: &[IpAddr]) -> anyhow::Result<()>;

    /// Records the key of a first use unless one is recorded already. Returns the fingerprint that is recorded now.
    fn remember_first_use(&self, node: &NodeName, fingerprint: &str) -> anyhow::Result<String>;

    /// Forgets a node's keys, so that another host may take its place. Returns `false` if nothing was known.
    fn forget_node(&self, node: &NodeName) -> anyhow::Result<bool>;

    /// The nodes that are drained, each with its deadline. Never blocks.
    fn drains(&self) -> HashMap<NodeName, SystemTime>;

    /// Records that a node is drained, with a deadline of whole milliseconds, or that it no longer is. Returns whether it was
    /// before.
    fn set_drain(&self, node: &NodeName, until: Option<SystemTime>) -> anyhow::Result<bool>;

    /// The list of revoked certificates, if there ever was one.
    fn revocations(&self) -> anyhow::Result<Option<Vec<u8>>>;

    /// The version of that list.
    fn revocations_version(&self) -> anyhow::Result<Option<u64>>;

    /// Replaces the list by the one that `change` returns, if it returns one, in one transaction.
    fn change_revocations(&self, change: ChangeRevocations<'_>) -> anyhow::Result<()>;
}

/// Makes a new list and its version of the present list, or `None` to leave it.
pub type ChangeRevocations<'a> = &'a mut dyn FnMut(Option<&[u8]>) -> anyhow::Result<Option<(u64, Vec<u8>)>>;

fn rfc3339<S: Serializer>(time: &SystemTime, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(&humantime::format_rfc3339_seconds(*time))
}
