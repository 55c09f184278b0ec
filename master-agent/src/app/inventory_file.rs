//! Follows the inventory file, which is read again when it changes and on SIGHUP.

use std::{path::PathBuf, sync::Arc, time::Duration};

use prometheus_client::metrics::{counter::Counter, family::Family};
use proto_net::file_watcher::{FileWatcher, Polled, Watcher};
use tokio::{
    signal::unix::Signal,
    time::{MissedTickBehavior, interval},
};

use crate::{metrics::ReasonLabel, routing::inventory::Inventory, tunnels::expected_nodes::ExpectedNodes};

/// How often the file is polled.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The inventory file as it was read last. Without a file, the inventory has no nodes.
pub(super) struct InventoryFile(Option<Arc<FileWatcher<Inventory>>>);

/// Passes the nodes of the inventory file on when it has been read again.
pub(super) struct InventoryFollower {
    file: InventoryFile,
    expected: Arc<ExpectedNodes>,
    /// Counts reloads by result.
    reloads: Family<ReasonLabel, Counter>,
}

impl InventoryFile {
    /// Reads the file for the first time. Blocks.
    pub(super) fn load(path: Option<PathBuf>) -> anyhow::Result<Self> {
        Ok(Self(path.map(Inventory::watch).transpose()?))
    }

    pub(super) fn inventory(&self) -> Arc<Inventory> {
        self.0.as_ref().map(|file| file.get()).unwrap_or_default()
    }
}

impl InventoryFollower {
    pub(super) fn new(
        file: InventoryFile,
        expected: Arc<ExpectedNodes>,
        reloads: Family<ReasonLabel, Counter>,
    ) -> Self {
        Self { file, expected, reloads }
    }

    /// Polls the file until the future is dropped, and reads it again on each `hangup`. Dropping the future does not
    /// wait for a read that is in progress, since a read on a mount whose server is gone may never return.
    pub(super) async fn follow(self, mut hangup: Signal) {
        let follower = Arc::new(self);
        let mut poll = interval(POLL_INTERVAL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let requested = tokio::select! {
                _ = hangup.recv() => true,
                _ = poll.tick() => false,
            };
            let polling = follower.clone();
            // A large inventory takes a while to read and must not block streams.
            if let Err(error) = tokio::task::spawn_blocking(move || polling.poll(requested)).await {
                tracing::error!(%error, "can't read the inventory again");
            }
        }
    }

    /// Reads the file if it has changed, or in any case if this was `requested`. Blocks.
    fn poll(&self, requested: bool) {
        let Some(file) = &self.file.0 else { return };
        let reason = match if requested { file.reload() } else { file.poll() } {
            Polled::Unchanged | Polled::Failed { repeated: true, .. } => return,
            Polled::Loaded => self.replace(self.file.inventory(), requested),
            Polled::Failed { error, repeated: false } => {
                tracing::error!(error, "the inventory has errors; the last good one stays");
                "failed"
            }
        };
        self.reloads.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Replaces the inventory, and returns the result to count.
    fn replace(&self, inventory: Arc<Inventory>, requested: bool) -> &'static str {
        // A file without any nodes is more likely a mistake than intended.
        if inventory.nodes().is_empty() && self.expected.file_has_nodes() && !requested {
            tracing::error!("the inventory has no nodes any more; the last one stays until SIGHUP");
            return "failed";
        }
        tracing::info!(nodes = inventory.nodes().len(), "inventory read again");
        self.expected.replace_inventory(inventory);
        "ok"
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    };

    use proto_net::tasks::Tasks;
    use tokio::{
        signal::unix::{SignalKind, signal},
        sync::Notify,
    };

    use super::*;
    use crate::{identity::tests::TempDir, routing::shared::SharedRoutes, tunnels::registry::Registry};

    #[tokio::test(start_paused = true)]
    async fn a_read_that_hangs_delays_neither_the_end_nor_the_nodes_of_the_cluster() {
        let dir = TempDir::new();
        let path = dir.0.join("inventory.yaml");
        std::fs::write(&path, "first").unwrap();
        let (release, released) = mpsc::channel::<()>();
        let (is_first, released) = (AtomicBool::new(true), Mutex::new(released));
        let hangs = Arc::new(Notify::new());
        let hanging = hangs.clone();
        let file = FileWatcher::load("the inventory", vec![path.clone()], move || {
            if !is_first.swap(false, Ordering::SeqCst) {
                hanging.notify_one();
                let _ = released.lock().unwrap().recv();
            }
            Ok(Inventory::default())
        });
        let (routes, registry) = (Arc::new(SharedRoutes::new(String::new())), Arc::new(Registry::new(1)));
        let expected = ExpectedNodes::new(Arc::default(), None, routes, registry, Tasks::new());
        let expected = Arc::new(expected);
        let file = InventoryFile(Some(file.unwrap()));
        let follower = InventoryFollower::new(file, expected.clone(), Family::default());
        std::fs::write(&path, "changed").unwrap();
        tokio::select! {
            () = follower.follow(signal(SignalKind::hangup()).unwrap()) => panic!("it never ends"),
            () = hangs.notified() => expected.cluster_changed(),
        }
        // The runtime of the test waits for the read.
        drop(release);
    }
}
