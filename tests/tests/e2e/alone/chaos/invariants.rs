//! What must be true once nobody calls any more.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use tests::{
    front_end::{BOOTSTRAP, TOKEN},
    metrics::{OPEN_METRICS, Scraped, scrape},
    process::Usage,
};
use tokio::time::sleep;

use super::{
    load::{BYTES, Entrances, Listener},
    site::{NODE_AGENTS, NODES, Running, Site},
};

/// Longer than streams outlive their callers, and processes that have been replaced their streams.
const SETTLED: Duration = Duration::from_secs(90);
/// Resident bytes that a process may have more than the first one had.
const GROWTH: u64 = 64 << 20;
/// Descriptors that are nobody's: a database's journal, connections to kube-apiserver that wait for requests.
const SPARE: u64 = 16;

/// What is zero at rest.
const OF_MASTER: &[&str] = &[
    "master_agent_streams",
    "master_agent_streams_stalled",
    "master_agent_dials_pending",
    "master_agent_draining_processes",
    "master_agent_front_end_requests_in_flight",
    "master_agent_front_end_requests_queued",
];
const OF_NODE: &[&str] = &[
    "node_agent_streams",
    "node_agent_streams_stalled",
    "node_agent_front_end_streams",
    "node_agent_draining_processes",
];

/// What the agents used at the start, after they had carried something.
pub struct AtStart(Vec<Usage>);

impl AtStart {
    pub async fn note(site: &Site) -> anyhow::Result<Self> {
        rest(site).await?;
        Ok(Self(site.agents().map(|agent| usage(site, agent)).collect()))
    }

    /// Waits until nothing is left of all that has happened.
    pub async fn is_back(&self, site: &Site) -> anyhow::Result<()> {
        rest(site).await?;
        let began = Instant::now();
        for (agent, before) in site.agents().zip(&self.0) {
            let name = agent.name;
            loop {
                let now = usage(site, agent);
                let [used, had] = [now, *before].map(|usage| usage.memory / 1024);
                let more = now.descriptors.saturating_sub(before.descriptors);
                if more <= SPARE && now.memory <= before.memory + GROWTH {
                    println!("{name}: {used} KB, and {had} KB at the start; {more} descriptors more");
                    break;
                }
                ensure!(began.elapsed() < SETTLED, "{name} has {now:?}, and had {before:?} at the start");
                sleep(Duration::from_millis(200)).await;
            }
        }
        Ok(())
    }
}

/// What an agent uses, without further connections of tunnels, which stay for minutes.
fn usage(site: &Site, agent: &Running) -> Usage {
    let of_agent = |node: &usize| [site.master.name, NODES[*node].0].contains(&agent.name);
    let connections = (0..NODES.len()).filter(of_agent).map(|node| site.front_end.cluster.connections(node));
    let further: u64 = connections.map(|connections| connections.saturating_sub(1)).sum();
    let usage = agent.process.usage();
    Usage { descriptors: usage.descriptors.saturating_sub(further), ..usage }
}

/// Waits until no stream is open and no process is left that has been replaced.
async fn rest(site: &Site) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let busy = match busy(site).await {
            Ok(busy) if busy.is_empty() => return Ok(()),
            Ok(busy) => busy.join(", "),
            Err(error) => format!("{error:#}"),
        };
        ensure!(began.elapsed() < SETTLED, "without callers, after {SETTLED:?}: {busy}");
        sleep(Duration::from_millis(200)).await;
    }
}

async fn busy(site: &Site) -> anyhow::Result<Vec<String>> {
    let mut busy = Vec::new();
    let of_nodes = site.node_agents.iter().map(|agent| (agent, OF_NODE));
    for (agent, names) in std::iter::once((&site.master, OF_MASTER)).chain(of_nodes) {
        let scraped = scrape(agent.admin, OPEN_METRICS).await.with_context(|| agent.name.to_owned())?;
        let values = names.iter().map(|name| (name, scraped.total(name)));
        busy.extend(
            values.filter(|(_, value)| *value != 0.0).map(|(name, value)| format!("{name} is {value}")),
        );
    }
    if !busy.is_empty() {
        return Ok(busy);
    }
    for (node, agent) in site.node_agents.iter().enumerate() {
        let sessions = scrape(agent.admin, OPEN_METRICS).await?.total("node_agent_sessions");
        let connections = site.front_end.cluster.connections(node) as f64;
        if sessions != connections {
            busy.push(format!("{} has {sessions} sessions, and the master {connections}", agent.name));
        }
    }
    let serving: BTreeSet<u32> = site.agents().map(|agent| agent.process.pid()).collect();
    let running = processes_of(site)?;
    busy.extend(running.difference(&serving).map(|pid| format!("process {pid} is left over")));
    busy.extend(serving.difference(&running).map(|pid| format!("process {pid} has ended")));
    Ok(busy)
}

/// The processes of the agents' own programs.
fn processes_of(site: &Site) -> anyhow::Result<BTreeSet<u32>> {
    let programs = site.programs.path().join("").display().to_string();
    let mut pids = BTreeSet::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let program = command.split(|byte| *byte == 0).next().unwrap_or_default();
        if program.starts_with(programs.as_bytes()) {
            pids.insert(pid);
        }
    }
    Ok(pids)
}

/// The metrics count what is carried now, no more and no less.
pub async fn metrics_add_up(site: &Site, entrances: &Entrances) -> anyhow::Result<()> {
    let transfers = (NODES.len() * Listener::PLAIN.len()) as f64;
    let of_node = (Listener::PLAIN.len() as u64 * BYTES) as f64;
    let before = counts(site).await?;
    for (node, _) in NODES {
        for listener in Listener::PLAIN {
            let what = || format!("{listener:?} to {node} without any fault");
            entrances.download(listener, node).await.with_context(what)?;
        }
    }
    let mut wanted = vec![transfers, transfers, NODES.len() as f64 * of_node];
    wanted.resize(wanted.len() + NODE_AGENTS, of_node);
    let began = Instant::now();
    loop {
        let now = counts(site).await?;
        let counted: Vec<f64> = now.iter().zip(&before).map(|(now, before)| now - before).collect();
        if counted == wanted {
            return Ok(());
        }
        ensure!(
            began.elapsed() < SETTLED,
            "dials, streams that ended, their bytes, and those of each node: {counted:?} in place of {wanted:?}"
        );
        sleep(Duration::from_millis(100)).await;
    }
}

/// Successful dials, streams that have ended and their bytes at the master, and the bytes at each node-agent.
async fn counts(site: &Site) -> anyhow::Result<Vec<f64>> {
    let master = scrape(site.master.admin, OPEN_METRICS).await?;
    let mut counts = vec![
        labelled(&master, "master_agent_dials_total", "result=\"ok\""),
        master.total("master_agent_stream_duration_seconds_count"),
        labelled(&master, "master_agent_stream_bytes_total", "direction=\"down\""),
    ];
    for agent in &site.node_agents {
        let node = scrape(agent.admin, OPEN_METRICS).await?;
        counts.push(labelled(&node, "node_agent_stream_bytes_total", "direction=\"down\""));
    }
    Ok(counts)
}

/// The sum of the samples with a label.
fn labelled(scraped: &Scraped, name: &str, label: &str) -> f64 {
    let samples = scraped.text.lines().filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
    let with_label = samples.filter(|(labels, _)| labels.starts_with('{') && labels.contains(label));
    with_label.filter_map(|(_, value)| value.parse::<f64>().ok()).sum()
}

/// Nobody has panicked, and nobody has logged a secret.
pub fn logs_are_clean(site: &Site) -> anyhow::Result<()> {
    let secrets = site.tokens.iter().map(String::as_str).chain([TOKEN, BOOTSTRAP]);
    let secrets: Vec<_> = secrets.collect();
    let audit = std::fs::read_to_string(site.front_end.file("audit.log"))?;
    let logs = site.agents().map(|agent| (agent.name, agent.process.log_text()));
    for (name, text) in logs.chain([("the audit log", audit)]) {
        for line in text.lines() {
            ensure!(!line.contains("panicked"), "{name}: {line}");
            ensure!(!secrets.iter().any(|secret| line.contains(*secret)), "{name} has a secret: {line}");
        }
    }
    Ok(())
}
