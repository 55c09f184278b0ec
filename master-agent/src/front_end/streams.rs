//! The streams of a caller's HTTP/2 connection, which end when their caller stops reading the response.
//!
//! A watch is a stream for as long as it lasts, so a stream has little memory and no timer: its connection looks after
//! all of its streams at once.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{
    task::coop::has_budget_remaining,
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};
use tokio_util::sync::CancellationToken;

use super::answer::Progress;
use crate::http::connection_tasks::{ConnectionTasks, Spawner};

tokio::task_local! {
    static PROGRESS: Arc<Progress>;
}

/// Returns the progress of the current stream's response.
pub(super) fn progress() -> Arc<Progress> {
    PROGRESS.try_with(Arc::clone).unwrap_or_default()
}

/// The streams of one connection.
pub(super) struct Streams {
    tasks: ConnectionTasks<Stream>,
    /// Ticks after the time in which a caller must read something of a response.
    checks: Interval,
    /// Cancelled when the connection has to end, because hyper holds pieces of a response that nobody reads.
    ending: CancellationToken,
}

/// Adds streams to those of a connection.
#[derive(Clone)]
pub(super) struct StreamSpawner(Spawner<Stream>);

impl Streams {
    /// `stall_timeout` is how long a caller may read nothing of a response. It may become twice as long.
    pub(super) fn new(stall_timeout: Duration, ending: CancellationToken) -> (StreamSpawner, Self) {
        let (spawner, tasks) = ConnectionTasks::new();
        let mut checks = interval_at(Instant::now() + stall_timeout, stall_timeout);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        (StreamSpawner(spawner), Self { tasks, checks, ending })
    }

    /// Drives the connection until it ends, and its streams as long. Cancel-safe.
    pub(super) async fn serve<C: Future>(&mut self, mut connection: Pin<&mut C>) -> C::Output {
        loop {
            tokio::select! {
                served = self.tasks.drive(connection.as_mut()) => return served,
                _ = self.checks.tick() => {}
            }
            for stream in self.tasks.iter_mut() {
                if stream.check() == Stall::Lasting {
                    self.ending.cancel();
                }
            }
        }
    }
}

impl<F> hyper::rt::Executor<F> for StreamSpawner
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let progress = Arc::<Progress>::default();
        let served = PROGRESS.scope(progress.clone(), stream);
        self.0.spawn(Stream { served: Some(Box::pin(served)), waker: None, progress, pending: None });
    }
}

/// A stream, which lasts until its request has been answered and all pieces of the response have been sent.
struct Stream {
    /// `None` once hyper has taken the whole response. Dropping it resets the stream and ends everything that its
    /// request has begun.
    served: Option<BoxFuture<'static, ()>>,
    waker: Option<Waker>,
    progress: Arc<Progress>,
    /// What was pending at the last check.
    pending: Option<usize>,
}

/// Whether the caller reads the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stall {
    None,
    /// The caller has stopped reading, so the stream was reset.
    Reset,
    /// Pieces are still pending although the stream was reset or the response is complete.
    Lasting,
}

impl Stream {
    /// Resets the stream if pieces have been pending since the last check without progress.
    fn check(&mut self) -> Stall {
        let before = std::mem::replace(&mut self.pending, self.progress.pending());
        if self.pending.is_none() || self.pending != before {
            return Stall::None;
        }
        if self.served.take().is_none() {
            return Stall::Lasting;
        }
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
        Stall::Reset
    }
}

impl Future for Stream {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        // Whatever is polled now would only find out for itself that this task has done enough for the moment.
        if !has_budget_remaining() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(served) = &mut this.served {
            if served.as_mut().poll(cx).is_pending() {
                match &mut this.waker {
                    Some(waker) => waker.clone_from(cx.waker()),
                    None => this.waker = Some(cx.waker().clone()),
                }
                return Poll::Pending;
            }
            this.served = None;
        }
        this.progress.poll_sent(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::{pending, poll_fn},
        pin::pin,
        sync::atomic::{AtomicBool, Ordering},
    };

    use futures_util::FutureExt;
    use hyper::rt::Executor;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(100);

    /// A response of pieces that hyper has taken, whose end is seen by others.
    struct Response {
        progress: Arc<Progress>,
        ended: Arc<AtomicBool>,
    }

    impl Drop for Response {
        fn drop(&mut self) {
            self.ended.store(true, Ordering::SeqCst);
        }
    }

    struct World {
        spawner: StreamSpawner,
        streams: Streams,
        ending: CancellationToken,
    }

    impl World {
        fn new() -> Self {
            let ending = CancellationToken::new();
            let (spawner, streams) = Streams::new(TIMEOUT, ending.clone());
            Self { spawner, streams, ending }
        }

        /// Begins a stream whose response has one piece, and that lasts if it is a watch.
        async fn begin(&mut self, watch: bool) -> (Arc<Progress>, Arc<AtomicBool>) {
            let (sender, mut receiver) = tokio::sync::oneshot::channel();
            let ended = Arc::<AtomicBool>::default();
            let seen = ended.clone();
            self.spawner.execute(async move {
                let response = Response { progress: progress(), ended: seen };
                response.progress.taken();
                let _ = sender.send(response.progress.clone());
                if watch {
                    pending::<()>().await;
                }
            });
            let connection = poll_fn(|cx| receiver.poll_unpin(cx));
            (self.streams.serve(pin!(connection)).await.unwrap(), ended)
        }

        async fn serve_for(&mut self, time: Duration) {
            self.streams.serve(pin!(tokio::time::sleep(time))).await;
        }

        fn count(&mut self) -> usize {
            self.streams.tasks.iter_mut().count()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_watch_lasts_and_one_that_is_not_read_ends() {
        let mut world = World::new();
        let (read, idle_ended) = world.begin(true).await;
        let (_unread, unread_ended) = world.begin(true).await;
        read.dropped();
        world.serve_for(TIMEOUT * 3 / 2).await;
        assert!(!unread_ended.load(Ordering::SeqCst), "it had less than twice the time");
        world.serve_for(TIMEOUT).await;
        assert!(unread_ended.load(Ordering::SeqCst) && !idle_ended.load(Ordering::SeqCst));
        assert!(!world.ending.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_lasts_while_it_is_read_slowly_and_until_its_last_piece_is_sent() {
        let mut world = World::new();
        let (slow, slow_ended) = world.begin(true).await;
        for _ in 0..5 {
            world.serve_for(TIMEOUT / 2).await;
            slow.taken();
            slow.dropped();
        }
        assert!(!slow_ended.load(Ordering::SeqCst));
        let (sent, sent_ended) = world.begin(false).await;
        world.serve_for(Duration::from_secs(1)).await;
        assert!(sent_ended.load(Ordering::SeqCst));
        assert_eq!(world.count(), 2, "its last piece has not been sent");
        sent.dropped();
        world.serve_for(Duration::from_secs(1)).await;
        assert_eq!(world.count(), 1);
        assert!(!world.ending.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn the_connection_ends_if_even_a_reset_frees_no_piece() {
        let mut world = World::new();
        let (_unread, ended) = world.begin(true).await;
        world.serve_for(TIMEOUT * 5 / 2).await;
        assert!(ended.load(Ordering::SeqCst) && !world.ending.is_cancelled());
        world.serve_for(TIMEOUT).await;
        assert!(world.ending.is_cancelled());
    }

    #[tokio::test]
    async fn streams_end_with_their_connection() {
        let mut world = World::new();
        let (_progress, ended) = world.begin(true).await;
        drop(world);
        assert!(ended.load(Ordering::SeqCst));
    }
}
