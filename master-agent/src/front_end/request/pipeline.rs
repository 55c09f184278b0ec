//! The life of a request.
//!
//! Five phases come before the handler. Each of them passes the request on or rejects it:
//!
//! 1. `admit` checks the rate of the caller's address, and rejects ambiguous heads.
//! 2. `identify` authenticates the caller.
//! 3. `resolve` reads what the request asks for, and chooses its handler.
//! 4. `reserve` reserves room in the audit log and waits for one of the user's seats.
//! 5. `authorize` decides whether the caller may do what it asks for.
//!
//! Every request has an audit record, which is written when the last byte of the response has been sent or the caller
//! has left. The seat is kept until then.
//!
//! A panic in a phase or a handler rejects its own request. It does not reach the task of the connection, which would
//! end with all other requests on it.

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc};

use access::authn::Validity;
use futures_util::FutureExt;
use hyper::{
    Request, Response, StatusCode, Version,
    body::Incoming,
    header::{self, HeaderValue},
};

use super::{
    admit::admit,
    authorize::authorize,
    call_home,
    handled::{Handled, Relay, Upgrade},
    identify::identify,
    page, proxy_url,
    rejection::Rejection,
    reserve::reserve,
    resolve::resolve,
    stages::Handler,
    upstream,
};
use crate::{
    front_end::{
        answer::{Answer, Resources},
        connection::Connection,
        recorder::Recorder,
        server::LISTENER,
        streams,
    },
    http::watched::Busy,
};

/// Takes a request through its phases to its handler.
async fn handle(
    connection: &Arc<Connection>,
    request: Request<Incoming>,
    record: &mut Recorder,
) -> Result<Handled, Rejection> {
    let admitted = admit(connection, request)?;
    let identified = identify(connection, admitted, record).await?;
    let resolved = resolve(connection, identified, record)?;
    let reserved = reserve(connection, resolved, record).await?;
    let (handler, authorized) = authorize(connection, reserved, record).await?;
    match handler {
        Handler::CallHome(call_home) => call_home::answer(connection, call_home, authorized),
        Handler::ProxyUrl(proxy_urls) => proxy_url::answer(connection, proxy_urls, authorized, record).await,
        Handler::Page(page) => Ok(page::answer(connection, page, authorized, record).await),
        Handler::Upstream => upstream::answer(connection, authorized, record).await,
    }
}

impl Connection {
    /// Answers one request of this connection.
    pub(in crate::front_end) async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Answer>, Infallible> {
        let busy = self.activity.busy();
        let mut record = Recorder::new(&self.records, &request);
        let http1 = request.version() < Version::HTTP_2;
        // hyper silently drops a Content-Length beside Transfer-Encoding, but a proxy in front of this server may have
        // relied on it.
        let mut last = http1 && request.headers().contains_key(header::TRANSFER_ENCODING);
        // State that is shared with other requests is behind locks that ignore poisoning.
        let unwound = AssertUnwindSafe(handle(&self, request, &mut record)).catch_unwind().await;
        let handled = match unwound.unwrap_or_else(|_| Err(self.panicked(&record))) {
            Ok(handled) => handled,
            Err(rejection) => {
                record.rejected(rejection.outcome()).await;
                let handled = Handled::from(rejection);
                // After an invalid head, the following bytes are not necessarily a request.
                last |= http1 && handled.response.status() == StatusCode::BAD_REQUEST;
                handled
            }
        };
        let Handled { mut response, seat, validity, upgrade } = handled;
        last |= http1 && self.generation.draining.is_cancelled();
        if self.is_to_end_after(response.status()) {
            last = http1;
            self.ending.cancel();
        }
        if last && upgrade.is_none() {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        record.answered(response.status());
        let record = Arc::new(record);
        if let Some(upgrade) = upgrade {
            self.begin(upgrade, &record, &validity);
        }
        let resources = Resources { record, _busy: busy, _seat: seat, progress: streams::progress() };
        Ok(response.map(|content| Answer::new(content, resources, validity.end())))
    }

    /// Logs that handling a request has panicked. The panic's text is in a line that the panic hook logs.
    fn panicked(&self, record: &Recorder) -> Rejection {
        let (peer, request) = (&self.peer, record.id());
        tracing::error!(egress = LISTENER, %peer, %request, "request handler panicked");
        Rejection::Panicked
    }

    /// Serves the upgraded connection in a task of its own once the response has been sent.
    fn begin(self: &Arc<Self>, upgrade: Upgrade, record: &Arc<Recorder>, validity: &Validity) {
        let open = Open { _connection: self.clone(), _busy: self.activity.busy() };
        match upgrade {
            Upgrade::Link(link) => link.begin(record, open),
            Upgrade::Relay(relay) => {
                self.front_end.connections.spawn(run(relay, record.clone(), validity.clone(), open));
            }
        }
    }
}

/// Keeps a connection open after the response that changed its protocol.
struct Open {
    _connection: Arc<Connection>,
    _busy: Busy,
}

async fn run(relay: Relay, record: Arc<Recorder>, validity: Validity, open: Open) {
    let expired = async {
        match validity.end() {
            Some(end) => end.await,
            None => std::future::pending().await,
        }
    };
    relay.run(&record, expired).await;
    drop(open);
}
