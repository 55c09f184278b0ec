//! The client with which commands ask the running agent, over its admin socket.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Method;
use hyper_util::rt::TokioIo;
use proto_net::tasks::Tasks;
use tokio::net::UnixStream;

use crate::admin_api::{
    COMPARISON, Explanation, NODES, NodeDetail, NodeStatus, PAGE_TOKEN, RELOAD, Reloaded, explain_path,
    node_path,
};

/// A client of the running agent. Each request has its own connection.
#[derive(Clone, Debug)]
pub struct AdminClient {
    socket: PathBuf,
}

impl AdminClient {
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Returns all nodes and their tunnels.
    pub async fn nodes(&self) -> anyhow::Result<Vec<NodeStatus>> {
        Ok(serde_json::from_str(&self.nodes_json().await?)?)
    }

    /// Returns all nodes and their tunnels in the agent's own JSON.
    pub async fn nodes_json(&self) -> anyhow::Result<String> {
        self.get(NODES).await
    }

    /// Returns one node with its streams and events.
    pub async fn node(&self, name: &str) -> anyhow::Result<NodeDetail> {
        Ok(serde_json::from_str(&self.get(&node_path(name)).await?)?)
    }

    /// Returns how a target is reached, and why.
    pub async fn explain(&self, target: &str) -> anyhow::Result<Explanation> {
        Ok(serde_json::from_str(&self.explain_json(target).await?)?)
    }

    /// Returns how a target is reached, and why, in the agent's own JSON.
    pub async fn explain_json(&self, target: &str) -> anyhow::Result<String> {
        self.get(&explain_path(target)).await
    }

    /// Returns a token with which a browser can log in to the page once.
    pub async fn page_token(&self) -> anyhow::Result<String> {
        self.send(Method::POST, PAGE_TOKEN, String::new()).await
    }

    /// Has the running process hand over to its next one. Returns once that serves.
    pub async fn reload(&self) -> anyhow::Result<Reloaded> {
        Ok(serde_json::from_str(&self.send(Method::POST, RELOAD, String::new()).await?)?)
    }

    /// Sends a comparison in JSON, which the page shows.
    pub async fn put_comparison(&self, report: String) -> anyhow::Result<()> {
        self.send(Method::PUT, COMPARISON, report).await.map(drop)
    }

    async fn get(&self, path: &str) -> anyhow::Result<String> {
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
