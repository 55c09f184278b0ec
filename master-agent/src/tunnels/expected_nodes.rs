//! The nodes that are expected to have tunnels: those of the inventory file, and those nodes of the cluster that the
//! file does not list.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proto_net::tasks::Tasks;
use tokio::sync::watch;

use super::{absent::Absent, registry::Registry};
use crate::{
    kubernetes::config::WatchedNodes,
    routing::{InventoryRoutes, inventory::Inventory, shared::SharedRoutes},
};

/// Merges the sources of nodes and publishes the result to subscribers.
pub struct ExpectedNodes {
    /// The file as it was read last. It stays locked while the sources are merged, so that results are published in
    /// order.
    file: Mutex<Arc<Inventory>>,
    /// How nodes of the cluster are treated. With `None`, they are ignored.
    watched: Option<WatchedNodes>,
    routes: Arc<SharedRoutes>,
    registry: Arc<Registry>,
    /// The group of the tasks that close the tunnels of removed nodes.
    tasks: Tasks,
    current: watch::Sender<Arc<Inventory>>,
}

impl ExpectedNodes {
    pub fn new(
        inventory: Arc<Inventory>,
        watched: Option<WatchedNodes>,
        routes: Arc<SharedRoutes>,
        registry: Arc<Registry>,
        tasks: Tasks,
    ) -> Self {
        let (file, current) = (Mutex::default(), watch::Sender::default());
        let nodes = Self { file, watched, routes, registry, tasks, current };
        nodes.replace_inventory(inventory);
        nodes
    }

    pub fn subscribe(&self) -> watch::Receiver<Arc<Inventory>> {
        self.current.subscribe()
    }

    /// Replaces the inventory file's nodes and routes.
    pub fn replace_inventory(&self, inventory: Arc<Inventory>) {
        let routes = InventoryRoutes::new(&inventory);
        // Dials wait for the change, so the former routes are dropped only afterwards.
        drop(self.routes.change(|all| std::mem::replace(&mut all.inventory, routes)));
        let mut file = self.file();
        *file = inventory;
        self.publish(&file);
    }

    /// Merges again, since the nodes of the cluster have changed.
    pub fn cluster_changed(&self) {
        self.publish(&self.file());
    }

    /// Whether the inventory file had nodes when it was read last.
    pub fn file_has_nodes(&self) -> bool {
        !self.file().nodes().is_empty()
    }

    fn file(&self) -> MutexGuard<'_, Arc<Inventory>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Merges the sources, publishes the nodes, and closes the tunnels of those that are gone.
    fn publish(&self, file: &Arc<Inventory>) {
        let nodes = self.with_nodes_of_the_cluster(file);
        let expected: BTreeMap<_, _> = nodes
            .nodes()
            .iter()
            .map(|node| {
                let absent = if node.dial.is_some() { Absent::New } else { Absent::WaitingForCallHome };
                (node.name.clone(), (node.connections, absent))
            })
            .collect();
        let gone = self.registry.expect(&expected);
        self.current.send_replace(nodes);
        for tunnel in gone {
            self.tasks.spawn(async move { tunnel.close("the node is no longer in the inventory").await });
        }
    }

    /// Returns the file's nodes with the further ones of the cluster. If there are none, the file is shared.
    fn with_nodes_of_the_cluster(&self, file: &Arc<Inventory>) -> Arc<Inventory> {
        let Some(watched) = &self.watched else { return file.clone() };
        let further: Vec<_> = self.routes.read(|routes| {
            let unlisted = routes.cluster.nodes().filter(|node| file.node(&node.name).is_none());
            unlisted.map(|node| watched.node(node)).collect()
        });
        if further.is_empty() {
            return file.clone();
        }
        let mut all = Inventory::clone(file);
        all.extend(further);
        Arc::new(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_to_which_the_cluster_adds_nothing_is_shared() {
        let text = "nodes: [{name: a}, {name: b}]";
        let file = Inventory::parse(text, "inventory", std::path::Path::new("/")).unwrap();
        let file = Arc::new(file);
        let (routes, registry) = (Arc::new(SharedRoutes::new(String::new())), Arc::new(Registry::new(1)));
        let expected = ExpectedNodes::new(file.clone(), None, routes, registry.clone(), Tasks::new());
        assert!(Arc::ptr_eq(&expected.subscribe().borrow(), &file));
        expected.cluster_changed();
        assert!(Arc::ptr_eq(&expected.subscribe().borrow(), &file));
        assert_eq!(registry.count(), (0, 2));
    }
}
