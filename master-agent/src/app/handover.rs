//! The handover of a running process to its next one, seen from both.

use std::{convert::Infallible, future::pending, time::Duration};

use proto::NodeName;
use proto_net::{
    handover::{Draining, End, HandoverError, Predecessor, Program, Successor},
    listeners::{Address, Listeners, Stage},
    systemd,
};
use tokio::{
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::components::Components;
use crate::{admin_api::Reloaded, reload::ReloadRequests, stream::metrics::DrainingGauges};

/// How long the next process waits for the links and watches that the running one has.
const LINKS_TIMEOUT: Duration = Duration::from_secs(20);
/// The pause between two looks at which of them are there.
const LINKS_INTERVAL: Duration = Duration::from_millis(10);
/// The pause between two looks for nodes that have not been asked for another link.
const ASK_INTERVAL: Duration = Duration::from_millis(500);
/// How long callers that were accepted before may still ask for something in a process that has been replaced. They are
/// told with each answer that they have to connect again.
const LAST_REQUESTS: Duration = Duration::from_secs(10);
/// How long the streams that these requests need may take.
const LAST_DIALS: Duration = Duration::from_secs(10);
/// How often the next process is told what this one still carries.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// The most processes at once that drain.
const MAX_DRAINING: i64 = 32;
/// How often a next process that ends unexpectedly is started again, and the pause before that.
const RESTARTS: usize = 3;
const RESTART_PAUSE: Duration = Duration::from_secs(1);

const REPLACED: &str = "a new process of the master-agent has taken its place";

/// The running process, as far as its next one takes it over.
pub(super) struct Handover<'a> {
    pub(super) program: &'a Program,
    pub(super) listeners: &'a Listeners,
    pub(super) components: &'a Components,
    /// The number of callers.
    pub(super) callers: &'a (dyn Fn() -> u64 + Sync),
}

impl Handover<'_> {
    /// Hands over whenever that is requested. Completes once a next process serves.
    pub(super) async fn requested(&self, requests: &mut ReloadRequests) -> Successor {
        while let Some(answer) = requests.recv().await {
            match self.hand_over().await {
                Ok(successor) => {
                    let reloaded = Reloaded {
                        pid: successor.pid,
                        version: successor.version.clone(),
                        former_pid: std::process::id(),
                        former_callers: (self.callers)(),
                    };
                    let _ = answer.send(Ok(reloaded));
                    return successor;
                }
                Err(why) => {
                    tracing::error!(why, "no new process has taken over; this one goes on");
                    let _ = answer.send(Err(format!("{why}; the running process goes on")));
                }
            }
        }
        pending().await
    }

    async fn hand_over(&self) -> Result<Successor, String> {
        let draining = self.components.streams.draining.processes.get();
        if draining >= MAX_DRAINING {
            return Err(format!(
                "{draining} former processes still carry streams: wait for them, or restart the agent"
            ));
        }
        let begun = self.begin().await;
        if begun.is_err() {
            // Callers have been accepted all the time.
            self.listeners.accept(Stage::Links, true);
        }
        begun.map_err(|error| error.to_string())
    }

    /// Starts the next process, and leaves the links to it. This process goes on unless the result is good.
    async fn begin(&self) -> Result<Successor, HandoverError> {
        tracing::info!(program = %self.program.path().display(), "starting a new process");
        let nodes = self.components.registry.connected();
        let nodes = nodes.into_iter().map(|node| node.to_string()).collect();
        let mut successor = Successor::start(self.program, self.listeners, nodes).await?;
        self.listeners.accept(Stage::Links, false);
        tokio::select! {
            served = successor.serve(self.listeners) => served?,
            never = self.ask_for_links() => match never {},
        }
        self.listeners.accept(Stage::Callers, false);
        systemd::replaced_by(successor.pid);
        tracing::info!(pid = successor.pid, version = successor.version, "a new process serves");
        Ok(successor)
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

    /// Does what a process that has been replaced still has to do, until the `rest` of its callers has ended. Returns how many
    /// of them were cut.
    ///
    /// If the next process ends meanwhile, it is started again: systemd does not notice the end of a main process whose
    /// parent is another one. If that fails, this process ends, and systemd starts the agent anew.
    pub(super) async fn carry_on(
        &self,
        mut successor: Successor,
        rest: impl Future<Output = usize>,
    ) -> usize {
        let retiring = async {
            sleep(LAST_REQUESTS).await;
            self.components.closing.cancel();
            sleep(LAST_DIALS).await;
            self.components.for_all_tunnels(|tunnel| async move { tunnel.retire(REPLACED).await }).await;
            pending::<Infallible>().await
        };
        tokio::pin!(rest, retiring);
        let mut restarts = RESTARTS;
        loop {
            tokio::select! {
                cut = &mut rest => return cut,
                never = &mut retiring => match never {},
                () = self.report_until_crash(&mut successor) => {}
            }
            // Nobody serves, and this comes before everything else.
            successor = loop {
                if restarts == 0 {
                    return usize::try_from((self.callers)()).unwrap_or(usize::MAX);
                }
                restarts -= 1;
                sleep(RESTART_PAUSE).await;
                match self.start_again().await {
                    Ok(next) => break next,
                    Err(error) => tracing::error!(%error, "no new process takes over again"),
                }
            };
        }
    }

    async fn report_until_crash(&self, successor: &mut Successor) {
        loop {
            let former = &self.components.streams.draining;
            let count = |gauge: i64| u64::try_from(gauge).unwrap_or_default();
            let draining = Draining {
                processes: 1 + count(former.processes.get()),
                streams: (self.callers)() + count(former.callers.get()),
            };
            successor.report(draining).await;
            tokio::select! {
                () = sleep(REPORT_INTERVAL) => {}
                end = successor.end() => match end {
                    // Nobody waits for this process to start another one any more.
                    End::Leaves => self.listeners.close_all_handles(),
                    End::Crashed(status) => {
                        tracing::error!(pid = successor.pid, status, "the process that serves has crashed");
                        return;
                    }
                },
            }
        }
    }

    async fn start_again(&self) -> Result<Successor, HandoverError> {
        let mut successor = Successor::start(self.program, self.listeners, Vec::new()).await?;
        successor.serve(self.listeners).await?;
        systemd::replaced_by(successor.pid);
        tracing::info!(pid = successor.pid, "a process serves again");
        Ok(successor)
    }
}

/// Takes the place of the former process: says that everything has been read, makes the links that the former process has,
/// and then serves everybody.
pub(super) async fn take_over(
    predecessor: &mut Predecessor,
    unused: Vec<Address>,
    listeners: &Listeners,
    components: &Components,
) {
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
    predecessor.loaded(env!("CARGO_PKG_VERSION"), unused).await;
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
    predecessor.serving().await;
}

/// Shows what former processes still carry, until they have ended. Tells them when this process is leaving, too.
pub(super) async fn follow(predecessor: Predecessor, gauges: DrainingGauges, leaving: CancellationToken) {
    let show = |draining: Draining| {
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        gauges.processes.set(number(draining.processes));
        gauges.callers.set(number(draining.streams));
    };
    predecessor.follow(show, leaving.cancelled()).await;
}
