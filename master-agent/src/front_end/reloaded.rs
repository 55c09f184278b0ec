//! Values read from files, which follow the files.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

/// How often files are looked at: a change rules within two of these.
const INTERVAL: Duration = Duration::from_millis(500);

/// Entries of a directory that are looked at.
const MAX_ENTRIES: usize = 4096;

type Fingerprint = Option<(SystemTime, u64, u64)>;
type Read<T> = dyn Fn() -> anyhow::Result<T> + Send + Sync;

/// A value that is read again when one of its files has changed; a directory is what is in it. What can't be read keeps the last good value.
pub struct Reloaded<T> {
    /// For people: `the token file`.
    what: String,
    files: Vec<PathBuf>,
    read: Box<Read<T>>,
    current: RwLock<Arc<T>>,
    generation: AtomicU64,
    state: Mutex<State>,
}

/// What was seen of the files.
struct State {
    /// When they were last read.
    read: Vec<(PathBuf, Fingerprint)>,
    /// At the last look.
    seen: Vec<(PathBuf, Fingerprint)>,
}

impl<T> Reloaded<T> {
    /// Reads the value for the first time.
    pub fn load(
        what: impl Into<String>,
        files: Vec<PathBuf>,
        read: impl Fn() -> anyhow::Result<T> + Send + Sync + 'static,
    ) -> anyhow::Result<Arc<Self>> {
        let seen = fingerprints(&files);
        let first = read()?;
        Ok(Arc::new(Self {
            what: what.into(),
            files,
            read: Box::new(read),
            current: RwLock::new(Arc::new(first)),
            generation: AtomicU64::new(0),
            state: Mutex::new(State { read: seen.clone(), seen }),
        }))
    }

    /// The last good value.
    pub fn get(&self) -> Arc<T> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What can be looked at for changes.
pub trait Follow: Send + Sync {
    /// Reads again if the files have changed since they were last read, and not since the last look: a file that
    /// still changes may be half-written.
    fn look(&self);

    /// Changes with the value.
    fn generation(&self) -> u64;
}

impl<T: Send + Sync> Follow for Reloaded<T> {
    fn look(&self) {
        let now = fingerprints(&self.files);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let due = now != state.read && now == state.seen;
        state.seen = now;
        if !due {
            return;
        }
        state.read = state.seen.clone();
        drop(state);
        match (self.read)() {
            Ok(value) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(value);
                self.generation.fetch_add(1, Ordering::Release);
                tracing::info!(what = self.what, "read again");
            }
            Err(error) => {
                tracing::error!(
                    what = self.what,
                    error = format!("{error:#}"),
                    "can't be used; the last good one stays"
                );
            }
        }
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

/// Follows all of them for ever.
pub async fn follow(all: Vec<Arc<dyn Follow>>) {
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        for one in &all {
            one.look();
        }
    }
}

/// Those of files, and of directories with what is in them.
fn fingerprints(files: &[PathBuf]) -> Vec<(PathBuf, Fingerprint)> {
    let mut all = Vec::new();
    for file in files {
        all.push((file.clone(), fingerprint(file)));
        if let Ok(entries) = std::fs::read_dir(file) {
            let mut paths: Vec<_> = entries.flatten().take(MAX_ENTRIES).map(|entry| entry.path()).collect();
            paths.sort();
            all.extend(paths.into_iter().map(|path| {
                let seen = fingerprint(&path);
                (path, seen)
            }));
        }
    }
    all
}

/// What tells that a file has changed, also when it was replaced through a symbolic link.
pub fn fingerprint(path: &Path) -> Fingerprint {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_file_rules_once_it_is_still_and_a_broken_one_does_not() {
        let path = std::env::temp_dir().join(format!("reloaded-{}", std::process::id()));
        std::fs::write(&path, "1").unwrap();
        let file = path.clone();
        let value = Reloaded::load("the number", vec![path.clone()], move || {
            Ok(std::fs::read_to_string(&file)?.parse::<u32>()?)
        })
        .unwrap();
        value.look();
        assert_eq!(*value.get(), 1);
        std::fs::write(&path, "22").unwrap();
        value.look();
        assert_eq!((*value.get(), value.generation()), (1, 0), "it may be half-written");
        value.look();
        assert_eq!((*value.get(), value.generation()), (22, 1));
        std::fs::write(&path, "broken").unwrap();
        value.look();
        value.look();
        assert_eq!(*value.get(), 22);
        std::fs::remove_file(&path).unwrap();
        value.look();
        value.look();
        assert_eq!(*value.get(), 22);
        std::fs::write(&path, "333").unwrap();
        value.look();
        value.look();
        assert_eq!(*value.get(), 333);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_directory_is_what_is_in_it() {
        let dir = std::env::temp_dir().join(format!("reloaded-dir-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("a"), "1").unwrap();
        let read = dir.clone();
        let value = Reloaded::load("the texts", vec![dir.clone()], move || {
            let mut texts = Vec::new();
            for entry in std::fs::read_dir(&read)? {
                texts.push(std::fs::read_to_string(entry?.path())?);
            }
            texts.sort();
            Ok(texts.concat())
        })
        .unwrap();
        let looked = || {
            value.look();
            value.look();
            value.get().as_str().to_owned()
        };
        assert_eq!(looked(), "1");
        std::fs::write(dir.join("a"), "22").unwrap();
        assert_eq!(looked(), "22", "changed in place");
        std::fs::write(dir.join("b"), "3").unwrap();
        assert_eq!(looked(), "223");
        std::fs::remove_file(dir.join("a")).unwrap();
        assert_eq!(looked(), "3");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
