//! Checks what must go on undisturbed while a test attacks the agents.

use std::{path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    client::{Door, Stream},
    cluster::Cluster,
    load::completes,
    process::{Process, Usage, eventually},
};

/// How long an agent may take to settle after a test.
const SETTLED: Duration = Duration::from_secs(60);

/// A stream that echoes.
pub struct Echo {
    stream: Stream,
    said: u64,
}

impl Echo {
    /// `target` is a port of [`crate::target`].
    pub async fn open(door: &Door, target: &str) -> anyhow::Result<Self> {
        let mut stream = door.stream(target).await?;
        stream.write_all(b"echo\n").await?;
        let mut echo = Self { stream, said: 0 };
        echo.say().await?;
        Ok(echo)
    }

    /// Says something that it has not said before, and waits for the answer.
    pub async fn say(&mut self) -> anyhow::Result<()> {
        self.said += 1;
        let words = format!("{:032}", self.said);
        let exchange = async {
            self.stream.write_all(words.as_bytes()).await?;
            let mut heard = vec![0; words.len()];
            self.stream.read_exact(&mut heard).await?;
            std::io::Result::Ok(heard)
        };
        let heard = completes("an echo", exchange).await?;
        if heard != words.as_bytes() {
            bail!("said {words:?}, heard {:?}", String::from_utf8_lossy(&heard));
        }
        Ok(())
    }
}

/// A node's only tunnel, and a stream inside it.
pub struct Steady {
    node: String,
    since: u64,
    echo: Echo,
}

impl Steady {
    pub async fn start(cluster: &Cluster, node: &str, port: u16) -> anyhow::Result<Self> {
        let since = since(cluster, node)?;
        let echo = Echo::open(&cluster.unix, &format!("{node}:{port}")).await?;
        Ok(Self { node: node.to_owned(), since, echo })
    }

    pub async fn say(&mut self) -> anyhow::Result<()> {
        self.echo.say().await
    }

    /// The stream still echoes, and the tunnel is the one that it was.
    pub async fn check(&mut self, cluster: &Cluster) {
        let said = self.echo.say().await;
        said.unwrap_or_else(|e| {
            panic!("the open stream of {}: {e:#}\n{}", self.node, cluster.master.log_text())
        });
        assert_eq!(since(cluster, &self.node).unwrap(), self.since, "{}", cluster.master.log_text());
    }
}

fn since(cluster: &Cluster, node: &str) -> anyhow::Result<u64> {
    let status = cluster.node_status(node)?;
    match status["tunnels"].as_array().context("tunnels")?.as_slice() {
        [only] => only["since_unix_seconds"].as_u64().context("since_unix_seconds"),
        other => bail!("{node} has {} tunnels", other.len()),
    }
}

/// A process's usage before an attack.
pub struct Health {
    name: String,
    pid: u32,
    log: PathBuf,
    before: Usage,
}

impl Health {
    pub fn of(process: &Process) -> Self {
        let (name, pid, log) = (process.name.clone(), process.pid(), process.log.clone());
        Self { name, pid, log, before: process.usage() }
    }

    /// Resident memory that has come since, bytes.
    pub fn growth(&self) -> u64 {
        Usage::of(self.pid).memory.saturating_sub(self.before.memory)
    }

    /// The process has not panicked, its descriptors are back, and its memory within `limit` bytes.
    pub async fn check(&self, limit: u64) {
        let mut now = Usage::default();
        let settled = async || {
            now = Usage::of(self.pid);
            (now.descriptors > 0 && now.descriptors <= self.before.descriptors && self.growth() < limit)
                .then_some(())
        };
        let result = tokio::time::timeout(SETTLED, eventually("settled", SETTLED * 2, settled)).await;
        assert!(result.is_ok(), "{} had {:?}, and has {now:?}", self.name, self.before);
        self.no_panic();
        println!("{}: memory grew by {} KB of {} KB", self.name, self.growth() / 1024, limit / 1024);
    }

    pub fn no_panic(&self) {
        let log = std::fs::read_to_string(&self.log).unwrap();
        let panic = log.lines().find(|line| line.contains("panicked"));
        assert_eq!(panic, None, "{}", self.name);
    }
}

/// Enough for all tests that run at once.
const DESCRIPTORS: u64 = 65_536;

/// Lets this process, and those that it starts, have `count` descriptors beside those of other tests.
pub fn raise_descriptor_limit(count: u64) -> anyhow::Result<()> {
    let limits = std::fs::read_to_string("/proc/self/limits")?;
    let line = limits.lines().find(|l| l.starts_with("Max open files")).context("no limit of open files")?;
    let mut numbers = line.split_whitespace().filter_map(|w| w.parse::<u64>().ok());
    let (Some(soft), Some(hard)) = (numbers.next(), numbers.next()) else { bail!("can't read {line:?}") };
    let count = count.max(DESCRIPTORS.min(hard));
    if soft >= count {
        return Ok(());
    }
    let pid = std::process::id().to_string();
    let set = |count: u64| {
        let limit = format!("--nofile={count}:{}", hard.max(count));
        crate::openssh::run(Command::new("prlimit").args(["--pid", &pid, &limit]))
    };
    // Where the hard limit cannot be raised, it has to do.
    if count > hard { set(count).or_else(|_| set(hard)) } else { set(count) }
}
