//! The connection of a call home that has been admitted, from the change of its protocol to the end of its link.

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

/// A connection whose response, the change of protocols, is still to be sent.
pub(super) struct PendingLink {
    pub services: CallHomeServices,
    pub peer: SocketAddr,
    pub purpose: Purpose,
    pub upgrade: OnUpgrade,
    pub seat: RequestPermit,
}

impl PendingLink {
    /// Serves the link to its end in a task beside those of other links, and keeps `open` as long. `record` tells of the
    /// beginning of the link; one more record is written at its end.
    pub(super) fn begin(self, record: &Recorder, open: impl Send + 'static) {
        let Self { services, peer, purpose, upgrade, seat } = self;
        let mut record = record.again();
        let CallHomeServices { links, tasks, .. } = services;
        tasks.spawn(async move {
            let _held = (open, seat);
            if record.reserve(true).await.is_err() {
                return;
            }
            let socket = Box::pin(async move { Some(LinkSocket::new(upgrade.await.ok()?, record)) });
            links.serve(IncomingCall { peer, purpose, socket }).await;
        });
    }
}
