//! The client with which commands ask the running agent, over its admin socket.

use std::{path::Path, time::Duration};

use hyper::Method;
use proto::NodeName;
use proto_net::{admin_client, drain, handover::reload::Reloaded};

use crate::admin_api::{
    COMPARISON, Explanation, NODES, NodeDetail, NodeStatus, PAGE_TOKEN, drain_path, explain_path, node_path,
    undrain_path,
};

/// A client of the running agent. Each request has its own connection.
#[derive(Clone, Debug)]
pub struct AdminClient(admin_client::AdminClient);

impl AdminClient {
    pub fn new(socket: &Path) -> Self {
        Self(admin_client::AdminClient::new("master-agent", socket))
    }

    /// Whether an agent runs, as far as its socket tells.
    pub async fn is_running(&self) -> bool {
        self.0.is_running().await
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
        self.0.reload().await
    }

    /// Drains a node. Returns it with the streams that are left.
    pub async fn drain(&self, node: &NodeName, deadline: Duration) -> anyhow::Result<NodeDetail> {
        let request = drain::request(deadline);
        Ok(serde_json::from_str(&self.send(Method::POST, &drain_path(node.as_str()), request).await?)?)
    }

    /// Undoes the drain of a node. Returns a line of text.
    pub async fn undrain(&self, node: &NodeName) -> anyhow::Result<String> {
        self.send(Method::POST, &undrain_path(node.as_str()), String::new()).await
    }

    /// Sends a comparison in JSON, which the page shows.
    pub async fn put_comparison(&self, report: String) -> anyhow::Result<()> {
        self.send(Method::PUT, COMPARISON, report).await.map(drop)
    }

    async fn get(&self, path: &str) -> anyhow::Result<String> {
        self.send(Method::GET, path, String::new()).await
    }

    async fn send(&self, method: Method, path: &str, body: String) -> anyhow::Result<String> {
        self.0.send(method, path, body).await
    }
}
