//! Konnectivity's own server and agent, for those who have them: `--peer konnectivity=SERVER,AGENT`.

use std::{
    path::{Path as File, PathBuf},
    process::Command,
    str::FromStr,
    time::{Duration, Instant},
};

use ::tests::{
    client::Door,
    pki::Authority,
    process::{Process, Usage, free_port},
};
use anyhow::bail;

/// The binaries of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub server: PathBuf,
    pub agent: PathBuf,
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not konnectivity=SERVER,AGENT, with the paths of both binaries");
        let paths = text.strip_prefix("konnectivity=").ok_or_else(wrong)?;
        match paths.split(',').collect::<Vec<_>>()[..] {
            [server, agent] if !server.is_empty() && !agent.is_empty() => {
                Ok(Self { server: server.into(), agent: agent.into() })
            }
            _ => Err(wrong()),
        }
    }
}

/// A server whose callers enter by a Unix socket with HTTP CONNECT, as they enter a master-agent, and its agent.
pub struct Konnectivity {
    pub door: Door,
    server: Process,
    agent: Process,
}

impl Konnectivity {
    /// Waits until `target` is reached through both. Their files are below `directory`.
    pub async fn start(peer: &Peer, directory: &File, target: &str) -> anyhow::Result<Self> {
        let directory = directory.join("konnectivity");
        std::fs::create_dir_all(&directory)?;
        let pki = Authority::new("konnectivity")?;
        std::fs::write(directory.join("ca.crt"), pki.pem())?;
        pki.server(&directory, "server", &["localhost", "127.0.0.1"])?;
        pki.client(&directory, "agent")?;
        let socket = directory.join("proxy.sock");
        let ports = std::array::from_fn(|_| free_port());
        let mut server = Command::new(&peer.server);
        server.args(server_flags(&directory, &socket, ports));
        let server = Process::start("proxy-server", &mut server, &directory.join("server.log"))?;
        let mut agent = Command::new(&peer.agent);
        agent.args(agent_flags(&directory, [ports[0], free_port(), free_port()]));
        let agent = Process::start("proxy-agent", &mut agent, &directory.join("agent.log"))?;
        let mut started = Self { door: Door::Unix(socket), server, agent };
        let deadline = Instant::now() + Duration::from_secs(60);
        while started.door.stream(target).await.is_err() {
            if Instant::now() > deadline || !started.server.is_running() || !started.agent.is_running() {
                bail!(
                    "no way through Konnectivity:\n{}{}",
                    started.server.log_text(),
                    started.agent.log_text()
                );
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(started)
    }

    pub fn usage(&self) -> [Usage; 2] {
        [self.server.usage(), self.agent.usage()]
    }
}

/// The flags of `proxy-server`; the ports are for agents, its administrator and its health.
fn server_flags(directory: &File, socket: &File, ports: [u16; 3]) -> Vec<String> {
    let [agents, admin, health] = ports;
    let file = |name: &str| directory.join(name).display().to_string();
    vec![
        "--mode=http-connect".to_owned(),
        format!("--uds-name={}", socket.display()),
        "--server-port=0".to_owned(),
        "--agent-bind-address=127.0.0.1".to_owned(),
        format!("--agent-port={agents}"),
        "--admin-bind-address=127.0.0.1".to_owned(),
        format!("--admin-port={admin}"),
        "--health-bind-address=127.0.0.1".to_owned(),
        format!("--health-port={health}"),
        format!("--cluster-ca-cert={}", file("ca.crt")),
        format!("--cluster-cert={}", file("server.crt")),
        format!("--cluster-key={}", file("server.key")),
    ]
}

/// The flags of `proxy-agent`; the ports are the server's, its own administrator's and its health's.
fn agent_flags(directory: &File, ports: [u16; 3]) -> Vec<String> {
    let [server, admin, health] = ports;
    let file = |name: &str| directory.join(name).display().to_string();
    vec![
        "--proxy-server-host=127.0.0.1".to_owned(),
        format!("--proxy-server-port={server}"),
        "--admin-bind-address=127.0.0.1".to_owned(),
        format!("--admin-server-port={admin}"),
        "--health-server-host=127.0.0.1".to_owned(),
        format!("--health-server-port={health}"),
        format!("--ca-cert={}", file("ca.crt")),
        format!("--agent-cert={}", file("agent.crt")),
        format!("--agent-key={}", file("agent.key")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_named_by_both_paths() {
        let peer: Peer = "konnectivity=/opt/proxy-server,bin/proxy-agent".parse().unwrap();
        assert_eq!(peer, Peer { server: "/opt/proxy-server".into(), agent: "bin/proxy-agent".into() });
        for wrong in
            ["", "/a,/b", "other=/a,/b", "konnectivity=/a", "konnectivity=/a,", "konnectivity=/a,/b,/c"]
        {
            assert!(wrong.parse::<Peer>().unwrap_err().contains("konnectivity=SERVER,AGENT"), "{wrong}");
        }
    }

    #[test]
    fn the_agent_is_given_the_port_on_which_the_server_takes_agents() {
        let server = server_flags(File::new("/d"), File::new("/d/s"), [1, 2, 3]);
        let agent = agent_flags(File::new("/d"), [1, 4, 5]);
        assert!(
            server.contains(&"--agent-port=1".to_owned()) && server.contains(&"--uds-name=/d/s".to_owned())
        );
        assert!(agent.contains(&"--proxy-server-port=1".to_owned()));
    }
}
