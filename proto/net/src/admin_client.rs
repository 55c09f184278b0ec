//! The client with which commands ask the running agent, over its admin socket.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::{
    handover::reload::{RELOAD, Reloaded},
    tasks::Tasks,
};

/// A client of the running agent. Each request has its own connection.
#[derive(Clone, Debug)]
pub struct AdminClient {
    agent: &'static str,
    socket: PathBuf,
}

impl AdminClient {
    /// `agent` is the name of the program.
    pub fn new(agent: &'static str, socket: &Path) -> Self {
        Self { agent, socket: socket.to_owned() }
    }

    /// Whether an agent runs, as far as its socket tells.
    pub async fn is_running(&self) -> bool {
        UnixStream::connect(&self.socket).await.is_ok()
    }

    /// Has the running process hand over to its next one. Returns once that serves.
    pub async fn reload(&self) -> anyhow::Result<Reloaded> {
        Ok(serde_json::from_str(&self.send(Method::POST, RELOAD, String::new()).await?)?)
    }

    /// Sends a request, and returns the text of the answer. An answer that says no is an error with its text.
    pub async fn send(&self, method: Method, path: &str, body: String) -> anyhow::Result<String> {
        let stream = UnixStream::connect(&self.socket).await.with_context(|| {
            let (socket, agent) = (self.socket.display(), self.agent);
            format!("can't reach the running agent at {socket}: does `{agent} run` run?")
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let tasks = Tasks::new();
        tasks.spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, self.agent)
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        let body = String::from_utf8_lossy(&body).into_owned();
        if !status.is_success() {
            bail!("{}", body.trim());
        }
        Ok(body)
    }
}
