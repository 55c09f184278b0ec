//! The connection of an admitted call home, from the change of its protocol until its link ends.

use std::net::SocketAddr;

use hyper::upgrade::OnUpgrade;

use crate::{
    front_end::{
        call_home::{CallHomeServices, IncomingCall},
        limits::RequestPermit,
        link_socket::LinkSocket,
        recorder::Recorder,
    },
    tunnels::call_home::Purpose,
};

/// A connection that becomes a link once the response with the change of protocols has been sent.
pub(super) struct PendingLink {
    pub services: CallHomeServices,
    pub peer: SocketAddr,
    pub purpose: Purpose,
    pub upgrade: OnUpgrade,
    pub seat: RequestPermit,
}

impl PendingLink {
    /// Serves the link until it ends, in a task of its own, and keeps `open` until then. `record` records the beginning
    /// of the link, and another record is written at its end.
    pub(super) fn begin(self, record: &Recorder, open: impl Send + 'static) {
        let Self { services, peer, purpose, upgrade, seat } = self;
        let mut record = record.for_link();
        let CallHomeServices { links, tasks, runtime, .. } = services;
        let served = async move {
            let _held = (open, seat);
            if record.reserve(true).await.is_err() {
                tracing::warn!(%peer, "a link was not served because it can't be recorded");
                return;
            }
            let socket = Box::pin(async move {
                let socket = LinkSocket::new(upgrade.await.ok()?, record);
                socket.inspect_err(|error| tracing::warn!(%peer, %error, "a link was not served")).ok()
            });
            links.serve(IncomingCall { peer, purpose, socket }).await;
        };
        tasks.spawn_on(served, &runtime);
    }
}
