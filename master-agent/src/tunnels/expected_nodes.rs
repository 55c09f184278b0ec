//! Which nodes are expected to have tunnels: those of the inventory file, and those of the cluster that the file does
//! not list.

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

/// Brings the sources of nodes together. Whoever needs the nodes subscribes.
pub struct ExpectedNodes {
    /// The nodes of the file as it was read last. Locked while the sources are brought together.
    file: Mutex<Inventory>,
    /// How nodes of the cluster are treated; `None` does not take them.
    watched: Option<WatchedNodes>,
    routes: Arc<SharedRoutes>,
    registry: Arc<Registry>,
    /// Closes the tunnels of nodes that are gone.
    tasks: Tasks,
    current: watch::Sender<Arc<Inventory>>,
}

impl ExpectedNodes {
    pub fn new(
        inventory: Inventory,
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

    /// Takes a new inventory file, with its routes.
    pub fn replace_inventory(&self, inventory: Inventory) {
        let routes = InventoryRoutes::new(&inventory);
        self.routes.change(|all| all.inventory = routes);
        let mut file = self.file();
        *file = inventory;
        self.publish(&file);
    }

    /// Takes the nodes that the cluster has now.
    pub fn cluster_changed(&self) {
        self.publish(&self.file());
    }

    /// Whether the inventory file had nodes when it was read last.
    pub fn file_has_nodes(&self) -> bool {
        !self.file().nodes().is_empty()
    }

    fn file(&self) -> MutexGuard<'_, Inventory> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the nodes known, and closes the tunnels of those that are gone.
    fn publish(&self, file: &Inventory) {
        let mut nodes = file.clone();
        if let Some(watched) = &self.watched {
            let of_cluster: Vec<_> = self.routes.read(|routes| {
                let unlisted = routes.cluster.nodes().filter(|node| file.node(&node.name).is_none());
                unlisted.map(|node| watched.node(node)).collect()
            });
            nodes.extend(of_cluster);
        }
        let expected: BTreeMap<_, _> = nodes
            .nodes()
            .iter()
            .map(|node| {
                let absent = if node.dial.is_some() { Absent::New } else { Absent::WaitingForCallHome };
                (node.name.clone(), (node.connections, absent))
            })
            .collect();
        let gone = self.registry.expect(&expected);
        self.current.send_replace(Arc::new(nodes));
        for tunnel in gone {
            self.tasks.spawn(async move { tunnel.close("the node is no longer in the inventory").await });
        }
    }
}
