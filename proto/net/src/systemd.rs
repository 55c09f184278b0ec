//! Notifies systemd of the agent's state, as sd_notify(3) describes it. Without systemd this does nothing.

use std::{env, io, os::unix::net::UnixDatagram, time::Duration};

use sd_notify::NotifyState;
use tokio::{
    runtime::Handle,
    time::{MissedTickBehavior, interval},
};

use super::tasks::Tasks;

/// Says that every socket is bound and served.
pub fn ready() {
    tell(NotifyState::Ready);
}

/// Says that the agent is shutting down.
pub fn stopping() {
    tell(NotifyState::Stopping);
}

/// Says that another process is the service's main process from now on.
pub fn replaced_by(pid: u32) {
    tell(NotifyState::MainPid(pid));
}

fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!(%error, "systemd was not notified");
    }
}

/// Answers systemd's watchdog, if it is on, for as long as the runtimes that carry streams run tasks: the one that this
/// is spawned on, and `others`. If one of them hangs, so does this, and systemd restarts the agent.
pub async fn watchdog(others: Vec<Handle>) {
    if let Some(timeout) = sd_notify::watchdog_enabled() {
        answer_while_alive(timeout / 2, &others, || {
            if let Err(error) = answer() {
                tracing::debug!(%error, "the watchdog was not answered");
            }
        })
        .await;
    }
}

async fn answer_while_alive(pause: Duration, others: &[Handle], mut answer: impl FnMut()) {
    // Tokio panics at an interval of zero.
    let mut ticks = interval(pause.max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let tasks = Tasks::new();
    loop {
        ticks.tick().await;
        for runtime in others {
            let _ = tasks.spawn_on(async {}, runtime).await;
        }
        answer();
    }
}

/// Answers without blocking: `sd_notify::notify` waits while systemd's queue is full, and this thread carries streams.
fn answer() -> io::Result<()> {
    let Some(path) = env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect(path)?;
    socket.send(b"WATCHDOG=1").map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::runtime::Builder;

    use super::*;

    const PAUSE: Duration = Duration::from_secs(15);

    /// A runtime on a thread of its own, and what lets a blocked thread go on.
    struct Worker {
        runtime: Handle,
        release: mpsc::Sender<()>,
        blocked: mpsc::Receiver<()>,
    }

    fn worker(blocks: bool) -> Worker {
        let (release, released) = mpsc::channel::<()>();
        let (block, blocked) = mpsc::channel();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        std::thread::spawn(move || {
            runtime.block_on(async {
                if blocks {
                    block.send(()).unwrap();
                    let _ = released.recv();
                }
                std::future::pending::<()>().await;
            });
        });
        Worker { runtime: handle, release, blocked }
    }

    /// Answers until there were `wanted` of them, or until an hour has passed without them. While nothing happens on
    /// this thread, time passes at once.
    async fn answers(wanted: usize, others: &[Handle]) -> usize {
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        let answering = answer_while_alive(PAUSE, others, || sender.send(()).unwrap());
        let counting = async {
            let mut count = 0;
            while count < wanted && receiver.recv().await.is_some() {
                count += 1;
            }
            count
        };
        tokio::select! {
            () = answering => unreachable!(),
            count = counting => count,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_answered_at_half_its_time_while_all_runtimes_live() {
        let workers = [worker(false), worker(false)];
        let handles = workers.each_ref().map(|worker| worker.runtime.clone());
        let began = tokio::time::Instant::now();
        assert_eq!(answers(5, &handles).await, 5);
        assert_eq!(began.elapsed(), 4 * PAUSE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_that_hangs_leaves_the_watchdog_unanswered() {
        let worker = worker(true);
        worker.blocked.recv().unwrap();
        let handles = [worker.runtime.clone()];
        let hour = Duration::from_secs(3600);
        let waited = tokio::time::timeout(hour, answers(1, &handles)).await;
        assert!(waited.is_err(), "answered while a thread hangs");
        worker.release.send(()).unwrap();
        assert_eq!(answers(2, &handles).await, 2);
    }
}
