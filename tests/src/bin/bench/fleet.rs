//! A master with many nodes.

use std::{
    fmt::Write,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use proto_config::secret_file;
use tests::{
    client::http_get,
    cluster::{Cluster, Options},
    process::{Process, TempDir, free_port},
    stand_ins,
};

use super::kubernetes::{Size, kubeconfig_for, start_api};

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
        let user_ca = cluster.path().join("master/user_ca");
        let address = |i: u32| stand_ins::address(offset + i);
        let entries = stand_ins::prepare(dir.path(), &user_ca, size.nodes, address)?;
        let nodes = stand_ins::start(&std::env::current_exe()?, dir.path(), size.nodes, offset)?;
        std::fs::write(cluster.path().join("inventory.yaml"), format!("nodes:\n{entries}"))?;
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
