//! Measures what it costs to call home over the front end's HTTPS port in place of plain TCP. One master has a node of
//! each kind, and both reach the same target in turns. The column `direct` is plain TCP here, and `ours` is HTTPS.

use std::time::Duration;

use tests::{
    client::Stream,
    cluster::{Cluster, Kind, Options},
    process::{Process, TempDir, free_port},
};

use super::{
    paths::target_process,
    report::{Figures, Path, Samples, rounds},
    work::{download, kept_get_p50, kept_get_rate, upload},
};

const BOTH: [Path; 2] = [Path::Direct, Path::Ours];

struct Homes {
    cluster: Cluster,
    port: u16,
    _target: Process,
    _dir: TempDir,
}

impl Homes {
    async fn start() -> anyhow::Result<Self> {
        let dir = TempDir::new("bench")?;
        let port = free_port();
        let target = target_process(port, &dir.path().join("target.log"))?;
        let cluster = Cluster::start(Options {
            nodes: vec![("tcp".to_owned(), Kind::CallHome), ("https".to_owned(), Kind::CallHomeHttps)],
            ports: vec![port],
            master_config: "log: {level: warn}\n".to_owned(),
            node_config: "log: {level: warn}".to_owned(),
            ..Options::default()
        })
        .await?;
        Ok(Self { cluster, port, _target: target, _dir: dir })
    }

    async fn connect(&self, path: Path) -> anyhow::Result<Stream> {
        let node = if path == Path::Ours { "https" } else { "tcp" };
        self.cluster.unix.stream(&format!("{node}:{}", self.port)).await
    }

    /// CPU time of the master and the node, in seconds.
    fn cpu(&self, path: Path) -> f64 {
        let node = self.cluster.nodes.get(usize::from(path == Path::Ours)).and_then(|n| n.process.as_ref());
        self.cluster.master.usage().cpu + node.map(|node| node.usage().cpu).unwrap_or_default()
    }
}

pub async fn figures(n: usize, megabytes: u64, time: Duration) -> anyhow::Result<Figures> {
    let homes = Homes::start().await?;
    let bytes = megabytes << 20;
    let mut cpu = Samples::default();
    let down = rounds(&BOTH, n, async |path| {
        let before = homes.cpu(path);
        let speed = download(homes.connect(path).await?, bytes).await?;
        cpu.push(path, (homes.cpu(path) - before) / (bytes as f64 / 1e9));
        Ok(speed)
    })
    .await;
    let up = rounds(&BOTH, n, async |path| upload(homes.connect(path).await?, bytes).await).await;
    let p50 = rounds(&BOTH, n, async |path| kept_get_p50(homes.connect(path).await?, time).await).await;
    let rate =
        rounds(&BOTH, n, async |path| kept_get_rate(async || homes.connect(path).await, time).await).await;
    Ok(Figures::from([
        ("call_home_https_download", down.figure("MB/s")),
        ("call_home_https_upload", up.figure("MB/s")),
        ("call_home_https_cpu_per_gb", cpu.figure("s/GB")),
        ("call_home_https_kept_get_p50", p50.figure("us")),
        ("call_home_https_rate_32", rate.figure("1/s")),
    ]))
}
