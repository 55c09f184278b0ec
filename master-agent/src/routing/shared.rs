//! The routes, shared by those who dial and those who keep them.

use std::sync::{PoisonError, RwLock};

use super::Routes;

/// The present routes.
#[derive(Debug, Default)]
pub struct SharedRoutes(RwLock<Routes>);

impl SharedRoutes {
    /// `cluster_domain` is what cluster DNS appends to the names of services.
    pub fn new(cluster_domain: String) -> Self {
        Self(RwLock::new(Routes { cluster_domain, ..Routes::default() }))
    }

    /// Asks the routes. `ask` has to be quick, as changes wait for it.
    pub fn read<R>(&self, ask: impl FnOnce(&Routes) -> R) -> R {
        ask(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the routes. Dials wait for it.
    pub fn change<R>(&self, change: impl FnOnce(&mut Routes) -> R) -> R {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }
}
