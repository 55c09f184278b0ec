//! The one thing that egress listeners know of the rest: something that dials.

use std::{fmt, pin::Pin};

use super::stream::Stream;
use proto::{DialError, NodeName, Target};

/// Who asked, for records and limits: for instance `unix uid=0 pid=77` or `tls CN=kube-apiserver`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin(pub String);

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An established connection to a target, and how it was reached.
#[derive(Debug)]
pub struct Connection {
    pub stream: Stream,
    /// The node that reached it; `None` without a tunnel.
    pub node: Option<NodeName>,
    /// Why that node was chosen.
    pub reason: String,
    /// Held for as long as the connection lives.
    pub permit: Option<Box<dyn std::any::Any + Send + Sync>>,
}

pub type DialFuture<'a> = Pin<Box<dyn Future<Output = Result<Connection, DialError>> + Send + 'a>>;

/// Dials targets. Dropping the future cancels the dial, on the way to the target as well.
pub trait Dialer: Send + Sync + 'static {
    fn dial<'a>(&'a self, target: &'a Target, origin: &'a Origin) -> DialFuture<'a>;
}
