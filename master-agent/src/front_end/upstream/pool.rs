//! The pool of connections to one API server, which also limits their number.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::{
    config::UpstreamConfig,
    established::Established,
    sender::{Http1, Sender},
    shared::{Http2, MAX_UNUSED, Shared, lock},
};
use crate::front_end::workers::PerThread;

/// The connections to one API server.
pub(super) struct Pool {
    idle: Idle,
    shared: Shared,
    permits: Arc<Semaphore>,
    max_age: Duration,
}

/// Idle connections. Each worker thread has its own, since a connection is driven by the thread that made it. The most
/// recently used connection is used next, so that connections which are not needed expire.
struct Idle {
    of_threads: PerThread<Mutex<VecDeque<Http1>>>,
    count: AtomicUsize,
    max: usize,
}

impl Idle {
    fn new(max: usize) -> Self {
        Self { of_threads: PerThread::default(), count: AtomicUsize::new(0), max }
    }

    /// Takes the most recently used connection of this thread.
    fn newest(&self) -> Option<Http1> {
        self.remove(self.of_threads.current(), VecDeque::pop_back)
    }

    /// Takes the least recently used connection of the thread that has the most idle connections.
    fn oldest(&self) -> Option<Http1> {
        let most = self.of_threads.iter().max_by_key(|one| lock(one).len())?;
        self.remove(most, VecDeque::pop_front)
    }

    /// Adds a connection of this thread, and closes the oldest one if there are too many.
    fn add(&self, connection: Http1) {
        self.add_to(self.of_threads.current(), connection);
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
        for one in self.of_threads.iter() {
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

impl Pool {
    pub(super) fn new(config: &UpstreamConfig) -> Self {
        Self {
            idle: Idle::new(config.max_idle),
            shared: Shared::default(),
            permits: Arc::new(Semaphore::new(config.max_connections)),
            max_age: config.max_age,
        }
    }

    /// Returns a permit for a new connection. If none is left, an unused connection is closed to free one.
    pub(super) fn permit(&self) -> Option<OwnedSemaphorePermit> {
        let permit = || self.permits.clone().try_acquire_owned().ok();
        permit().or_else(|| {
            let closed = self.idle.oldest().is_some() || self.shared.close_unused();
            closed.then(permit).flatten()
        })
    }

    /// Takes a connection that was made with this generation of the files, a shared one if there is one with room.
    pub(super) fn take(&self, generation: u64) -> Option<Sender> {
        let shared = self.shared.take(|established| established.is_current(generation, self.max_age));
        match shared {
            Some((sender, stream)) => Some(Sender::Http2(sender, stream)),
            None => self.take_idle(generation),
        }
    }

    /// Takes an idle connection that was made with this generation of the files.
    pub(super) fn take_idle(&self, generation: u64) -> Option<Sender> {
        loop {
            // The connection is taken out of the pool first, because driving it may take a while.
            let mut connection = self.idle.newest()?;
            if connection.established.is_current(generation, self.max_age) && connection.is_ready() {
                return Some(Sender::Http1(connection));
            }
        }
    }

    /// Returns a connection to the pool, if it can be used again.
    pub(super) fn put(&self, mut connection: Http1, generation: u64) {
        if !connection.established.is_current(generation, self.max_age) || !connection.is_ready() {
            return;
        }
        connection.used = Instant::now();
        self.idle.add(connection);
    }

    /// Adds a new HTTP/2 connection to the pool, and takes its first stream.
    pub(super) fn share(&self, connection: Http2) -> Sender {
        let sender = connection.sender.clone();
        Sender::Http2(sender, self.shared.add(connection))
    }

    /// Closes connections that the server has closed, that have been unused for long, that are old, or that were made
    /// with an older generation of the files.
    pub(super) fn sweep(&self, generation: u64) {
        let is_current = |established: &Established| established.is_current(generation, self.max_age);
        self.idle.retain(|connection| {
            connection.used.elapsed() < MAX_UNUSED
                && is_current(&connection.established)
                && connection.is_ready()
        });
        self.shared.sweep(is_current);
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, task::Poll};

    use hyper::client::conn::{http1, http2};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::{io::DuplexStream, task::coop::has_budget_remaining};

    use super::*;
    use crate::front_end::upstream::shared::{AllowedStreams, FIRST_STREAMS, MAX_STREAMS, Stream};

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
            pool.idle.add_to(pool.idle.of_threads.iter().next().unwrap(), connection);
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

    /// Adds a shared connection whose server allows this number of streams, and takes its first stream.
    async fn http2(pool: &Pool, allowed: usize) -> (Stream, DuplexStream) {
        let (near, far) = tokio::io::duplex(1024);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(near)).await.unwrap();
        #[allow(clippy::disallowed_methods, reason = "a test owns its tasks by its runtime")]
        tokio::spawn(connection);
        let streams = AllowedStreams::default();
        streams.set(allowed);
        let established = established(0);
        let _permit = pool.permit().unwrap();
        (stream(pool.share(Http2 { sender, allowed: streams, established, _permit })), far)
    }

    fn stream(sender: Sender) -> Stream {
        match sender {
            Sender::Http2(_, stream) => stream,
            Sender::Http1(_) => panic!("not shared"),
        }
    }

    fn take(pool: &Pool) -> Option<Stream> {
        pool.take(0).map(stream)
    }

    fn free(pool: &Pool) -> usize {
        pool.permits.available_permits()
    }

    #[tokio::test(start_paused = true)]
    async fn shared_connections_fill_up_in_turn_and_close_when_nobody_needs_them() {
        let pool = pool(10, 10);
        let (first, _far) = http2(&pool, MAX_STREAMS).await;
        let mut streams = vec![first];
        streams.extend(std::iter::from_fn(|| take(&pool)));
        assert_eq!(streams.len(), MAX_STREAMS);
        let (second, _far) = http2(&pool, MAX_STREAMS).await;
        assert!(take(&pool).is_some(), "the second has room");
        second.finish();
        tokio::time::advance(MAX_UNUSED).await;
        pool.sweep(0);
        assert_eq!(free(&pool), 9, "the second was unused, and the first is in use");
        streams.into_iter().for_each(Stream::finish);
        assert!(take(&pool).is_some(), "the first has room again");
        tokio::time::advance(MAX_UNUSED).await;
        pool.sweep(0);
        assert_eq!(free(&pool), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_shared_connection_takes_what_its_server_allows_and_an_abandoned_stream_counts_for_a_while() {
        let pool = pool(10, 10);
        let (first, _far) = http2(&pool, 3).await;
        let (second, third) = (take(&pool).unwrap(), take(&pool).unwrap());
        assert!(take(&pool).is_none());
        second.finish();
        let second = take(&pool).expect("what has ended makes room");
        drop(second);
        assert!(take(&pool).is_none(), "the server may not have noticed yet");
        pool.sweep(0);
        let second = take(&pool).unwrap();
        assert!(take(&pool).is_none());
        drop((first, second, third));
        assert!(take(&pool).is_none());
        let no_more = AllowedStreams::default();
        assert_eq!(no_more.get(), FIRST_STREAMS);
        no_more.set(usize::MAX);
        assert_eq!(no_more.get(), MAX_STREAMS);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_ends_is_the_next_one_however_many_connections_are_full() {
        let pool = pool(10, 1000);
        let mut streams = Vec::new();
        let mut ends = Vec::new();
        for _ in 0..100 {
            let (stream, far) = http2(&pool, 1).await;
            streams.push(stream);
            ends.push(far);
        }
        assert!(take(&pool).is_none());
        assert_eq!(pool.shared.stacked(), 0, "none is looked at again");
        streams.swap_remove(50).finish();
        assert_eq!(pool.shared.stacked(), 1);
        let next = take(&pool).unwrap();
        assert!(take(&pool).is_none());
        drop(next);
    }

    #[tokio::test(start_paused = true)]
    async fn old_shared_connections_end_with_their_last_stream_and_unused_ones_give_way() {
        let pool = pool(10, 2);
        let (first, _far) = http2(&pool, 10).await;
        assert!(pool.take(1).is_none(), "made with other files");
        assert_eq!(free(&pool), 1);
        first.finish();
        pool.sweep(1);
        assert_eq!(free(&pool), 2);

        let (aged, _far) = http2(&pool, 10).await;
        let (unused, _far) = http2(&pool, 10).await;
        assert!(pool.permit().is_none());
        unused.finish();
        let permit = pool.permit().expect("an unused connection gives way");
        tokio::time::advance(Duration::from_secs(601)).await;
        assert!(take(&pool).is_none(), "the other is too old");
        aged.finish();
        assert!(take(&pool).is_none());
        assert_eq!(free(&pool), 1);
        drop(permit);
    }

    #[tokio::test]
    async fn a_connection_whose_server_is_gone_is_not_used() {
        let pool = pool(10, 10);
        let (first, far) = http2(&pool, 10).await;
        drop(far);
        while let Some(stream) = take(&pool) {
            stream.finish();
            tokio::task::yield_now().await;
        }
        drop(first);
        pool.sweep(0);
        assert_eq!(free(&pool), 10);
    }
}
