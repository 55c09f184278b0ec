//! The embedded store: one SQLite file of mode 0600, which commands of other processes may use at the same time.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use proto::NodeName;
use proto_config::secret_file;
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use russh::keys::PublicKey;
use subtle::ConstantTimeEq;
use tokio::sync::watch;

use super::{
    host_key::fingerprint,
    store::{ChangeRevocations, Store, TokenError, TokenRecord},
};

/// The version of the tables. A later version migrates from each earlier one.
const SCHEMA: i64 = 2;
/// How many seconds an expired token is kept, so that a host that presents it learns why it is refused.
const KEEP_EXPIRED: i64 = 7 * 24 * 3600;
/// How long to wait for another process that is writing.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS tokens (
        id TEXT PRIMARY KEY, hash BLOB NOT NULL, node TEXT, expires INTEGER NOT NULL, used_by TEXT
    ) STRICT;
    CREATE TABLE IF NOT EXISTS nodes (
        name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS addresses (
        address TEXT PRIMARY KEY, node TEXT NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS revocations (
        id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL, list BLOB NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS first_use (name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) STRICT;";

/// Version 1 had columns that nothing read.
const FROM_1: &str = "
    ALTER TABLE nodes DROP COLUMN public_key;
    ALTER TABLE nodes DROP COLUMN joined;
    ALTER TABLE nodes DROP COLUMN not_after;";

/// The embedded store.
#[derive(Debug)]
pub struct SqliteStore {
    database: Mutex<Database>,
    /// Written only while `database` is locked, so that changes arrive in the order of their transactions.
    keys: RwLock<KnownKeys>,
    changes: watch::Sender<()>,
}

/// The keys by which nodes are known, as fingerprints.
#[derive(Debug, PartialEq, Eq)]
struct KnownKeys {
    /// The key for which a node was last certified.
    joined: HashMap<NodeName, String>,
    /// The key that was trusted on first use.
    first_use: HashMap<NodeName, String>,
}

#[derive(Debug)]
struct Database {
    connection: Connection,
    /// The value of `PRAGMA data_version` when `keys` was read. Only commits of other connections change it.
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
        let mut connection = Connection::open(&path).with_context(context)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        let schema = schema(&connection).with_context(context)?;
        if schema > SCHEMA {
            bail!(
                "{} was written by a newer master-agent (schema {schema}, known here: {SCHEMA})",
                path.display()
            );
        }
        connection.execute_batch("PRAGMA synchronous = FULL").with_context(context)?;
        if schema < SCHEMA {
            migrate(&mut connection).with_context(context)?;
        }
        let mut database = Database { connection, version: 0, revocations: None };
        database.version = database.data_version().with_context(context)?;
        let (keys, revocations) = database.known().with_context(context)?;
        database.revocations = revocations;
        let (keys, changes) = (RwLock::new(keys), watch::Sender::new(()));
        Ok(Self { database: Mutex::new(database), keys, changes })
    }

    fn database(&self) -> MutexGuard<'_, Database> {
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies to memory what has just been committed. `change` returns whether that concerns anybody.
    fn committed(&self, database: MutexGuard<'_, Database>, change: impl FnOnce(&mut KnownKeys) -> bool) {
        let concerns = change(&mut self.keys.write().unwrap_or_else(PoisonError::into_inner));
        drop(database);
        if concerns {
            self.changes.send_replace(());
        }
    }
}

impl KnownKeys {
    /// Whether every node that had a key in `before` still has that key.
    fn keep_those_of(&self, before: &Self) -> bool {
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

    /// Reads the keys of nodes, and the version of the list of revoked certificates.
    fn known(&mut self) -> rusqlite::Result<(KnownKeys, Option<i64>)> {
        let transaction = self.connection.transaction()?;
        let keys = KnownKeys {
            joined: fingerprints(&transaction, "SELECT name, fingerprint FROM nodes")?,
            first_use: fingerprints(&transaction, "SELECT name, fingerprint FROM first_use")?,
        };
        Ok((keys, revocations_version(&transaction)?))
    }
}

impl From<rusqlite::Error> for TokenError {
    fn from(e: rusqlite::Error) -> Self {
        Self::Store(e.to_string())
    }
}

impl Store for SqliteStore {
    fn joined_key(&self, node: &NodeName) -> Option<String> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).joined.get(node).cloned()
    }

    fn first_use_key(&self, node: &NodeName) -> Option<String> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).first_use.get(node).cloned()
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
        self.committed(database, |keys| {
            let concerns = revoked || !known.keep_those_of(keys);
            *keys = known;
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
        listed: &dyn Fn(&NodeName) -> bool,
    ) -> Result<NodeName, TokenError> {
        let mut database = self.database();
        let transaction = database.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let Presented { bound, expired, used_by } = presented(&transaction, id, hash, now)?;
        if let Some(node) = used_by {
            let same_host = !expired
                && asked.is_none_or(|asked| *asked == node)
                && joined_key(&transaction, &node)?.is_some_and(|joined| joined == key);
            return if same_host { Ok(node) } else { Err(TokenError::Used) };
        }
        if expired {
            return Err(TokenError::Expired);
        }
        let node = match (bound, asked) {
            (Some(bound), Some(asked)) if bound != *asked => {
                return Err(TokenError::WrongNode { bound, asked: asked.clone() });
            }
            (Some(bound), _) => bound,
            (None, Some(asked)) if !listed(asked) => return Err(TokenError::NotListed(asked.clone())),
            (None, Some(asked)) if joined_key(&transaction, asked)?.is_some() => {
                return Err(TokenError::Joined(asked.clone()));
            }
            (None, Some(asked)) => asked.clone(),
            (None, None) => return Err(TokenError::NoName),
        };
        transaction.execute("UPDATE tokens SET used_by = ?2 WHERE id = ?1", [id, node.as_str()])?;
        transaction.commit()?;
        Ok(node)
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
        let shown = fingerprint(key);
        transaction.execute(
            "INSERT OR REPLACE INTO nodes (name, fingerprint) VALUES (?1, ?2)",
            [node.as_str(), shown.as_str()],
        )?;
        transaction.execute("DELETE FROM addresses WHERE node = ?1", [node.as_str()])?;
        for address in addresses {
            transaction.execute(
                "INSERT OR REPLACE INTO addresses (address, node) VALUES (?1, ?2)",
                [address.to_string().as_str(), node.as_str()],
            )?;
        }
        transaction.commit()?;
        self.committed(database, |keys| {
            let former = keys.joined.insert(node.clone(), shown.clone());
            former.is_some_and(|former| former != shown)
        });
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
        self.committed(database, |keys| {
            let former = keys.first_use.insert(node.clone(), recorded.clone());
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
        self.committed(database, |keys| {
            keys.first_use.remove(node).is_some() | keys.joined.remove(node).is_some()
        });
        Ok(first_use + joined > 0)
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

fn schema(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("PRAGMA user_version", [], |row| row.get(0))
}

/// Brings the tables to [`SCHEMA`].
fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Another process may have done it in the meantime.
    if schema(&transaction)? == 1 {
        transaction.execute_batch(FROM_1)?;
    }
    transaction.execute_batch(&format!("{TABLES} PRAGMA user_version = {SCHEMA}"))?;
    transaction.commit()
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
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use russh::keys::PrivateKey;

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
                            let store = own.as_ref().unwrap_or(store);
                            store.redeem(id, &[7; 32], Some(&asked), "SHA256:k", at(0), &|_| true)
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
    fn records_outlive_the_process_in_files_only_their_owner_can_read() {
        let dir = TempDir::new();
        let key = new_key();
        let address = "10.0.0.5".parse().unwrap();
        {
            let store = SqliteStore::open(&dir.0).unwrap();
            store.remember_node(&node("n1"), key.public_key(), &[address]).unwrap();
            assert_eq!(store.remember_first_use(&node("n2"), "SHA256:a").unwrap(), "SHA256:a");
            assert_eq!(store.remember_first_use(&node("n2"), "SHA256:b").unwrap(), "SHA256:a");
        }
        let store = SqliteStore::open(&dir.0).unwrap();
        assert_eq!(store.joined_key(&node("n1")), Some(fingerprint(key.public_key())));
        assert_eq!(store.address_owner(&address).unwrap(), Some(node("n1")));
        assert_eq!(store.first_use_key(&node("n2")).as_deref(), Some("SHA256:a"), "the first stays");
        let again = new_key();
        store.remember_node(&node("n1"), again.public_key(), &[]).unwrap();
        assert_eq!(store.joined_key(&node("n1")), Some(fingerprint(again.public_key())));
        assert_eq!(store.address_owner(&address).unwrap(), None);
        assert!(store.forget_node(&node("n1")).unwrap());
        assert!(!store.forget_node(&node("n1")).unwrap());
        assert_eq!(store.joined_key(&node("n1")), None);
        for entry in std::fs::read_dir(&dir.0).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
        }
    }

    /// The keys as a new process would read them.
    fn stored(dir: &TempDir) -> KnownKeys {
        SqliteStore::open(&dir.0).unwrap().keys.into_inner().unwrap()
    }

    #[test]
    fn memory_has_what_this_and_other_processes_have_committed() {
        let dir = TempDir::new();
        let (store, other) = (SqliteStore::open(&dir.0).unwrap(), SqliteStore::open(&dir.0).unwrap());
        let (first, second) = (new_key(), new_key());
        let remember = |store: &SqliteStore, key: &PrivateKey| {
            store.remember_node(&node("n1"), key.public_key(), &[]).unwrap();
        };
        let mut changes = store.changes();
        remember(&store, &second);
        assert!(!changes.has_changed().unwrap(), "the first key of a node concerns nobody");
        remember(&store, &first);
        assert!(changes.has_changed().unwrap());
        assert!(!store.refresh().unwrap(), "its own changes are known already");
        assert_eq!(*store.keys.read().unwrap(), stored(&dir));
        changes.mark_unchanged();

        remember(&other, &second);
        other.remember_first_use(&node("n2"), "SHA256:a").unwrap();
        assert_eq!(store.joined_key(&node("n1")), Some(fingerprint(first.public_key())));
        assert!(!changes.has_changed().unwrap());
        // A change of its own leaves what it has not read yet to the next refresh.
        store.remember_first_use(&node("n3"), "SHA256:c").unwrap();
        assert!(store.refresh().unwrap());
        assert!(changes.has_changed().unwrap());
        assert_eq!(store.joined_key(&node("n1")), Some(fingerprint(second.public_key())));
        assert_eq!(*store.keys.read().unwrap(), stored(&dir));

        assert!(other.forget_node(&node("n1")).unwrap());
        assert!(store.refresh().unwrap());
        assert_eq!(store.joined_key(&node("n1")), None);
        assert!(!store.refresh().unwrap());
    }

    #[test]
    fn only_what_can_concern_a_tunnel_wakes_those_who_wait() {
        let dir = TempDir::new();
        let (store, other) = (SqliteStore::open(&dir.0).unwrap(), SqliteStore::open(&dir.0).unwrap());
        let mut changes = store.changes();
        let (first, second) = (new_key(), new_key());
        let remember = |store: &SqliteStore, name: &str, key: &PrivateKey| {
            store.remember_node(&node(name), key.public_key(), &[]).unwrap();
        };
        let revoke = |store: &SqliteStore, version: u64| {
            store.change_revocations(&mut |_| Ok(Some((version, vec![])))).unwrap();
        };
        let mut woken = |what: &str, change: &dyn Fn(&SqliteStore)| {
            [&store, &other].map(|by| {
                change(by);
                assert_eq!(store.refresh().unwrap(), std::ptr::eq(by, &other), "{what}");
                let woken = changes.has_changed().unwrap();
                changes.mark_unchanged();
                woken
            })
        };
        let number = std::cell::Cell::new(0);
        let next = || {
            number.set(number.get() + 1);
            number.get()
        };
        let join = |by: &SqliteStore| remember(by, &format!("n{}", next()), &first);
        assert_eq!(woken("first keys", &join), [false, false]);
        assert_eq!(woken("the same keys again", &|by| remember(by, "n1", &first)), [false, false]);
        let keys = std::cell::RefCell::new(vec![&first, &second]);
        let replace = |by: &SqliteStore| remember(by, "n1", keys.borrow_mut().pop().unwrap());
        assert_eq!(woken("other keys", &replace), [true, true]);
        let token = |by: &SqliteStore| by.add_token(&next().to_string(), &[1; 32], None, at(60)).unwrap();
        assert_eq!(woken("tokens", &token), [false, false]);
        assert_eq!(woken("revocations", &|by| revoke(by, next())), [true, true]);
        let forget = |by: &SqliteStore| {
            let known = if std::ptr::eq(by, &other) { "n2" } else { "n1" };
            assert!(by.forget_node(&node(known)).unwrap());
        };
        assert_eq!(woken("forgotten nodes", &forget), [true, true]);
    }

    #[test]
    fn a_host_whose_answer_was_lost_asks_again_and_nobody_else_does() {
        let dir = TempDir::new();
        let store = SqliteStore::open(&dir.0).unwrap();
        let (key, other) = (new_key(), new_key());
        let (shown, others) = (fingerprint(key.public_key()), fingerprint(other.public_key()));
        for (id, bound) in [("bound", Some(node("n1"))), ("unbound", None)] {
            store.add_token(id, &[1; 32], bound.as_ref(), at(60)).unwrap();
            let redeem = |secret: u8, asked: Option<&str>, key: &str, seconds: u64| {
                let asked = asked.map(node);
                store.redeem(id, &[secret; 32], asked.as_ref(), key, at(seconds), &|_| true)
            };
            assert_eq!(redeem(1, Some("n1"), &shown, 0).unwrap(), node("n1"));
            // The master did not get as far as to certify the key.
            assert!(matches!(redeem(1, Some("n1"), &shown, 1), Err(TokenError::Used)), "{id}");
            store.remember_node(&node("n1"), key.public_key(), &[]).unwrap();
            assert_eq!(redeem(1, Some("n1"), &shown, 1).unwrap(), node("n1"));
            assert_eq!(redeem(1, None, &shown, 59).unwrap(), node("n1"));
            assert_eq!(store.check(id, &[1; 32], at(59)).unwrap(), Some(node("n1")));
            for (secret, asked, key, seconds) in
                [(1, Some("n1"), &others, 1), (1, Some("n2"), &shown, 1), (1, Some("n1"), &shown, 60)]
            {
                let refused = redeem(secret, asked, key, seconds);
                assert!(matches!(refused, Err(TokenError::Used)), "{id}: {refused:?}");
            }
            assert!(matches!(redeem(2, Some("n1"), &shown, 1), Err(TokenError::Unknown)));
            assert!(matches!(store.check(id, &[2; 32], at(1)), Err(TokenError::Unknown)));
            assert!(matches!(store.check(id, &[1; 32], at(60)), Err(TokenError::Expired)));
            // A used token is worth nothing once its node has joined with another key or was forgotten.
            store.remember_node(&node("n1"), other.public_key(), &[]).unwrap();
            assert!(matches!(redeem(1, Some("n1"), &shown, 1), Err(TokenError::Used)));
            assert!(store.forget_node(&node("n1")).unwrap());
            for key in [&shown, &others] {
                assert!(matches!(redeem(1, Some("n1"), key, 1), Err(TokenError::Used)));
            }
        }
    }

    #[test]
    fn two_processes_agree_on_the_key_of_first_use() {
        let dir = TempDir::new();
        let (store, other) = (SqliteStore::open(&dir.0).unwrap(), SqliteStore::open(&dir.0).unwrap());
        assert_eq!(other.remember_first_use(&node("n1"), "SHA256:a").unwrap(), "SHA256:a");
        assert_eq!(store.first_use_key(&node("n1")), None, "not noticed yet");
        assert_eq!(store.remember_first_use(&node("n1"), "SHA256:b").unwrap(), "SHA256:a");
        assert_eq!(store.first_use_key(&node("n1")).as_deref(), Some("SHA256:a"));
    }

    #[test]
    fn expired_tokens_are_told_apart_for_a_week_and_then_forgotten() {
        let dir = TempDir::new();
        let store = SqliteStore::open(&dir.0).unwrap();
        store.add_token("a", &[1; 32], Some(&node("n1")), at(60)).unwrap();
        assert_eq!(store.tokens(at(59)).unwrap().len(), 1);
        assert_eq!(store.tokens(at(60)).unwrap(), []);
        let late = store.redeem("a", &[1; 32], None, "SHA256:k", at(60), &|_| true);
        assert!(matches!(late, Err(TokenError::Expired)), "{late:?}");
        store.tokens(at(60 + 7 * 24 * 3600)).unwrap();
        let gone = store.redeem("a", &[1; 32], None, "SHA256:k", at(60 + 7 * 24 * 3600), &|_| true);
        assert!(matches!(gone, Err(TokenError::Unknown)), "{gone:?}");
    }

    #[test]
    fn a_token_whose_binding_cannot_be_read_is_refused() {
        let dir = TempDir::new();
        let store = SqliteStore::open(&dir.0).unwrap();
        store.add_token("a", &[1; 32], Some(&node("n1")), at(60)).unwrap();
        store.database().connection.execute("UPDATE tokens SET node = 'N_1'", []).unwrap();
        let got = store.redeem("a", &[1; 32], Some(&node("n2")), "SHA256:k", at(0), &|_| true);
        assert!(matches!(got, Err(TokenError::Store(_))), "{got:?}");
    }

    /// As builds before 0.1.0 wrote it, of which the first did not know of revocations.
    #[test]
    fn the_tables_of_version_1_are_brought_to_the_present_one() {
        let dir = TempDir::new();
        let key = new_key();
        let former = "
            DROP TABLE revocations; DROP TABLE nodes;
            CREATE TABLE nodes (
                name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, public_key TEXT NOT NULL,
                joined INTEGER NOT NULL, not_after INTEGER NOT NULL
            ) STRICT;
            INSERT INTO nodes VALUES ('n1', 'SHA256:a', 'ssh-ed25519 x', 1, 2);
            PRAGMA user_version = 1;";
        SqliteStore::open(&dir.0).unwrap().database().connection.execute_batch(former).unwrap();
        // Several processes may begin with it.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| SqliteStore::open(&dir.0).unwrap());
            }
        });
        let store = SqliteStore::open(&dir.0).unwrap();
        assert_eq!(store.revocations().unwrap(), None);
        assert_eq!(store.joined_key(&node("n1")).as_deref(), Some("SHA256:a"));
        store.remember_node(&node("n1"), key.public_key(), &[]).unwrap();
        assert_eq!(stored(&dir).joined.get(&node("n1")), Some(&fingerprint(key.public_key())));
    }

    #[test]
    fn a_newer_schema_is_left_alone() {
        let dir = TempDir::new();
        SqliteStore::open(&dir.0)
            .unwrap()
            .database()
            .connection
            .execute_batch("PRAGMA user_version = 99")
            .unwrap();
        assert!(SqliteStore::open(&dir.0).unwrap_err().to_string().contains("newer master-agent"));
    }
}
