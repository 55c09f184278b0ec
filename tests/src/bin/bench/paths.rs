//! The ways to one target: directly, through OpenSSH, through the agents, and through a peer if there is one.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path as File,
    process::Command,
    time::Duration,
};

use anyhow::Context;
use tests::{
    client::{Door, Stream},
    cluster::{Cluster, Kind, Options},
    openssh,
    packet_path::PacketPath,
    process::{Process, TempDir, Usage, free_port, output_of},
    relay::Relay,
};
use tokio::net::TcpStream;

use super::{
    machine,
    peer::{Konnectivity, Peer},
    report::Path,
};

/// What lies between the two ends of every tunnel.
#[derive(Clone, Copy)]
pub enum Between<'a> {
    Loopback,
    /// A relay that takes that long each way.
    Delay(Duration),
    /// The masters' ends are in the namespace that this thread has entered, the nodes' and the targets in the far one.
    Packets(&'a PacketPath),
}

impl Between<'_> {
    /// The address of the node's side.
    fn far(&self) -> IpAddr {
        match self {
            Self::Loopback | Self::Delay(_) => Ipv4Addr::LOCALHOST.into(),
            Self::Packets(path) => path.far_address.into(),
        }
    }

    /// Where the master's side dials a port of the node's.
    fn to(&self, port: u16) -> anyhow::Result<SocketAddr> {
        let address = SocketAddr::new(self.far(), port);
        if let Self::Delay(delay) = self { relay(address, *delay) } else { Ok(address) }
    }

    /// Does on the node's side what starts a process there.
    fn on_far_side<T>(&self, start: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let Self::Packets(path) = self else { return start() };
        let _far = path.far.enter()?;
        start()
    }
}

/// How a caller begins a stream to a target.
#[derive(Clone)]
pub enum Entry {
    Tcp(SocketAddr),
    Connect(Door, String),
}

impl Entry {
    pub async fn connect(&self) -> anyhow::Result<Stream> {
        match self {
            Self::Tcp(address) => {
                let socket = TcpStream::connect(address).await?;
                socket.set_nodelay(true)?;
                Ok(Box::new(socket))
            }
            Self::Connect(door, target) => door.stream(target).await,
        }
    }
}

/// A target in a process of its own.
pub struct Target {
    pub process: Process,
    /// As those on the node's side reach it.
    pub address: SocketAddr,
}

impl Target {
    pub fn start(directory: &File) -> anyhow::Result<Self> {
        let port = free_port();
        let process = target_process(port, &directory.join(format!("target-{port}.log")))?;
        Ok(Self { process, address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)) })
    }
}

/// `ssh -L` to every target, through an sshd of its own.
struct Forwards {
    ssh: Process,
    sshd: Process,
    entries: Vec<SocketAddr>,
}

impl Forwards {
    fn start(
        directory: &File,
        between: Between<'_>,
        targets: &[Target],
        cipher: Option<&str>,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let (key, user, port) = (directory.join("host_key"), directory.join("user_key"), free_port());
        openssh::keygen(&key)?;
        openssh::keygen(&user)?;
        let mut config = format!(
            "HostKey {}\nAuthorizedKeysFile {}\nMaxSessions 10000",
            key.display(),
            user.with_extension("pub").display()
        );
        if !between.far().is_loopback() {
            config += &format!("\nListenAddress {}", between.far());
        }
        let sshd = between.on_far_side(|| openssh::sshd(directory, port, &config))?;
        let mut ssh = Command::new("ssh");
        ssh.args(["-N", "-F", "none"]);
        for option in [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "ExitOnForwardFailure=yes",
            "LogLevel=ERROR",
            "IdentitiesOnly=yes",
        ] {
            ssh.args(["-o", option]);
        }
        if let Some(cipher) = cipher {
            ssh.args(["-c", cipher]);
        }
        let mut entries = Vec::new();
        for target in targets {
            let entry = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
            ssh.args(["-L", &format!("{entry}:{}", target.address)]);
            entries.push(entry);
        }
        let to = between.to(port)?;
        let login = format!("{}@{}", output_of(Command::new("id").arg("-un")).trim(), to.ip());
        ssh.arg("-i").arg(&user).args(["-p", &to.port().to_string(), &login]);
        let ssh = Process::start("ssh", &mut ssh, &directory.join("ssh.log"))?;
        for entry in &entries {
            openssh::wait_for_port(entry.port()).context("ssh -L did not start")?;
        }
        Ok(Self { ssh, sshd, entries })
    }
}

/// All ways to two targets, which do not share a process.
pub struct Bench {
    pub cluster: Cluster,
    pub targets: Vec<Target>,
    direct: Vec<SocketAddr>,
    same: Forwards,
    default: Forwards,
    peer: Option<Konnectivity>,
    _dir: TempDir,
}

impl Bench {
    pub async fn start(between: Between<'_>, peer: Option<&Peer>) -> anyhow::Result<Self> {
        let dir = TempDir::new("bench")?;
        let path = dir.path();
        let targets = between.on_far_side(|| Ok(vec![Target::start(path)?, Target::start(path)?]))?;
        let ports = targets.iter().map(|target| target.address.port()).collect();
        let direct = targets.iter().map(|t| SocketAddr::new(between.far(), t.address.port())).collect();
        let same = Forwards::start(&path.join("same"), between, &targets, Some(&machine::cipher()))?;
        let default = Forwards::start(&path.join("default"), between, &targets, None)?;
        let node_port = free_port();
        let mut cluster = Cluster::start(Options {
            nodes: vec![("n1".to_owned(), Kind::Dialled)],
            ports,
            dial: vec![("n1".to_owned(), between.to(node_port)?)],
            node_ports: vec![node_port],
            node_listen: Some(between.far()),
            master_config: "log: {level: warn}\nkonnectivity: {unix: {path: konnectivity.sock}}\n".to_owned(),
            node_config: "log: {level: warn}".to_owned(),
            nodes_down: true,
            ..Options::default()
        })
        .await?;
        between.on_far_side(|| cluster.start_node(0))?;
        cluster.wait_connected().await;
        let peer = match (peer, between) {
            (Some(peer), Between::Loopback) => {
                Some(Konnectivity::start(peer, path, &targets[0].address.to_string()).await?)
            }
            _ => None,
        };
        Ok(Self { cluster, targets, direct, same, default, peer, _dir: dir })
    }

    /// Every way there is.
    pub fn paths(&self) -> Vec<Path> {
        let mut paths = vec![Path::Direct, Path::OpenSsh, Path::OpenSshDefault, Path::Ours];
        paths.extend(self.peer.is_some().then_some(Path::Konnectivity));
        paths
    }

    /// To the first target.
    pub async fn connect(&self, path: Path) -> anyhow::Result<Stream> {
        self.entry(path, 0).connect().await
    }

    /// To a target by its index.
    pub fn entry(&self, path: Path, target: usize) -> Entry {
        let through = |door: Door| Entry::Connect(door, self.targets[target].address.to_string());
        match (path, &self.peer) {
            (Path::OpenSsh, _) => Entry::Tcp(self.same.entries[target]),
            (Path::OpenSshDefault, _) => Entry::Tcp(self.default.entries[target]),
            (Path::Ours, _) => through(self.cluster.unix.clone()),
            (Path::Konnectivity, Some(peer)) => through(peer.door.clone()),
            (Path::Direct | Path::Konnectivity, _) => Entry::Tcp(self.direct[target]),
        }
    }

    /// Where kube-apiserver would speak Konnectivity's gRPC with the master.
    pub fn konnectivity(&self) -> Door {
        Door::Unix(self.cluster.path().join("konnectivity.sock"))
    }

    /// Waits until neither the targets nor the agents have work: the stalled streams have filled what there is to
    /// fill. Until then the writers themselves take a core from everybody.
    pub async fn until_idle(&self, path: Path) {
        let targets = || self.targets.iter().map(|target| target.process.usage().cpu).sum::<f64>();
        let cpu = || targets() + self.usage(path).cpu;
        let mut before = cpu();
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let now = cpu();
            if now - before < 0.03 {
                return;
            }
            before = now;
        }
        eprintln!("the stalled streams never came to rest");
    }

    /// The usage of both ends of a tunnel together.
    pub fn usage(&self, path: Path) -> Usage {
        let pair = match path {
            Path::Direct => return Usage::default(),
            Path::OpenSsh => [self.same.ssh.usage(), self.same.sshd.usage()],
            Path::OpenSshDefault => [self.default.ssh.usage(), self.default.sshd.usage()],
            Path::Ours => {
                let node = self.cluster.nodes[0].process.as_ref().map(Process::usage).unwrap_or_default();
                [self.cluster.master.usage(), node]
            }
            Path::Konnectivity => self.peer.as_ref().map(Konnectivity::usage).unwrap_or_default(),
        };
        Usage {
            memory: pair[0].memory + pair[1].memory,
            descriptors: pair[0].descriptors + pair[1].descriptors,
            cpu: pair[0].cpu + pair[1].cpu,
        }
    }
}

/// A target on all of this host's addresses, in a process of its own.
pub fn target_process(port: u16, log: &File) -> anyhow::Result<Process> {
    let mut serve = Command::new(std::env::current_exe()?);
    serve.args(["--serve", &port.to_string()]);
    let process = Process::start("target", &mut serve, log)?;
    openssh::wait_for_port(port)?;
    Ok(process)
}

/// A delaying relay on a thread of its own.
fn relay(to: SocketAddr, delay: Duration) -> anyhow::Result<SocketAddr> {
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let relay = Relay::start(SocketAddr::from(([127, 0, 0, 1], 0)), to, delay, None).await?;
            tx.send(relay.address)?;
            std::future::pending::<anyhow::Result<()>>().await
        })
    });
    Ok(rx.recv()?)
}
