//! The interface of an egress listener to the code that accepts its callers.

use std::sync::Arc;

use super::{outbound::Outbound, socket::CallerSocket};
use crate::stream::caller::Caller;

/// Serves the callers of one protocol. Each caller has a task of its own.
pub trait EgressListener: Send + Sync + 'static {
    fn outbound(&self) -> &Outbound;

    /// Serves one caller to its end.
    fn serve<S: CallerSocket>(self: Arc<Self>, socket: S, caller: Caller) -> impl Future<Output = ()> + Send;
}
