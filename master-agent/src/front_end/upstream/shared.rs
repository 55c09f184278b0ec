//! The HTTP/2 connections to one API server, each of which many requests share.
//!
//! Each worker thread has its own, since a connection is driven by the thread that made it. Those of a thread that may
//! have room for another stream are on a stack, and the next stream is one of the uppermost connection. A connection
//! leaves the stack when it is found full and comes back when one of its streams ends. So the choice takes the same
//! time however many connections there are, few of them carry many streams, and those at the bottom become unused and
//! are closed.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper::client::conn::http2;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use super::{body::RequestBody, established::Established};
use crate::front_end::workers::PerThread;

/// The maximum number of concurrent requests on one connection, even if the server allows more. Of kube-apiserver's own
/// defaults, 250 is the highest.
pub(super) const MAX_STREAMS: usize = 250;
/// The number of concurrent requests on a connection whose server has not said yet how many it allows.
pub(super) const FIRST_STREAMS: usize = 100;
/// How long an unused connection is kept.
pub(super) const MAX_UNUSED: Duration = Duration::from_secs(90);

/// The number of concurrent streams that the server of one connection allows.
#[derive(Clone)]
pub(super) struct AllowedStreams(Arc<AtomicUsize>);

impl Default for AllowedStreams {
    fn default() -> Self {
        Self(Arc::new(AtomicUsize::new(FIRST_STREAMS)))
    }
}

impl AllowedStreams {
    /// Records what the server has said.
    pub(super) fn set(&self, streams: usize) {
        self.0.store(streams.min(MAX_STREAMS), Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// A connection, which a task of its own drives until the last handle to its sender is dropped.
pub(super) struct Http2 {
    pub sender: http2::SendRequest<RequestBody>,
    pub allowed: AllowedStreams,
    pub established: Established,
    /// Counts the connection among those to its server.
    pub _permit: OwnedSemaphorePermit,
}

/// One stream of a connection. Dropping it gives it back.
pub(super) struct Stream {
    connections: Arc<Mutex<Connections>>,
    connection: u64,
    finished: bool,
}

impl Stream {
    /// Gives back a stream whose response has been read to its end. A stream that is dropped before counts for its
    /// connection until the next sweep, because a server may still be at work on it. kube-apiserver ends a connection,
    /// with the streams of everyone, when far more streams are given up on it than it allows at once.
    pub(super) fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        lock(&self.connections).give_back(self.connection, self.finished);
    }
}

/// The connections of all threads to one server.
#[derive(Default)]
pub(super) struct Shared(PerThread<Arc<Mutex<Connections>>>);

impl Shared {
    /// Takes a stream of a connection of this thread that is `good`.
    pub(super) fn take(
        &self,
        good: impl Fn(&Established) -> bool,
    ) -> Option<(http2::SendRequest<RequestBody>, Stream)> {
        let connections = self.0.current();
        let (connection, sender) = lock(connections).take(|one| one.is_good(&good))?;
        Some((sender, Stream { connections: connections.clone(), connection, finished: false }))
    }

    /// Adds a new connection of this thread, and takes its first stream.
    pub(super) fn add(&self, connection: Http2) -> Stream {
        let connections = self.0.current();
        let connection = lock(connections).add(connection);
        Stream { connections: connections.clone(), connection, finished: false }
    }

    /// Closes unused connections that have been unused for long, or are not `good`.
    pub(super) fn sweep(&self, good: impl Fn(&Established) -> bool) {
        for connections in self.0.iter() {
            lock(connections).sweep(|one| one.is_good(&good));
        }
    }

    /// Returns the number of this thread's connections that may have room.
    #[cfg(test)]
    pub(super) fn stacked(&self) -> usize {
        lock(self.0.current()).stack.len()
    }

    /// Closes an unused connection of any thread, which makes room for another one. Returns whether there was one.
    pub(super) fn close_unused(&self) -> bool {
        self.0.iter().any(|connections| lock(connections).close_unused())
    }
}

/// The connections of one thread.
#[derive(Default)]
struct Connections {
    all: HashMap<u64, Connection>,
    /// Those that may have room for another stream. One that has been closed leaves its number here.
    stack: Vec<u64>,
    next: u64,
}

struct Connection {
    http2: Http2,
    /// The number of streams that have not been given back.
    open: usize,
    /// The number of streams that have been abandoned since the last sweep.
    abandoned: usize,
    /// Whether the connection is on the stack.
    stacked: bool,
    /// When the last stream was given back.
    used: Instant,
}

impl Connection {
    fn is_good(&self, good: impl Fn(&Established) -> bool) -> bool {
        !self.http2.sender.is_closed() && good(&self.http2.established)
    }

    fn has_room(&self) -> bool {
        self.open + self.abandoned < self.http2.allowed.get()
    }
}

impl Connections {
    fn take(&mut self, good: impl Fn(&Connection) -> bool) -> Option<(u64, http2::SendRequest<RequestBody>)> {
        while let Some(number) = self.stack.last().copied() {
            if let Some(one) = self.all.get_mut(&number) {
                let is_good = good(one);
                if is_good && one.has_room() {
                    one.open += 1;
                    return Some((number, one.http2.sender.clone()));
                }
                one.stacked = false;
                // Requests in progress keep their connection.
                if !is_good && one.open == 0 {
                    self.all.remove(&number);
                }
            }
            self.stack.pop();
        }
        None
    }

    fn add(&mut self, http2: Http2) -> u64 {
        let number = self.next;
        self.next += 1;
        let used = http2.established.at;
        self.all.insert(number, Connection { http2, open: 1, abandoned: 0, stacked: true, used });
        self.stack.push(number);
        number
    }

    fn give_back(&mut self, number: u64, finished: bool) {
        let Some(one) = self.all.get_mut(&number) else { return };
        one.open = one.open.saturating_sub(1);
        one.abandoned += usize::from(!finished);
        one.used = Instant::now();
        if !one.stacked && one.has_room() {
            one.stacked = true;
            self.stack.push(number);
        }
    }

    fn sweep(&mut self, good: impl Fn(&Connection) -> bool) {
        let Self { all, stack, .. } = self;
        all.retain(|_, one| one.open > 0 || good(one) && one.used.elapsed() < MAX_UNUSED);
        stack.retain(|number| all.contains_key(number));
        for (number, one) in all {
            // The server may still work on some of them.
            one.abandoned /= 2;
            if !one.stacked && good(one) && one.has_room() {
                one.stacked = true;
                stack.push(*number);
            }
        }
    }

    fn close_unused(&mut self) -> bool {
        let unused = self.all.iter().find(|(_, one)| one.open == 0).map(|(number, _)| *number);
        unused.is_some_and(|number| self.all.remove(&number).is_some())
    }
}

pub(super) fn lock<T>(one: &Mutex<T>) -> MutexGuard<'_, T> {
    one.lock().unwrap_or_else(PoisonError::into_inner)
}
