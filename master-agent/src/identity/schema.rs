//! The tables of the database, and the steps that bring those of an earlier version to the present one.

use rusqlite::{Connection, TransactionBehavior};

/// The version to which all steps together lead.
pub(super) const VERSION: i64 = STEPS.len() as i64;

/// The steps from each version to the next one. The first makes version 1 of an empty database. What has been released
/// never changes: a change of the tables is a further step at the end. It only adds to them, since the former process
/// of a reload uses them until its last connection has ended.
const STEPS: &[&str] = &[
    "CREATE TABLE tokens (
        id TEXT PRIMARY KEY, hash BLOB NOT NULL, node TEXT, expires INTEGER NOT NULL, used_by TEXT
    ) STRICT;
    CREATE TABLE nodes (
        name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, public_key TEXT NOT NULL,
        joined INTEGER NOT NULL, not_after INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE addresses (
        address TEXT PRIMARY KEY, node TEXT NOT NULL
    ) STRICT;
    CREATE TABLE first_use (name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) STRICT;",
    // Version 1 came before the first release. Nothing read the columns, and some of its databases have the table.
    "ALTER TABLE nodes DROP COLUMN public_key;
    ALTER TABLE nodes DROP COLUMN joined;
    ALTER TABLE nodes DROP COLUMN not_after;
    CREATE TABLE IF NOT EXISTS revocations (
        id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL, list BLOB NOT NULL
    ) STRICT;",
    // `until` is in milliseconds since 1970.
    "CREATE TABLE drains (name TEXT PRIMARY KEY, until INTEGER NOT NULL) STRICT;",
];

/// The version of a database; 0 for one without tables.
pub(super) fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("PRAGMA user_version", [], |row| row.get(0))
}

/// Takes the steps that a database has not taken yet, each in a transaction of its own.
pub(super) fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let from = version(connection)?;
    for (step, number) in STEPS.iter().zip(1..).filter(|(_, number)| *number > from) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Another process may have taken it in the meantime.
        if version(&transaction)? < number {
            transaction.execute_batch(step)?;
            transaction.pragma_update(None, "user_version", number)?;
            transaction.commit()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The statements that make the tables of a database.
    fn tables(connection: &Connection) -> Vec<String> {
        let mut query =
            connection.prepare("SELECT sql FROM sqlite_schema WHERE sql NOT NULL ORDER BY name").unwrap();
        query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    }

    #[test]
    fn each_version_leads_to_the_same_tables_and_one_that_is_present_is_left_alone() {
        let mut fresh = Connection::open_in_memory().unwrap();
        migrate(&mut fresh).unwrap();
        assert_eq!(version(&fresh).unwrap(), VERSION);
        for (from, number) in (1..=STEPS.len()).zip(1_i64..) {
            let mut former = Connection::open_in_memory().unwrap();
            for step in &STEPS[..from] {
                former.execute_batch(step).unwrap();
            }
            former.pragma_update(None, "user_version", number).unwrap();
            migrate(&mut former).unwrap();
            assert_eq!(tables(&former), tables(&fresh), "from version {from}");
            assert_eq!(version(&former).unwrap(), VERSION);
        }
    }

    #[test]
    fn a_step_that_fails_leaves_the_version_before_it() {
        let mut connection = Connection::open_in_memory().unwrap();
        // The second step finds no column that it could drop.
        connection
            .execute_batch("CREATE TABLE nodes (name TEXT PRIMARY KEY) STRICT; PRAGMA user_version = 1")
            .unwrap();
        let before = tables(&connection);
        assert!(migrate(&mut connection).is_err());
        assert_eq!((version(&connection).unwrap(), tables(&connection)), (1, before));
    }
}
