//! The database file of the state directory: how it is opened, and what to do when it can't be.
//!
//! It has a write-ahead log, so that whoever reads, such as `master-agent backup`, holds up nobody who writes. The log is
//! a part of the database: a copy of the file alone lacks what was written last.

use std::{io::ErrorKind, path::Path, time::Duration};

use anyhow::{Context, anyhow, bail};
use proto_config::secret_file;
use rusqlite::{Connection, ErrorCode, MAIN_DB};

use super::schema;

/// The name of the file in the state directory.
pub(super) const FILE: &str = "state.sqlite";
/// How long to wait for another process that is writing.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// The least size of a database with anything in it. SQLite takes a shorter file for an empty database.
const LEAST_SIZE: u64 = 512;

/// Opens the database of a state directory. Creates it if it isn't there, and brings its tables to the present version.
pub(super) fn open(state_dir: &Path) -> anyhow::Result<Connection> {
    let path = state_dir.join(FILE);
    // SQLite would create it with the process's umask; its log takes the mode of the file.
    if !path.exists()
        && let Err(error) = secret_file::write_new(&path, b"")
        && error.kind() != ErrorKind::AlreadyExists
    {
        return Err(error).with_context(|| format!("can't create {}", path.display()));
    }
    secret_file::check(&path)?;
    if (1..LEAST_SIZE).contains(&std::fs::metadata(&path)?.len()) {
        return Err(damaged(state_dir, "the file is too short"));
    }
    let failed = |error| explained(state_dir, error);
    let mut connection = Connection::open(&path).map_err(failed)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    if connection.is_readonly(MAIN_DB)? {
        return Err(read_only(state_dir, "the file system or the file is read-only"));
    }
    refuse_newer(schema::version(&connection).map_err(failed)?, &path)?;
    let mode: String =
        connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(failed)?;
    if mode != "wal" {
        bail!(
            "{} can't have a write-ahead log (its journal mode stays {mode:?}): `state_dir` has to be on a local file system",
            path.display()
        );
    }
    connection.execute_batch("PRAGMA synchronous = FULL")?;
    schema::migrate(&mut connection).map_err(failed)?;
    Ok(connection)
}

/// Refuses tables of a version that only a later master-agent knows.
pub(super) fn refuse_newer(found: i64, path: &Path) -> anyhow::Result<()> {
    let known = schema::VERSION;
    if found > known {
        bail!("{} was written by a newer master-agent (schema {found}, known here: {known})", path.display());
    }
    Ok(())
}

/// Says what to do about an error with which the database can't be opened.
pub(super) fn explained(state_dir: &Path, error: rusqlite::Error) -> anyhow::Error {
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => damaged(state_dir, &error.to_string()),
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen) => read_only(state_dir, &error.to_string()),
        Some(_) | None => {
            anyhow::Error::new(error).context(format!("can't open {}", state_dir.join(FILE).display()))
        }
    }
}

fn damaged(state_dir: &Path, error: &str) -> anyhow::Error {
    let (path, directory) = (state_dir.join(FILE), state_dir.display());
    anyhow!(
        "{path} is damaged: {error}. master-agent has changed nothing. Move {directory} away and run `master-agent restore FILE` with a backup; without one, move {path}* away and run `{anew}`, after which nodes have to join anew, and certificates to be revoked anew",
        path = path.display(),
        anew = without_records(state_dir)
    )
}

/// The command after which the agent goes on with its keys and an empty database.
pub(super) fn without_records(state_dir: &Path) -> String {
    format!("install -m 600 /dev/null {}", state_dir.join(FILE).display())
}

fn read_only(state_dir: &Path, error: &str) -> anyhow::Error {
    let (path, directory) = (state_dir.join(FILE), state_dir.display());
    anyhow!(
        "{} can't be written: {error}. The agent needs {directory} on a file system that is mounted read-write, and the right to write there",
        path.display()
    )
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::identity::{
        sqlite::SqliteStore,
        store::Store,
        tests::{TempDir, new_key},
    };

    #[test]
    fn a_damaged_database_is_an_error_with_the_ways_out_and_stays_as_it_is() {
        let dir = TempDir::new();
        let path = dir.0.join(FILE);
        SqliteStore::open(&dir.0)
            .unwrap()
            .remember_node(&"n1".parse().unwrap(), new_key().public_key(), &[])
            .unwrap();
        let good = std::fs::read(&path).unwrap();
        let page = 4096;
        let pages_overwritten = [good[..page].to_vec(), vec![0xff; good.len() - page]].concat();
        for (what, bytes) in [
            ("another file", b"something else\n".repeat(1000)),
            ("cut off in the header", good[..50].to_vec()),
            ("pages overwritten", pages_overwritten),
        ] {
            std::fs::write(&path, &bytes).unwrap();
            let error = format!("{:#}", SqliteStore::open(&dir.0).unwrap_err());
            for part in
                [&*path.to_string_lossy(), "is damaged", "master-agent restore FILE", "install -m 600"]
            {
                assert!(error.contains(part), "{what}: no {part:?} in {error}");
            }
            assert_eq!(std::fs::read(&path).unwrap(), bytes, "{what}");
        }
        std::fs::write(&path, good).unwrap();
        SqliteStore::open(&dir.0).unwrap();
    }

    #[test]
    fn a_database_of_an_earlier_release_gets_a_log_while_its_process_reads() {
        let dir = TempDir::new();
        drop(open(&dir.0).unwrap());
        let former = Connection::open(dir.0.join(FILE)).unwrap();
        former
            .execute_batch("PRAGMA journal_mode = DELETE; INSERT INTO first_use VALUES ('n1', 'a')")
            .unwrap();
        let first_use = |connection: &Connection| -> i64 {
            connection.query_row("SELECT count(*) FROM first_use", [], |row| row.get(0)).unwrap()
        };
        std::thread::scope(|scope| {
            former.execute_batch("BEGIN; SELECT count(*) FROM first_use").unwrap();
            let opened = scope.spawn(|| open(&dir.0).unwrap());
            thread::sleep(Duration::from_millis(50));
            former.execute_batch("COMMIT").unwrap();
            let present = opened.join().unwrap();
            present.execute_batch("INSERT INTO first_use VALUES ('n2', 'b')").unwrap();
            assert_eq!((first_use(&present), first_use(&former)), (2, 2));
        });
    }
}
