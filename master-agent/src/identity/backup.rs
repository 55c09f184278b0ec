//! Backups of the master's state: one file that holds all that the master must not lose.
//!
//! A backup is an SQLite database: a consistent copy of the master's own, with two tables more. `backup` has one row,
//! with the version of this format and the time; `backup_files` has the other files of the state directory.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context, bail};
use proto_config::secret_file;
use rusqlite::{Connection, OpenFlags, params};
use zeroize::Zeroizing;

use super::{
    authorities::{self, KEYS},
    database, schema,
    state::{self, Found},
};

/// The version of the tables that only a backup has.
const FORMAT: i64 = 1;

const ADD_TABLES: &str = "
    CREATE TABLE backup (format INTEGER NOT NULL, made TEXT NOT NULL) STRICT;
    CREATE TABLE backup_files (name TEXT PRIMARY KEY, content TEXT NOT NULL) STRICT;";
/// Without VACUUM, the keys would stay in unused pages of the database.
const DROP_TABLES: &str = "DROP TABLE backup; DROP TABLE backup_files; VACUUM;";

/// A backup that has been checked.
struct Backup {
    connection: Connection,
    made: String,
    keys: Vec<(&'static str, Zeroizing<String>)>,
}

/// Writes a backup to `file`, which must not exist. The agent may run meanwhile.
pub fn write(state_dir: &Path, file: &Path, now: SystemTime) -> anyhow::Result<()> {
    if state::find(state_dir)? == Found::Nothing {
        bail!("there is no state in {}", state_dir.display());
    }
    if file.try_exists().with_context(|| format!("can't write {}", file.display()))? {
        bail!("{} exists already: name a file that does not exist yet", file.display());
    }
    let connection = database::open(state_dir)?;
    let copied = copy(&connection, file, |copy| {
        copy.execute_batch(ADD_TABLES)?;
        let made = humantime::format_rfc3339_seconds(now).to_string();
        copy.execute("INSERT INTO backup (format, made) VALUES (?1, ?2)", params![FORMAT, made])?;
        for name in KEYS {
            let key = secret_file::read(&state_dir.join(name))?;
            copy.execute(
                "INSERT INTO backup_files (name, content) VALUES (?1, ?2)",
                params![name, key.as_str()],
            )?;
        }
        Ok(())
    });
    copied
        .and_then(|temporary| Ok(secret_file::publish(&temporary, file)?))
        .with_context(|| format!("can't write {}", file.display()))
}

/// Restores a backup into a state directory that has no state. Returns when the backup was made. The agent must not run.
///
/// If this ends early, the directory counts as unfinished, which the agent refuses and another restore completes.
pub fn restore(state_dir: &Path, file: &Path) -> anyhow::Result<String> {
    let backup = Backup::read(file).with_context(|| format!("can't restore {}", file.display()))?;
    secret_file::create_directory(state_dir)?;
    let _lock = state::lock(state_dir)?;
    state::begin_restore(state_dir)?;
    for (name, key) in &backup.keys {
        secret_file::replace(&state_dir.join(name), key.as_bytes())?;
    }
    let path = state_dir.join(database::FILE);
    let temporary = copy(&backup.connection, &path, |copy| Ok(copy.execute_batch(DROP_TABLES)?))
        .with_context(|| format!("can't write {}", path.display()))?;
    // SQLite would take what is left of a former database for the log of this one.
    for end in ["-wal", "-shm", "-journal"] {
        remove_if_there(&state_dir.join(format!("{}{end}", database::FILE)))?;
    }
    std::fs::rename(&temporary, &path).with_context(|| format!("can't write {}", path.display()))?;
    state::finish_restore(state_dir)?;
    Ok(backup.made)
}

impl Backup {
    fn read(file: &Path) -> anyhow::Result<Self> {
        secret_file::check(file)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(std::path::absolute(file)?, flags)?;
        let found: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
        if found != "ok" {
            bail!("it is damaged: {found}");
        }
        let (format, made): (i64, String) = connection
            .query_row("SELECT format, made FROM backup", [], |row| Ok((row.get(0)?, row.get(1)?)))
            .context("it was not written by `master-agent backup`")?;
        if format > FORMAT {
            bail!("it was written by a newer master-agent (format {format}, known here: {FORMAT})");
        }
        database::refuse_newer(schema::version(&connection)?, file)?;
        let mut keys = Vec::new();
        for name in KEYS {
            let content: String = connection
                .query_row("SELECT content FROM backup_files WHERE name = ?1", [name], |row| row.get(0))
                .with_context(|| format!("it has no {name}"))?;
            let key = Zeroizing::new(content);
            authorities::parse(&key, Path::new(name))?;
            keys.push((name, key));
        }
        Ok(Self { connection, made, keys })
    }
}

/// Copies a database to a file beside `path`, of mode 0600, and changes the copy. Returns its name.
fn copy(
    from: &Connection,
    path: &Path,
    change: impl FnOnce(&Connection) -> anyhow::Result<()>,
) -> anyhow::Result<PathBuf> {
    // SQLite takes only text, and an absolute path is no URI.
    let mut name = std::path::absolute(path)?.into_os_string();
    name.push(format!(".{:016x}", rand::random::<u64>()));
    let Ok(name) = name.into_string() else { bail!("the path is not UTF-8") };
    let temporary = PathBuf::from(&name);
    // SQLite would create it with the process's umask; its journal takes the mode of the file.
    secret_file::write_new(&temporary, b"")?;
    let copied = fill(from, &name, change);
    if copied.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    copied.map(|()| temporary)
}

fn fill(
    from: &Connection,
    name: &str,
    change: impl FnOnce(&Connection) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    from.execute("VACUUM INTO ?1", [name])?;
    let copy = Connection::open(name)?;
    change(&copy)?;
    copy.close().map_err(|(_, error)| error)?;
    Ok(File::open(name)?.sync_all()?)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::PermissionsExt,
        sync::atomic::{AtomicBool, Ordering},
    };

    use proto::NodeName;

    use super::*;
    use crate::identity::{
        state::MasterState,
        store::Store,
        tests::{TempDir, new_key},
    };

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH
    }

    fn node(number: u32) -> NodeName {
        format!("n{number}").parse().unwrap()
    }

    #[test]
    fn backups_that_are_made_under_load_are_restored_whole() {
        let dir = TempDir::new();
        let path = |name: &str| dir.0.join(name);
        let state = MasterState::open(&path("state")).unwrap();
        let (key, done) = (new_key(), AtomicBool::new(false));
        let backups = [path("first"), path("second"), path("third")];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0.. {
                    state.store.remember_node(&node(number), key.public_key(), &[]).unwrap();
                    state.store.remember_first_use(&node(number), "SHA256:a").unwrap();
                    if done.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
            let made: Vec<_> = backups.iter().map(|file| write(&path("state"), file, now())).collect();
            done.store(true, Ordering::Relaxed);
            made.into_iter().for_each(Result::unwrap);
        });
        assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 4, "no temporary file is left");
        for (number, backup) in backups.iter().enumerate() {
            assert_eq!(std::fs::metadata(backup).unwrap().permissions().mode() & 0o777, 0o600);
            let restored = path(&format!("restored{number}"));
            assert_eq!(restore(&restored, backup).unwrap(), "1970-01-01T00:00:00Z");
            assert_eq!(std::fs::read_dir(&restored).unwrap().count(), 3, "no temporary file is left");
            let bytes = std::fs::read(restored.join(database::FILE)).unwrap();
            assert!(
                !bytes.windows(11).any(|part| part == b"PRIVATE KEY"),
                "the keys are not in the database"
            );
            let again = MasterState::open(&restored).unwrap();
            assert_eq!(again.authorities.user_ca_pin(), state.authorities.user_ca_pin());
            assert_eq!(again.authorities.host_ca(), state.authorities.host_ca());
            // A key of first use comes after that of the join.
            let joined = (0..).take_while(|n| again.store.joined_key(&node(*n)).is_some()).count();
            let first_use = (0..).take_while(|n| again.store.first_use_key(&node(*n)).is_some()).count();
            assert!(joined == first_use || joined == first_use + 1, "{joined} and {first_use}");
        }
    }

    #[test]
    fn neither_a_file_nor_a_state_is_overwritten() {
        let dir = TempDir::new();
        let (state, file, other) = (dir.0.join("state"), dir.0.join("backup"), dir.0.join("other"));
        let none = write(&state, &file, now()).unwrap_err().to_string();
        assert!(none.contains("there is no state") && !state.exists() && !file.exists(), "{none}");
        let pin = MasterState::open(&state).unwrap().authorities.user_ca_pin();
        write(&state, &file, now()).unwrap();
        let before = std::fs::read(&file).unwrap();
        let error = write(&state, &file, now()).unwrap_err().to_string();
        assert!(error.contains("exists already"), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), before);

        let other_pin = MasterState::open(&other).unwrap().authorities.user_ca_pin();
        let error = restore(&other, &file).unwrap_err().to_string();
        assert!(
            error.contains("has a state already") && error.contains("move the directory away"),
            "{error}"
        );
        assert_ne!(pin, other_pin);
        assert_eq!(MasterState::open(&other).unwrap().authorities.user_ca_pin(), other_pin);
    }

    #[test]
    fn a_file_that_is_no_good_backup_is_refused_before_anything_is_written() {
        let dir = TempDir::new();
        let (state, good, bad) = (dir.0.join("state"), dir.0.join("good"), dir.0.join("bad"));
        drop(MasterState::open(&state).unwrap());
        write(&state, &good, now()).unwrap();
        let bytes = std::fs::read(&good).unwrap();
        let changed = |sql: &str| {
            secret_file::replace(&bad, &bytes).unwrap();
            Connection::open(&bad).unwrap().execute_batch(sql).unwrap();
            std::fs::read(&bad).unwrap()
        };
        let newer = changed("PRAGMA user_version = 99");
        for (bytes, why) in [
            (b"something else\n".repeat(1000), "not a database"),
            (bytes[..bytes.len() / 2].to_vec(), "malformed"),
            (changed("UPDATE backup SET format = 2"), "newer master-agent"),
            (newer, "newer master-agent"),
            (changed("DELETE FROM backup_files WHERE name = 'user_ca'"), "it has no user_ca"),
            (changed("UPDATE backup_files SET content = 'x'"), "host_ca is not an OpenSSH private key"),
            // The last one, since SQLite makes a log beside a database that has one.
            (std::fs::read(state.join(database::FILE)).unwrap(), "not written by `master-agent backup`"),
        ] {
            secret_file::replace(&bad, &bytes).unwrap();
            let error = format!("{:#}", restore(&dir.0.join("restored"), &bad).unwrap_err());
            assert!(error.contains(&format!("can't restore {}", bad.display())), "{error}");
            assert!(error.contains(why), "no {why:?} in {error}");
            assert!(!dir.0.join("restored").exists(), "{why}");
        }
        std::fs::set_permissions(&good, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = format!("{:#}", restore(&dir.0.join("restored"), &good).unwrap_err());
        assert!(error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_restore_that_ended_early_is_refused_by_the_agent_and_completed_by_another() {
        let dir = TempDir::new();
        let (state, file, restored) = (dir.0.join("state"), dir.0.join("backup"), dir.0.join("restored"));
        let pin = MasterState::open(&state).unwrap().authorities.user_ca_pin();
        write(&state, &file, now()).unwrap();
        secret_file::create_directory(&restored).unwrap();
        state::begin_restore(&restored).unwrap();
        secret_file::write_new(&restored.join("host_ca"), b"half of a k").unwrap();
        secret_file::write_new(&restored.join("state.sqlite-wal"), b"left over").unwrap();
        let error = MasterState::open(&restored).unwrap_err().to_string();
        assert!(error.contains("run `master-agent restore FILE` again"), "{error}");
        restore(&restored, &file).unwrap();
        assert_eq!(MasterState::open(&restored).unwrap().authorities.user_ca_pin(), pin);
    }
}
