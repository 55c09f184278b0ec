//! The client with which commands ask the running agent, over its admin socket.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Method;
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proto_net::tasks::Tasks;
use tokio::net::UnixStream;

use crate::{
    registry::{NodeDetail, NodeStatus},
    tunnels::explain::Explanation,
};

/// A client of the running agent. Each question has a connection of its own.
#[derive(Clone, Debug)]
pub struct AdminClient {
    socket: PathBuf,
}

impl AdminClient {
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// All nodes, and their tunnels.
    pub async fn nodes(&self) -> anyhow::Result<Vec<NodeStatus>> {
        Ok(serde_json::from_str(&self.get("/nodes").await?)?)
    }

    /// One node, with its streams and events.
    pub async fn node(&self, name: &str) -> anyhow::Result<NodeDetail> {
        Ok(serde_json::from_str(&self.get(&format!("/nodes/{name}")).await?)?)
    }

    /// Which way a target would be reached, and why.
    pub async fn explain(&self, target: &str) -> anyhow::Result<Explanation> {
        Ok(serde_json::from_str(&self.get(&explain_path(target)).await?)?)
    }

    /// A token with which a browser logs in to the page, once.
    pub async fn page_token(&self) -> anyhow::Result<String> {
        self.send(Method::POST, "/page/token", String::new()).await
    }

    /// Gives the page a comparison to show, as JSON.
    pub async fn put_comparison(&self, report: String) -> anyhow::Result<()> {
        self.send(Method::PUT, "/comparison", report).await.map(drop)
    }

    /// An answer as it is.
    pub async fn get(&self, path: &str) -> anyhow::Result<String> {
        self.send(Method::GET, path, String::new()).await
    }

    async fn send(&self, method: Method, path: &str, body: String) -> anyhow::Result<String> {
        let stream = UnixStream::connect(&self.socket).await.with_context(|| {
            format!(
                "can't reach the running agent at {}: does `master-agent run` run?",
                self.socket.display()
            )
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let tasks = Tasks::new();
        tasks.spawn(connection);
        let request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "master-agent")
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

/// Where the explanation of a target is.
pub fn explain_path(target: &str) -> String {
    format!("/explain?{}", utf8_percent_encode(target, NON_ALPHANUMERIC))
}
