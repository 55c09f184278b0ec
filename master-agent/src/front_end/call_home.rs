//! The services that take calls home from the front end, which has authenticated and authorized their callers before.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use proto::{NodeName, join::Admission};
use proto_net::tasks::Tasks;
use tokio::runtime::Handle;

use super::link_socket::LinkSocket;
use crate::{identity::store::TokenError, tunnels::call_home::Purpose};

/// Serves the links of nodes that call home and of hosts that join.
pub trait ServeLinks: Send + Sync {
    /// Returns after what time a caller has to come again, or `None` if its call can be served now.
    fn turn_away(&self, peer: SocketAddr, purpose: &Purpose) -> Option<Duration>;

    /// Serves a link until it ends.
    fn serve(self: Arc<Self>, call: IncomingCall) -> BoxFuture<'static, ()>;

    /// Counts a call that was rejected because its credential belongs to another node. `claimed` is the node that the
    /// call named, if it named one.
    fn count_other_node(&self, claimed: Option<&NodeName>, reason: &str);
}

/// Checks what hosts that have not joined yet present of their join tokens.
pub trait CheckJoinTokens: Send + Sync {
    /// Returns the node that the token is bound to, if there is one. The token is not used up.
    fn check(&self, admission: Admission) -> BoxFuture<'static, Result<Option<NodeName>, TokenError>>;
}

/// A call home that the front end has admitted.
pub struct IncomingCall {
    pub peer: SocketAddr,
    /// The purpose for which the call was admitted.
    pub purpose: Purpose,
    /// Completes once the connection has changed its protocol. The result is `None` if the connection has ended
    /// instead.
    pub socket: BoxFuture<'static, Option<LinkSocket>>,
}

/// The parts of the agent that calls home need.
#[derive(Clone)]
pub struct CallHomeServices {
    pub links: Arc<dyn ServeLinks>,
    pub join_tokens: Arc<dyn CheckJoinTokens>,
    /// The group that owns the tasks which serve links.
    pub tasks: Tasks,
    /// The runtime of the tunnels, on which these tasks run.
    pub runtime: Handle,
}
