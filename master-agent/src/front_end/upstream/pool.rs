//! The pool of connections to one API server, which also limits their number.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper::client::conn::http2;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::{
    body::RequestBody,
    config::UpstreamConfig,
    sender::{Established, Http1, Sender, StreamPermit},
};
use crate::front_end::workers;

/// The maximum number of concurrent requests on one HTTP/2 connection.
pub(super) const MAX_STREAMS: usize = 100;
/// How long an unused connection is kept.
const MAX_UNUSED: Duration = Duration::from_secs(90);

/// The connections to one API server.
pub(super) struct Pool {
    idle: Idle,
    shared: Mutex<Vec<Http2>>,
    permits: Arc<Semaphore>,
    max_age: Duration,
}

/// Idle connections. Each worker thread has its own, since a connection is driven by the thread that made it. The most
/// recently used connection is used next, so that connections which are not needed expire.
struct Idle {
    of_threads: Vec<Mutex<VecDeque<Http1>>>,
    count: AtomicUsize,
    max: usize,
}

impl Idle {
    fn new(max: usize) -> Self {
        let of_threads = (0..=workers::count()).map(|_| Mutex::default()).collect();
        Self { of_threads, count: AtomicUsize::new(0), max }
    }

    /// Takes the most recently used connection of this thread.
    fn newest(&self) -> Option<Http1> {
        self.remove(self.of_threads.get(workers::current())?, VecDeque::pop_back)
    }

    /// Takes the least recently used connection of the thread that has the most idle connections.
    fn oldest(&self) -> Option<Http1> {
        let most = self.of_threads.iter().max_by_key(|one| lock(one).len())?;
        self.remove(most, VecDeque::pop_front)
    }

    /// Adds a connection of this thread, and closes the oldest one if there are too many.
    fn add(&self, connection: Http1) {
        let Some(one) = self.of_threads.get(workers::current()) else { return };
        self.add_to(one, connection);
        if self.count.load(Ordering::Relaxed) > self.max {
            drop(self.oldest());
        }
    }

    fn add_to(&self, one: &Mutex<VecDeque<Http1>>, connection: Http1) {
        // The connection is counted before another thread can remove it.
        self.count.fetch_add(1, Ordering::Relaxed);
        lock(one).push_back(connection);
    }

    fn remove(
        &self,
        one: &Mutex<VecDeque<Http1>>,
        which: fn(&mut VecDeque<Http1>) -> Option<Http1>,
    ) -> Option<Http1> {
        let connection = which(&mut lock(one))?;
        self.count.fetch_sub(1, Ordering::Relaxed);
        Some(connection)
    }

    /// Closes connections that are not `good`. Each connection is taken out of the pool while it is checked.
    fn retain(&self, good: impl Fn(&mut Http1) -> bool) {
        for one in &self.of_threads {
            let kept = lock(one).len();
            for _ in 0..kept {
                let Some(mut connection) = self.remove(one, VecDeque::pop_front) else { break };
                if good(&mut connection) {
                    self.add_to(one, connection);
                }
            }
        }
    }
}

fn lock<T>(one: &Mutex<T>) -> MutexGuard<'_, T> {
    one.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An HTTP/2 connection, which many requests share and a task of its own drives.
struct Http2 {
    sender: http2::SendRequest<RequestBody>,
    streams: Arc<AtomicUsize>,
    established: Established,
    /// When the connection was last known to have streams.
    used: Instant,
}

impl Pool {
    pub(super) fn new(config: &UpstreamConfig) -> Self {
        Self {
            idle: Idle::new(config.max_idle),
            shared: Mutex::default(),
            permits: Arc::new(Semaphore::new(config.max_connections)),
            max_age: config.max_age,
        }
    }

    /// Returns a permit for a new connection. If none is left, an idle connection is closed to free one.
    pub(super) fn permit(&self) -> Option<OwnedSemaphorePermit> {
        let permit = || self.permits.clone().try_acquire_owned().ok();
        permit().or_else(|| {
            drop(self.idle.oldest());
            permit()
        })
    }

    /// Takes a connection that was made with this generation of the files.
    pub(super) fn take(&self, generation: u64) -> Option<Sender> {
        if let Some((sender, permit)) = self.stream(generation) {
            return Some(Sender::Http2(sender, permit));
        }
        loop {
            // The connection is taken out of the pool first, because driving it may take a while.
            let mut connection = self.idle.newest()?;
            if self.is_current(&connection.established, generation) && connection.is_ready() {
                return Some(Sender::Http1(connection));
            }
        }
    }

    fn stream(&self, generation: u64) -> Option<(http2::SendRequest<RequestBody>, StreamPermit)> {
        let mut shared = self.shared();
        // Requests in progress keep their connection.
        shared.retain(|one| !one.sender.is_closed() && self.is_current(&one.established, generation));
        let one = shared.iter_mut().find(|one| one.streams.load(Ordering::Relaxed) < MAX_STREAMS)?;
        one.used = Instant::now();
        Some((one.sender.clone(), StreamPermit::take(&one.streams)))
    }

    /// Returns a connection to the pool, if it can be used again.
    pub(super) fn put(&self, mut connection: Http1, generation: u64) {
        if !self.is_current(&connection.established, generation) || !connection.is_ready() {
            return;
        }
        connection.used = Instant::now();
        self.idle.add(connection);
    }

    /// Adds a new HTTP/2 connection to the pool, and takes its first stream.
    pub(super) fn share(
        &self,
        sender: &http2::SendRequest<RequestBody>,
        established: Established,
    ) -> StreamPermit {
        let streams = Arc::default();
        let permit = StreamPermit::take(&streams);
        self.shared().push(Http2 { sender: sender.clone(), streams, established, used: Instant::now() });
        permit
    }

    /// Closes connections that the server has closed, that have been unused for long, that are old, or that were made
    /// with an older generation of the files.
    pub(super) fn sweep(&self, generation: u64) {
        self.idle.retain(|connection| {
            connection.used.elapsed() < MAX_UNUSED
                && self.is_current(&connection.established, generation)
                && connection.is_ready()
        });
        self.shared().retain_mut(|one| {
            if one.streams.load(Ordering::Relaxed) > 0 {
                one.used = Instant::now();
            }
            one.used.elapsed() < MAX_UNUSED
                && !one.sender.is_closed()
                && self.is_current(&one.established, generation)
        });
    }

    fn is_current(&self, established: &Established, generation: u64) -> bool {
        established.generation == generation && established.at.elapsed() < self.max_age
    }

    fn shared(&self) -> MutexGuard<'_, Vec<Http2>> {
        lock(&self.shared)
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, task::Poll};

    use hyper::client::conn::http1;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::{io::DuplexStream, task::coop::has_budget_remaining};

    use super::*;

    fn pool(max_idle: usize, max_connections: usize) -> Pool {
        Pool::new(&UpstreamConfig {
            servers: Vec::new(),
            tls: Default::default(),
            identity: Default::default(),
            http2: true,
            health_path: "/".to_owned(),
            health_interval: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            max_idle,
            max_connections,
            max_age: Duration::from_secs(600),
        })
    }

    fn kept(pool: &Pool) -> usize {
        let count = pool.idle.of_threads.iter().map(|one| lock(one).len()).sum();
        assert_eq!(pool.idle.count.load(Ordering::Relaxed), count);
        count
    }

    fn established(generation: u64) -> Established {
        Established { generation, at: Instant::now() }
    }

    async fn http1(pool: &Pool, generation: u64) -> (Http1, DuplexStream) {
        let (near, far) = tokio::io::duplex(1024);
        let (sender, connection) = http1::handshake(TokioIo::new(near)).await.unwrap();
        let driver = Box::pin(connection.with_upgrades());
        let mut connection = Http1::new(sender, driver, established(generation), pool.permit().unwrap());
        assert!(connection.is_ready());
        (connection, far)
    }

    /// Uses up the task's budget in tokio's cooperative scheduling.
    async fn work_hard() {
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        for _ in 0..1000 {
            sender.send(()).unwrap();
        }
        poll_fn(|cx| {
            while has_budget_remaining() {
                let _ = receiver.poll_recv(cx);
            }
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn a_busy_task_tells_good_connections_from_closed_ones() {
        let pool = pool(10, 10);
        let (good, _far) = http1(&pool, 0).await;
        let (ended, gone) = http1(&pool, 0).await;
        drop(gone);
        work_hard().await;
        pool.put(good, 0);
        pool.put(ended, 0);
        assert_eq!(kept(&pool), 1);
        assert!(pool.take(0).is_some());
    }

    #[tokio::test]
    async fn kept_connections_are_bounded_and_give_way_to_new_ones() {
        let pool = pool(2, 3);
        let mut all = Vec::new();
        let mut ends = Vec::new();
        for _ in 0..3 {
            let (connection, far) = http1(&pool, 0).await;
            all.push(connection);
            ends.push(far);
        }
        assert!(pool.permit().is_none());
        for connection in all {
            pool.put(connection, 0);
        }
        assert_eq!(kept(&pool), 2);
        let permits: Vec<_> = std::iter::from_fn(|| pool.permit()).collect();
        assert_eq!((permits.len(), kept(&pool)), (3, 0));
    }

    #[tokio::test]
    async fn a_thread_uses_its_own_connections_and_the_one_with_most_gives_way() {
        let pool = pool(2, 10);
        let mut ends = Vec::new();
        for _ in 0..2 {
            let (connection, far) = http1(&pool, 0).await;
            pool.idle.add_to(&pool.idle.of_threads[1], connection);
            ends.push(far);
        }
        assert!(pool.take(0).is_none(), "they are another thread's");
        let (connection, _far) = http1(&pool, 0).await;
        pool.put(connection, 0);
        assert_eq!(kept(&pool), 2);
        assert!(pool.take(0).is_some() && pool.take(0).is_none());
        assert_eq!(kept(&pool), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn connections_of_old_files_and_old_connections_are_not_used() {
        let pool = pool(10, 10);
        let (old, _far) = http1(&pool, 0).await;
        pool.put(old, 0);
        assert!(pool.take(1).is_none());
        let (late, _far) = http1(&pool, 0).await;
        pool.put(late, 1);
        assert_eq!(kept(&pool), 0);
        let (aged, _far) = http1(&pool, 1).await;
        tokio::time::advance(Duration::from_secs(601)).await;
        pool.put(aged, 1);
        assert!(pool.take(1).is_none());
        let (unused, _far) = http1(&pool, 1).await;
        pool.put(unused, 1);
        pool.sweep(1);
        assert_eq!(kept(&pool), 1);
        tokio::time::advance(MAX_UNUSED).await;
        pool.sweep(1);
        assert_eq!(kept(&pool), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn shared_connections_fill_up_in_turn_and_close_when_nobody_needs_them() {
        let pool = pool(10, 10);
        let (near, _far) = tokio::io::duplex(1024);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(near)).await.unwrap();
        #[allow(clippy::disallowed_methods, reason = "a test owns its tasks by its runtime")]
        tokio::spawn(connection);
        let first: Vec<_> =
            std::iter::once(Sender::Http2(sender.clone(), pool.share(&sender, established(0))))
                .chain(std::iter::from_fn(|| pool.take(0)))
                .collect();
        assert_eq!(first.len(), MAX_STREAMS);
        let second = pool.share(&sender, established(0));
        drop(second);
        tokio::time::advance(MAX_UNUSED).await;
        pool.sweep(0);
        assert_eq!(pool.shared().len(), 1, "the first is in use");
        drop(first);
        tokio::time::advance(MAX_UNUSED).await;
        pool.sweep(0);
        assert_eq!(pool.shared().len(), 0);
        let permit = pool.share(&sender, established(0));
        assert!(pool.take(1).is_none() && pool.shared().is_empty(), "made with other files");
        drop(permit);
    }
}
