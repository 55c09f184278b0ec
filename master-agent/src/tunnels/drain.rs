//! A drain, which takes a node out of use: until its deadline, the node gets only the streams that no other node can carry,
//! and after it none.

use std::time::{Duration, SystemTime};

use proto::NodeName;
use proto_net::drain::LONGEST;
use tokio::time::Instant;

use crate::{
    activity::unix_milliseconds,
    admin_api::{DrainStatus, DrainedBy, state},
};

/// Why the streams that are left are reset at the deadline.
pub(super) const DRAINED: &str = "the node is drained";

/// A drain of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drain {
    /// The deadline, as people are told.
    pub until: SystemTime,
    /// The same moment, which decides.
    pub(super) ends: Instant,
    pub(super) by: DrainedBy,
    /// The number of streams that were reset at the deadline, once they have been.
    pub(super) cut: Option<usize>,
}

impl Drain {
    /// A drain by a command of this host.
    pub(super) fn by_master(until: SystemTime) -> Self {
        let left = until.duration_since(SystemTime::now()).unwrap_or_default().min(LONGEST);
        Self { until, ends: Instant::now() + left, by: DrainedBy::Master, cut: None }
    }

    /// A drain that the node has asked for.
    pub(super) fn by_node(left: Duration) -> Self {
        let left = left.min(LONGEST);
        let (until, ends) = (SystemTime::now() + left, Instant::now() + left);
        Self { until, ends, by: DrainedBy::Node, cut: None }
    }

    /// Whether the deadline has passed.
    pub fn is_over(&self) -> bool {
        self.ends <= Instant::now()
    }

    /// Returns the state of a node with a tunnel.
    pub(super) fn state(&self) -> &'static str {
        if self.is_over() { state::DRAINED } else { state::DRAINING }
    }

    /// Returns when and by which command the node is drained.
    pub(super) fn reason(&self) -> String {
        let when = if self.is_over() { "since" } else { "until" };
        let command = match self.by {
            DrainedBy::Master => "master-agent node drain",
            DrainedBy::Node => "node-agent drain",
        };
        format!("{when} {}, by `{command}`", humantime::format_rfc3339_seconds(self.until))
    }

    /// Returns why the node gets no streams, and how to undo that.
    pub(super) fn refusal(&self, node: &NodeName) -> String {
        match self.by {
            DrainedBy::Master => format!("{DRAINED}; `master-agent node undrain {node}` undoes that"),
            DrainedBy::Node => format!("{DRAINED}; `node-agent undrain` on it undoes that"),
        }
    }

    pub(super) fn status(&self) -> DrainStatus {
        DrainStatus {
            until_unix_milliseconds: unix_milliseconds(self.until),
            by: self.by,
            cut: self.cut.map(|streams| streams as u64),
        }
    }
}
