//! The running process's part of a handover, from the request until its own end.

use std::{convert::Infallible, future::pending, process, time::Duration};

use rustix::process::getppid;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    draining::{Draining, DrainingGauges},
    program::Program,
    reload::{ReloadRequests, Reloaded},
    successor::{HandoverError, JUST_REPLACED, Successor},
};
use crate::{
    listeners::{Listeners, Stage},
    systemd,
};

/// How often the next process is told what this one still carries.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// The most processes at once that drain.
const MAX_DRAINING: u64 = 32;

/// An agent that runs, as far as its next process takes it over.
pub trait Agent: Sync {
    /// The peers that it is linked to.
    fn peers(&self) -> Vec<String>;

    /// Asks its peers to make links to the next process, again and again, since some may be late.
    fn ask_for_links(&self) -> impl Future<Output = Infallible> + Send;

    /// How many callers it has, or on a node how many streams.
    fn callers(&self) -> u64;
}

/// A running process that may be replaced.
pub struct Handover<'a, A> {
    pub program: &'a Program,
    pub listeners: &'a Listeners,
    pub agent: &'a A,
    /// What the processes before this one still carry.
    pub former: &'a DrainingGauges,
    /// Cancelled when the process that serves has been told to stop.
    pub stopping: &'a CancellationToken,
}

impl<A: Agent> Handover<'_, A> {
    /// Hands over whenever that is requested. Completes once a next process serves.
    pub async fn requested(&self, requests: &mut ReloadRequests) -> Successor {
        while let Some(answer) = requests.recv().await {
            match self.hand_over().await {
                Ok(successor) => {
                    let reloaded = Reloaded {
                        pid: successor.pid,
                        version: successor.version.clone(),
                        former_pid: process::id(),
                        former_callers: self.agent.callers(),
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
        // A runtime's own child has no parent that it sees.
        if process::id() == 1 || getppid().is_none() {
            return Err("the container would end with this process: replace the container".to_owned());
        }
        let Draining { processes, .. } = self.former.get();
        if processes >= MAX_DRAINING {
            return Err(format!(
                "{processes} former processes still carry streams: wait for them, or restart the agent"
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
        let mut successor = Successor::start(self.program, self.listeners, self.agent.peers()).await?;
        self.listeners.accept(Stage::Links, false);
        tokio::select! {
            served = successor.serve(self.listeners) => served?,
            never = self.agent.ask_for_links() => match never {},
        }
        self.listeners.accept(Stage::Callers, false);
        systemd::replaced_by(successor.pid);
        tracing::info!(pid = successor.pid, version = successor.version, "a new process serves");
        Ok(successor)
    }

    /// Tells the next process what this one still carries, until the `rest` of that has ended. Returns how much of it was cut.
    ///
    /// If the next process ends meanwhile, whoever supervises the agent starts it anew. The sockets of this one are closed, so
    /// that nobody waits in their queues for a process that does not come. If the next process ends at once, so does this one.
    pub async fn carry_on(&self, successor: &Successor, rest: impl Future<Output = u64>) -> u64 {
        self.listeners.close_all_handles();
        let replaced = Instant::now();
        let reports = async {
            loop {
                let Draining { processes, streams } = self.former.get();
                let draining = Draining { processes: 1 + processes, streams: self.agent.callers() + streams };
                successor.report(draining).await;
                tokio::select! {
                    () = sleep(REPORT_INTERVAL) => {}
                    stops = successor.stops() => {
                        // systemd may not know yet that this process is not the main one any more.
                        if stops || replaced.elapsed() < JUST_REPLACED {
                            self.stopping.cancel();
                        }
                        return pending().await;
                    }
                }
            }
        };
        tokio::select! {
            cut = rest => cut,
            never = reports => match never {},
        }
    }
}
