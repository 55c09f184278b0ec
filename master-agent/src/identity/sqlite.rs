//! The embedded store: one SQLite file of mode 0600, which commands of other processes may use at the same time.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard},
    time::{Duration, SystemTime},
};

use proto::NodeName;
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use russh::keys::PublicKey;
use subtle::ConstantTimeEq;
use tokio::sync::watch;

use super::{
    database,
    host_key::fingerprint,
    store::{ChangeRevocations, Grant, Store, TokenError, TokenRecord},
};

/// How many seconds an expired token is kept, so that a host that presents it learns why it is refused.
const KEEP_EXPIRED: i64 = 7 * 24 * 3600;

/// The embedded store.
#[derive(Debug)]
pub struct SqliteStore {
    database: Mutex<Database>,
    /// Written only while `database` is locked, so that changes arrive in the order of their transactions.
    known: RwLock<Known>,
    changes: watch::Sender<()>,
}

/// What is kept in memory. Keys are fingerprints.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    /// The key for which a node was last certified.
    joined: HashMap<NodeName, String>,
    /// The key that was trusted on first use.
    first_use: HashMap<NodeName, String>,
    /// The deadlines of nodes that are drained.
    drains: HashMap<NodeName, SystemTime>,
}

#[derive(Debug)]
struct Database {
    connection: Connection,
    /// The value of `PRAGMA data_version` when [`Known`] was read. Only commits of other connections change it.
    version: i64,
    /// The version of the list of revoked certificates that was read or written last.
    revocations: Option<i64>,
}

/// A token whose secret was presented.
struct Presented {
    bound: Option<NodeName>,
    expired: bool,
    used_by: Option<NodeName>,
}

impl SqliteStore {
    /// Opens the database of a state directory. Creates it if it isn't there, so whether that is right is for the caller
    /// to know.
    pub(crate) fn open(state_dir: &Path) -> anyhow::Result<Self> {
        let connection = database::open(state_dir)?;
        let failed = |error| database::explained(state_dir, error);
        let mut database = Database { connection, version: 0, revocations: None };
        database.version = database.data_version().map_err(failed)?;
        let (known, revocations) = database.known().map_err(failed)?;
        database.revocations = revocations;
        let (known, changes) = (RwLock::new(known), watch::Sender::new(()));
        Ok(Self { database: Mutex::new(database), known, changes })
    }

    fn database(&self) -> MutexGuard<'_, Database> {
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies to memory what has just been committed. `change` returns whether that concerns anybody.
    fn committed(&self, database: MutexGuard<'_, Database>, change: impl FnOnce(&mut Known) -> bool) {
        let concerns = change(&mut self.known.write().unwrap_or_else(PoisonError::into_inner));
        drop(database);
        if concerns {
            self.changes.send_replace(());
        }
    }

    /// Applies to memory that a key has been committed as the one for which a node is certified.
    fn joined(&self, database: MutexGuard<'_, Database>, node: &NodeName, key: &str) {
        self.committed(database, |known| {
            let former = known.joined.insert(node.clone(), key.to_owned());
            former.is_some_and(|former| former != key)
        });
    }
}

impl Known {
    /// Whether every node that had a key in `before` still has that key.
    fn keeps_keys_of(&self, before: &Self) -> bool {
        let keep = |now: &HashMap<NodeName, String>, before: &HashMap<NodeName, String>| {
            before.iter().all(|(node, key)| now.get(node) == Some(key))
        };
        keep(&self.joined, &before.joined) && keep(&self.first_use, &before.first_use)
    }
}

impl Database {
    fn data_version(&self) -> rusqlite::Result<i64> {
        self.connection.query_row("PRAGMA data_version", [], |row| row.get(0))
    }

    /// Reads what is kept in memory, and the version of the list of revoked certificates.
    fn known(&mut self) -> rusqlite::Result<(Known, Option<i64>)> {
        let transaction = self.connection.transaction()?;
        let known = Known {
            joined: fingerprints(&transaction, "SELECT name, fingerprint FROM nodes")?,
            first_use: fingerprints(&transaction, "SELECT name, fingerprint FROM first_use")?,
            drains: drains(&transaction)?,
        };
        Ok((known, revocations_version(&transaction)?))
    }
}

impl From<rusqlite::Error> for TokenError {
    fn from(e: rusqlite::Error) -> Self {
        Self::Store(e.to_string())
    }
}

impl Store for SqliteStore {
    fn joined_key(&self, node: &NodeName) -> Option<String> {
        self.known().joined.get(node).cloned()
    }

    fn first_use_key(&self, node: &NodeName) -> Option<String> {
        self.known().first_use.get(node).cloned()
    }

    fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    fn refresh(&self) -> anyhow::Result<bool> {
        let mut database = self.database();
        // A transaction that is committed after this line is either read now or noticed the next time.
        let version = database.data_version()?;
        if version == database.version {
            return Ok(false);
        }
        let (known, revocations) = database.known()?;
        let revoked = revocations != database.revocations;
        (database.version, database.revocations) = (version, revocations);
        self.committed(database, |present| {
            let concerns = revoked || !known.keeps_keys_of(present) || known.drains != present.drains;
            *present = known;
            concerns
        });
        Ok(true)
    }

    fn add_token(
        &self,
        id: &str,
        hash: &[u8; 32],
        node: Option<&NodeName>,
        expires: SystemTime,
    ) -> anyhow::Result<()> {
        self.database().connection.execute(
            "INSERT INTO tokens (id, hash, node, expires) VALUES (?1, ?2, ?3, ?4)",
            params![id, hash.as_slice(), node.map(NodeName::as_str), unix(expires)],
        )?;
        Ok(())
    }

    fn tokens(&self, now: SystemTime) -> anyhow::Result<Vec<TokenRecord>> {
        let database = self.database();
        let connection = &database.connection;
        connection.execute("DELETE FROM tokens WHERE expires <= ?1", [unix(now) - KEEP_EXPIRED])?;
        let mut query = connection
            .prepare("SELECT id, node, expires, used_by FROM tokens WHERE expires > ?1 ORDER BY expires")?;
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
        Ok(self.database().connection.execute("DELETE FROM tokens WHERE id = ?1", [id])? > 0)
    }

    fn check(&self, id: &str, hash: &[u8; 32], now: SystemTime) -> Result<Option<NodeName>, TokenError> {
        let Presented { bound, expired, used_by } = presented(&self.database().connection, id, hash, now)?;
        if expired { Err(TokenError::Expired) } else { Ok(used_by.or(bound)) }
    }

    fn redeem(
        &self,
        id: &str,
        hash: &[u8; 32],
        asked: Option<&NodeName>,
        key: &str,
        now: SystemTime,
        grant: &dyn Fn(&NodeName) -> Grant,
    ) -> Result<(NodeName, Vec<IpAddr>), TokenError> {
        let mut database = self.database();
        let transaction = database.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let presented = presented(&transaction, id, hash, now)?;
        let (node, addresses) = admitted(&transaction, presented, asked, key, grant)?;
        transaction.execute("UPDATE tokens SET used_by = ?2 WHERE id = ?1", [id, node.as_str()])?;
        record(&transaction, &node, key, &addresses)?;
        transaction.commit()?;
        self.joined(database, &node, key);
        Ok((node, addresses))
    }

    fn address_owner(&self, address: &IpAddr) -> anyhow::Result<Option<NodeName>> {
        let owner: Option<String> = self
            .database()
            .connection
            .query_row("SELECT node FROM addresses WHERE address = ?1", [address.to_string()], |row| {
                row.get(0)
            })
            .optional()?;
        Ok(name(owner))
    }

    fn remember_node(&self, node: &NodeName, key: &PublicKey, addresses: &[IpAddr]) -> anyhow::Result<()> {
        let mut database = self.database();
        let transaction = database.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let key = fingerprint(key);
        record(&transaction, node, &key, addresses)?;
        transaction.commit()?;
        self.joined(database, node, &key);
        Ok(())
    }

    fn remember_first_use(&self, node: &NodeName, fingerprint: &str) -> anyhow::Result<String> {
        let mut database = self.database();
        let transaction = database.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute(
            "INSERT OR IGNORE INTO first_use (name, fingerprint) VALUES (?1, ?2)",
            [node.as_str(), fingerprint],
        )?;
        let recorded: String = transaction.query_row(
            "SELECT fingerprint FROM first_use WHERE name = ?1",
            [node.as_str()],
            |row| row.get(0),
        )?;
        transaction.commit()?;
        self.committed(database, |known| {
            let former = known.first_use.insert(node.clone(), recorded.clone());
            former.is_some_and(|former| former != recorded)
        });
        Ok(recorded)
    }

    fn forget_node(&self, node: &NodeName) -> anyhow::Result<bool> {
        let mut database = self.database();
        let transaction = database.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let first_use = transaction.execute("DELETE FROM first_use WHERE name = ?1", [node.as_str()])?;
        let joined = transaction.execute("DELETE FROM nodes WHERE name = ?1", [node.as_str()])?;
        transaction.execute("DELETE FROM addresses WHERE node = ?1", [node.as_str()])?;
        transaction.commit()?;
        self.committed(database, |known| {
            known.first_use.remove(node).is_some() | known.joined.remove(node).is_some()
        });
        Ok(first_use + joined > 0)
    }

    fn drains(&self) -> HashMap<NodeName, SystemTime> {
        self.known().drains.clone()
    }

    fn set_drain(&self, node: &NodeName, until: Option<SystemTime>) -> anyhow::Result<bool> {
        let mut database = self.database();
        let transaction = database.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let was = transaction.execute("DELETE FROM drains WHERE name = ?1", [node.as_str()])? > 0;
        if let Some(until) = until {
            let milliseconds = until.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
            transaction.execute(
                "INSERT INTO drains (name, until) VALUES (?1, ?2)",
                params![node.as_str(), i64::try_from(milliseconds).unwrap_or(i64::MAX)],
            )?;
        }
        transaction.commit()?;
        self.committed(database, |known| {
            match until {
                Some(until) => known.drains.insert(node.clone(), until),
                None => known.drains.remove(node),
            };
            true
        });
        Ok(was)
    }

    fn revocations(&self) -> anyhow::Result<Option<Vec<u8>>> {
        let connection = &self.database().connection;
        Ok(connection.query_row("SELECT list FROM revocations", [], |row| row.get(0)).optional()?)
    }

    fn revocations_version(&self) -> anyhow::Result<Option<u64>> {
        Ok(revocations_version(&self.database().connection)?.map(i64::cast_unsigned))
    }

    fn change_revocations(&self, change: ChangeRevocations<'_>) -> anyhow::Result<()> {
        let mut database = self.database();
        let transaction = database.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let before: Option<Vec<u8>> =
            transaction.query_row("SELECT list FROM revocations", [], |row| row.get(0)).optional()?;
        let Some((version, list)) = change(before.as_deref())? else { return Ok(()) };
        transaction.execute(
            "INSERT OR REPLACE INTO revocations (id, version, list) VALUES (1, ?1, ?2)",
            params![version.cast_signed(), list],
        )?;
        transaction.commit()?;
        database.revocations = Some(version.cast_signed());
        self.committed(database, |_| true);
        Ok(())
    }
}

fn revocations_version(connection: &Connection) -> rusqlite::Result<Option<i64>> {
    connection.query_row("SELECT version FROM revocations", [], |row| row.get(0)).optional()
}

/// Returns the fingerprint of the key for which a node was last certified.
fn joined_key(connection: &Connection, node: &NodeName) -> rusqlite::Result<Option<String>> {
    connection
        .query_row("SELECT fingerprint FROM nodes WHERE name = ?1", [node.as_str()], |row| row.get(0))
        .optional()
}

/// Reads names and fingerprints. A node whose name can't be read is left out, and so has no key.
fn fingerprints(connection: &Connection, query: &str) -> rusqlite::Result<HashMap<NodeName, String>> {
    let mut query = connection.prepare(query)?;
    let rows = query.query_map([], |row| Ok((name(row.get(0)?), row.get(1)?)))?;
    rows.filter_map(|row| row.map(|(node, key)| Some((node?, key))).transpose()).collect()
}

/// Reads the deadlines of drained nodes.
fn drains(connection: &Connection) -> rusqlite::Result<HashMap<NodeName, SystemTime>> {
    let mut query = connection.prepare("SELECT name, until FROM drains")?;
    let rows = query.query_map([], |row| {
        let milliseconds = u64::try_from(row.get::<_, i64>(1)?).unwrap_or_default();
        let until = SystemTime::UNIX_EPOCH + Duration::from_millis(milliseconds);
        Ok((name(row.get(0)?), until))
    })?;
    rows.filter_map(|row| row.map(|(node, until)| Some((node?, until))).transpose()).collect()
}

/// Records what a node is certified for, in place of what was known of it.
fn record(connection: &Connection, node: &NodeName, key: &str, addresses: &[IpAddr]) -> rusqlite::Result<()> {
    connection
        .execute("INSERT OR REPLACE INTO nodes (name, fingerprint) VALUES (?1, ?2)", [node.as_str(), key])?;
    connection.execute("DELETE FROM addresses WHERE node = ?1", [node.as_str()])?;
    for address in addresses {
        connection.execute(
            "INSERT OR REPLACE INTO addresses (address, node) VALUES (?1, ?2)",
            [address.to_string().as_str(), node.as_str()],
        )?;
    }
    Ok(())
}

/// Returns the name under which a host is admitted, and the addresses that it is granted.
fn admitted(
    connection: &Connection,
    Presented { bound, expired, used_by }: Presented,
    asked: Option<&NodeName>,
    key: &str,
    grant: &dyn Fn(&NodeName) -> Grant,
) -> Result<(NodeName, Vec<IpAddr>), TokenError> {
    if let Some(node) = used_by {
        let same_host = !expired
            && asked.is_none_or(|asked| *asked == node)
            && joined_key(connection, &node)?.is_some_and(|joined| joined == key);
        if !same_host {
            return Err(TokenError::Used);
        }
        let addresses = grant(&node).addresses;
        return Ok((node, addresses));
    }
    if expired {
        return Err(TokenError::Expired);
    }
    let (node, is_bound) = match (bound, asked) {
        (Some(bound), Some(asked)) if bound != *asked => {
            return Err(TokenError::WrongNode { bound, asked: asked.clone() });
        }
        (Some(bound), _) => (bound, true),
        (None, Some(asked)) => (asked.clone(), false),
        (None, None) => return Err(TokenError::NoName),
    };
    let Grant { listed, addresses } = grant(&node);
    if !is_bound && !listed {
        return Err(TokenError::NotListed(node));
    }
    if !is_bound && joined_key(connection, &node)?.is_some() {
        return Err(TokenError::Joined(node));
    }
    Ok((node, addresses))
}

/// Returns what is known of a token whose secret was presented.
fn presented(
    connection: &Connection,
    id: &str,
    hash: &[u8; 32],
    now: SystemTime,
) -> Result<Presented, TokenError> {
    type Row = (Vec<u8>, Option<String>, i64, Option<String>);
    let row: Option<Row> = connection
        .query_row("SELECT hash, node, expires, used_by FROM tokens WHERE id = ?1", [id], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })
        .optional()?;
    let (stored, bound, expires, used_by) = row.ok_or(TokenError::Unknown)?;
    // Nothing about a token is told to anyone who does not hold its secret.
    if !bool::from(stored.as_slice().ct_eq(hash.as_slice())) {
        return Err(TokenError::Unknown);
    }
    // A name that can't be read must not make the token good for any node.
    let unreadable = |text: &str| TokenError::Store(format!("token {id} is of node {text:?}"));
    let read = |text: Option<String>| -> Result<Option<NodeName>, TokenError> {
        text.map(|text| text.parse().map_err(|_| unreadable(&text))).transpose()
    };
    Ok(Presented { bound: read(bound)?, expired: expires <= unix(now), used_by: read(used_by)? })
}

fn unix(time: SystemTime) -> i64 {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    i64::try_from(seconds).unwrap_or(i64::MAX)
}

fn from_unix(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

fn name(text: Option<String>) -> Option<NodeName> {
    text.and_then(|t| t.parse().ok())
}

#[cfg(test)]
mod tests;
