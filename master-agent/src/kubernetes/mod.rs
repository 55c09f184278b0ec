//! Follows the Kubernetes API: lists and watches Nodes, Pods, Services and EndpointSlices, and keeps the routes as they
//! say. Where tokens of service accounts are checked, it also follows ServiceAccounts and keeps which of these objects
//! exist.
//!
//! Whatever goes wrong with the API, what is known stays, and its age can be asked for ([`Watches::status`]).

pub mod api_server;
pub mod config;
pub mod existing;
mod followed;
mod lenient;
pub mod metrics;
mod objects;
mod reflector;
mod state;
#[cfg(test)]
mod tests;
pub mod thread;
mod watched;

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use kube::{
    Client,
    config::{KubeConfigOptions, Kubeconfig},
};
use proto_net::tasks::Tasks;
use tokio::{runtime::Handle, sync::watch};

use crate::routing::shared::SharedRoutes;
use config::KubernetesConfig;
use existing::ExistingObjects;
use followed::Followed;
use reflector::{PATIENCE, Reflector, WATCH};
use state::State;
pub use state::WatchStatus;

/// The watches of all kinds.
pub struct Watches {
    state: Arc<State>,
    stale_after: Duration,
}

/// A client of the API server, by a kubeconfig file or by what a pod is given.
pub async fn client(config: &KubernetesConfig) -> anyhow::Result<Client> {
    let mut client = match &config.kubeconfig {
        Some(path) => {
            let context = || format!("can't use the kubeconfig {}", path.display());
            let kubeconfig = Kubeconfig::read_from(path).with_context(context)?;
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .with_context(context)?
        }
        None => kube::Config::incluster()
            .context("kubernetes.kubeconfig is not given, and this is no pod with a service account")?,
    };
    client.connect_timeout = Some(PATIENCE);
    client.read_timeout = Some(WATCH + PATIENCE);
    Client::try_from(client).context("no client for the Kubernetes API")
}

impl Watches {
    /// `accounts` also follows service accounts, and keeps which objects exist that tokens can be bound to.
    pub fn new(routes: Arc<SharedRoutes>, stale_after: Duration, accounts: bool) -> Arc<Self> {
        let existing = accounts.then(Arc::default);
        routes.set_complete(false);
        Arc::new(Self { state: Arc::new(State::new(routes, existing)), stale_after })
    }

    /// Which objects exist that tokens can be bound to.
    pub fn existing(&self) -> Option<Arc<ExistingObjects>> {
        self.state.existing().cloned()
    }

    /// Follows all kinds until the group is cancelled. All that the API server says is decoded on `runtime`, where the
    /// client must have been made.
    pub fn start(&self, client: &Client, tasks: &Tasks, runtime: &Handle) {
        let (client, state) = (|| client.clone(), || self.state.clone());
        tasks.spawn_on(Reflector::<core::Node>::new(client(), state()).run(), runtime);
        tasks.spawn_on(Reflector::<core::Pod>::new(client(), state()).run(), runtime);
        tasks.spawn_on(Reflector::<core::Service>::new(client(), state()).run(), runtime);
        tasks.spawn_on(Reflector::<discovery::EndpointSlice>::new(client(), state()).run(), runtime);
        if self.state.existing().is_some() {
            tasks.spawn_on(Reflector::<core::ServiceAccount>::new(client(), state()).run(), runtime);
        }
    }

    /// Wakes whoever waits when the set of nodes, or an address of one, has changed.
    pub fn nodes_changed(&self) -> watch::Receiver<()> {
        self.state.nodes_changed()
    }

    /// How each kind is followed, nodes first.
    pub fn status(&self) -> Vec<WatchStatus> {
        let accounts = self.state.existing().is_some();
        let followed =
            Followed::ALL.into_iter().filter(|kind| accounts || *kind != Followed::ServiceAccounts);
        followed.map(|kind| self.state.status(kind)).collect()
    }

    /// Remarks about the watches, or an error if routes are missing or older than is tolerable.
    pub fn ready(&self) -> Result<Vec<String>, String> {
        let (mut late, mut stale) = (Vec::new(), Vec::new());
        for status in self.status() {
            let error = status.error.as_deref().unwrap_or("not asked yet");
            let kind = status.kind;
            stale.extend(status.unreadable.iter().map(|what| format!("{kind}: {what}")));
            match status.stale_seconds {
                // No route depends on them, and each token can be asked about by itself.
                seconds
                    if kind == Followed::ServiceAccounts.name() && (!status.listed || seconds.is_some()) =>
                {
                    stale.push(format!(
                        "{kind} can't be followed, so the API server is asked about each token: {error}"
                    ));
                }
                _ if !status.listed => late.push(format!("{kind} have not been listed yet: {error}")),
                Some(seconds) if Duration::from_secs(seconds) >= self.stale_after => {
                    late.push(format!("{kind} are {seconds} s old: {error}"));
                }
                Some(seconds) => stale.push(format!("{kind} are {seconds} s old: {error}")),
                None => {}
            }
        }
        if late.is_empty() { Ok(stale) } else { Err(late.join("; ")) }
    }
}
