//! Stands in for a kubelet (HTTPS) and for pods (HTTP) on a node.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Context;
use clap::Parser;
use proto_net::tasks::Tasks;
use tokio::signal::unix::{SignalKind, signal};

mod server;

/// Answers /, /healthz, /pods, /bytes/N and /upload until SIGTERM; prints `ready` once it listens.
#[derive(Parser)]
#[command(name = "standin", version)]
struct Args {
    /// Listen here for HTTPS, as a kubelet does; may be given several times.
    #[arg(long, value_name = "ADDRESS:PORT", requires_all = ["cert", "key"])]
    kubelet: Vec<SocketAddr>,
    /// Listen here for HTTP, as a pod might; may be given several times.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pod: Vec<SocketAddr>,
    /// The certificate for HTTPS, PEM.
    #[arg(long, value_name = "FILE")]
    cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The name in the answers.
    #[arg(long, default_value = "stand-in")]
    name: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let tls = match (&args.cert, &args.key) {
        (Some(cert), Some(key)) => Some(server::acceptor(cert, key)?),
        _ => None,
    };
    let tasks = Tasks::new();
    let mut listeners = Vec::new();
    for address in &args.kubelet {
        listeners.push((server::bind(*address).await?, tls.clone()));
    }
    for address in &args.pod {
        listeners.push((server::bind(*address).await?, None));
    }
    let server = server::Standin::new(&args.name, tasks.clone());
    for (listener, tls) in listeners {
        tasks.spawn(server.clone().serve(listener, tls));
    }
    println!("ready");
    signal(SignalKind::terminate()).context("can't wait for SIGTERM")?.recv().await;
    Ok(())
}
