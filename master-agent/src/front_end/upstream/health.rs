//! The health checks of API servers.

use std::{io, sync::Arc};

use http_body_util::{BodyExt, Limited};
use hyper::{Request, Uri};
use proto_net::causes::causes;

use super::{
    body::RequestBody,
    connection::ServerConnection,
    server::{ConnectError, Protocol, Server},
};

/// How many kept connections may fail before a check fails.
const MAX_REPEATS: usize = 3;
/// The maximum number of bytes that are read of an answer, after which its connection can be kept.
const MAX_HEALTH: usize = 64 * 1024;

/// Checks the health of a server. Every answer except `5xx` means that it is healthy, even one that denies access.
pub(super) async fn check(server: &Arc<Server>) {
    server.sweep();
    match tokio::time::timeout(server.timeout, ask(server)).await {
        Ok(Ok(())) => server.mark_healthy(),
        Ok(Err(error)) => server.connect_failed(&error),
        Err(_) => server.count_failure(&"no answer in time"),
    }
}

async fn ask(server: &Arc<Server>) -> Result<(), ConnectError> {
    let failed = |error| ConnectError::Server(server.name.clone(), io::Error::other(error));
    let mut repeats = 0..MAX_REPEATS;
    loop {
        let connection = ServerConnection::to(server, Protocol::Any).await?;
        let kept = connection.kept;
        let mut request = Request::new(RequestBody::empty());
        *request.uri_mut() = Uri::from(server.health.clone());
        let response = match connection.send(request).await {
            Ok(response) => response,
            // The server may have closed a kept connection in the meantime.
            Err(_) if kept && repeats.next().is_some() => continue,
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
