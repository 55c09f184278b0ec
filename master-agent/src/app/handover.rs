//! The master-agent's part in a handover: that of the running process, and that of the next one.

use std::{convert::Infallible, future::pending, io, time::Duration};

use proto::NodeName;
use proto_net::{
    handover::{Agent, Predecessor},
    listeners::{Address, Listeners, Stage},
};
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::{components::Components, groups::Groups};

/// How long the next process waits for the links and watches that the running one has.
const LINKS_TIMEOUT: Duration = Duration::from_secs(20);
/// The pause between two looks at which of them are there.
const LINKS_INTERVAL: Duration = Duration::from_millis(10);
/// The pause between two looks for nodes that have not been asked for another link.
const ASK_INTERVAL: Duration = Duration::from_millis(500);
/// How long the command that has asked for the handover may take to read its answer.
const LAST_ANSWER: Duration = Duration::from_millis(500);
/// How long callers that were accepted before may still ask for something in a process that has been replaced. They are
/// told with each answer that they have to connect again.
const LAST_REQUESTS: Duration = Duration::from_secs(10);
/// How long the streams that these requests need may take.
const LAST_DIALS: Duration = Duration::from_secs(10);

const REPLACED: &str = "a new process of the master-agent has taken its place";

/// The agent that runs, for the handover to its next process.
pub(super) struct Running<'a> {
    pub(super) components: &'a Components,
    pub(super) groups: &'a Groups,
}

impl Agent for Running<'_> {
    fn peers(&self) -> Vec<String> {
        self.components.registry.connected().into_iter().map(|node| node.to_string()).collect()
    }

    /// Asks nodes that call home for other links, also those whose call was still being answered.
    async fn ask_for_links(&self) -> Infallible {
        let mut asked = 0;
        loop {
            let tunnels = self.components.registry.tunnels();
            let new: Vec<_> = tunnels.into_iter().filter(|tunnel| tunnel.id > asked).collect();
            asked = new.iter().map(|tunnel| tunnel.id).max().unwrap_or(asked);
            let asking = self.components.sessions.child();
            for tunnel in new {
                asking.spawn(async move { tunnel.ask_to_relink().await });
            }
            sleep(ASK_INTERVAL).await;
        }
    }

    fn callers(&self) -> u64 {
        self.groups.callers.len() as u64
    }
}

impl Running<'_> {
    /// Leaves new callers to the next process, and then the tunnels. Never completes.
    pub(super) async fn retire(&self) -> Infallible {
        sleep(LAST_ANSWER).await;
        self.groups.health.cancel();
        sleep(LAST_REQUESTS).await;
        self.components.generations.present().closing.cancel();
        sleep(LAST_DIALS).await;
        self.components.for_all_tunnels(|tunnel| async move { tunnel.retire(REPLACED).await }).await;
        pending().await
    }
}

/// Takes the place of the former process: says that everything has been read, makes the links that the former process has,
/// and then serves everybody.
pub(super) async fn take_over(
    predecessor: &mut Predecessor,
    unused: &[Address],
    listeners: &Listeners,
    components: &Components,
) -> io::Result<()> {
    let Components { registry, watches, expected, .. } = components;
    // Nodes that are known only from the cluster would be refused.
    if let Some(watches) = watches {
        let read = async {
            while watches.ready().is_err() {
                sleep(LINKS_INTERVAL).await;
            }
        };
        if timeout(LINKS_TIMEOUT, read).await.is_err() {
            tracing::warn!("taking over before the Kubernetes API has been read");
        }
        let expected = expected.clone();
        let _ = spawn_blocking(move || expected.cluster_changed()).await;
    }
    predecessor.loaded(env!("CARGO_PKG_VERSION"), unused).await?;
    listeners.accept(Stage::Links, true);
    let mut missing: Vec<_> =
        predecessor.take_peers().iter().filter_map(|node| node.parse::<NodeName>().ok()).collect();
    let linked = async {
        // Only the last one is looked at, until it is there.
        while let Some(last) = missing.last() {
            if registry.is_connected(last) || registry.state(last).is_none() {
                missing.pop();
            } else {
                sleep(LINKS_INTERVAL).await;
            }
        }
    };
    if timeout(LINKS_TIMEOUT, linked).await.is_err() {
        let first = missing.last().map(tracing::field::display);
        tracing::warn!(first, at_most = missing.len(), "nodes of the former process have no tunnel yet");
    }
    registry.serves_now();
    listeners.accept(Stage::Callers, true);
    predecessor.serving().await
}
