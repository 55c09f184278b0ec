//! Measures direct connections, OpenSSH's `ssh -L` and the agents on the same work, interleaved in one run.
//!
//! Everything runs on loopback, or in network namespaces that the benchmark makes. Figures are medians over the rounds;
//! what counts are the ratios. A figure that is off never makes this fail.
#![allow(clippy::disallowed_methods, reason = "a benchmark owns its tasks by its runtime")]

mod call_home;
mod distance;
mod fleet;
mod front_end;
mod idle;
mod isolation;
mod kubernetes;
mod machine;
mod many;
mod mixed;
mod paths;
mod peer;
mod report;
mod requests;
mod throughput;
mod watches;
mod watching;
mod work;

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Parser;
use isolation::Way;
use paths::{Bench, Between};
use peer::Peer;
use report::{Figures, Report};
use tests::{konnectivity::Connection, stand_ins, target};

#[derive(Parser)]
struct Args {
    /// Print one JSON object in place of the table.
    #[arg(long)]
    json: bool,
    /// Also write the table, with a description of this machine, to this file of Markdown.
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    /// Fewer rounds and less data: shows that every figure can be taken, and roughly what it is.
    #[arg(long)]
    quick: bool,
    /// Only figures whose name contains this, with those that are measured together with them. Those that begin with
    /// `many` are measured only if they are asked for.
    #[arg(long)]
    only: Option<String>,
    /// 10,000 nodes for `--only many`, in place of 300.
    #[arg(long)]
    full: bool,
    /// Measure a peer's binaries as well, by `konnectivity=SERVER,AGENT`.
    #[arg(long, value_name = "NAME=PATHS")]
    peer: Option<Peer>,
    /// TCP's congestion control on the paths of packets, in place of this host's.
    #[arg(long, value_name = "NAME")]
    congestion_control: Option<String>,
    /// Serve as the API server of a cluster, given a port and the number of nodes; used by the benchmark itself.
    #[arg(long, hide = true, num_args = 2)]
    apiserver: Option<Vec<u32>>,
    /// Serve as the target on this port; used by the benchmark itself.
    #[arg(long, hide = true)]
    serve: Option<u16>,
    /// Serve watches as an API server, given a port and its certificate's directory; used by the benchmark itself.
    #[arg(long, hide = true, num_args = 2)]
    watched: Option<Vec<String>>,
    /// Serve as nodes, given their directory, the first one, the end and an offset; used by the benchmark itself.
    #[arg(long, hide = true, num_args = 4)]
    nodes: Option<Vec<String>>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        if let Some(port) = args.serve {
            // Nodes are 127.0.0.1, 127.0.0.2 and so on.
            target::serve(SocketAddr::from(([0, 0, 0, 0], port))).await?;
            return std::future::pending().await;
        }
        if let Some([port, nodes]) = args.apiserver.as_deref() {
            return kubernetes::serve(u16::try_from(*port)?, kubernetes::Size { nodes: *nodes }).await;
        }
        if let Some([port, directory]) = args.watched.as_deref() {
            return watches::serve(port.parse()?, std::path::Path::new(directory)).await;
        }
        if let Some([directory, first, last, offset]) = args.nodes.as_deref() {
            return stand_ins::serve(
                std::path::Path::new(directory),
                first.parse()?,
                last.parse()?,
                offset.parse()?,
            )
            .await;
        }
        let machine = machine::describe(args.quick);
        let figures = Run::new(&args).measure().await?;
        let report = Report { machine, figures };
        if let Some(file) = &args.table {
            std::fs::write(file, report.markdown())?;
        }
        if args.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            print!("{}", report.text());
        }
        Ok(())
    })
}

// The figures that are measured together.
const IDLE_STREAMS: &[&str] = &["idle_stream_memory"];
const IDLE_TUNNELS: &[&str] = &["idle_tunnel_memory", "idle_tunnel_cpu"];
const BULK: &[&str] = &[
    "download_throughput",
    "download_throughput_4",
    "upload_throughput",
    "upload_throughput_4",
    "cpu_per_gb",
];
const NEW: &[&str] = &["new_connection_get_p50", "new_connection_rate_32"];
const KEPT: &[&str] = &["kept_get_p50", "kept_get_rate_32"];
const MIXED: &[&str] = &["mixed_get_p50", "mixed_get_p99", "mixed_download", "mixed_download_kept"];
const ISOLATION: &[&str] = &[
    "isolation_rate",
    "isolation_throughput",
    "isolation_memory",
    "konnectivity_isolation_rate",
    "konnectivity_isolation_throughput",
    "konnectivity_isolation_memory",
];
const ROUTES: &[&str] = &["route_lookup_p99", "route_update_p99", "route_memory"];
const UPDATES: &[&str] = &["dial_p99_100_updates", "watch_memory"];
const FRONT_END: &[&str] = &[
    "front_end_rate_32_by_nginx",
    "front_end_added_p50_by_nginx",
    "front_end_rate_32_by_anonymous",
    "front_end_cpu_by_nginx",
];
const FRONT_END_WATCHES: &[&str] = &["front_end_watch_memory"];
const CALL_HOME: &[&str] = &[
    "call_home_https_download",
    "call_home_https_upload",
    "call_home_https_cpu_per_gb",
    "call_home_https_kept_get_p50",
    "call_home_https_rate_32",
];
const WATCHING: &[&str] = &["watching_throughput", "watching_rate_32"];
const RELAY: &[&str] = &["download_100ms_rtt", "second_stream_100ms_rtt"];
const CAPACITY: &[&str] = &["packets_capacity", "packets_capacity_hop_cpu"];
const LONG: &[&str] = &[
    "packets_50ms_loss_download",
    "packets_50ms_loss_download_4",
    "packets_50ms_loss_hop_cpu",
    "packets_300ms_download",
    "packets_300ms_download_4",
    "packets_300ms_hop_cpu",
];
const NARROW: &[&str] = &["packets_20ms_get_p50", "packets_20ms_get_p99", "packets_20ms_download"];

/// How much is measured.
struct Run<'a> {
    args: &'a Args,
    rounds: usize,
    megabytes: u64,
    /// For figures that are rates over a time.
    time: Duration,
    figures: Figures,
}

impl<'a> Run<'a> {
    fn new(args: &'a Args) -> Self {
        let (rounds, megabytes, milliseconds) = if args.quick { (2, 128, 300) } else { (5, 1024, 1500) };
        let time = Duration::from_millis(milliseconds);
        Self { args, rounds, megabytes, time, figures: Figures::new() }
    }

    /// Whether one of these figures is to be measured.
    fn wants(&self, names: &[&str]) -> bool {
        self.args.only.as_ref().is_none_or(|only| names.iter().any(|name| name.contains(only.as_str())))
    }

    /// One of two, for the short form and the long one.
    fn of<T>(&self, quick: T, full: T) -> T {
        if self.args.quick { quick } else { full }
    }

    async fn measure(mut self) -> anyhow::Result<Figures> {
        let n = self.rounds;
        if self.wants(IDLE_STREAMS) {
            let count = self.of(500, 2000);
            self.take("idle streams", idle::streams(count)).await?;
        }
        if self.wants(IDLE_TUNNELS) {
            let (nodes, time) = self.of((20, Duration::from_secs(2)), (100, Duration::from_secs(20)));
            self.take("idle tunnels", idle::tunnels(nodes, time)).await?;
        }
        self.tunnels().await?;
        if self.wants(ROUTES) {
            self.take("routes of a large cluster", async { Ok(kubernetes::table().into()) }).await?;
        }
        if self.wants(UPDATES) {
            let count = self.of(500, 3000);
            let dials = async { Ok(kubernetes::dials(n, count).await?.into()) };
            self.take("dials while the cluster changes", dials).await?;
        }
        if self.wants(FRONT_END) {
            let (time, connections) = (self.time, self.of(2, 5));
            self.take("the front end beside nginx", front_end::figures(n, time, connections)).await?;
        }
        if self.wants(FRONT_END_WATCHES) {
            let count = self.of(1_000, 20_000);
            self.take("idle watches at the front end", watches::figures(count)).await?;
        }
        if self.wants(CALL_HOME) {
            let (megabytes, time) = (self.megabytes, self.time);
            self.take("call home over HTTPS beside TCP", call_home::figures(n, megabytes, time)).await?;
        }
        if self.wants(WATCHING) {
            // The difference is small: it takes more rounds than others to see it.
            let (rounds, time) = (self.of(n, 3 * n), self.time);
            self.take("while somebody watches", watching::figures(rounds, time)).await?;
        }
        self.distance().await?;
        // Only who asks for it in so many words: it takes long.
        if self.args.only.as_ref().is_some_and(|only| only.starts_with("many")) {
            let nodes = if self.args.full { 10_000 } else { self.of(30, 300) };
            let (count, idle) = self.of((300, Duration::from_secs(1)), (3000, Duration::from_secs(20)));
            self.take("many nodes", many::figures(nodes, n, count, idle)).await?;
        }
        Ok(self.figures)
    }

    /// What one node's tunnel does beside its rivals.
    async fn tunnels(&mut self) -> anyhow::Result<()> {
        let (n, megabytes, time) = (self.rounds, self.megabytes, self.time);
        if ![BULK, NEW, KEPT, MIXED, ISOLATION].iter().any(|names| self.wants(names)) {
            return Ok(());
        }
        let bench = Bench::start(Between::Loopback, self.args.peer.as_ref()).await?;
        if self.wants(BULK) {
            self.take("transfers", async { Ok(throughput::figures(&bench, n, megabytes).await) }).await?;
        }
        if self.wants(NEW) {
            let count = self.of(300, 1000);
            self.take("new connections", async { Ok(requests::new_connection(&bench, n, count).await) })
                .await?;
        }
        if self.wants(KEPT) {
            self.take("kept connections", async { Ok(requests::kept(&bench, n, time).await) }).await?;
        }
        if self.wants(MIXED) {
            let time = self.of(time, 3 * time);
            self.take("GETs beside a download", async { Ok(mixed::figures(&bench, n, time).await) }).await?;
        }
        if self.wants(ISOLATION) {
            let quick = self.args.quick;
            self.take("isolation", isolation::figures(Way::Connect(&bench), n, quick)).await?;
            let connection = Connection::open(&bench.konnectivity()).await?;
            let way = Way::Konnectivity(&bench, connection);
            self.take("isolation of Konnectivity's callers", isolation::figures(way, n, quick)).await?;
        }
        Ok(())
    }

    async fn distance(&mut self) -> anyhow::Result<()> {
        if self.wants(RELAY) {
            let (rounds, megabytes) = self.of((1, 32), (3, 256));
            self.take("100 ms round trip", distance::relay(rounds, megabytes)).await?;
        }
        let args = self.args;
        let packets = distance::Packets {
            rounds: self.of(1, 3),
            time: self.of(Duration::from_secs(1), Duration::from_secs(10)),
            congestion_control: args.congestion_control.as_deref(),
        };
        if self.wants(CAPACITY) {
            self.take("what a path of packets can carry", packets.capacity()).await?;
        }
        if self.wants(LONG) {
            self.take("downloads over packets", packets.long()).await?;
        }
        if self.wants(NARROW) {
            self.take("GETs beside a download over packets", packets.narrow()).await?;
        }
        Ok(())
    }

    async fn take(
        &mut self,
        what: &str,
        figures: impl Future<Output = anyhow::Result<Figures>>,
    ) -> anyhow::Result<()> {
        let began = Instant::now();
        eprint!("{what} ... ");
        self.figures.extend(figures.await?);
        eprintln!("{:.0} s", began.elapsed().as_secs_f64());
        Ok(())
    }
}
