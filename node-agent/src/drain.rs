//! A drain of this node by a command on it.
//!
//! Masters are told, and send only the streams that no other node can carry. After the deadline, this node itself takes no
//! streams of masters and people, and resets those that are left, so that it does not matter what a master understands. What
//! callers on this node want of a master's front end goes on.
//!
//! The state directory keeps the drain until it is undone, so a restart or a reload changes nothing.

use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use proto::mux::ids::Opener;
use proto_config::secret_file;
use proto_net::{channel::Channels, drain::LONGEST, mux::Mux};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until},
};

/// Why streams are refused, and reset at the deadline.
pub const DRAINED: &str = "the node is drained; `node-agent undrain` on it undoes that";
/// The name of the file in the state directory.
const FILE: &str = "drain";
/// How often a process that another one has replaced reads the file.
const READ_INTERVAL: Duration = Duration::from_secs(1);

/// The end of a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// As people are told.
    pub until: SystemTime,
    /// The same moment, which decides.
    ends: Instant,
}

impl Deadline {
    fn new(until: SystemTime) -> Self {
        let left = until.duration_since(SystemTime::now()).unwrap_or_default().min(LONGEST);
        Self { until, ends: Instant::now() + left }
    }

    /// What a master is told: at least a millisecond.
    fn left(self) -> Duration {
        self.ends.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
    }

    pub fn is_over(self) -> bool {
        self.ends <= Instant::now()
    }
}

/// Whether this node is drained.
pub struct Drain {
    path: PathBuf,
    deadline: watch::Sender<Option<Deadline>>,
    /// The number of streams that were reset at the present deadline.
    cut: AtomicU64,
}

impl Drain {
    /// Reads whether the node was drained before.
    pub fn load(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(FILE);
        let deadline = watch::Sender::new(read(&path)?.map(Deadline::new));
        Ok(Self { path, deadline, cut: AtomicU64::new(0) })
    }

    /// The deadline, if there is a drain.
    pub fn deadline(&self) -> Option<Deadline> {
        *self.deadline.borrow()
    }

    /// Whether the deadline has passed.
    pub fn is_over(&self) -> bool {
        self.deadline().is_some_and(Deadline::is_over)
    }

    /// The number of streams that were reset at the deadline.
    pub fn cut(&self) -> u64 {
        self.cut.load(Ordering::Relaxed)
    }

    /// Drains the node within some time. A drain that is in force gets the new deadline.
    pub async fn begin(&self, within: Duration) -> anyhow::Result<()> {
        let milliseconds = (unix(SystemTime::now()) + within).as_millis();
        let path = self.path.clone();
        let until = spawn_blocking(move || {
            secret_file::replace(&path, milliseconds.to_string().as_bytes())?;
            read(&path)
        });
        let until = until.await??;
        self.set(until);
        tracing::info!(seconds = within.as_secs(), "the node drains");
        Ok(())
    }

    /// Undoes the drain. Returns `false` if there was none.
    pub async fn end(&self) -> anyhow::Result<bool> {
        let path = self.path.clone();
        let removed = spawn_blocking(move || match secret_file::remove(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            removed => removed.map(|()| true),
        });
        let was_drained = removed.await??;
        self.set(None);
        if was_drained {
            tracing::info!("the node is no longer drained");
        }
        Ok(was_drained)
    }

    fn set(&self, until: Option<SystemTime>) {
        self.deadline.send_if_modified(|present| {
            let is_new = until != present.map(|deadline| deadline.until);
            if is_new {
                self.cut.store(0, Ordering::Relaxed);
                *present = until.map(Deadline::new);
            }
            is_new
        });
    }

    /// Follows the drain in a process whose place another one has taken. Never returns.
    pub async fn follow_next_process(self: Arc<Self>) {
        loop {
            sleep(READ_INTERVAL).await;
            let path = self.path.clone();
            match spawn_blocking(move || read(&path)).await {
                Ok(Ok(until)) => self.set(until),
                Ok(Err(error)) => tracing::debug!(%error, "can't read whether the node is drained"),
                Err(error) => tracing::debug!(%error, "can't read whether the node is drained"),
            }
        }
    }

    /// Tells a master of the drain and of each change, and resets its streams at the deadline. Ends with the agent.
    pub async fn follow_on_mux(self: Arc<Self>, mux: Mux) {
        let mut deadlines = self.deadline.subscribe();
        let mut is_told = false;
        loop {
            let deadline = *deadlines.borrow_and_update();
            if deadline.is_some() || is_told {
                mux.say_drain(deadline.map(Deadline::left).unwrap_or_default()).await;
                is_told = deadline.is_some();
            }
            let cut = || mux.reset_streams(Opener::Peer, DRAINED);
            if !self.until_changed(&mut deadlines, deadline, cut).await {
                return;
            }
        }
    }

    /// Resets the streams that are channels of their own at the deadline. Ends with the agent.
    pub async fn follow_on_channels(self: Arc<Self>, channels: Channels) {
        let mut deadlines = self.deadline.subscribe();
        loop {
            let deadline = *deadlines.borrow_and_update();
            if !self.until_changed(&mut deadlines, deadline, || channels.reset(DRAINED)).await {
                return;
            }
        }
    }

    /// Waits until the drain changes, and calls `cut` when its deadline comes before that. Returns `false` if it can't change
    /// any more.
    async fn until_changed(
        &self,
        deadlines: &mut watch::Receiver<Option<Deadline>>,
        deadline: Option<Deadline>,
        cut: impl Fn() -> usize,
    ) -> bool {
        if let Some(deadline) = deadline {
            tokio::select! {
                changed = deadlines.changed() => return changed.is_ok(),
                () = sleep_until(deadline.ends) => {
                    self.cut.fetch_add(cut() as u64, Ordering::Relaxed);
                }
            }
        }
        deadlines.changed().await.is_ok()
    }
}

fn unix(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Reads the deadline in a file, in milliseconds since 1970.
fn read(path: &Path) -> io::Result<Option<SystemTime>> {
    let text = match secret_file::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let until = text
        .trim()
        .parse()
        .ok()
        .and_then(|milliseconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(milliseconds)));
    let wrong = || {
        let text = format!("{} holds no deadline of a drain: remove it", path.display());
        io::Error::new(ErrorKind::InvalidData, text)
    };
    until.map(Some).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempDir;

    #[tokio::test]
    async fn a_drain_lasts_until_it_is_undone() {
        let dir = TempDir::new();
        let load = || Drain::load(dir.path()).unwrap();
        let drain = Arc::new(load());
        assert_eq!((drain.deadline(), drain.is_over()), (None, false));
        assert!(!drain.end().await.unwrap());
        drain.begin(Duration::from_secs(60)).await.unwrap();
        let until = drain.deadline().unwrap().until;
        let left = drain.deadline().unwrap().left();
        assert!(left > Duration::from_secs(50) && left <= Duration::from_secs(60), "{left:?}");
        assert_eq!(load().deadline().unwrap().until, until);
        drain.begin(Duration::ZERO).await.unwrap();
        assert!(drain.is_over() && load().is_over());
        assert_eq!(load().deadline().unwrap().left(), Duration::from_millis(1));
        // The process that was there before learns of it from the file.
        let former = Arc::new(load());
        assert!(drain.end().await.unwrap() && !drain.is_over() && !load().is_over());
        let mut changes = former.deadline.subscribe();
        tokio::select! {
            () = former.clone().follow_next_process() => {}
            changed = changes.changed() => changed.unwrap(),
        }
        assert_eq!(former.deadline(), None);
        secret_file::replace(&dir.path().join(FILE), b"soon").unwrap();
        assert!(Drain::load(dir.path()).map(drop).unwrap_err().to_string().contains("remove it"));
    }
}
