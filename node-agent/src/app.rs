//! The composition root: everything is read and every socket bound first, then everything serves.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use proto_net::{admin::Endpoints, exposition::Exposition, socket, systemd, tasks::Tasks, unix};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    agent::Agent,
    config::{Config, LocalUnixConfig},
    identity::NodeIdentity,
    links, local_endpoint,
    revocation::Revocations,
};

/// The least time for sessions to end by themselves.
const GOODBYE: Duration = Duration::from_secs(2);

/// Runs the agent until SIGTERM or SIGINT, then drains it.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let identity = NodeIdentity::load_or_create(&config.state_dir)?;
    let revocations = Revocations::load(&config.state_dir, identity.user_cas())?;
    let listener = match config.listen {
        Some(address) => Some(socket::listen(address).map_err(|e| bind_error(address, e))?),
        None => None,
    };
    let admin = socket::listen(config.admin.listen)
        .with_context(|| format!("can't listen on {}", config.admin.listen))?;
    let (mut front_end_tcp, mut front_end_unix) = (None, None);
    if let Some(front_end) = &config.front_end {
        if let Some(address) = front_end.tcp {
            front_end_tcp =
                Some(socket::listen(address).with_context(|| format!("can't listen on {address}"))?);
        }
        if let Some(LocalUnixConfig { path, mode }) = &front_end.unix {
            let listener = unix::bind(path, *mode, None, None);
            front_end_unix = Some(listener.with_context(|| format!("can't listen on {}", path.display()))?);
        }
    }
    let agent = Arc::new(Agent::new(config, identity, revocations));

    let background = Tasks::new();
    let listeners = Tasks::new();
    if let Some(listener) = listener {
        listeners.spawn(links::accept(agent.clone(), listener));
    }
    if let Some(listener) = front_end_tcp {
        listeners.spawn(local_endpoint::accept_tcp(agent.clone(), listener));
    }
    if let Some(listener) = front_end_unix {
        listeners.spawn(local_endpoint::accept_unix(agent.clone(), listener));
    }
    for master in &agent.config.call_home {
        agent.sessions.spawn(links::call_home(agent.clone(), master.clone()));
    }
    let endpoints = Endpoints { metrics: Exposition::new(agent.metrics.register()), admin: agent.clone() };
    background.spawn(endpoints.serve_tcp(admin, background.clone()));
    background.spawn(systemd::watchdog(Vec::new()));

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    systemd::ready();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "node-agent runs");
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => tracing::info!("SIGHUP: nothing is read again here; a restart reads the configuration"),
        }
    }

    // Stop accepting, tell the masters, let streams finish, end the sessions.
    systemd::stopping();
    let streams = || agent.metrics.streams.get() + agent.metrics.front_end_streams.get();
    tracing::info!(streams = streams(), "stopping");
    agent.draining.cancel();
    listeners.cancel();
    let deadline = tokio::time::Instant::now() + agent.config.shutdown_grace;
    while streams() > 0 && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let cut = streams();
    agent.stopping.cancel();
    agent.sessions.drain(deadline.saturating_duration_since(tokio::time::Instant::now()).max(GOODBYE)).await;
    background.cancel();
    background.drain(Duration::from_secs(2)).await;
    tracing::info!(cut, "stopped");
    Ok(())
}

fn bind_error(address: std::net::SocketAddr, error: std::io::Error) -> anyhow::Error {
    if error.kind() == std::io::ErrorKind::AddrInUse {
        return anyhow::anyhow!(
            "can't listen on {address}: the port is taken, probably by this host's sshd. Ways out: let this node \
             call home (`call_home: [MASTER:2222]` and no `listen:`), give it another port (`listen:` here, `dial:` \
             in the master's inventory), or use that sshd as the node (`master-agent sshd-config`)"
        );
    }
    anyhow::anyhow!("can't listen on {address}: {error}")
}
