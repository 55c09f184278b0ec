//! Ownership of tasks: every task belongs to a group that can cancel and join it, and the groups form a tree.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{runtime::Handle, task::JoinHandle};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// A group of tasks. Cloning gives another handle to the same group; [`Tasks::child`] makes a group below it.
///
/// A task is a member of the group that it was spawned in and of every group above. So cancelling a group also cancels
/// its descendants, and draining a group waits for their tasks, too. A child can be cancelled and drained alone.
///
/// Only tasks count, handles do not. Draining does not wait for a group without tasks, whoever holds a handle to it, and
/// the tasks of a group whose last handle has been dropped run on until they end or a group above is cancelled. A task
/// may therefore hold handles to its own group and to any other. Only [`Tasks::drain`] must not be called by a member
/// of the group, which would wait for itself.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    cancel: CancellationToken,
    parent: Option<Arc<Tasks>>,
}

impl Tasks {
    pub fn new() -> Self {
        Self::default()
    }

    /// A group that is cancelled and drained with this one, or alone.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            tracker: TaskTracker::new(),
            cancel: self.cancel.child_token(),
            parent: Some(Arc::new(self.clone())),
        }
    }

    /// Runs `future` until it ends or the group is cancelled.
    pub fn spawn<F>(&self, future: F) -> JoinHandle<Option<F::Output>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.spawn_on(future, &Handle::current())
    }

    /// Runs `future` as [`Tasks::spawn`] does, on another runtime than the caller's.
    pub fn spawn_on<F>(&self, future: F, runtime: &Handle) -> JoinHandle<Option<F::Output>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let cancelled = self.cancel.clone().cancelled_owned();
        let above = self.parent.as_deref().map(Membership::of);
        self.tracker.spawn_on(UntilCancelled { future, cancelled, _above: above }, runtime)
    }

    /// Completes once the group has been cancelled.
    pub async fn cancelled(&self) {
        self.cancel.cancelled().await;
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// A token that is cancelled with this group, or alone, for what ends with the group and is no task of it.
    #[must_use]
    pub fn child_token(&self) -> CancellationToken {
        self.cancel.child_token()
    }

    /// Ends all tasks of this group and of its descendants, those that are yet to be spawned included.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Number of tasks in this group and its descendants that have not ended.
    pub fn len(&self) -> usize {
        self.tracker.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tracker.is_empty()
    }

    /// Waits until all tasks of this group and its descendants have ended by themselves.
    pub async fn ended(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Waits up to `grace` for all tasks of this group and its descendants to end by themselves, then cancels and joins
    /// the rest. Returns the number of tasks that had to be cancelled.
    pub async fn drain(&self, grace: Duration) -> usize {
        self.tracker.close();
        if tokio::time::timeout(grace, self.tracker.wait()).await.is_ok() {
            return 0;
        }
        let left = self.tracker.len();
        self.cancel.cancel();
        self.tracker.wait().await;
        left
    }
}

/// Makes a task of a group a member of a group above, and of all that are above that one.
struct Membership {
    _token: TaskTrackerToken,
    _above: Option<Box<Membership>>,
}

impl Membership {
    fn of(group: &Tasks) -> Self {
        let above = group.parent.as_deref().map(|parent| Box::new(Self::of(parent)));
        Self { _token: group.tracker.token(), _above: above }
    }
}

pin_project! {
    /// Resolves to `None` once the group is cancelled. It is a type of its own because an async block around the future
    /// would hold it several times over, and there are many streams. The memberships come last, so that
    /// a task still belongs to all its groups while it drops what it held.
    struct UntilCancelled<F> {
        #[pin]
        future: F,
        #[pin]
        cancelled: WaitForCancellationFutureOwned,
        _above: Option<Membership>,
    }
}

impl<F: Future> Future for UntilCancelled<F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if this.cancelled.poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        this.future.poll(cx).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        sync::atomic::{AtomicBool, Ordering},
    };

    use tokio::time::{Instant, sleep};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// Sets a flag when its owner is dropped.
    struct SetOnDrop(Arc<AtomicBool>);

    impl Drop for SetOnDrop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn draining_waits_for_the_tasks_of_all_descendants() {
        let root = Tasks::new();
        let grandchild = root.child().child();
        grandchild.spawn(sleep(HOUR));
        assert_eq!((root.len(), grandchild.len()), (1, 1));
        let began = Instant::now();
        assert_eq!(root.drain(2 * HOUR).await, 0);
        assert!(began.elapsed() >= HOUR);
        assert!(root.is_empty() && grandchild.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn draining_cancels_and_joins_what_outlasts_the_grace() {
        let root = Tasks::new();
        let child = root.child();
        let flag = Arc::<AtomicBool>::default();
        let held = SetOnDrop(flag.clone());
        child.child().spawn(async move {
            let _held = held;
            pending::<()>().await;
        });
        child.spawn(pending::<()>());
        root.spawn(sleep(HOUR / 2));
        assert_eq!(root.drain(HOUR).await, 2);
        assert!(flag.load(Ordering::SeqCst), "a task was not joined");
        assert!(child.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_child_that_is_drained_alone_leaves_its_siblings_and_its_parent() {
        let root = Tasks::new();
        let (one, other) = (root.child(), root.child());
        one.spawn(pending::<()>());
        let stays = other.spawn(sleep(HOUR));
        root.spawn(sleep(HOUR));
        assert_eq!(one.drain(Duration::ZERO).await, 1);
        assert!(!root.is_cancelled() && !other.is_cancelled());
        assert_eq!((root.len(), other.len()), (2, 1));
        assert_eq!(stays.await.unwrap(), Some(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_child_that_is_made_after_the_cancellation_is_cancelled() {
        let root = Tasks::new();
        root.cancel();
        let child = root.child();
        assert!(child.is_cancelled());
        let polled = child.spawn(async { panic!("a cancelled group has run a task") });
        assert_eq!(polled.await.unwrap(), None::<()>);
        assert_eq!(root.drain(HOUR).await, 0);
    }

    #[test]
    fn a_token_is_cancelled_with_its_group_or_alone() {
        let root = Tasks::new();
        let child = root.child();
        let (one, other) = (child.child_token(), child.child_token());
        one.cancel();
        assert!(!child.is_cancelled() && !other.is_cancelled());
        root.cancel();
        assert!(other.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn handles_are_not_waited_for_and_tasks_outlive_them() {
        let root = Tasks::new();
        let idle: Vec<_> = (0..100).map(|_| root.child()).collect();
        let alone = root.child().spawn(sleep(HOUR));
        assert_eq!(root.len(), 1);
        assert_eq!(alone.await.unwrap(), Some(()));
        let began = Instant::now();
        assert_eq!(root.drain(HOUR).await, 0);
        assert_eq!(began.elapsed().as_secs(), 0);
        let link = Arc::downgrade(idle.first().unwrap().parent.as_ref().unwrap());
        drop(idle);
        assert!(link.upgrade().is_none(), "a child that nobody has any more is kept");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_may_hold_its_own_group_and_those_above() {
        let root = Tasks::new();
        let child = root.child();
        let groups = (root.clone(), child.clone());
        child.spawn(async move {
            // More work for a group that is being drained.
            sleep(HOUR).await;
            groups.1.spawn(sleep(HOUR));
            groups.0.child().spawn(sleep(2 * HOUR));
        });
        drop(child);
        let began = Instant::now();
        assert_eq!(root.drain(10 * HOUR).await, 0);
        assert_eq!(began.elapsed().as_secs(), 3 * HOUR.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_joined() {
        let root = Tasks::new();
        let failed = root.child().spawn(async { panic!("a task fails") });
        assert_eq!(root.drain(HOUR).await, 0);
        let ended: Result<Option<()>, _> = failed.await;
        assert!(ended.unwrap_err().is_panic());
    }
}
