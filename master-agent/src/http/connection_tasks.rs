//! The tasks of one HTTP/2 connection, which run within the task that drives the connection. They are not scheduled by
//! themselves, take little memory while they wait, and end when the connection's task is dropped.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::sync::mpsc;

/// The tasks of a connection.
pub struct ConnectionTasks<T> {
    /// The tasks that have been added since the last poll.
    added: mpsc::UnboundedReceiver<T>,
    running: FuturesUnordered<T>,
}

/// Adds tasks to those of a connection.
pub struct Spawner<T>(mpsc::UnboundedSender<T>);

impl<T> Clone for Spawner<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Spawner<T> {
    /// Adds a task. It is dropped if the connection has ended.
    pub fn spawn(&self, task: T) {
        let _ = self.0.send(task);
    }
}

impl<F> hyper::rt::Executor<F> for Spawner<BoxFuture<'static, ()>>
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.spawn(Box::pin(task));
    }
}

impl<T: Future<Output = ()> + Unpin> ConnectionTasks<T> {
    pub fn new() -> (Spawner<T>, Self) {
        // The connection bounds its tasks by the number of its streams.
        let (sender, added) = mpsc::unbounded_channel();
        (Spawner(sender), Self { added, running: FuturesUnordered::new() })
    }

    /// Drives the connection until it ends, and its tasks as long. Cancel-safe.
    pub async fn drive<C: Future>(&mut self, mut connection: Pin<&mut C>) -> C::Output {
        poll_fn(|cx| {
            let ended = connection.as_mut().poll(cx);
            if ended.is_pending() {
                let _ = self.poll(cx);
            }
            ended
        })
        .await
    }

    /// Runs the tasks that are left when a connection has been driven to its end.
    pub async fn finish(mut self) {
        poll_fn(|cx| self.poll(cx)).await;
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.running.iter_mut()
    }

    /// Polls the tasks that have something to do. Completes while there is no task.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Poll::Ready(Some(task)) = self.added.poll_recv(cx) {
            self.running.push(task);
        }
        while let Poll::Ready(Some(())) = self.running.poll_next_unpin(cx) {}
        match self.running.is_empty() && self.added.is_empty() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, pin::pin};

    use futures_util::FutureExt;
    use tokio::sync::oneshot;

    use super::*;

    type Task = BoxFuture<'static, ()>;

    #[tokio::test]
    async fn tasks_run_while_their_connection_is_driven_and_may_add_others() {
        let (spawner, mut tasks) = ConnectionTasks::<Task>::new();
        let (sender, receiver) = oneshot::channel();
        let inner = spawner.clone();
        spawner.spawn(Box::pin(async move {
            tokio::task::yield_now().await;
            inner.spawn(Box::pin(async move { sender.send("done").unwrap() }));
        }));
        // The connection ends with the last of its tasks.
        let connection = pin!(async { receiver.await.unwrap() });
        assert_eq!(tasks.drive(connection).await, "done");
        tasks.finish().await;
    }

    #[tokio::test]
    async fn tasks_outlast_their_connection_only_if_they_are_finished() {
        let (spawner, mut tasks) = ConnectionTasks::<Task>::new();
        let (sender, receiver) = oneshot::channel::<()>();
        let (ended, has_ended) = oneshot::channel();
        spawner.spawn(Box::pin(async move {
            let _ = receiver.await;
            let _ = ended.send(());
        }));
        tasks.drive(pin!(async {})).await;
        let mut finished = Box::pin(tasks.finish());
        assert!(finished.as_mut().now_or_never().is_none());
        drop(sender);
        finished.await;
        has_ended.await.unwrap();

        let (spawner, mut tasks) = ConnectionTasks::<Task>::new();
        let (held, dropped) = oneshot::channel::<()>();
        spawner.spawn(Box::pin(async move {
            let _held = held;
            pending::<()>().await;
        }));
        assert!(tasks.drive(pin!(pending::<()>())).now_or_never().is_none());
        drop(tasks);
        assert!(dropped.await.is_err());
        spawner.spawn(Box::pin(async {}));
    }
}
