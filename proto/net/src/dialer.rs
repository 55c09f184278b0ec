//! Dialling as egress listeners know it: a target goes in, and a connection or an error comes out.

use std::{fmt, pin::Pin};

use proto::{DialError, NodeName, Target};
use tokio::sync::OwnedSemaphorePermit;

use super::stream::Stream;

/// Who asked, as records name the caller: for instance `unix uid=0 pid=77` or `tls CN=kube-apiserver`.
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
    /// The permit for one of the node's streams, held for as long as the connection lives; `None` without a tunnel.
    pub permit: Option<OwnedSemaphorePermit>,
}

pub type DialFuture<'a> = Pin<Box<dyn Future<Output = Result<Connection, DialError>> + Send + 'a>>;

/// Dials targets. Dropping the future cancels the dial, on the way to the target as well.
pub trait Dialer: Send + Sync + 'static {
    fn dial<'a>(&'a self, target: &'a Target, origin: &'a Origin) -> DialFuture<'a>;
}
