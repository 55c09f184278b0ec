//! Measures direct connections, OpenSSH's `ssh -L` and the agents on the same work, interleaved in one run.
//!
//! Everything runs on loopback. Figures are medians over the rounds; what counts are the ratios. A figure that
//! is off never makes this fail.
#![allow(clippy::disallowed_methods, reason = "a benchmark owns its tasks by its runtime")]

mod call_home;
mod front_end;
mod isolation;
mod kubernetes;
mod watching;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Parser;
use isolation::Way;
use serde::Serialize;
use tests::{
    client::{Door, Stream},
    cluster::{Cluster, Kind, Options, binary},
    konnectivity::Connection,
    openssh,
    process::{Process, TempDir, Usage, free_port},
    relay::Relay,
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

#[derive(Parser)]
struct Args {
    /// Print one JSON object in place of the table.
    #[arg(long)]
    json: bool,
    /// Fewer rounds and less data: shows that every figure can be taken, and roughly what it is.
    #[arg(long)]
    quick: bool,
    /// Only figures whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Serve as the API server of a large cluster on this port; used by the benchmark itself.
    #[arg(long, hide = true)]
    apiserver: Option<u16>,
    /// Serve as the target on this port; used by the benchmark itself.
    #[arg(long, hide = true)]
    serve: Option<u16>,
}

#[derive(Serialize)]
struct Figure {
    unit: &'static str,
    direct: Option<f64>,
    openssh: Option<f64>,
    ours: Option<f64>,
    /// Ours by OpenSSH's; where OpenSSH has no such figure, ours by direct.
    ratio: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Path {
    Direct,
    OpenSsh,
    Ours,
}

const ALL: [Path; 3] = [Path::Direct, Path::OpenSsh, Path::Ours];

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        if let Some(port) = args.serve {
            // Nodes are 127.0.0.1, 127.0.0.2 and so on.
            target::serve(SocketAddr::from(([0, 0, 0, 0], port))).await?;
            return std::future::pending().await;
        }
        if let Some(port) = args.apiserver {
            return kubernetes::serve(port).await;
        }
        let figures = measure(&args).await?;
        if args.json {
            println!("{}", serde_json::to_string(&figures)?);
        } else {
            print_table(&figures);
        }
        Ok(())
    })
}

fn print_table(figures: &BTreeMap<&str, Figure>) {
    println!(
        "{:<28} {:>10} {:>12} {:>12} {:>12} {:>8}",
        "figure", "unit", "direct", "openssh", "ours", "ratio"
    );
    let show = |v: Option<f64>| match v {
        None => "-".to_owned(),
        Some(v) if v.abs() >= 100.0 => format!("{v:.0}"),
        Some(v) => format!("{v:.2}"),
    };
    for (name, f) in figures {
        println!(
            "{name:<28} {:>10} {:>12} {:>12} {:>12} {:>8}",
            f.unit,
            show(f.direct),
            show(f.openssh),
            show(f.ours),
            show(f.ratio)
        );
    }
}

/// The three ways to one target.
struct Bench {
    cluster: Cluster,
    target_process: Process,
    target: SocketAddr,
    ssh: Process,
    sshd: Process,
    forward: SocketAddr,
    _dir: TempDir,
}

impl Bench {
    /// With `delay`, a relay that takes that long each way stands between the two ends of either tunnel.
    async fn start(delay: Option<Duration>) -> anyhow::Result<Self> {
        let dir = TempDir::new("bench")?;
        let port = free_port();
        let target = SocketAddr::from(([127, 0, 0, 1], port));
        let target_process = target_process(port, &dir.path().join("target.log"))?;

        let (sshd_port, forward_port, node_port) = (free_port(), free_port(), free_port());
        let (mut ssh_to, mut dial) = (sshd_port, vec![]);
        if let Some(delay) = delay {
            let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
            ssh_to = relay(local(sshd_port), delay)?.port();
            dial = vec![("n1".to_owned(), relay(local(node_port), delay)?)];
        }
        let key = dir.path().join("host_key");
        let user = dir.path().join("user_key");
        openssh::keygen(&key)?;
        openssh::keygen(&user)?;
        let config = format!(
            "HostKey {}\nAuthorizedKeysFile {}\nMaxSessions 10000",
            key.display(),
            user.with_extension("pub").display()
        );
        let sshd = openssh::sshd(dir.path(), sshd_port, &config)?;
        let mut ssh = Command::new("ssh");
        ssh.args([
            "-N",
            "-F",
            "none",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        ])
        .args(["-o", "ExitOnForwardFailure=yes", "-o", "LogLevel=ERROR", "-o", "IdentitiesOnly=yes", "-i"])
        .arg(&user)
        .args(["-L", &format!("127.0.0.1:{forward_port}:{target}"), "-p", &ssh_to.to_string()])
        .arg(format!("{}@127.0.0.1", whoami()?));
        let ssh = Process::start("ssh", &mut ssh, &dir.path().join("ssh.log"))?;
        openssh::wait_for_port(forward_port).context("ssh -L did not start")?;

        let mut options = Options {
            nodes: vec![("n1".to_owned(), Kind::Dialled)],
            ports: vec![port],
            dial,
            master_config: "log: {level: warn}\nkonnectivity: {unix: {path: konnectivity.sock}}\n".to_owned(),
            node_config: "log: {level: warn}".to_owned(),
            ..Options::default()
        };
        options.node_ports = vec![node_port];
        let cluster = Cluster::start(options).await?;
        Ok(Self {
            cluster,
            target_process,
            target,
            ssh,
            sshd,
            forward: SocketAddr::from(([127, 0, 0, 1], forward_port)),
            _dir: dir,
        })
    }

    async fn connect(&self, path: Path) -> anyhow::Result<Stream> {
        let tcp = async |address: SocketAddr| {
            let socket = TcpStream::connect(address).await?;
            socket.set_nodelay(true)?;
            anyhow::Ok(Box::new(socket) as Stream)
        };
        match path {
            Path::Direct => tcp(self.target).await,
            Path::OpenSsh => tcp(self.forward).await,
            Path::Ours => self.door().stream(&self.target.to_string()).await,
        }
    }

    fn door(&self) -> &Door {
        &self.cluster.unix
    }

    fn konnectivity(&self) -> Door {
        Door::Unix(self.cluster.path().join("konnectivity.sock"))
    }

    /// Waits until neither the target nor the agents have work: the stalled streams have filled what there is to
    /// fill. Until then the writers themselves take a core from everybody.
    async fn until_idle(&self, path: Path) {
        let cpu = || self.target_process.usage().cpu + self.usage(path).cpu;
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
    fn usage(&self, path: Path) -> Usage {
        let pair = match path {
            Path::Direct => return Usage::default(),
            Path::OpenSsh => [self.ssh.usage(), self.sshd.usage()],
            Path::Ours => {
                let node = self.cluster.nodes[0].process.as_ref().map(Process::usage).unwrap_or_default();
                [self.cluster.master.usage(), node]
            }
        };
        Usage {
            memory: pair[0].memory + pair[1].memory,
            descriptors: pair[0].descriptors + pair[1].descriptors,
            cpu: pair[0].cpu + pair[1].cpu,
        }
    }
}

/// The target of all ways, in a process of its own.
fn target_process(port: u16, log: &std::path::Path) -> anyhow::Result<Process> {
    let mut serve = Command::new(std::env::current_exe()?);
    serve.args(["--serve", &port.to_string()]);
    let process = Process::start("target", &mut serve, log)?;
    openssh::wait_for_port(port)?;
    Ok(process)
}

fn whoami() -> anyhow::Result<String> {
    Ok(String::from_utf8(Command::new("id").arg("-un").output()?.stdout)?.trim().to_owned())
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

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Measures `work` on each path in turn, for a number of rounds.
async fn rounds(
    paths: &[Path],
    rounds: usize,
    mut work: impl AsyncFnMut(Path) -> anyhow::Result<f64>,
) -> BTreeMap<Path, f64> {
    let mut values: BTreeMap<Path, Vec<f64>> = BTreeMap::new();
    for _ in 0..rounds {
        for path in paths {
            match work(*path).await {
                Ok(value) => values.entry(*path).or_default().push(value),
                Err(e) => eprintln!("{path:?}: {e:#}"),
            }
        }
    }
    values.into_iter().filter_map(|(path, values)| Some((path, median(values)?))).collect()
}

fn figure(unit: &'static str, values: &BTreeMap<Path, f64>) -> Figure {
    let get = |path| values.get(&path).copied();
    let (direct, openssh, ours) = (get(Path::Direct), get(Path::OpenSsh), get(Path::Ours));
    let ratio = ours.zip(openssh.or(direct)).map(|(ours, other)| ours / other);
    Figure { unit, direct, openssh, ours, ratio }
}

async fn measure(args: &Args) -> anyhow::Result<BTreeMap<&'static str, Figure>> {
    let _ = binary("master-agent");
    let mut figures = BTreeMap::new();
    let wanted = |name: &str| args.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    let n = if args.quick { 3 } else { 5 };
    let megabytes: u64 = if args.quick { 256 } else { 1024 };

    if wanted("idle_stream") {
        eprintln!("idle streams");
        // Agents that have carried something before have memory left over from it.
        let bench = Bench::start(None).await?;
        let values =
            rounds(&[Path::Ours, Path::OpenSsh], 1, async |path| idle_memory(&bench, path, 2000).await).await;
        figures.insert("idle_stream_memory", figure("KB", &values));
    }
    if ["download_throughput", "upload_throughput", "cpu_per_gb", "new_connection", "kept_get", "isolation"]
        .iter()
        .any(|name| wanted(name))
    {
        let bench = Bench::start(None).await?;
        if wanted("download_throughput") || wanted("cpu_per_gb") {
            eprintln!("downloads");
            let mut cpu: BTreeMap<Path, Vec<f64>> = BTreeMap::new();
            let throughput = rounds(&ALL, n, async |path| {
                let before = bench.usage(path).cpu;
                let speed = download(bench.connect(path).await?, megabytes << 20).await?;
                let gigabytes = (megabytes << 20) as f64 / 1e9;
                cpu.entry(path).or_default().push((bench.usage(path).cpu - before) / gigabytes);
                Ok(speed)
            })
            .await;
            figures.insert("download_throughput", figure("MB/s", &throughput));
            cpu.remove(&Path::Direct);
            let cpu = cpu.into_iter().filter_map(|(path, values)| Some((path, median(values)?))).collect();
            figures.insert("cpu_per_gb", figure("s/GB", &cpu));
        }
        if wanted("upload_throughput") {
            eprintln!("uploads");
            let values =
                rounds(&ALL, n, async |path| upload(bench.connect(path).await?, megabytes << 20).await).await;
            figures.insert("upload_throughput", figure("MB/s", &values));
        }
        if wanted("new_connection") {
            eprintln!("new connections");
            let count = if args.quick { 300 } else { 1000 };
            let values = rounds(&ALL, n, async |path| new_connections(&bench, path, count).await).await;
            let mut one = figure("us", &values);
            one.ratio = one.ours.zip(one.direct).map(|(ours, direct)| ours / direct);
            figures.insert("new_connection_get_p50", one);
            let values =
                rounds(&ALL, n, async |path| new_connection_rate(&bench, path, count * 2).await).await;
            figures.insert("new_connection_rate_32", figure("1/s", &values));
        }
        if wanted("kept_get") {
            eprintln!("kept connections");
            let values = rounds(&ALL, n, async |path| {
                let count = if path == Path::OpenSsh { 50 } else { 2000 };
                kept_gets(bench.connect(path).await?, count).await
            })
            .await;
            figures.insert("kept_get_p50", figure("us", &values));
            let time = Duration::from_millis(if args.quick { 500 } else { 1500 });
            let values =
                rounds(&ALL, n, async |path| kept_get_rate(async || bench.connect(path).await, time).await)
                    .await;
            figures.insert("kept_get_rate_32", figure("1/s", &values));
        }
        if wanted("isolation") {
            eprintln!("isolation");
            figures.extend(isolation::figures(Way::Connect(&bench), n, args.quick).await?);
            let connection = Connection::open(&bench.konnectivity()).await?;
            figures.extend(isolation::figures(Way::Konnectivity(&bench, connection), n, args.quick).await?);
        }
    }
    if ["route_lookup_p99", "route_update_p99", "route_memory"].iter().any(|name| wanted(name)) {
        eprintln!("routes of a large cluster");
        figures.extend(kubernetes::table());
    }
    if ["dial_p99_100_updates", "watch_memory"].iter().any(|name| wanted(name)) {
        eprintln!("dials while the cluster changes");
        figures.extend(kubernetes::dials(n, if args.quick { 1000 } else { 3000 }).await?);
    }
    if wanted("front_end_rate_32_by_nginx") || wanted("front_end_added_p50_by_nginx") {
        eprintln!("the front end beside nginx");
        let time = Duration::from_millis(if args.quick { 500 } else { 1500 });
        figures.extend(front_end::figures(n, time, if args.quick { 2 } else { 5 }).await?);
    }
    if wanted("call_home_https") {
        eprintln!("call home over HTTPS beside TCP");
        let time = Duration::from_millis(if args.quick { 500 } else { 1500 });
        figures.extend(call_home::figures(n, megabytes, time).await?);
    }
    if wanted("watching_throughput") || wanted("watching_rate_32") {
        eprintln!("while somebody watches");
        let time = Duration::from_millis(if args.quick { 500 } else { 1500 });
        // The difference is small: it takes more rounds than others to see it.
        figures.extend(watching::figures(if args.quick { n } else { 3 * n }, time).await?);
    }
    if wanted("download_100ms_rtt") {
        eprintln!("100 ms round trip");
        let bench = Bench::start(Some(Duration::from_millis(50))).await?;
        let megabytes: u64 = if args.quick { 128 } else { 256 };
        let values = rounds(&[Path::OpenSsh, Path::Ours], if args.quick { 1 } else { 3 }, async |path| {
            download(bench.connect(path).await?, megabytes << 20).await
        })
        .await;
        figures.insert("download_100ms_rtt", figure("MB/s", &values));
    }
    Ok(figures)
}

/// One download; MB/s from the request to the last byte.
async fn download(mut stream: Stream, bytes: u64) -> anyhow::Result<f64> {
    let mut buffer = vec![0; 1 << 20];
    let began = Instant::now();
    stream.write_all(format!("source {bytes}\n").as_bytes()).await?;
    let mut got = 0u64;
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        got += n as u64;
    }
    if got != bytes {
        bail!("{got} of {bytes} bytes arrived");
    }
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

/// One upload; MB/s from the first byte to the answer that counts them.
async fn upload(mut stream: Stream, bytes: u64) -> anyhow::Result<f64> {
    let buffer = vec![0; 256 * 1024];
    let began = Instant::now();
    stream.write_all(b"drain\n").await?;
    for _ in 0..bytes / buffer.len() as u64 {
        stream.write_all(&buffer).await?;
    }
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    if answer.trim() != bytes.to_string() {
        bail!("{answer:?} of {bytes} bytes arrived");
    }
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

async fn get(stream: &mut Stream) -> anyhow::Result<()> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await?;
    let mut answer = [0; 40];
    stream.read_exact(&mut answer).await?;
    Ok(())
}

async fn new_connections(bench: &Bench, path: Path, count: usize) -> anyhow::Result<f64> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        let mut stream = bench.connect(path).await?;
        get(&mut stream).await?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    median(times).context("no times")
}

async fn new_connection_rate(bench: &Bench, path: Path, count: usize) -> anyhow::Result<f64> {
    let began = Instant::now();
    let workers = (0..32).map(|_| async {
        for _ in 0..count / 32 {
            let mut stream = bench.connect(path).await?;
            get(&mut stream).await?;
        }
        anyhow::Ok(())
    });
    try_all(workers).await?;
    Ok((count / 32 * 32) as f64 / began.elapsed().as_secs_f64())
}

async fn kept_gets(mut stream: Stream, count: usize) -> anyhow::Result<f64> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        get(&mut stream).await?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    median(times).context("no times")
}

async fn kept_get_rate(
    connect: impl AsyncFn() -> anyhow::Result<Stream>,
    time: Duration,
) -> anyhow::Result<f64> {
    let began = Instant::now();
    let done = std::cell::Cell::new(0u64);
    let workers = (0..32).map(|_| async {
        let mut stream = connect().await?;
        while began.elapsed() < time {
            get(&mut stream).await?;
            done.set(done.get() + 1);
        }
        anyhow::Ok(())
    });
    try_all(workers).await?;
    Ok(done.get() as f64 / began.elapsed().as_secs_f64())
}

/// Runs all at once on this thread.
async fn try_all(
    futures: impl Iterator<Item = impl Future<Output = anyhow::Result<()>>>,
) -> anyhow::Result<()> {
    let mut pending: Vec<_> = futures.map(Box::pin).collect();
    std::future::poll_fn(|cx| {
        let mut error = None;
        pending.retain_mut(|future| match future.as_mut().poll(cx) {
            std::task::Poll::Pending => true,
            std::task::Poll::Ready(result) => {
                error = error.take().or(result.err());
                false
            }
        });
        match error {
            Some(e) => std::task::Poll::Ready(Err(e)),
            None if pending.is_empty() => std::task::Poll::Ready(Ok(())),
            None => std::task::Poll::Pending,
        }
    })
    .await
}

async fn idle_memory(bench: &Bench, path: Path, count: usize) -> anyhow::Result<f64> {
    // The first ones pay for what is needed once.
    let open = async |count| {
        let mut streams = Vec::new();
        for _ in 0..count {
            let mut stream = bench.connect(path).await?;
            get(&mut stream).await?;
            streams.push(stream);
        }
        anyhow::Ok(streams)
    };
    drop(open(100).await?);
    let before = bench.usage(path).memory;
    let streams = open(count).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = bench.usage(path).memory;
    drop(streams);
    Ok(after.saturating_sub(before) as f64 / 1024.0 / count as f64)
}
