//! The thread on which the API server is followed. The lists of a large cluster take seconds to decode, and the runtime of
//! the tunnels has a single thread on small hosts.

use std::{io, thread};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// A thread with a runtime of its own. It is joined when this is dropped, which has to wait for what it is decoding.
pub struct FollowerThread {
    runtime: Handle,
    stop: CancellationToken,
    thread: Option<thread::JoinHandle<()>>,
}

impl FollowerThread {
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (handle, stop) = (runtime.handle().clone(), CancellationToken::new());
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("kubernetes".into()).spawn(move || {
            runtime.block_on(stopped.cancelled());
            // A look-up of a name that is still under way must not delay the end.
            runtime.shutdown_background();
        })?;
        Ok(Self { runtime: handle, stop, thread: Some(thread) })
    }

    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }
}

impl Drop for FollowerThread {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(Err(_)) = self.thread.take().map(thread::JoinHandle::join) {
            tracing::error!("the thread that follows the Kubernetes API has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proto_net::tasks::Tasks;

    use super::*;

    #[tokio::test]
    async fn tasks_run_on_the_thread_until_it_is_joined() {
        let (thread, tasks) = (FollowerThread::start().unwrap(), Tasks::new());
        let name = async { thread::current().name().map(str::to_owned) };
        let name = tasks.spawn_on(name, thread.runtime()).await.unwrap().unwrap();
        assert_eq!(name.as_deref(), Some("kubernetes"));
        tasks.spawn_on(std::future::pending::<()>(), thread.runtime());
        drop(thread);
        // Joining the thread ended the task that was still running.
        assert_eq!(tasks.drain(Duration::from_secs(10)).await, 0);
    }
}
