//! Starts a master-agent and nodes on loopback. They are the real binaries, each with a configuration of its own, and
//! join as a user would join them.

use std::{
    fmt::Write,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context, bail};

use crate::{
    client::Door,
    metrics::{OPEN_METRICS, scrape},
    openssh,
    pki::{Authority, client_config},
    process::{Process, TempDir, eventually, free_port},
};

/// How long a tunnel may take to come up in a test.
pub const SOON: Duration = Duration::from_secs(20);

/// The kinds of node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A node-agent that the master dials.
    Dialled,
    /// A node-agent that calls home.
    CallHome,
    /// A node-agent that calls home over the front end's port, with a client certificate.
    CallHomeHttps,
    /// A plain OpenSSH sshd.
    Sshd,
}

/// Describes a cluster.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub nodes: Vec<(String, Kind)>,
    /// YAML lines appended to the master's configuration, to every node's, to every node's inventory entry.
    pub master_config: String,
    /// Further fields of the master's section `admin`, each behind a comma.
    pub admin: &'static str,
    pub node_config: String,
    pub inventory: String,
    /// Where the nodes' local endpoints listen, in order; none where it ends. A node-agent has `front-end.sock`, too.
    pub local_endpoints: Vec<SocketAddr>,
    /// Ports that every node's policy allows on its own addresses.
    pub ports: Vec<u16>,
    /// Further targets that every node's policy allows.
    pub targets: Vec<SocketAddr>,
    /// Addresses that the master dials in place of a node's own port, such as a relay's.
    pub dial: Vec<(String, SocketAddr)>,
    /// Ports of the nodes' SSH servers, in order; free ones where it ends.
    pub node_ports: Vec<u16>,
    /// Where the nodes' SSH servers listen in place of 127.0.0.1.
    pub node_listen: Option<IpAddr>,
    /// Where nodes call home in place of the master's own port.
    pub call_home: Option<SocketAddr>,
    /// The master's own port for nodes that call home; a free one without.
    pub call_home_port: Option<u16>,
    /// The section `call_home_https` of nodes that call home over HTTPS, in place of one that shows a client certificate.
    pub https: Option<String>,
    /// Their master as they dial it, in place of `https://localhost:PORT`.
    pub https_master: Option<String>,
    /// Lines of the section `front_end`, which is there for them, in place of those that admit client certificates.
    pub front_end: Option<String>,
    /// The front end that `master_config` has, if it has one; there is no other then.
    pub front_end_at: Option<SocketAddr>,
    /// No link is made at the start; the test starts the nodes.
    pub nodes_down: bool,
}

/// A running cluster.
pub struct Cluster {
    pub master: Process,
    /// Processes of the master that `reload` has replaced.
    pub former_masters: Vec<Process>,
    pub nodes: Vec<Node>,
    pub unix: Door,
    pub tls: Door,
    pub call_home: SocketAddr,
    /// The front end's, where there are nodes that call home over HTTPS.
    pub https: SocketAddr,
    pub admin: SocketAddr,
    pub pki: Authority,
    options: Options,
    /// The last one, so that it goes when nobody writes there any more.
    pub dir: TempDir,
}

pub struct Node {
    pub name: String,
    pub kind: Kind,
    /// Where its SSH server listens, unless it calls home.
    pub port: u16,
    pub admin: SocketAddr,
    pub process: Option<Process>,
    pub dir: PathBuf,
}

/// The process that serves after a reload, according to what the command has printed.
fn next_process(former: &Process, said: &str) -> anyhow::Result<Process> {
    let pid = said.split_whitespace().nth(1).and_then(|pid| pid.parse().ok());
    Ok(former.adopt(pid.with_context(|| format!("no process: {said}"))?))
}

/// A binary of the profile that this test was built with, or of the directory in TEST_BIN_DIR.
pub fn binary(name: &str) -> PathBuf {
    if let Some(directory) = std::env::var_os("TEST_BIN_DIR") {
        return PathBuf::from(directory).join(name);
    }
    let mut path = std::env::current_exe().expect("the test's own path");
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    path.join(name)
}

/// Whether the binaries are of an optimised profile: only then do figures say something.
pub fn optimized() -> bool {
    let binary = binary("master-agent");
    let profiles = ["quick", "release", "dist"];
    binary.parent().is_some_and(|directory| profiles.iter().any(|profile| directory.ends_with(profile)))
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

impl Cluster {
    /// Starts everything and waits until every node is connected.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let dir = TempDir::new("cluster")?;
        let path = dir.path();
        let pki = Authority::new("test CA")?;
        std::fs::write(path.join("ca.crt"), pki.pem())?;
        pki.server(path, "server", &["localhost", "127.0.0.1"])?;
        pki.client(path, "kube-apiserver")?;
        let (call_home, admin, tls) =
            (local(options.call_home_port.unwrap_or_else(free_port)), local(free_port()), local(free_port()));
        let https = options.front_end_at.unwrap_or_else(|| local(free_port()));
        let mut front_end = String::new();
        let over_https = options.nodes.iter().any(|(_, kind)| *kind == Kind::CallHomeHttps);
        if over_https && options.front_end_at.is_none() {
            front_end = front_end_section(https, options.front_end.as_deref());
        }
        std::fs::write(
            path.join("master.yaml"),
            format!(
                "state_dir: master\nadmin: {{listen: '{admin}', socket: admin.sock{}}}\ninventory: inventory.yaml\n\
                 http_connect:\n  unix: {{path: connect.sock}}\n  tls: {{listen: '{tls}', cert: server.crt, key: server.key, client_ca: ca.crt}}\n\
                 call_home: {{listen: '{call_home}'}}\n{front_end}\n{}\n",
                options.admin, options.master_config
            ),
        )?;
        let mut nodes = Vec::new();
        for (i, (name, kind)) in options.nodes.iter().enumerate() {
            let dir = path.join(name);
            std::fs::create_dir_all(&dir)?;
            nodes.push(Node {
                name: name.clone(),
                kind: *kind,
                port: options.node_ports.get(i).copied().unwrap_or_else(free_port),
                admin: local(free_port()),
                process: None,
                dir,
            });
        }
        write_inventory(path, &nodes, &options)?;
        let master = start_master(path)?;
        let config = client_config(&path.join("ca.crt"), Some((path, "kube-apiserver")))?;
        let mut cluster = Self {
            unix: Door::Unix(path.join("connect.sock")),
            tls: Door::Tls(tls, config),
            dir,
            master,
            former_masters: Vec::new(),
            nodes,
            call_home,
            https,
            admin,
            pki,
            options,
        };
        cluster.wait_for_master().await;
        for i in 0..cluster.nodes.len() {
            cluster.prepare(i)?;
            if !cluster.options.nodes_down {
                cluster.start_node(i)?;
            }
        }
        if !cluster.options.nodes_down {
            cluster.wait_connected().await;
        }
        Ok(cluster)
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The front end as nodes dial it.
    pub fn https_master(&self) -> String {
        let master = self.options.https_master.clone();
        master.unwrap_or_else(|| format!("https://localhost:{}", self.https.port()))
    }

    /// Where a node's local endpoint listens.
    pub fn local_endpoint(&self, index: usize) -> SocketAddr {
        self.options.local_endpoints[index]
    }

    /// Descriptors of the master and of the first node, without those of further connections between them, which come and
    /// go with what streams carry.
    pub fn descriptors(&self) -> (u64, u64) {
        let node = self.nodes[0].process.as_ref().expect("the first node runs");
        let further = self.connections(0).saturating_sub(1);
        (self.master.usage().descriptors - further, node.usage().descriptors - further)
    }

    /// The number of SSH connections between the master and a node.
    pub fn connections(&self, index: usize) -> u64 {
        let status = self.node_status(&self.nodes[index].name).unwrap_or_default();
        let tunnels = status["tunnels"].as_array().into_iter().flatten();
        tunnels.filter_map(|tunnel| tunnel["connections"].as_u64()).sum()
    }

    /// The same once they have stopped changing: a tunnel that has just come up still has files to close.
    pub async fn descriptors_at_rest(&self) -> (u64, u64) {
        let (mut last, mut same) = (self.descriptors(), 0);
        eventually("descriptors stop changing", SOON, async || {
            let now = self.descriptors();
            same = if now == last { same + 1 } else { 0 };
            last = now;
            (same >= 10).then_some(now)
        })
        .await
    }

    pub fn doors(&self) -> [Door; 2] {
        [self.unix.clone(), self.tls.clone()]
    }

    async fn wait_for_master(&mut self) {
        let log = self.master.log.clone();
        eventually("the master-agent runs", SOON, async || {
            assert!(self.master.is_running(), "{}", std::fs::read_to_string(&log).unwrap_or_default());
            tokio::net::TcpStream::connect(self.admin).await.ok()
        })
        .await;
    }

    pub fn restart_master(&mut self) -> anyhow::Result<()> {
        self.master.kill();
        self.master = start_master(self.path())?;
        Ok(())
    }

    /// Runs `master-agent reload`, and returns the process that serves then.
    pub fn next_master(&self) -> anyhow::Result<Process> {
        next_process(&self.master, &self.command(&["reload"])?)
    }

    /// Runs `node-agent reload` on a node, and returns the process that serves then.
    pub fn next_node(&self, index: usize) -> anyhow::Result<Process> {
        let said = self.on_node(index, &["reload"])?;
        let former = self.nodes[index].process.as_ref().context("the node has no node-agent")?;
        next_process(former, &said)
    }

    /// Runs a command of node-agent on a node to its end; gives what it printed.
    pub fn on_node(&self, index: usize, args: &[&str]) -> anyhow::Result<String> {
        let dir = &self.nodes[index].dir;
        let mut command = Command::new(binary("node-agent"));
        command.arg("--config").arg(dir.join("node.yaml")).args(args).current_dir(dir);
        let output = command.output()?;
        if !output.status.success() {
            bail!("{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Reloads the master.
    pub fn reload_master(&mut self) -> anyhow::Result<()> {
        let next = self.next_master()?;
        self.former_masters.push(std::mem::replace(&mut self.master, next));
        Ok(())
    }

    /// Reloads a node-agent, and returns the former process.
    pub fn reload_node(&mut self, index: usize) -> anyhow::Result<Process> {
        let next = self.next_node(index)?;
        self.nodes[index].process.replace(next).context("the node has no node-agent")
    }

    /// Runs a command of master-agent to its end, whatever that is.
    pub fn output(&self, args: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(binary("master-agent"));
        command.arg("--config").arg(self.path().join("master.yaml")).args(args).current_dir(self.path());
        Ok(command.output()?)
    }

    /// Runs a command of master-agent to its end; gives what it printed.
    pub fn command(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.output(args)?;
        if !output.status.success() {
            bail!("{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Gives a node its identity.
    fn prepare(&mut self, index: usize) -> anyhow::Result<()> {
        let node = &self.nodes[index];
        match node.kind {
            Kind::Sshd => {
                openssh::keygen(&node.dir.join("host_key"))?;
                Ok(())
            }
            Kind::Dialled | Kind::CallHome | Kind::CallHomeHttps => {
                let mut policy = String::new();
                for port in &self.options.ports {
                    for (i, address) in addresses(index).iter().enumerate() {
                        write!(policy, "{{name: local-{i}-{port}, to: '{address}', ports: '{port}'}}, ")?;
                    }
                }
                for target in &self.options.targets {
                    let (address, port) = (target.ip(), target.port());
                    write!(policy, "{{name: target-{port}, to: '{address}', ports: '{port}'}}, ")?;
                }
                let link = match node.kind {
                    Kind::Dialled => {
                        let address = self.options.node_listen.unwrap_or(local(0).ip());
                        format!("listen: '{}'", SocketAddr::new(address, node.port))
                    }
                    Kind::CallHomeHttps => {
                        let user = format!("system:node:{}", node.name);
                        self.pki.client_in(&node.dir, "client", &user, ["system:nodes", "agents"])?;
                        let shown = "{ca: ../ca.crt, cert: client.crt, key: client.key}";
                        let shown = self.options.https.as_deref().unwrap_or(shown);
                        format!("call_home: ['{}']\ncall_home_https: {shown}", self.https_master())
                    }
                    Kind::CallHome | Kind::Sshd => {
                        format!("call_home: ['{}']", self.options.call_home.unwrap_or(self.call_home))
                    }
                };
                // A certificate gives no node a loopback address: what these nodes have is stated here.
                let mut own = String::new();
                if !self.options.node_config.contains("addresses:") {
                    let addresses: Vec<_> = addresses(index).iter().map(|a| format!("'{a}'")).collect();
                    own = format!("addresses: [{}]\n", addresses.join(", "));
                }
                let endpoint = self.options.local_endpoints.get(index).map(|address| {
                    format!("front_end: {{wait: 500ms, tcp: '{address}', unix: {{path: front-end.sock}}}}\n")
                });
                std::fs::write(
                    node.dir.join("node.yaml"),
                    format!(
                        "state_dir: state\nadmin: {{listen: '{}', socket: admin.sock}}\n{link}\npolicy: {{allow: [{policy}]}}\n{own}{}{}\n",
                        node.admin,
                        endpoint.unwrap_or_default(),
                        self.options.node_config
                    ),
                )?;
                let token = self.command(&["token", "create", "--node", &node.name])?;
                self.node_command(index, token.trim())
            }
        }
    }

    /// Runs a `node-agent ...` line as `token create` prints it.
    pub fn node_command(&self, index: usize, line: &str) -> anyhow::Result<()> {
        let mut words = line.split_whitespace();
        if words.next() != Some("node-agent") {
            bail!("not a node-agent line: {line}");
        }
        openssh::run(
            Command::new(binary("node-agent"))
                .args(words)
                .arg("--config")
                .arg(self.nodes[index].dir.join("node.yaml"))
                .current_dir(&self.nodes[index].dir),
        )
    }

    pub fn start_node(&mut self, index: usize) -> anyhow::Result<()> {
        let process = match self.nodes[index].kind {
            Kind::Dialled | Kind::CallHome | Kind::CallHomeHttps => {
                let node = &self.nodes[index];
                let mut command = Command::new(binary("node-agent"));
                command.arg("--config").arg(node.dir.join("node.yaml")).arg("run").current_dir(&node.dir);
                Process::start(&node.name, &mut command, &node.dir.join("log"))?
            }
            Kind::Sshd => self.start_sshd(index)?,
        };
        self.nodes[index].process = Some(process);
        Ok(())
    }

    /// Ends a node at once, with the sessions of an sshd, which outlive the process that listens.
    pub fn kill_node(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        if let Some(process) = &mut node.process {
            process.kill();
        }
        if node.kind == Kind::Sshd {
            let sockets = Command::new("ss").args(["-tnpH", "state", "established"]).output().unwrap();
            let text = String::from_utf8_lossy(&sockets.stdout).into_owned();
            let near = format!("127.0.0.1:{}", node.port);
            let lines = text.lines().filter(|l| l.split_whitespace().nth(2) == Some(&near));
            let pids =
                lines.flat_map(|line| line.split("pid=").skip(1)).filter_map(|rest| rest.split(',').next());
            // A child of one that has just been killed may be gone already.
            let _ = Command::new("kill").arg("-9").args(pids).output();
        }
    }

    fn start_sshd(&self, index: usize) -> anyhow::Result<Process> {
        let node = &self.nodes[index];
        let key = node.dir.join("host_key");
        openssh::create_account("master-agent")?;
        let text = |path: PathBuf| path.display().to_string();
        let mut args = vec!["sshd-config".to_owned(), node.name.clone(), "--files-only".to_owned()];
        let options = [
            ("--host-key", text(node.dir.join("host_key.pub"))),
            ("--host-key-path", text(key.clone())),
            ("--directory", text(node.dir.clone())),
            ("--drop-in", text(node.dir.join("drop-in.conf"))),
        ];
        args.extend(options.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
        for address in addresses(index) {
            for port in &self.options.ports {
                let target = SocketAddr::new(address, *port).to_string();
                args.extend(["--allow".to_owned(), target]);
            }
        }
        let script = self.command(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
        openssh::run(Command::new("sh").arg("-c").arg(&script))?;
        openssh::sshd(&node.dir, node.port, &format!("Include {}", text(node.dir.join("drop-in.conf"))))
    }

    /// Waits until every node has a tunnel.
    pub async fn wait_connected(&self) {
        for node in &self.nodes {
            self.wait_state(&node.name, "connected").await;
        }
    }

    pub async fn wait_state(&self, node: &str, state: &str) {
        let log = self.master.log.clone();
        let mut last = String::new();
        eventually(&format!("node {node} is {state} (see {})", log.display()), SOON, async || {
            last = self.node_status(node).ok()?["state"].as_str()?.to_owned();
            (last == state).then_some(())
        })
        .await;
    }

    /// The entry of a node in `node list -o json`.
    pub fn node_status(&self, node: &str) -> anyhow::Result<serde_json::Value> {
        let all: Vec<serde_json::Value> =
            serde_json::from_str(&self.command(&["node", "list", "-o", "json"])?)?;
        all.into_iter().find(|n| n["name"] == node).context("no such node")
    }

    /// The sum of a metric's samples.
    pub async fn total(&self, admin: SocketAddr, name: &str) -> anyhow::Result<f64> {
        Ok(scrape(admin, OPEN_METRICS).await?.total(name))
    }

    /// The value of a metric's first sample whose line begins with `prefix`.
    pub async fn metric(&self, admin: SocketAddr, prefix: &str) -> anyhow::Result<f64> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut socket = tokio::net::TcpStream::connect(admin).await?;
        socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut text = String::new();
        socket.read_to_string(&mut text).await?;
        let line =
            text.lines().find(|l| l.starts_with(prefix)).with_context(|| format!("no metric {prefix}"))?;
        Ok(line.rsplit(' ').next().unwrap_or_default().parse()?)
    }
}

fn front_end_section(listen: SocketAddr, lines: Option<&str>) -> String {
    let lines = lines.unwrap_or("  authentication: [{x509: {ca: ca.crt}}]\n  authorization: [{node: {}}]\n");
    format!(
        "front_end:\n  listen: '{listen}'\n  certificates: [{{cert: server.crt, key: server.key}}]\n  upstream: \
         {{servers: ['http://127.0.0.1:9']}}\n  audit: {{file: audit.log}}\n{lines}"
    )
}

fn start_master(path: &Path) -> anyhow::Result<Process> {
    let mut command = Command::new(binary("master-agent"));
    command.arg("--config").arg(path.join("master.yaml")).arg("run").current_dir(path);
    Process::start("master-agent", &mut command, &path.join("master.log"))
}

/// Node 0 is 127.0.0.1 and ::1, node 1 is 127.0.0.2, and so on: all of them this host's loopback.
pub fn addresses(index: usize) -> Vec<IpAddr> {
    let v4 = IpAddr::from([127, 0, 0, index as u8 + 1]);
    if index == 0 { vec![v4, IpAddr::from(std::net::Ipv6Addr::LOCALHOST)] } else { vec![v4] }
}

fn write_inventory(path: &Path, nodes: &[Node], options: &Options) -> anyhow::Result<()> {
    let mut text = if nodes.is_empty() { String::new() } else { "nodes:\n".to_owned() };
    for (i, node) in nodes.iter().enumerate() {
        let addresses: Vec<String> = addresses(i).iter().map(|a| format!("'{a}'")).collect();
        write!(
            text,
            "  - name: {}\n    addresses: [{}]\n    {}\n",
            node.name,
            addresses.join(", "),
            options.inventory
        )?;
        if !matches!(node.kind, Kind::CallHome | Kind::CallHomeHttps) {
            let dial = options.dial.iter().find(|(name, _)| *name == node.name);
            let dial = dial.map_or_else(|| local(node.port), |(_, address)| *address);
            writeln!(text, "    dial: '{dial}'")?;
        }
        if let Some(address) = options.local_endpoints.get(i).filter(|_| node.kind == Kind::Sshd) {
            writeln!(text, "    front_end_listen: '{address}'")?;
        }
    }
    std::fs::write(path.join("inventory.yaml"), text)?;
    Ok(())
}
