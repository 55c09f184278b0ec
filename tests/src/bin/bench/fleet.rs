//! A master with many nodes. Each node is a whole node-agent with an SSH server, a key and a policy of its own, but many
//! of them share a process.

use std::{
    fmt::Write,
    net::{Ipv4Addr, SocketAddr},
    path::Path as File,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use node_agent::{config::Config, identity::host::NodeIdentity};
use proto_config::secret_file;
use proto_net::{
    handover::{Beginning, Role},
    telemetry::LinesLost,
};
use russh::keys::{HashAlg, PrivateKey};
use tests::{
    client::http_get,
    cluster::{Cluster, Options},
    process::{Process, TempDir, free_port},
};

use super::kubernetes::{Size, kubeconfig_for, start_api};

/// Nodes of one process.
const SHARE: u32 = 500;
/// The ports of every node, which has an address of its own.
const SSH: u16 = 2222;
const ADMIN: u16 = 9443;

pub struct Fleet {
    pub cluster: Cluster,
    pub size: Size,
    /// Resident bytes of the master when it knew the cluster and no node of its own.
    empty: u64,
    _nodes: Vec<Process>,
    _api: Option<Process>,
    _dir: TempDir,
}

impl Fleet {
    /// Waits until all nodes are connected. Their addresses follow the first `offset`. With `kubernetes`, the master
    /// follows an API server whose cluster has these nodes.
    pub async fn start(size: Size, offset: u32, kubernetes: bool) -> anyhow::Result<Self> {
        let dir = TempDir::new("bench-nodes")?;
        let mut master_config = "log: {level: warn}\n".to_owned();
        let mut api = None;
        if kubernetes {
            let (port, file) = (free_port(), dir.path().join("kubeconfig"));
            secret_file::replace(&file, kubeconfig_for(port).as_bytes())?;
            writeln!(master_config, "kubernetes: {{kubeconfig: {}}}", file.display())?;
            api = Some(start_api(port, size, dir.path())?);
        }
        let cluster = Cluster::start(Options { master_config, ..Options::default() }).await?;
        if kubernetes {
            size.until_listed(cluster.admin).await;
        }
        let empty = cluster.master.usage().memory;
        let user_ca = PrivateKey::read_openssh_file(cluster.path().join("master/user_ca"))?;
        let inventory = prepare(dir.path(), &user_ca, size.nodes, offset)?;
        let nodes = start_nodes(dir.path(), size.nodes, offset)?;
        std::fs::write(cluster.path().join("inventory.yaml"), inventory)?;
        cluster.master.signal("HUP");
        let fleet = Self { cluster, size, empty, _nodes: nodes, _api: api, _dir: dir };
        fleet.until_connected().await?;
        Ok(fleet)
    }

    /// How many nodes have a tunnel.
    pub async fn connected(&self) -> anyhow::Result<u32> {
        let metrics = http_get(self.cluster.admin, "/metrics").await?;
        let line = metrics.lines().find_map(|line| line.strip_prefix("master_agent_nodes_connected "));
        Ok(line.context("no number of nodes")?.parse()?)
    }

    pub async fn until_connected(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60 + u64::from(self.size.nodes) / 20);
        while self.connected().await.ok() != Some(self.size.nodes) {
            if Instant::now() > deadline {
                bail!("{:?} of {} nodes are connected", self.connected().await, self.size.nodes);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// Resident bytes of the master for each tunnel.
    pub fn memory(&self) -> f64 {
        self.cluster.master.usage().memory.saturating_sub(self.empty) as f64 / f64::from(self.size.nodes)
    }

    /// The share of a core that the master takes while nobody uses it.
    pub async fn idle_cpu(&self, time: Duration) -> f64 {
        let (began, before) = (Instant::now(), self.cluster.master.cpu_of_threads());
        tokio::time::sleep(time).await;
        (self.cluster.master.cpu_of_threads() - before) / began.elapsed().as_secs_f64()
    }
}

/// 127.1.0.1 and so on.
fn address(i: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x7f01_0001 + i)
}

/// Gives every node a directory with its key and the master's CA; gives the inventory that pins the keys.
fn prepare(directory: &File, user_ca: &PrivateKey, count: u32, offset: u32) -> anyhow::Result<String> {
    let user_ca = user_ca.public_key().to_openssh()?;
    let mut inventory = "nodes:\n".to_owned();
    for i in 0..count {
        let directory = directory.join(format!("node-{i}"));
        let identity = NodeIdentity::load_or_create(&directory)?;
        std::fs::write(directory.join("user_ca.pub"), &user_ca)?;
        let pin = identity.host_key().fingerprint(HashAlg::Sha256);
        let dial = SocketAddr::from((address(offset + i), SSH));
        writeln!(inventory, "  - {{name: node-{i}, dial: '{dial}', host_keys: {{pins: ['{pin}']}}}}")?;
    }
    Ok(inventory)
}

fn start_nodes(directory: &File, count: u32, offset: u32) -> anyhow::Result<Vec<Process>> {
    let mut nodes = Vec::new();
    for first in (0..count).step_by(SHARE as usize) {
        let last = count.min(first + SHARE);
        let mut serve = Command::new(std::env::current_exe()?);
        serve.arg("--nodes").arg(directory).args([first, last, offset].map(|number| number.to_string()));
        let name = format!("nodes-{first}");
        nodes.push(Process::start(&name, &mut serve, &directory.join(format!("{name}.log")))?);
    }
    Ok(nodes)
}

/// Runs the nodes from `first` to before `last` whose directories are in `directory`.
pub async fn serve(directory: &File, first: u32, last: u32, offset: u32) -> anyhow::Result<()> {
    let mut nodes = tokio::task::JoinSet::new();
    for i in first..last {
        let (directory, own) = (directory.join(format!("node-{i}")), address(offset + i));
        let text = format!(
            "node: node-{i}\nstate_dir: .\nadmin: {{listen: '{own}:{ADMIN}', socket: admin.sock}}\nlisten: '{own}:{SSH}'\n\
             addresses: ['{own}']\npolicy: {{pod_cidrs: [10.0.0.0/8], service_cidrs: [172.16.0.0/12]}}\n"
        );
        let config = Config::parse(&text, "a stand-in", &directory).map_err(|e| anyhow::anyhow!("{e}"))?;
        nodes.spawn(node_agent::app::run(
            config,
            Beginning::new(Role::First, directory)?,
            LinesLost::default(),
        ));
    }
    while let Some(ended) = nodes.join_next().await {
        ended??;
    }
    Ok(())
}
