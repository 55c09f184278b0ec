//! What must outlive the process: tokens (hashed), nodes that have joined, keys trusted on first use.
//!
//! One SQLite file of mode 0600, which commands of other processes may use at the same time.

use std::{
    net::IpAddr,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::Context;
use proto::{NodeName, secret_file};
use russh::keys::PublicKey;
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use serde::{Serialize, Serializer};
use subtle::ConstantTimeEq;

use crate::identity::fingerprint;

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TokenRecord {
    pub id: String,
    pub node: Option<NodeName>,
    #[serde(serialize_with = "rfc3339")]
    pub expires: SystemTime,
    pub used_by: Option<String>,
}

/// A node that has a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRecord {
    pub name: NodeName,
    pub key_fingerprint: String,
    pub addresses: Vec<IpAddr>,
}

/// Why a token is no good; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("the token is not known here: make a new one with `master-agent token create`")]
    Unknown,
    #[error("the token has expired: make a new one with `master-agent token create`")]
    Expired,
    #[error("the token has been used before: each is good for one host; make a new one with `master-agent token create`")]
    Used,
    #[error("the token is bound to node {bound}: join as that node, or make one with `master-agent token create --node {asked}`")]
    WrongNode { bound: NodeName, asked: NodeName },
    #[error("the token is not bound to a node: say which with `--node`")]
    NoName,
    #[error("node {0} has joined before: to join it anew, make a token bound to it with `master-agent token create --node {0}`")]
    Joined(NodeName),
    #[error("the store failed: {0}")]
    Store(String),
}

impl From<rusqlite::Error> for TokenError {
    fn from(e: rusqlite::Error) -> Self {
        Self::Store(e.to_string())
    }
}

/// The store of a master. A replicated one can take the embedded one's place.
pub trait Store: Send + Sync {
    fn add_token(&self, id: &str, hash: &[u8; 32], node: Option<&NodeName>, expires: SystemTime) -> anyhow::Result<()>;

    /// Tokens that have not expired.
    fn tokens(&self, now: SystemTime) -> anyhow::Result<Vec<TokenRecord>>;

    /// `false` if there was none.
    fn remove_token(&self, id: &str) -> anyhow::Result<bool>;

    /// Uses a token up, in one step: of any number of hosts that try at the same time, one succeeds. Gives the
    /// node's name.
    fn redeem(&self, id: &str, hash: &[u8; 32], asked: Option<&NodeName>, now: SystemTime) -> Result<NodeName, TokenError>;

    fn node(&self, name: &NodeName) -> anyhow::Result<Option<NodeRecord>>;

    /// The node that an address was certified for.
    fn address_owner(&self, address: &IpAddr) -> anyhow::Result<Option<NodeName>>;

    /// Remembers what was certified; replaces what was known of the node.
    fn remember_node(
        &self,
        name: &NodeName,
        key: &PublicKey,
        addresses: &[IpAddr],
        now: SystemTime,
        not_after: SystemTime,
    ) -> anyhow::Result<()>;

    /// The fingerprint trusted on first use.
    fn first_use(&self, name: &NodeName) -> anyhow::Result<Option<String>>;

    fn remember_first_use(&self, name: &NodeName, fingerprint: &str) -> anyhow::Result<()>;

    /// Forgets a node's key, so that another may take its place. `false` if nothing was known.
    fn forget_node(&self, name: &NodeName) -> anyhow::Result<bool>;
}

/// The embedded store.
#[derive(Debug)]
pub struct SqliteStore(Mutex<Connection>);

impl SqliteStore {
    /// Opens `state.sqlite` in the state directory, creating it if needed.
    pub fn open(state_dir: &Path) -> anyhow::Result<Self> {
        secret_file::create_directory(state_dir)?;
        let path = state_dir.join("state.sqlite");
        let context = || format!("can't open {}", path.display());
        // SQLite would create it with the process's umask; its journal takes the mode of the file.
        match secret_file::write_new(&path, b"") {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).with_context(context),
        }
        let connection = Connection::open(&path).with_context(context)?;
        connection.busy_timeout(Duration::from_secs(5))?;
        connection
            .execute_batch(
                "PRAGMA synchronous = FULL;
                 BEGIN IMMEDIATE;
                 CREATE TABLE IF NOT EXISTS tokens (
                     id TEXT PRIMARY KEY, hash BLOB NOT NULL, node TEXT, expires INTEGER NOT NULL, used_by TEXT
                 ) STRICT;
                 CREATE TABLE IF NOT EXISTS nodes (
                     name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, public_key TEXT NOT NULL,
                     joined INTEGER NOT NULL, not_after INTEGER NOT NULL
                 ) STRICT;
                 CREATE TABLE IF NOT EXISTS addresses (
                     address TEXT PRIMARY KEY, node TEXT NOT NULL
                 ) STRICT;
                 CREATE TABLE IF NOT EXISTS first_use (name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) STRICT;
                 COMMIT;",
            )
            .with_context(context)?;
        Ok(Self(Mutex::new(connection)))
    }

    fn db(&self) -> MutexGuard<'_, Connection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unix(time: SystemTime) -> i64 {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    i64::try_from(seconds).unwrap_or(i64::MAX)
}

fn from_unix(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

fn rfc3339<S: Serializer>(time: &SystemTime, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(&humantime::format_rfc3339_seconds(*time))
}

fn name(text: Option<String>) -> Option<NodeName> {
    text.and_then(|t| t.parse().ok())
}

impl Store for SqliteStore {
    fn add_token(&self, id: &str, hash: &[u8; 32], node: Option<&NodeName>, expires: SystemTime) -> anyhow::Result<()> {
        self.db().execute(
            "INSERT INTO tokens (id, hash, node, expires) VALUES (?1, ?2, ?3, ?4)",
            params![id, hash.as_slice(), node.map(NodeName::as_str), unix(expires)],
        )?;
        Ok(())
    }

    fn tokens(&self, now: SystemTime) -> anyhow::Result<Vec<TokenRecord>> {
        let db = self.db();
        db.execute("DELETE FROM tokens WHERE expires <= ?1", [unix(now) - 7 * 24 * 3600])?;
        let mut query = db.prepare("SELECT id, node, expires, used_by FROM tokens WHERE expires > ?1 ORDER BY expires")?;
        let rows = query.query_map([unix(now)], |row| {
            Ok(TokenRecord {
                id: row.get(0)?,
                node: name(row.get(1)?),
                expires: from_unix(row.get(2)?),
                used_by: row.get(3)?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn remove_token(&self, id: &str) -> anyhow::Result<bool> {
        Ok(self.db().execute("DELETE FROM tokens WHERE id = ?1", [id])? > 0)
    }

    fn redeem(&self, id: &str, hash: &[u8; 32], asked: Option<&NodeName>, now: SystemTime) -> Result<NodeName, TokenError> {
        let mut db = self.db();
        let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        type Row = (Vec<u8>, Option<String>, i64, Option<String>);
        let row: Option<Row> = transaction
            .query_row("SELECT hash, node, expires, used_by FROM tokens WHERE id = ?1", [id], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
            })
            .optional()?;
        let (stored, bound, expires, used) = row.ok_or(TokenError::Unknown)?;
        // Nothing is told of a token to who does not hold its secret.
        if !bool::from(stored.as_slice().ct_eq(hash.as_slice())) {
            return Err(TokenError::Unknown);
        }
        if used.is_some() {
            return Err(TokenError::Used);
        }
        if expires <= unix(now) {
            return Err(TokenError::Expired);
        }
        let node = match (name(bound), asked) {
            (Some(bound), Some(asked)) if bound != *asked => {
                return Err(TokenError::WrongNode { bound, asked: asked.clone() });
            }
            (Some(bound), _) => bound,
            (None, Some(asked)) => {
                let joined: Option<i64> = transaction
                    .query_row("SELECT 1 FROM nodes WHERE name = ?1", [asked.as_str()], |row| row.get(0))
                    .optional()?;
                if joined.is_some() {
                    return Err(TokenError::Joined(asked.clone()));
                }
                asked.clone()
            }
            (None, None) => return Err(TokenError::NoName),
        };
        transaction.execute("UPDATE tokens SET used_by = ?2 WHERE id = ?1", [id, node.as_str()])?;
        transaction.commit()?;
        Ok(node)
    }

    fn node(&self, node: &NodeName) -> anyhow::Result<Option<NodeRecord>> {
        let db = self.db();
        let fingerprint: Option<String> = db
            .query_row("SELECT fingerprint FROM nodes WHERE name = ?1", [node.as_str()], |row| row.get(0))
            .optional()?;
        let Some(key_fingerprint) = fingerprint else { return Ok(None) };
        let mut query = db.prepare("SELECT address FROM addresses WHERE node = ?1 ORDER BY rowid")?;
        let rows = query.query_map([node.as_str()], |row| row.get::<_, String>(0))?;
        let addresses = rows.filter_map(|a| a.ok().and_then(|a| a.parse().ok())).collect();
        Ok(Some(NodeRecord { name: node.clone(), key_fingerprint, addresses }))
    }

    fn address_owner(&self, address: &IpAddr) -> anyhow::Result<Option<NodeName>> {
        let owner: Option<String> = self
            .db()
            .query_row("SELECT node FROM addresses WHERE address = ?1", [address.to_string()], |row| row.get(0))
            .optional()?;
        Ok(name(owner))
    }

    fn remember_node(
        &self,
        node: &NodeName,
        key: &PublicKey,
        addresses: &[IpAddr],
        now: SystemTime,
        not_after: SystemTime,
    ) -> anyhow::Result<()> {
        let mut db = self.db();
        let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute(
            "INSERT OR REPLACE INTO nodes (name, fingerprint, public_key, joined, not_after) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![node.as_str(), fingerprint(key), key.to_openssh()?, unix(now), unix(not_after)],
        )?;
        transaction.execute("DELETE FROM addresses WHERE node = ?1", [node.as_str()])?;
        for address in addresses {
            transaction.execute(
                "INSERT OR REPLACE INTO addresses (address, node) VALUES (?1, ?2)",
                [address.to_string().as_str(), node.as_str()],
            )?;
        }
        transaction.commit()?;
        Ok(())
    }

    fn first_use(&self, node: &NodeName) -> anyhow::Result<Option<String>> {
        let db = self.db();
        Ok(db
            .query_row("SELECT fingerprint FROM first_use WHERE name = ?1", [node.as_str()], |row| row.get(0))
            .optional()?)
    }

    fn remember_first_use(&self, node: &NodeName, fingerprint: &str) -> anyhow::Result<()> {
        self.db().execute(
            "INSERT OR IGNORE INTO first_use (name, fingerprint) VALUES (?1, ?2)",
            [node.as_str(), fingerprint],
        )?;
        Ok(())
    }

    fn forget_node(&self, node: &NodeName) -> anyhow::Result<bool> {
        let db = self.db();
        let first = db.execute("DELETE FROM first_use WHERE name = ?1", [node.as_str()])?;
        let joined = db.execute("DELETE FROM nodes WHERE name = ?1", [node.as_str()])?;
        db.execute("DELETE FROM addresses WHERE node = ?1", [node.as_str()])?;
        Ok(first + joined > 0)
    }
}
