//! The routes, shared by those who dial and those who keep them.

use std::sync::{PoisonError, RwLock};

use tokio::sync::watch;

use super::Routes;

/// The present routes.
#[derive(Debug)]
pub struct SharedRoutes {
    routes: RwLock<Routes>,
    /// Whether all that is known of the cluster has been read once.
    complete: watch::Sender<bool>,
}

impl SharedRoutes {
    /// `cluster_domain` is what cluster DNS appends to the names of services.
    pub fn new(cluster_domain: String) -> Self {
        let routes = RwLock::new(Routes { cluster_domain, ..Routes::default() });
        Self { routes, complete: watch::Sender::new(true) }
    }

    /// Says whether routes are still missing because the cluster has not been read yet.
    pub fn set_complete(&self, complete: bool) {
        self.complete.send_replace(complete);
    }

    /// Waits until the cluster has been read.
    pub async fn complete(&self) {
        let _ = self.complete.subscribe().wait_for(|complete| *complete).await;
    }

    /// Asks the routes. `ask` has to be quick, as changes wait for it.
    pub fn read<R>(&self, ask: impl FnOnce(&Routes) -> R) -> R {
        ask(&self.routes.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the routes. Dials wait for it.
    pub fn change<R>(&self, change: impl FnOnce(&mut Routes) -> R) -> R {
        change(&mut self.routes.write().unwrap_or_else(PoisonError::into_inner))
    }
}
