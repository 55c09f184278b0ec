//! The groups of tasks, which end one after the other.

use proto_net::tasks::Tasks;

/// The groups, in the order in which they end.
pub(super) struct Groups {
    /// The group above all others.
    pub(super) all: Tasks,
    /// The accept loops.
    pub(super) listeners: Tasks,
    /// Callers and their streams, which may finish.
    pub(super) callers: Tasks,
    /// SSH sessions, and the tasks that make and supervise them.
    pub(super) sessions: Tasks,
    /// The tasks that go on until everybody has left.
    pub(super) background: Tasks,
}

impl Groups {
    pub(super) fn new() -> Self {
        let all = Tasks::new();
        let [listeners, callers, sessions, background] = std::array::from_fn(|_| all.child());
        Self { all, listeners, callers, sessions, background }
    }
}
