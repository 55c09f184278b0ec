//! Drains of nodes by commands of this host.
//!
//! The store keeps a drain until it is undone, so a restart or a reload changes nothing. Every process of the agent follows
//! the store. So does one that a reload has replaced, which ends the streams that it still carries with the same deadline.

use std::{
    future::pending,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use proto::NodeName;
use tokio::{task::spawn_blocking, time::sleep_until};

use super::registry::Registry;
use crate::{activity::unix_milliseconds, identity::store::Store};

/// Drains nodes, and undoes that.
pub struct Drains {
    store: Arc<dyn Store>,
    registry: Arc<Registry>,
    /// Held while what the store says is handed to the registry, so that nothing older comes later.
    applying: Mutex<()>,
}

impl Drains {
    /// The drains of the store are in force from now on.
    pub fn new(store: Arc<dyn Store>, registry: Arc<Registry>) -> Self {
        let drains = Self { store, registry, applying: Mutex::default() };
        drains.apply();
        drains
    }

    /// Drains a node within some time. A drain that is in force gets the new deadline.
    pub async fn begin(&self, node: &NodeName, within: Duration) -> anyhow::Result<()> {
        let until = unix_milliseconds(SystemTime::now() + within);
        let until = SystemTime::UNIX_EPOCH + Duration::from_millis(until);
        self.record(node, Some(until)).await?;
        tracing::info!(%node, until = %humantime::format_rfc3339_seconds(until), "node drains");
        Ok(())
    }

    /// Undoes the drain of a node. Returns `false` if there was none.
    pub async fn end(&self, node: &NodeName) -> anyhow::Result<bool> {
        let was_drained = self.record(node, None).await?;
        if was_drained {
            tracing::info!(%node, "node is no longer drained");
        }
        Ok(was_drained)
    }

    async fn record(&self, node: &NodeName, until: Option<SystemTime>) -> anyhow::Result<bool> {
        let (store, node) = (self.store.clone(), node.clone());
        let was_drained = spawn_blocking(move || store.set_drain(&node, until)).await??;
        self.apply();
        Ok(was_drained)
    }

    /// Follows the store, and resets the streams that are left at each deadline. Never returns while the store lasts.
    pub async fn follow(self: Arc<Self>) {
        let mut changes = self.store.changes();
        loop {
            // A change that is committed after this line is either read now or wakes this task again.
            changes.mark_unchanged();
            self.apply();
            let next = self.registry.cut_drained();
            let due = async {
                match next {
                    Some(deadline) => sleep_until(deadline).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = due => {}
            }
        }
    }

    fn apply(&self) {
        let _one_after_the_other = self.applying.lock().unwrap_or_else(PoisonError::into_inner);
        self.registry.set_drains(self.store.drains());
    }
}
