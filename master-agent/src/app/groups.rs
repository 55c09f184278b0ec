//! The groups of the agent's tasks, which end one after another.

use proto_net::tasks::Tasks;

/// The groups in the order in which they end, below the group of all tasks.
pub(super) struct Groups {
    /// The parent of all other groups.
    pub(super) all: Tasks,
    /// The accept loops.
    pub(super) listeners: Tasks,
    /// Callers and their streams, which have time to finish.
    pub(super) callers: Tasks,
    /// SSH sessions, and the tasks that make and supervise them.
    pub(super) sessions: Tasks,
    /// The tasks that run until all callers and sessions have ended.
    pub(super) background: Tasks,
    /// Health, metrics and commands, which are answered until the end, or until another process answers them.
    pub(super) health: Tasks,
}

impl Groups {
    pub(super) fn new() -> Self {
        let all = Tasks::new();
        let [listeners, callers, sessions, background, health] = std::array::from_fn(|_| all.child());
        Self { all, listeners, callers, sessions, background, health }
    }
}
