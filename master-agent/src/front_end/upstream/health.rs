//! The look at an API server, again and again, whether it works.

use std::{io, sync::Arc};

use http_body_util::{BodyExt, Limited};
use hyper::{Request, Uri};

use super::{
    body::RequestBody,
    connection::Connection,
    sender::causes,
    server::{ConnectError, Protocol, Server},
};

/// Bytes of an answer to a check that are read, to keep its connection.
const MAX_HEALTH: usize = 64 * 1024;

/// Asks a server whether it works. An answer that is no `5xx` says so, whoever may see the path.
pub(super) async fn check(server: &Arc<Server>) {
    server.sweep();
    match tokio::time::timeout(server.timeout, ask(server)).await {
        Ok(Ok(())) => server.works(),
        Ok(Err(error)) => server.unconnected(&error),
        Err(_) => server.failed(&"no answer in time"),
    }
}

async fn ask(server: &Arc<Server>) -> Result<(), ConnectError> {
    let failed = |error| ConnectError::Server(server.name.clone(), io::Error::other(error));
    loop {
        let connection = Connection::to(server, Protocol::Any).await?;
        let kept = connection.kept;
        let mut request = Request::new(RequestBody::empty());
        *request.uri_mut() = Uri::from(server.health.clone());
        let response = match connection.send(request).await {
            Ok(response) => response,
            // The server may have ended it meanwhile.
            Err(_) if kept => continue,
            Err((error, _)) => return Err(failed(causes(&error))),
        };
        let status = response.status();
        let _ = Limited::new(response.into_body(), MAX_HEALTH).collect().await;
        if status.is_server_error() {
            return Err(failed(format!("{} answers {status}", server.health)));
        }
        return Ok(());
    }
}
