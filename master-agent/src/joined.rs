//! Connects parts of layers that must not use each other, by implementing for one part the trait that another declares.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use proto::{NodeName, join::Admission};
use tokio::task::spawn_blocking;

use crate::{
    egress::proxy_urls::call::ProxyUrls,
    front_end::{
        call_home::{CheckJoinTokens, IncomingCall, ServeLinks},
        proxy_urls::{self, Proxied, ProxyUrlRequest},
    },
    identity::store::{Store, TokenError},
    tunnels::call_home::{CallHome, Purpose},
};

impl proxy_urls::ProxyUrls for ProxyUrls {
    fn answer(self: Arc<Self>, request: ProxyUrlRequest) -> BoxFuture<'static, Proxied> {
        Box::pin(async move {
            let ProxyUrlRequest { caller, peer, activity, request } = request;
            let (answer, node) = self.answer_authorized(caller, peer, &activity, request).await;
            Proxied { node, answer }
        })
    }
}

impl ServeLinks for CallHome {
    fn turn_away(&self, peer: SocketAddr, purpose: &Purpose) -> Option<Duration> {
        Self::turn_away(self, peer, purpose)
    }

    fn serve(self: Arc<Self>, call: IncomingCall) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let IncomingCall { peer, purpose, socket } = call;
            self.answer_upgrade(socket, peer, purpose).await;
        })
    }

    fn count_other_node(&self, claimed: Option<&NodeName>, reason: &str) {
        self.refusals.count("other_node");
        if let Some(node) = claimed {
            self.refusals.count_claim(node, &reason);
        }
    }
}

/// Checks join tokens against the store.
pub(crate) struct StoredTokens(pub(crate) Arc<dyn Store>);

impl CheckJoinTokens for StoredTokens {
    fn check(&self, admission: Admission) -> BoxFuture<'static, Result<Option<NodeName>, TokenError>> {
        let store = self.0.clone();
        Box::pin(async move {
            let checked =
                spawn_blocking(move || store.check(&admission.id, &admission.hash, SystemTime::now()));
            checked.await.unwrap_or_else(|error| Err(TokenError::Store(error.to_string())))
        })
    }
}
