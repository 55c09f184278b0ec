//! The agents, and what is done to them.

use std::{
    array,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use tests::{
    client::Door,
    cluster::{Kind, Options, binary},
    disk::Disk,
    front_end::{FrontEnd, Setup},
    openssh::{run, sshd},
    pki::Authority,
    process::{Process, TempDir, free_port},
    relay::Relay,
    stand_ins,
};
use tokio::{
    net::UnixStream,
    task::{JoinHandle, spawn_blocking},
    time::{sleep, timeout},
};

use super::faults::{Agent, Fault};

/// The nodes that carry something. Those with a node-agent come first.
pub const NODES: [(&str, Kind); 4] =
    [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::CallHomeHttps), ("n4", Kind::Sshd)];
pub const NODE_AGENTS: usize = 3;
pub const SSHD: usize = 3;

/// Bytes a second that a throttled link carries.
const SLOW: f64 = 1e6;
/// How often and how fast links flap.
const FLAPS: u32 = 20;
const FLAP: Duration = Duration::from_millis(150);
/// Descriptors that are left to a master which has too few, and callers who want one.
const LEFT: u64 = 20;
const IDLE: usize = 200;
/// Longer than a reload takes whose links are not made.
const PATIENCE: Duration = Duration::from_secs(60);

/// An agent whose program is a copy of its own, which an upgrade can replace.
pub struct Running {
    pub name: &'static str,
    /// The program as it was built, and the copy.
    built: PathBuf,
    program: PathBuf,
    config: PathBuf,
    /// What the configuration says at first, and how often it has changed.
    text: String,
    changes: u32,
    pub admin: SocketAddr,
    /// The process that serves.
    pub process: Process,
    /// Those that it has replaced and that still carry streams.
    pub former: Vec<Process>,
}

impl Running {
    fn start(
        name: &'static str,
        agent: &str,
        directory: &Path,
        config: PathBuf,
        log: &Path,
        admin: SocketAddr,
    ) -> anyhow::Result<Self> {
        let (built, program) = (binary(agent), directory.join(name));
        std::fs::copy(&built, &program)?;
        let text = std::fs::read_to_string(&config)?;
        let process = Process::start(name, &mut command(&program, &config, "run")?, log)?;
        Ok(Self { name, built, program, config, text, changes: 0, admin, process, former: Vec::new() })
    }

    /// SIGKILL, as the kernel without memory or a machine without power sends it.
    fn kill(&mut self) {
        for process in self.former.iter_mut().chain([&mut self.process]) {
            process.kill();
        }
        self.former.clear();
    }

    fn start_again(&mut self) -> anyhow::Result<()> {
        let mut command = command(&self.program, &self.config, "run")?;
        self.process = Process::start(self.name, &mut command, &self.process.log)?;
        Ok(())
    }

    /// Puts another file in the program's place.
    fn upgrade(&self) -> anyhow::Result<()> {
        let other = self.program.with_extension("next");
        std::fs::copy(&self.built, &other)?;
        Ok(std::fs::rename(other, &self.program)?)
    }

    /// Begins to reload; gives the process that serves then.
    fn reload(&self) -> anyhow::Result<JoinHandle<anyhow::Result<u32>>> {
        let mut command = command(&self.built, &self.config, "reload")?;
        Ok(spawn_blocking(move || -> anyhow::Result<u32> {
            let output = command.output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let said = String::from_utf8_lossy(&output.stdout);
            let pid = said.split_whitespace().nth(1).and_then(|pid| pid.parse::<u32>().ok());
            pid.with_context(|| format!("no process: {said}"))
        }))
    }

    /// Changes the configuration and says so by SIGHUP; gives the process that serves then.
    fn hangup(&mut self) -> anyhow::Result<JoinHandle<anyhow::Result<u32>>> {
        self.changes += 1;
        std::fs::write(&self.config, format!("{}\ndrain_timeout: {}m\n", self.text, 30 + self.changes))?;
        let (log, already) = (self.process.log.clone(), self.process.log_text().len());
        self.process.signal("HUP");
        Ok(tokio::spawn(async move {
            loop {
                let text = std::fs::read_to_string(&log)?;
                for line in text.get(already..).unwrap_or_default().lines() {
                    ensure!(!line.contains("no new process has taken over"), "{line}");
                    let pid = line.split_once("pid=").filter(|_| line.contains("a new process serves"));
                    if let Some(pid) =
                        pid.and_then(|(_, rest)| rest.split_whitespace().next()?.parse::<u32>().ok())
                    {
                        return anyhow::Ok(pid);
                    }
                }
                sleep(Duration::from_millis(100)).await;
            }
        }))
    }

    fn replaced_by(&mut self, pid: u32) {
        let next = self.process.adopt(pid);
        self.former.push(std::mem::replace(&mut self.process, next));
        self.former.retain_mut(Process::is_running);
    }
}

fn command(program: &Path, config: &Path, what: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(program);
    command.arg("--config").arg(config).arg(what).current_dir(config.parent().context("no directory")?);
    Ok(command)
}

/// How a fault ends.
pub enum Undo {
    Restore(usize),
    Start(Agent),
    StartSshd,
    Continue(Agent),
    /// A new process takes over.
    Replace(Agent, JoinHandle<anyhow::Result<u32>>),
    Remove(PathBuf),
    Close {
        pid: u32,
        limit: u64,
        idle: Vec<UnixStream>,
    },
    Flapped(JoinHandle<()>),
    Nothing,
}

impl Undo {
    /// Whether it waits for the agents, which may have to wait for another fault to end.
    pub fn waits(&self) -> bool {
        matches!(self, Self::Replace(..) | Self::Remove(_))
    }
}

/// Everything that runs. Processes end before what they use.
pub struct Site {
    pub master: Running,
    /// In the order of [`NODES`].
    pub node_agents: Vec<Running>,
    sshd: Process,
    _stand_ins: Vec<Process>,
    /// The number of nodes, those included.
    nodes: f64,
    links: Vec<Relay>,
    other_links: Vec<Relay>,
    disk: Disk,
    /// Tokens with which hosts have joined.
    pub tokens: Vec<String>,
    pub programs: TempDir,
    /// Its cluster has files and addresses; the processes are here.
    pub front_end: Arc<FrontEnd>,
}

impl Site {
    /// Starts nodes of all kinds that reach `ports` of their own, and `others` that carry nothing.
    pub async fn start(ports: Vec<u16>, others: u32) -> anyhow::Result<Self> {
        let near: [SocketAddr; NODES.len()] = array::from_fn(|_| local(free_port()));
        let node_ports: [u16; NODES.len()] = array::from_fn(|_| free_port());
        let sockets = ["konnectivity", "socks5", "proxy_urls"]
            .map(|name| format!("{name}: {{unix: {{path: {name}.sock}}}}\n"));
        let setup = Setup {
            nodes: NODES.map(|(name, kind)| (name.to_owned(), kind)).to_vec(),
            ports,
            http2: true,
            // Callers here may be late, and have not stalled.
            master_config: sockets.concat() + "tunnels: {sshd_stall_timeout: 20s}\n",
            cluster: Options {
                node_ports: node_ports.to_vec(),
                dial: [0, SSHD].map(|node| (NODES[node].0.to_owned(), near[node])).to_vec(),
                call_home: Some(near[1]),
                https_master: Some(format!("https://localhost:{}", near[2].port())),
                nodes_down: true,
                ..Options::default()
            },
            ..Setup::default()
        };
        let mut front_end = FrontEnd::start(setup).await?;
        let cluster = &mut front_end.cluster;
        let far = [local(node_ports[0]), cluster.call_home, front_end.address, local(node_ports[SSHD])];
        let mut links = Vec::new();
        for (near, far) in near.into_iter().zip(far) {
            links.push(Relay::start(near, far, Duration::ZERO, None).await?);
        }

        // The master starts again from a program of its own, with its state on a small disk.
        cluster.master.signal("TERM");
        cluster.master.wait(PATIENCE)?;
        let (path, programs) = (cluster.path().to_owned(), TempDir::new("programs")?);
        std::fs::rename(path.join("master"), path.join("former"))?;
        let disk = Disk::mount(&path.join("master"), "4m")?;
        run(Command::new("cp").args(["-a", "former/.", "master"]).current_dir(&path))?;
        let (other_links, stand_ins) = start_others(&path, programs.path(), others).await?;
        let config = path.join("master.yaml");
        let log = path.join("master.log");
        let master =
            Running::start("master-agent", "master-agent", programs.path(), config, &log, cluster.admin)?;
        let mut node_agents = Vec::new();
        for (node, (name, _)) in cluster.nodes.iter().zip(NODES).take(NODE_AGENTS) {
            let (config, log) = (node.dir.join("node.yaml"), node.dir.join("log"));
            node_agents.push(Running::start(name, "node-agent", programs.path(), config, &log, node.admin)?);
        }
        cluster.start_node(SSHD)?;
        let sshd = cluster.nodes[SSHD].process.take().context("no sshd")?;
        let nodes = f64::from(others) + NODES.len() as f64;
        let mut site = Self {
            master,
            node_agents,
            sshd,
            _stand_ins: stand_ins,
            nodes,
            links,
            other_links,
            disk,
            tokens: Vec::new(),
            programs,
            front_end: Arc::new(front_end),
        };
        site.roll_certificates()?;
        site.linked().await?;
        site.join_again()?;
        Ok(site)
    }

    fn agent(&mut self, agent: Agent) -> &mut Running {
        match agent {
            Agent::Master => &mut self.master,
            Agent::Node(node) => &mut self.node_agents[node],
        }
    }

    pub fn agents(&self) -> impl Iterator<Item = &Running> {
        std::iter::once(&self.master).chain(&self.node_agents)
    }

    /// Whether every node has a tunnel.
    pub async fn is_linked(&self) -> bool {
        let connected = self.front_end.cluster.total(self.master.admin, "master_agent_nodes_connected");
        let connected = timeout(Duration::from_secs(5), connected).await;
        connected.is_ok_and(|connected| connected.is_ok_and(|connected| connected == self.nodes))
    }

    async fn linked(&self) -> anyhow::Result<()> {
        let began = Instant::now();
        while !self.is_linked().await {
            ensure!(began.elapsed() < PATIENCE, "not all nodes are linked");
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// A host that has joined joins again, which writes to the master's state and keeps the host's key.
    fn join_again(&mut self) -> anyhow::Result<()> {
        let cluster = &self.front_end.cluster;
        let line = cluster.command(&["token", "create", "--node", NODES[0].0])?;
        self.tokens.push(line.split_whitespace().last().context("no token")?.to_owned());
        cluster.node_command(0, line.trim())
    }

    fn roll_certificates(&self) -> anyhow::Result<()> {
        let (front_end, cluster) = (&self.front_end, &self.front_end.cluster);
        let names = ["localhost", "127.0.0.1"];
        front_end.servers.server(front_end.path(), "front-end", &names)?;
        cluster.pki.server(cluster.path(), "server", &names)?;
        // Callers have certificates of the first one, nodes that call home over HTTPS of the second.
        let further = Authority::new("a further CA")?;
        let authorities = [&front_end.clients, &cluster.pki, &further].map(Authority::pem);
        front_end.replace("clients-ca.crt", &authorities.concat())
    }

    pub async fn inject(&mut self, fault: Fault) -> anyhow::Result<Undo> {
        Ok(match fault {
            Fault::Cut(at) => {
                self.links[at].cut();
                Undo::Nothing
            }
            Fault::BlackHole(at) => {
                self.links[at].black_hole();
                Undo::Restore(at)
            }
            Fault::Delay(at, delay) => {
                self.links[at].shape(delay, None);
                Undo::Restore(at)
            }
            Fault::Throttle(at) => {
                self.links[at].shape(Duration::ZERO, Some(SLOW));
                Undo::Restore(at)
            }
            Fault::Flap => {
                let links: Vec<_> = self.links.iter().chain(&self.other_links).cloned().collect();
                Undo::Flapped(tokio::spawn(async move {
                    for _ in 0..FLAPS {
                        links.iter().for_each(Relay::cut);
                        sleep(FLAP).await;
                    }
                }))
            }
            Fault::Kill(agent) => {
                self.agent(agent).kill();
                Undo::Start(agent)
            }
            Fault::KillSshd => {
                // Its sessions are processes of their own, which end with their links.
                self.sshd.kill();
                self.links[SSHD].cut();
                Undo::StartSshd
            }
            Fault::Stop(agent) => {
                self.agent(agent).process.signal("STOP");
                Undo::Continue(agent)
            }
            Fault::Reload(agent) => Undo::Replace(agent, self.agent(agent).reload()?),
            Fault::Upgrade(agent) => {
                self.agent(agent).upgrade()?;
                Undo::Replace(agent, self.agent(agent).reload()?)
            }
            Fault::Hangup(agent) => Undo::Replace(agent, self.agent(agent).hangup()?),
            Fault::Certificates => {
                self.roll_certificates()?;
                Undo::Nothing
            }
            Fault::FullDisk => Undo::Remove(self.disk.fill()?),
            Fault::Descriptors => self.exhaust_descriptors().await?,
        })
    }

    async fn exhaust_descriptors(&self) -> anyhow::Result<Undo> {
        let pid = self.master.process.pid();
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
        let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
        let limit =
            limit.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).context("no limit")?;
        limit_descriptors(pid, self.master.process.usage().descriptors + LEFT)?;
        let Door::Unix(socket) = &self.front_end.cluster.unix else { bail!("no Unix socket") };
        let mut idle = Vec::new();
        for _ in 0..IDLE {
            // The kernel's queue may be full.
            if let Ok(Ok(one)) = timeout(Duration::from_secs(1), UnixStream::connect(socket)).await {
                idle.push(one);
            }
        }
        Ok(Undo::Close { pid, limit, idle })
    }

    /// Ends a fault. With `alone`, it has been the only one, and what an operator has asked for must have succeeded.
    pub async fn heal(&mut self, undo: Undo, alone: bool) -> anyhow::Result<()> {
        match undo {
            Undo::Restore(at) => {
                self.links[at].shape(Duration::ZERO, None);
                self.links[at].restore();
            }
            Undo::Start(agent) => self.agent(agent).start_again()?,
            Undo::StartSshd => {
                let node = &self.front_end.cluster.nodes[SSHD];
                let include = format!("Include {}", node.dir.join("drop-in.conf").display());
                self.sshd = sshd(&node.dir, node.port, &include)?;
            }
            Undo::Continue(agent) => self.agent(agent).process.signal("CONT"),
            Undo::Replace(agent, replaced) => {
                let replaced = timeout(PATIENCE, replaced).await.context("no process has taken over")?;
                match replaced? {
                    Ok(pid) => self.agent(agent).replaced_by(pid),
                    Err(error) if alone => return Err(error.context(format!("{agent:?} was not replaced"))),
                    Err(error) => {
                        println!("           {agent:?} was not replaced: {error:#}");
                        ensure!(self.agent(agent).process.is_running(), "{agent:?} has ended: {error:#}");
                    }
                }
            }
            Undo::Remove(filler) => {
                std::fs::remove_file(filler)?;
                self.linked().await?;
                self.join_again()?;
            }
            Undo::Close { pid, limit, idle } => {
                drop(idle);
                limit_descriptors(pid, limit)?;
            }
            Undo::Flapped(flaps) => flaps.await?,
            Undo::Nothing => {}
        }
        Ok(())
    }
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Sets the soft limit of a process.
fn limit_descriptors(pid: u32, limit: u64) -> anyhow::Result<()> {
    run(Command::new("prlimit").args(["--pid", &pid.to_string(), &format!("--nofile={limit}:")]))
}

/// Starts further nodes that the master of a cluster dials, each by a relay.
async fn start_others(
    cluster: &Path,
    directory: &Path,
    count: u32,
) -> anyhow::Result<(Vec<Relay>, Vec<Process>)> {
    let mut links = Vec::new();
    for node in 0..count {
        links.push(Relay::start(local(0), stand_ins::address(node), Duration::ZERO, None).await?);
    }
    let address = |node: u32| links[node as usize].address;
    let entries = stand_ins::prepare(directory, &cluster.join("master/user_ca"), count, address)?;
    let inventory = cluster.join("inventory.yaml");
    std::fs::write(&inventory, std::fs::read_to_string(&inventory)? + &entries)?;
    let nodes = stand_ins::start(&binary("bench"), directory, count, 0)?;
    Ok((links, nodes))
}
