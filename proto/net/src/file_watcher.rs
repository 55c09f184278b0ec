//! Values that are read from files, and read again when the files change.
//!
//! Everything that is kept from a file for longer than one use is kept in a [`FileWatcher`]: certificates, authorities,
//! token files, policies, the inventory. What is needed once, such as a key for one dial, is read when it is needed.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// How often files are polled. A change takes effect within two intervals.
const INTERVAL: Duration = Duration::from_millis(500);

/// The most entries of a directory that are compared.
const MAX_ENTRIES: usize = 4096;

/// The most polls between two attempts to read what can't be used. The pause doubles from one poll up to this.
const MAX_PAUSE: u32 = 64;

/// Identifies one version of a file: its device, inode and size, and the seconds and nanoseconds of its last
/// modification and status change. `None` stands for a file that can't be examined.
type Stamp = Option<(u64, u64, u64, [i64; 4])>;
type Stamps = Vec<(PathBuf, Stamp)>;
type Read<T> = dyn Fn() -> anyhow::Result<T> + Send + Sync;

/// A value that is read again when one of its files changes. A directory counts as changed when one of its entries
/// does. While the files can't be used, the last good value stays in force.
///
/// Something has to call [`Watcher::poll`], usually [`watch`].
pub struct FileWatcher<T> {
    /// For people, such as `the token file`.
    what: String,
    files: Vec<PathBuf>,
    read: Box<Read<T>>,
    current: RwLock<Arc<T>>,
    generation: AtomicU64,
    state: Mutex<State>,
}

struct State {
    /// The versions that were read last.
    read: Stamps,
    /// The versions at the last poll.
    seen: Stamps,
    /// Set while the files can't be used.
    failing: Option<Failing>,
}

struct Failing {
    error: String,
    /// Polls until the next attempt.
    left: u32,
    /// Polls between the last attempt and the next one.
    pause: u32,
}

/// What a poll found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Polled {
    /// The value is as it was.
    Unchanged,
    /// There is a new value.
    Loaded,
    /// The files can't be used, so the last good value stays. `repeated` says that the same error was returned before
    /// and that no file has changed since.
    Failed { error: String, repeated: bool },
}

/// A [`FileWatcher`] of any type.
pub trait Watcher: Send + Sync {
    /// What is watched, for people.
    fn what(&self) -> &str;

    /// Reads the files if they have changed since they were last read but not since the last poll, as a file that is
    /// still changing may be half-written. Files that can't be used are tried again now and then even if they do not
    /// change, as the fault may lie elsewhere. This blocks.
    fn poll(&self) -> Polled;

    /// A number that changes with the value.
    fn generation(&self) -> u64;
}

impl<T> FileWatcher<T> {
    /// Reads the value for the first time. `files` are what `read` depends on. This blocks.
    pub fn load(
        what: impl Into<String>,
        files: Vec<PathBuf>,
        read: impl Fn() -> anyhow::Result<T> + Send + Sync + 'static,
    ) -> anyhow::Result<Arc<Self>> {
        let seen = stamps(&files);
        let first = read()?;
        Ok(Arc::new(Self {
            what: what.into(),
            files,
            read: Box::new(read),
            current: RwLock::new(Arc::new(first)),
            generation: AtomicU64::new(0),
            state: Mutex::new(State { read: seen.clone(), seen, failing: None }),
        }))
    }

    /// The last good value.
    pub fn get(&self) -> Arc<T> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the files at once, whether they have changed or not. This blocks.
    pub fn reload(&self) -> Polled {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.seen = stamps(&self.files);
        self.read_again(&mut state, true)
    }

    fn read_again(&self, state: &mut State, changed: bool) -> Polled {
        state.read = state.seen.clone();
        match (self.read)() {
            Ok(value) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(value);
                self.generation.fetch_add(1, Ordering::Release);
                state.failing = None;
                Polled::Loaded
            }
            Err(error) => {
                let error = format!("{error:#}");
                let last = state.failing.take().filter(|_| !changed);
                let repeated = last.as_ref().is_some_and(|last| last.error == error);
                let pause = last.map_or(1, |last| (last.pause * 2).min(MAX_PAUSE));
                state.failing = Some(Failing { error: error.clone(), left: pause, pause });
                Polled::Failed { error, repeated }
            }
        }
    }
}

impl<T: Send + Sync> Watcher for FileWatcher<T> {
    fn what(&self) -> &str {
        &self.what
    }

    fn poll(&self) -> Polled {
        let now = stamps(&self.files);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let settled = now == state.seen;
        state.seen = now;
        let changed = state.seen != state.read;
        let retry = state.failing.as_mut().is_some_and(|failing| {
            failing.left = failing.left.saturating_sub(1);
            failing.left == 0
        });
        if !settled || !(changed || retry) {
            return Polled::Unchanged;
        }
        self.read_again(&mut state, changed)
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

/// Polls and logs for ever, each watcher on its own: one that is slow to read delays no other.
pub async fn watch(watchers: Vec<Arc<dyn Watcher>>) {
    futures_util::future::join_all(watchers.into_iter().map(watch_one)).await;
}

async fn watch_one(watcher: Arc<dyn Watcher>) {
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let polling = watcher.clone();
        let what = watcher.what();
        match tokio::task::spawn_blocking(move || polling.poll()).await {
            Ok(Polled::Loaded) => tracing::info!(what, "read again"),
            Ok(Polled::Failed { error, repeated: false }) => {
                tracing::error!(what, error, "can't be used; the last good one stays");
            }
            Ok(Polled::Failed { .. } | Polled::Unchanged) => {}
            Err(error) => tracing::error!(what, %error, "can't poll files"),
        }
    }
}

/// The versions of files, and of the entries of directories.
fn stamps(files: &[PathBuf]) -> Stamps {
    let mut all = Vec::new();
    for file in files {
        all.push((file.clone(), stamp(file)));
        if let Ok(entries) = std::fs::read_dir(file) {
            let mut paths: Vec<_> = entries.flatten().take(MAX_ENTRIES).map(|entry| entry.path()).collect();
            paths.sort();
            all.extend(paths.into_iter().map(|path| {
                let seen = stamp(&path);
                (path, seen)
            }));
        }
    }
    all
}

/// The version of a file. It differs, too, when a symbolic link leads to another file or the time was set back.
fn stamp(path: &Path) -> Stamp {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(path).ok()?;
    let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
    Some((file.dev(), file.ino(), file.len(), times))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_takes_effect_once_the_file_is_still_and_a_broken_file_is_ignored() {
        let path = std::env::temp_dir().join(format!("file-watcher-{}", std::process::id()));
        std::fs::write(&path, "1").unwrap();
        let file = path.clone();
        let value = FileWatcher::load("the number", vec![path.clone()], move || {
            Ok(std::fs::read_to_string(&file)?.parse::<u32>()?)
        })
        .unwrap();
        value.poll();
        assert_eq!(*value.get(), 1);
        std::fs::write(&path, "22").unwrap();
        value.poll();
        assert_eq!((*value.get(), value.generation()), (1, 0), "it may be half-written");
        value.poll();
        assert_eq!((*value.get(), value.generation()), (22, 1));
        std::fs::write(&path, "broken").unwrap();
        value.poll();
        value.poll();
        assert_eq!(*value.get(), 22);
        std::fs::remove_file(&path).unwrap();
        value.poll();
        value.poll();
        assert_eq!(*value.get(), 22);
        std::fs::write(&path, "333").unwrap();
        value.poll();
        value.poll();
        assert_eq!(*value.get(), 333);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_poll_says_what_it_found_and_a_reload_does_not_wait() {
        let path = std::env::temp_dir().join(format!("file-watcher-reload-{}", std::process::id()));
        std::fs::write(&path, "1").unwrap();
        let file = path.clone();
        let value = FileWatcher::load("the number", vec![path.clone()], move || {
            Ok(std::fs::read_to_string(&file)?.parse::<u32>()?)
        })
        .unwrap();
        assert_eq!(value.poll(), Polled::Unchanged);
        std::fs::write(&path, "22").unwrap();
        assert_eq!((value.reload(), *value.get()), (Polled::Loaded, 22));
        assert_eq!(value.poll(), Polled::Unchanged, "what was read at once is not read again");
        std::fs::write(&path, "broken").unwrap();
        let failed =
            |repeated| Polled::Failed { error: "invalid digit found in string".to_owned(), repeated };
        let found = [value.poll(), value.poll(), value.poll(), value.poll()];
        assert_eq!(found, [Polled::Unchanged, failed(false), failed(true), Polled::Unchanged]);
        assert_eq!(value.reload(), failed(false), "who asks hears of it again");
        std::fs::write(&path, "333").unwrap();
        assert_eq!((value.poll(), value.poll(), *value.get()), (Polled::Unchanged, Polled::Loaded, 333));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_file_replaced_with_the_same_size_and_time_is_noticed() {
        let path = std::env::temp_dir().join(format!("file-watcher-time-{}", std::process::id()));
        let write = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        };
        write("old");
        let file = path.clone();
        let value =
            FileWatcher::load("the text", vec![path.clone()], move || Ok(std::fs::read_to_string(&file)?))
                .unwrap();
        let before = stamp(&path);
        // The file system's clock may have to move on first.
        for _ in 0..10_000 {
            write("new");
            if stamp(&path) != before {
                break;
            }
        }
        value.poll();
        value.poll();
        assert_eq!(*value.get(), "new");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_failed_read_is_retried_less_and_less_often_without_a_change() {
        let path = std::env::temp_dir().join(format!("file-watcher-again-{}", std::process::id()));
        std::fs::write(&path, "1").unwrap();
        let works = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let tries = Arc::new(AtomicU64::new(0));
        let (file, reads, working) = (path.clone(), tries.clone(), works.clone());
        let value = FileWatcher::load("the number", vec![path.clone()], move || {
            reads.fetch_add(1, Ordering::SeqCst);
            // Reading fails as it does when there are no file descriptors left.
            anyhow::ensure!(working.load(Ordering::SeqCst), "not now");
            Ok(std::fs::read_to_string(&file)?)
        })
        .unwrap();
        works.store(false, Ordering::SeqCst);
        std::fs::write(&path, "22").unwrap();
        for _ in 0..1000 {
            value.poll();
        }
        let tried = tries.load(Ordering::SeqCst);
        assert!((10..30).contains(&tried), "{tried}: less and less often");
        works.store(true, Ordering::SeqCst);
        for _ in 0..MAX_PAUSE {
            value.poll();
        }
        assert_eq!((value.get().as_str(), value.generation()), ("22", 1));
        for _ in 0..1000 {
            value.poll();
        }
        assert_eq!(value.generation(), 1, "and no more once it is good");
        std::fs::remove_file(&path).unwrap();
    }

    /// Blocks in `poll` until it is released.
    struct Slow(Mutex<std::sync::mpsc::Receiver<()>>);

    impl Watcher for Slow {
        fn what(&self) -> &str {
            "slow"
        }

        fn poll(&self) -> Polled {
            let _ = self.0.lock().unwrap().recv();
            Polled::Unchanged
        }

        fn generation(&self) -> u64 {
            0
        }
    }

    struct Counting(AtomicU64);

    impl Watcher for Counting {
        fn what(&self) -> &str {
            "counting"
        }

        fn poll(&self) -> Polled {
            self.0.fetch_add(1, Ordering::SeqCst);
            Polled::Unchanged
        }

        fn generation(&self) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
    }

    #[tokio::test]
    async fn a_slow_watcher_delays_neither_the_others_nor_the_runtime() {
        let (release, waits) = std::sync::mpsc::channel();
        let other = Arc::new(Counting(AtomicU64::new(0)));
        let watching = watch(vec![Arc::new(Slow(Mutex::new(waits))), other.clone()]);
        tokio::select! {
            () = watching => panic!("it never ends"),
            () = async {
                while other.generation() < 2 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            } => {}
        }
        drop(release);
    }

    #[test]
    fn a_directory_changes_with_its_entries() {
        let dir = std::env::temp_dir().join(format!("file-watcher-dir-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("a"), "1").unwrap();
        let read = dir.clone();
        let value = FileWatcher::load("the texts", vec![dir.clone()], move || {
            let mut texts = Vec::new();
            for entry in std::fs::read_dir(&read)? {
                texts.push(std::fs::read_to_string(entry?.path())?);
            }
            texts.sort();
            Ok(texts.concat())
        })
        .unwrap();
        let polled = || {
            value.poll();
            value.poll();
            value.get().as_str().to_owned()
        };
        assert_eq!(polled(), "1");
        std::fs::write(dir.join("a"), "22").unwrap();
        assert_eq!(polled(), "22", "changed in place");
        std::fs::write(dir.join("b"), "3").unwrap();
        assert_eq!(polled(), "223");
        std::fs::remove_file(dir.join("a")).unwrap();
        assert_eq!(polled(), "3");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
