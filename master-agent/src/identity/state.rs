//! The state directory as a whole. It is made when it is empty and read when it is whole, and everything in between is an
//! error: a lost key or a lost database is never replaced by a new one.

use std::{fs::File, io, path::Path};

use anyhow::{Context, anyhow, bail};
use proto_config::secret_file;

use super::{
    authorities::{Authorities, KEYS},
    database,
    sqlite::SqliteStore,
};

/// The file that is there while a new state is made. Nothing has been signed with it yet.
const CREATING: &str = "creating";
/// The file that is there while a backup is restored.
const RESTORING: &str = "restoring";

/// The CA keys and the records of nodes and tokens, none of which the master may lose.
#[derive(Debug)]
pub struct MasterState {
    pub authorities: Authorities,
    pub store: SqliteStore,
}

/// The state of a state directory that may be opened or filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing, or what is left of a new state that could not be made.
    Nothing,
    Whole,
}

impl MasterState {
    /// Reads a state directory. Makes a new state if the directory is empty.
    pub fn open(state_dir: &Path) -> anyhow::Result<Self> {
        secret_file::create_directory(state_dir)?;
        let _lock = lock(state_dir)?;
        let found = find(state_dir)?;
        if found == Found::Nothing {
            mark(state_dir, CREATING)?;
        }
        let state = Self {
            authorities: Authorities::load_or_create(state_dir)?,
            store: SqliteStore::open(state_dir)?,
        };
        if found == Found::Nothing {
            unmark(state_dir, CREATING)?;
        }
        Ok(state)
    }
}

/// Waits until no other process makes or restores the state. The lock ends with the file.
pub(super) fn lock(state_dir: &Path) -> anyhow::Result<File> {
    let locked = File::open(state_dir).and_then(|directory| directory.lock().map(|()| directory));
    locked.with_context(|| format!("can't lock {}", state_dir.display()))
}

/// Finds out what is in a state directory. Part of a state is an error, which names the ways out.
pub(super) fn find(state_dir: &Path) -> anyhow::Result<Found> {
    let shown = state_dir.display();
    if state_dir.join(RESTORING).exists() {
        bail!("a restore into {shown} has not finished: run `master-agent restore FILE` again");
    }
    let (mut present, mut missing) = (Vec::new(), Vec::new());
    for name in KEYS.into_iter().chain([database::FILE]) {
        match secret_file::check(&state_dir.join(name)) {
            Ok(()) => present.push(name),
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(name),
            Err(error) => return Err(error.into()),
        }
    }
    if present.is_empty() || state_dir.join(CREATING).exists() {
        return Ok(Found::Nothing);
    }
    if missing.is_empty() {
        return Ok(Found::Whole);
    }
    Err(incomplete(state_dir, &present, &missing))
}

fn incomplete(state_dir: &Path, present: &[&str], missing: &[&str]) -> anyhow::Error {
    let without_backup = if missing == [database::FILE] {
        let anew = database::without_records(state_dir);
        format!("run `{anew}`, after which nodes have to join anew, and certificates to be revoked anew")
    } else {
        "leave the directory empty, after which master-agent makes new keys, and nodes have to join anew"
            .to_owned()
    };
    anyhow!(
        "{} has {} but lacks {}, and master-agent replaces neither by itself. Move the directory away and run `master-agent restore FILE` with a backup; without one, {without_backup}",
        state_dir.display(),
        present.join(", "),
        missing.join(", ")
    )
}

/// Begins to fill a directory that has no state, or goes on with one that a restore has not filled.
pub(super) fn begin_restore(state_dir: &Path) -> anyhow::Result<()> {
    if state_dir.join(RESTORING).exists() {
        return Ok(());
    }
    if find(state_dir)? == Found::Whole {
        bail!(
            "{} has a state already: move the directory away, and restore into an empty one",
            state_dir.display()
        );
    }
    mark(state_dir, RESTORING)
}

/// Ends what [`begin_restore`] has begun.
pub(super) fn finish_restore(state_dir: &Path) -> anyhow::Result<()> {
    unmark(state_dir, CREATING)?;
    unmark(state_dir, RESTORING)
}

fn mark(state_dir: &Path, name: &str) -> anyhow::Result<()> {
    Ok(secret_file::replace(&state_dir.join(name), b"")?)
}

fn unmark(state_dir: &Path, name: &str) -> anyhow::Result<()> {
    match secret_file::remove(&state_dir.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use russh::keys::ssh_key::LineEnding;

    use super::*;
    use crate::identity::{
        store::Store,
        tests::{TempDir, new_key},
    };

    /// The files of a directory. The database's log stays if two processes close it at the same time.
    fn files(state_dir: &Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(state_dir).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = entries.filter(|path| !path.to_string_lossy().contains(".sqlite-")).collect();
        files.sort();
        files
    }

    #[test]
    fn of_many_processes_one_makes_the_state() {
        let dir = TempDir::new();
        let state = dir.0.join("state");
        let pins: Vec<String> = std::thread::scope(|scope| {
            let open = || MasterState::open(&state).unwrap().authorities.user_ca_pin();
            let tasks: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            tasks.into_iter().map(|task| task.join().unwrap()).collect()
        });
        assert!(pins.iter().all(|pin| *pin == pins[0]), "{pins:?}");
        let names = ["host_ca", "host_ca.pub", "state.sqlite", "user_ca", "user_ca.pub"];
        assert_eq!(files(&state), names.map(|name| state.join(name)));
    }

    #[test]
    fn what_is_lost_is_an_error_and_not_made_anew() {
        let dir = TempDir::new();
        let node = "n1".parse().unwrap();
        let state = MasterState::open(&dir.0).unwrap();
        state.store.remember_node(&node, new_key().public_key(), &[]).unwrap();
        let pin = state.authorities.user_ca_pin();
        drop(state);
        for name in KEYS.into_iter().chain([database::FILE]) {
            let (path, away) = (dir.0.join(name), dir.0.join("away"));
            std::fs::rename(&path, &away).unwrap();
            let before = files(&dir.0);
            let error = MasterState::open(&dir.0).unwrap_err().to_string();
            for part in
                [format!("lacks {name}").as_str(), "Move the directory away", "master-agent restore FILE"]
            {
                assert!(error.contains(part), "no {part:?} in {error}");
            }
            assert_eq!(files(&dir.0), before, "{name}");
            std::fs::rename(&away, &path).unwrap();
        }
        let state = MasterState::open(&dir.0).unwrap();
        assert_eq!(state.authorities.user_ca_pin(), pin);
        assert!(state.store.joined_key(&node).is_some());
        drop(state);
        // The way out that the error names for a lost database.
        secret_file::replace(&dir.0.join(database::FILE), b"").unwrap();
        let state = MasterState::open(&dir.0).unwrap();
        assert_eq!((state.authorities.user_ca_pin(), state.store.joined_key(&node)), (pin, None));
    }

    #[test]
    fn a_new_state_that_was_not_completed_is() {
        let dir = TempDir::new();
        let key = new_key().to_openssh(LineEnding::LF).unwrap();
        secret_file::write_new(&dir.0.join(CREATING), b"").unwrap();
        secret_file::write_new(&dir.0.join("host_ca"), key.as_bytes()).unwrap();
        MasterState::open(&dir.0).unwrap();
        assert_eq!(secret_file::read(&dir.0.join("host_ca")).unwrap().as_str(), key.as_str());
        assert_eq!(find(&dir.0).unwrap(), Found::Whole);
        std::fs::remove_file(dir.0.join("user_ca")).unwrap();
        assert!(MasterState::open(&dir.0).is_err(), "it is no longer new");
    }
}
