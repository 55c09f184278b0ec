//! Follows the inventory file: takes its nodes over when it changes or when somebody asks.

use std::{path::PathBuf, sync::Arc};

use prometheus_client::metrics::{counter::Counter, family::Family};
use proto_net::file_watcher::{FileWatcher, Polled, Watcher};

use crate::{metrics::Reason, routing::inventory::Inventory, tunnels::expected_nodes::ExpectedNodes};

/// The inventory file as it was read last; without a file, the inventory has no nodes.
pub(super) struct InventoryFile(Option<Arc<FileWatcher<Inventory>>>);

/// The inventory file, and where its nodes go.
pub(super) struct InventoryFollower {
    file: InventoryFile,
    expected: Arc<ExpectedNodes>,
    /// Counts by result how often the file was read again.
    reloads: Family<Reason, Counter>,
}

impl InventoryFile {
    /// Reads the file for the first time. Blocks.
    pub(super) fn load(path: Option<PathBuf>) -> anyhow::Result<Self> {
        Ok(Self(path.map(Inventory::watch).transpose()?))
    }

    pub(super) fn inventory(&self) -> Inventory {
        self.0.as_ref().map(|file| Inventory::clone(&file.get())).unwrap_or_default()
    }
}

impl InventoryFollower {
    pub(super) fn new(
        file: InventoryFile,
        expected: Arc<ExpectedNodes>,
        reloads: Family<Reason, Counter>,
    ) -> Self {
        Self { file, expected, reloads }
    }

    /// Reads the file if it has changed, or in any case if `asked`. Blocks.
    pub(super) fn poll(&self, asked: bool) {
        let Some(file) = &self.file.0 else { return };
        let reason = match if asked { file.reload() } else { file.poll() } {
            Polled::Unchanged | Polled::Failed { repeated: true, .. } => return,
            Polled::Loaded => self.replace(self.file.inventory(), asked),
            Polled::Failed { error, repeated: false } => {
                tracing::error!(error, "the inventory has errors; the last good one stays");
                "failed"
            }
        };
        self.reloads.get_or_create(&Reason { reason }).inc();
    }

    /// Gives the result to count.
    fn replace(&self, inventory: Inventory, asked: bool) -> &'static str {
        // A file in which no node is left is more likely a mistake than what somebody wants.
        if inventory.nodes().is_empty() && self.expected.file_has_nodes() && !asked {
            tracing::error!("the inventory has no nodes any more; the last one stays until SIGHUP");
            return "failed";
        }
        tracing::info!(nodes = inventory.nodes().len(), "inventory read again");
        self.expected.replace_inventory(inventory);
        "ok"
    }
}
