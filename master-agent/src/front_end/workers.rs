//! The worker threads, which serve the callers of the HTTPS port and those that come through tunnels. A caller's
//! connection and the connections to API servers that its requests use stay on one of them, so that a request never
//! changes threads. TLS handshakes of unauthenticated callers run on these threads and can't delay tunnels. The connection
//! of a node that calls home moves to the tunnels' threads once it has become a link.

use std::{cell::Cell, io, sync::Arc, thread};

use tokio::{
    net::TcpStream,
    runtime::{Builder, Handle},
};
use tokio_util::sync::{CancellationToken, DropGuard};

thread_local! {
    static NUMBER: Cell<usize> = const { Cell::new(0) };
}

/// Returns the number of worker threads, which is the number of cores.
pub fn count() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Returns the number of this worker thread, beginning with 1. Returns 0 for all other threads.
pub fn current() -> usize {
    NUMBER.get()
}

/// A value for each worker thread, and one for all other threads together.
pub struct PerThread<T> {
    of_workers: Vec<T>,
    of_others: T,
}

impl<T: Default> Default for PerThread<T> {
    fn default() -> Self {
        Self { of_workers: (0..count()).map(|_| T::default()).collect(), of_others: T::default() }
    }
}

impl<T> PerThread<T> {
    /// Returns the value of this thread.
    pub fn current(&self) -> &T {
        let of_worker = current().checked_sub(1).and_then(|number| self.of_workers.get(number));
        of_worker.unwrap_or(&self.of_others)
    }

    /// Returns the values of all threads, those of the worker threads first.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.of_workers.iter().chain([&self.of_others])
    }
}

/// The worker threads. They end when this is dropped.
pub struct Workers {
    all: Vec<Worker>,
    _stop: DropGuard,
}

struct Worker {
    runtime: Handle,
    /// Has one clone for each connection.
    load: LoadGuard,
}

/// Counts as a connection of its thread until it is dropped.
pub type LoadGuard = Arc<()>;

/// A socket and the thread to which it is assigned.
pub struct Assigned {
    pub socket: TcpStream,
    pub runtime: Handle,
    pub load: LoadGuard,
}

impl Workers {
    pub fn start() -> io::Result<Self> {
        let stop = CancellationToken::new();
        let start = |number| {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let worker = Worker { runtime: runtime.handle().clone(), load: LoadGuard::default() };
            let stopped = stop.clone();
            thread::Builder::new().name(format!("front-end-{number}")).spawn(move || {
                NUMBER.set(number);
                runtime.block_on(stopped.cancelled());
                runtime.shutdown_background();
            })?;
            io::Result::Ok(worker)
        };
        let all = (1..=count()).map(start).collect::<io::Result<_>>()?;
        Ok(Self { all, _stop: stop.drop_guard() })
    }

    /// Returns the runtimes of all threads.
    pub fn runtimes(&self) -> Vec<Handle> {
        self.all.iter().map(|worker| worker.runtime.clone()).collect()
    }

    /// Assigns a socket to the thread that has the fewest connections.
    pub fn assign(&self, socket: TcpStream) -> io::Result<Assigned> {
        let (runtime, load) = self.pick()?;
        let socket = socket.into_std()?;
        let socket = {
            let _entered = runtime.enter();
            TcpStream::from_std(socket)?
        };
        Ok(Assigned { socket, runtime, load })
    }

    /// Picks the thread that has the fewest connections, for a connection that belongs to no thread yet.
    pub fn pick(&self) -> io::Result<(Handle, LoadGuard)> {
        let fewest = self.all.iter().min_by_key(|worker| Arc::strong_count(&worker.load));
        let Worker { runtime, load } = fewest.ok_or_else(|| io::Error::other("no thread serves"))?;
        Ok((runtime.clone(), load.clone()))
    }
}

#[cfg(test)]
mod tests {
    use proto_net::tasks::Tasks;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[test]
    fn each_worker_thread_has_its_own_value_and_all_others_share_one() {
        let values = PerThread::<Cell<usize>>::default();
        for number in [0, 1, count(), 0, count() + 1] {
            NUMBER.set(number);
            values.current().set(values.current().get() + 1);
        }
        NUMBER.set(0);
        let values: Vec<usize> = values.iter().map(Cell::get).collect();
        let mut expected = vec![0; count() + 1];
        for place in [0, count() - 1, count(), count(), count()] {
            expected[place] += 1;
        }
        assert_eq!(values, expected);
    }

    #[tokio::test]
    async fn connections_are_spread_and_stay_where_they_are() {
        let workers = Workers::start().unwrap();
        let tasks = Tasks::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut callers = Vec::new();
        for _ in 0..2 * count() {
            callers.push(TcpStream::connect(address).await.unwrap());
            let (socket, _) = listener.accept().await.unwrap();
            let Assigned { mut socket, runtime, load } = workers.assign(socket).unwrap();
            let serve = async move {
                while socket.read_u8().await.is_ok() {
                    socket.write_u64(current() as u64).await.unwrap();
                }
                drop(load);
            };
            tasks.spawn_on(serve, &runtime);
        }
        let mut numbers = Vec::new();
        for caller in &mut callers {
            caller.write_u8(0).await.unwrap();
            let number = caller.read_u64().await.unwrap();
            caller.write_u8(0).await.unwrap();
            assert_eq!(caller.read_u64().await.unwrap(), number);
            numbers.push(number);
        }
        numbers.sort_unstable();
        let expected: Vec<u64> = (1..=count() as u64).flat_map(|number| [number, number]).collect();
        assert_eq!(numbers, expected);
        assert_eq!(current(), 0);
        let mut picked: Vec<_> = (0..count()).map(|_| workers.pick().unwrap()).collect();
        assert!(
            workers.all.iter().all(|worker| Arc::strong_count(&worker.load) == 4),
            "each was picked once"
        );
        picked.clear();
        drop(callers);
        assert_eq!(tasks.drain(std::time::Duration::from_secs(10)).await, 0);
        assert!(workers.all.iter().all(|worker| Arc::strong_count(&worker.load) == 1));
    }
}
