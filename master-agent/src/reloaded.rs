//! Values read from files, which follow the files.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// How often files are looked at: a change rules within two of these.
const INTERVAL: Duration = Duration::from_millis(500);

/// Entries of a directory that are looked at.
const MAX_ENTRIES: usize = 4096;

/// What can't be used is tried again at the next look, then after twice as many each time, and at last after these.
const MAX_PAUSE: u32 = 64;

/// Device, inode, size, and when content and inode were changed last, in seconds and nanoseconds.
type Fingerprint = Option<(u64, u64, u64, [i64; 4])>;
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
    /// Since they can't be used.
    failing: Option<Failing>,
}

struct Failing {
    /// As it was said last.
    error: String,
    /// Looks until the next try, and what it began with.
    left: u32,
    pause: u32,
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
            state: Mutex::new(State { read: seen.clone(), seen, failing: None }),
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
    /// still changes may be half-written. What can't be used is tried again now and then, as the fault need not be the
    /// files'. May block.
    fn look(&self);

    /// Changes with the value.
    fn generation(&self) -> u64;
}

impl<T: Send + Sync> Follow for Reloaded<T> {
    fn look(&self) {
        let now = fingerprints(&self.files);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let still = now == state.seen;
        state.seen = now;
        let changed = state.seen != state.read;
        let again = state.failing.as_mut().is_some_and(|failing| {
            failing.left = failing.left.saturating_sub(1);
            failing.left == 0
        });
        if !still || !(changed || again) {
            return;
        }
        state.read = state.seen.clone();
        match (self.read)() {
            Ok(value) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(value);
                self.generation.fetch_add(1, Ordering::Release);
                state.failing = None;
                tracing::info!(what = self.what, "read again");
            }
            Err(error) => {
                let error = format!("{error:#}");
                let last = state.failing.take();
                if changed || last.as_ref().is_none_or(|last| last.error != error) {
                    tracing::error!(what = self.what, error, "can't be used; the last good one stays");
                }
                let pause = last.filter(|_| !changed).map_or(1, |last| (last.pause * 2).min(MAX_PAUSE));
                state.failing = Some(Failing { error, left: pause, pause });
            }
        }
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

/// Follows all of them for ever, each for itself: one that is slow to read holds up no other.
pub async fn follow(all: Vec<Arc<dyn Follow>>) {
    futures_util::future::join_all(all.into_iter().map(follow_one)).await;
}

async fn follow_one(one: Arc<dyn Follow>) {
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let one = one.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || one.look()).await {
            tracing::error!(%error, "can't look at a file");
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

/// What tells that a file has changed, also when it was replaced through a symbolic link, or its time set back.
fn fingerprint(path: &Path) -> Fingerprint {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(path).ok()?;
    let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
    Some((file.dev(), file.ino(), file.len(), times))
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
    fn a_file_of_the_same_size_and_time_is_another_one() {
        let path = std::env::temp_dir().join(format!("reloaded-time-{}", std::process::id()));
        let write = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        };
        write("old");
        let file = path.clone();
        let value =
            Reloaded::load("the text", vec![path.clone()], move || Ok(std::fs::read_to_string(&file)?))
                .unwrap();
        let before = fingerprint(&path);
        // Until the file system's clock has moved on.
        for _ in 0..10_000 {
            write("new");
            if fingerprint(&path) != before {
                break;
            }
        }
        value.look();
        value.look();
        assert_eq!(*value.get(), "new");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_could_not_be_read_is_tried_again_though_no_file_changes() {
        let path = std::env::temp_dir().join(format!("reloaded-again-{}", std::process::id()));
        std::fs::write(&path, "1").unwrap();
        let works = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let tries = Arc::new(AtomicU64::new(0));
        let (file, reads, working) = (path.clone(), tries.clone(), works.clone());
        let value = Reloaded::load("the number", vec![path.clone()], move || {
            reads.fetch_add(1, Ordering::SeqCst);
            // Such as for want of file descriptors.
            anyhow::ensure!(working.load(Ordering::SeqCst), "not now");
            Ok(std::fs::read_to_string(&file)?)
        })
        .unwrap();
        works.store(false, Ordering::SeqCst);
        std::fs::write(&path, "22").unwrap();
        for _ in 0..1000 {
            value.look();
        }
        let tried = tries.load(Ordering::SeqCst);
        assert!((10..30).contains(&tried), "{tried}: less and less often");
        works.store(true, Ordering::SeqCst);
        for _ in 0..MAX_PAUSE {
            value.look();
        }
        assert_eq!((value.get().as_str(), value.generation()), ("22", 1));
        for _ in 0..1000 {
            value.look();
        }
        assert_eq!(value.generation(), 1, "and no more once it is good");
        std::fs::remove_file(&path).unwrap();
    }

    /// Waits in `look` until it is let go.
    struct Slow(Mutex<std::sync::mpsc::Receiver<()>>);

    impl Follow for Slow {
        fn look(&self) {
            let _ = self.0.lock().unwrap().recv();
        }

        fn generation(&self) -> u64 {
            0
        }
    }

    struct Counting(AtomicU64);

    impl Follow for Counting {
        fn look(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }

        fn generation(&self) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
    }

    #[tokio::test]
    async fn a_slow_one_holds_up_neither_the_others_nor_the_runtime() {
        let (let_go, waits) = std::sync::mpsc::channel();
        let other = Arc::new(Counting(AtomicU64::new(0)));
        let following = follow(vec![Arc::new(Slow(Mutex::new(waits))), other.clone()]);
        tokio::select! {
            () = following => panic!("it is for ever"),
            () = async {
                while other.generation() < 2 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            } => {}
        }
        drop(let_go);
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
