//! The health check of API servers.

use std::{io, sync::Arc};

use http_body_util::{BodyExt, Limited};
use hyper::{Request, Uri};

use super::{
    body::RequestBody,
    connection::ServerConnection,
    sender::causes,
    server::{ConnectError, Protocol, Server},
};

/// Bytes of an answer that are read so that its connection can be kept.
const MAX_HEALTH: usize = 64 * 1024;

/// Checks whether a server works. Every answer but `5xx` says so, also one that denies access to the path.
pub(super) async fn check(server: &Arc<Server>) {
    server.sweep();
    match tokio::time::timeout(server.timeout, ask(server)).await {
        Ok(Ok(())) => server.mark_working(),
        Ok(Err(error)) => server.not_connected(&error),
        Err(_) => server.count_failure(&"no answer in time"),
    }
}

async fn ask(server: &Arc<Server>) -> Result<(), ConnectError> {
    let failed = |error| ConnectError::Server(server.name.clone(), io::Error::other(error));
    loop {
        let connection = ServerConnection::to(server, Protocol::Any).await?;
        let kept = connection.kept;
        let mut request = Request::new(RequestBody::empty());
        *request.uri_mut() = Uri::from(server.health.clone());
        let response = match connection.send(request).await {
            Ok(response) => response,
            // The server may have closed a kept connection in the meantime.
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
