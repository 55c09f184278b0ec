//! What must outlive the process: tokens (hashed), nodes that have joined, keys trusted on first use, the list of
//! revoked certificates.
//!
//! One SQLite file of mode 0600, which commands of other processes may use at the same time.

use std::{
    net::IpAddr,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use proto::NodeName;
use proto_config::secret_file;
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use russh::keys::PublicKey;
use serde::{Serialize, Serializer};
use subtle::ConstantTimeEq;

use crate::identity::fingerprint;

/// Of the tables; a later version migrates from each earlier one.
const SCHEMA: i64 = 1;
/// How long an expired token is kept, so that who brings it learns why it is no good. Seconds.
const KEEP_EXPIRED: i64 = 7 * 24 * 3600;

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

impl From<rusqlite::Error> for TokenError {
    fn from(e: rusqlite::Error) -> Self {
        Self::Store(e.to_string())
    }
}

/// The store of a master. A replicated one can take the embedded one's place.
pub trait Store: Send + Sync {
    fn add_token(
        &self,
        id: &str,
        hash: &[u8; 32],
        node: Option<&NodeName>,
        expires: SystemTime,
    ) -> anyhow::Result<()>;

    /// Tokens that have not expired.
    fn tokens(&self, now: SystemTime) -> anyhow::Result<Vec<TokenRecord>>;

    /// `false` if there was none.
    fn remove_token(&self, id: &str) -> anyhow::Result<bool>;

    /// The node that a token is bound to, if it could be used now. Uses nothing up.
    fn check(&self, id: &str, hash: &[u8; 32], now: SystemTime) -> Result<Option<NodeName>, TokenError>;

    /// Uses a token up, in one step: of any number of hosts that try at the same time, one succeeds. Gives the
    /// node's name. `listed` says which names a token that is bound to none is good for.
    fn redeem(
        &self,
        id: &str,
        hash: &[u8; 32],
        asked: Option<&NodeName>,
        now: SystemTime,
        listed: &dyn Fn(&NodeName) -> bool,
    ) -> Result<NodeName, TokenError>;

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

    /// The list of revoked certificates, if there ever was one.
    fn revocations(&self) -> anyhow::Result<Option<Vec<u8>>>;

    /// Its version.
    fn revocations_version(&self) -> anyhow::Result<Option<u64>>;

    /// Replaces the list by what `change` makes of it, if anything, in one step.
    fn change_revocations(&self, change: ChangeRevocations<'_>) -> anyhow::Result<()>;
}

/// Makes a new list and its version of the present list, or `None` to leave it.
pub type ChangeRevocations<'a> = &'a mut dyn FnMut(Option<&[u8]>) -> anyhow::Result<Option<(u64, Vec<u8>)>>;

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
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => secret_file::check(&path)?,
            Err(e) => return Err(e).with_context(context),
        }
        let connection = Connection::open(&path).with_context(context)?;
        connection.busy_timeout(Duration::from_secs(5))?;
        let version: i64 =
            connection.query_row("PRAGMA user_version", [], |row| row.get(0)).with_context(context)?;
        if version > SCHEMA {
            bail!(
                "{} was written by a newer master-agent (schema {version}, known here: {SCHEMA})",
                path.display()
            );
        }
        connection
            .execute_batch(&format!(
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
                 CREATE TABLE IF NOT EXISTS revocations (
                     id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL, list BLOB NOT NULL
                 ) STRICT;
                 CREATE TABLE IF NOT EXISTS first_use (name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) STRICT;
                 PRAGMA user_version = {SCHEMA};
                 COMMIT;"
            ))
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
    fn add_token(
        &self,
        id: &str,
        hash: &[u8; 32],
        node: Option<&NodeName>,
        expires: SystemTime,
    ) -> anyhow::Result<()> {
        self.db().execute(
            "INSERT INTO tokens (id, hash, node, expires) VALUES (?1, ?2, ?3, ?4)",
            params![id, hash.as_slice(), node.map(NodeName::as_str), unix(expires)],
        )?;
        Ok(())
    }

    fn tokens(&self, now: SystemTime) -> anyhow::Result<Vec<TokenRecord>> {
        let db = self.db();
        db.execute("DELETE FROM tokens WHERE expires <= ?1", [unix(now) - KEEP_EXPIRED])?;
        let mut query =
            db.prepare("SELECT id, node, expires, used_by FROM tokens WHERE expires > ?1 ORDER BY expires")?;
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

    fn check(&self, id: &str, hash: &[u8; 32], now: SystemTime) -> Result<Option<NodeName>, TokenError> {
        usable(&self.db(), id, hash, now)
    }

    fn redeem(
        &self,
        id: &str,
        hash: &[u8; 32],
        asked: Option<&NodeName>,
        now: SystemTime,
        listed: &dyn Fn(&NodeName) -> bool,
    ) -> Result<NodeName, TokenError> {
        let mut db = self.db();
        let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let bound = usable(&transaction, id, hash, now)?;
        let node = match (bound, asked) {
            (Some(bound), Some(asked)) if bound != *asked => {
                return Err(TokenError::WrongNode { bound, asked: asked.clone() });
            }
            (Some(bound), _) => bound,
            (None, Some(asked)) if !listed(asked) => return Err(TokenError::NotListed(asked.clone())),
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
            .query_row("SELECT node FROM addresses WHERE address = ?1", [address.to_string()], |row| {
                row.get(0)
            })
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

    fn revocations(&self) -> anyhow::Result<Option<Vec<u8>>> {
        Ok(self.db().query_row("SELECT list FROM revocations", [], |row| row.get(0)).optional()?)
    }

    fn revocations_version(&self) -> anyhow::Result<Option<u64>> {
        let version: Option<i64> =
            self.db().query_row("SELECT version FROM revocations", [], |row| row.get(0)).optional()?;
        Ok(version.map(i64::cast_unsigned))
    }

    fn change_revocations(&self, change: ChangeRevocations<'_>) -> anyhow::Result<()> {
        let mut db = self.db();
        let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let before: Option<Vec<u8>> =
            transaction.query_row("SELECT list FROM revocations", [], |row| row.get(0)).optional()?;
        if let Some((version, list)) = change(before.as_deref())? {
            transaction.execute(
                "INSERT OR REPLACE INTO revocations (id, version, list) VALUES (1, ?1, ?2)",
                params![version.cast_signed(), list],
            )?;
            transaction.commit()?;
        }
        Ok(())
    }
}

/// What a token that can be used now is bound to.
fn usable(
    db: &Connection,
    id: &str,
    hash: &[u8; 32],
    now: SystemTime,
) -> Result<Option<NodeName>, TokenError> {
    type Row = (Vec<u8>, Option<String>, i64, Option<String>);
    let row: Option<Row> = db
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
    // A binding that can't be read must not make the token good for any node.
    let unreadable = |text: &str| TokenError::Store(format!("token {id} is bound to {text:?}"));
    bound.map(|text| text.parse().map_err(|_| unreadable(&text))).transpose()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::identity::tests::{TempDir, new_key};

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    fn node(s: &str) -> NodeName {
        s.parse().unwrap()
    }

    #[test]
    fn of_many_hosts_with_one_token_one_succeeds() {
        let dir = TempDir::new();
        let store = SqliteStore::open(&dir.0).unwrap();
        for round in 0..20 {
            let id = format!("token{round}");
            store.add_token(&id, &[7; 32], None, at(60)).unwrap();
            // Half of them through connections of their own, as other processes have them.
            let won = std::thread::scope(|scope| {
                let tasks: Vec<_> = (0..8)
                    .map(|i| {
                        let (id, store, dir) = (&id, &store, &dir.0);
                        scope.spawn(move || {
                            let asked = node(&format!("n{round}-{i}"));
                            let own = (i % 2 == 0).then(|| SqliteStore::open(dir).unwrap());
                            own.as_ref().unwrap_or(store).redeem(id, &[7; 32], Some(&asked), at(0), &|_| true)
                        })
                    })
                    .collect();
                tasks.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
            });
            let (won, lost): (Vec<_>, Vec<_>) = won.into_iter().partition(Result::is_ok);
            assert_eq!(won.len(), 1);
            assert!(lost.iter().all(|r| matches!(r, Err(TokenError::Used))), "{lost:?}");
        }
    }

    #[test]
    fn what_is_written_is_there_after_reopening_and_only_for_its_owner() {
        let dir = TempDir::new();
        let key = new_key();
        let address = "10.0.0.5".parse().unwrap();
        {
            let store = SqliteStore::open(&dir.0).unwrap();
            store.remember_node(&node("n1"), key.public_key(), &[address], at(0), at(60)).unwrap();
            store.remember_first_use(&node("n2"), "SHA256:a").unwrap();
            store.remember_first_use(&node("n2"), "SHA256:b").unwrap();
        }
        let store = SqliteStore::open(&dir.0).unwrap();
        let n1 = store.node(&node("n1")).unwrap().unwrap();
        assert_eq!((n1.key_fingerprint, n1.addresses), (fingerprint(key.public_key()), vec![address]));
        assert_eq!(store.address_owner(&address).unwrap(), Some(node("n1")));
        assert_eq!(store.first_use(&node("n2")).unwrap().as_deref(), Some("SHA256:a"), "the first stays");
        let again = new_key();
        store.remember_node(&node("n1"), again.public_key(), &[], at(1), at(61)).unwrap();
        assert_eq!(
            store.node(&node("n1")).unwrap().unwrap().key_fingerprint,
            fingerprint(again.public_key())
        );
        assert_eq!(store.address_owner(&address).unwrap(), None);
        assert!(store.forget_node(&node("n1")).unwrap());
        assert!(!store.forget_node(&node("n1")).unwrap());
        assert_eq!(store.node(&node("n1")).unwrap(), None);
        for entry in std::fs::read_dir(&dir.0).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
        }
    }

    #[test]
    fn expired_tokens_are_told_apart_for_a_week_and_then_forgotten() {
        let dir = TempDir::new();
        let store = SqliteStore::open(&dir.0).unwrap();
        store.add_token("a", &[1; 32], Some(&node("n1")), at(60)).unwrap();
        assert_eq!(store.tokens(at(59)).unwrap().len(), 1);
        assert_eq!(store.tokens(at(60)).unwrap(), []);
        let late = store.redeem("a", &[1; 32], None, at(60), &|_| true);
        assert!(matches!(late, Err(TokenError::Expired)), "{late:?}");
        store.tokens(at(60 + 7 * 24 * 3600)).unwrap();
        let gone = store.redeem("a", &[1; 32], None, at(60 + 7 * 24 * 3600), &|_| true);
        assert!(matches!(gone, Err(TokenError::Unknown)), "{gone:?}");
    }

    #[test]
    fn a_binding_that_cannot_be_read_binds_to_nothing() {
        let dir = TempDir::new();
        let store = SqliteStore::open(&dir.0).unwrap();
        store.add_token("a", &[1; 32], Some(&node("n1")), at(60)).unwrap();
        store.db().execute("UPDATE tokens SET node = 'N_1'", []).unwrap();
        let got = store.redeem("a", &[1; 32], Some(&node("n2")), at(0), &|_| true);
        assert!(matches!(got, Err(TokenError::Store(_))), "{got:?}");
    }

    #[test]
    fn a_newer_schema_is_left_alone() {
        let dir = TempDir::new();
        SqliteStore::open(&dir.0).unwrap().db().execute_batch("PRAGMA user_version = 99").unwrap();
        assert!(SqliteStore::open(&dir.0).unwrap_err().to_string().contains("newer master-agent"));
    }
}
