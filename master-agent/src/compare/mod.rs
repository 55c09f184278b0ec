//! `compare`: measures what a tunnel costs, compared with the direct path and with other proxies, by the same work at
//! the same time.
//!
//! [`measure`] does the work and returns a [`report::Report`], which [`print`] and [`html`] show.

mod client;
pub mod html;
mod measure;
mod path;
mod print;
pub mod report;
mod target;

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use hyper::header::HeaderValue;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use proto::{Host, NodeName, Target};
use proto_net::{
    stdout,
    tls::{ClientTls, believe_any, roots},
};
use rustls::ClientConfig;
use tokio::time::Instant;

use crate::{
    admin_api::{ExplainedCandidate, Explanation},
    admin_client::AdminClient,
    input::read_text,
};

use client::Client;
use measure::{Phase, Work, measure};
use path::{Path, Proxy, ProxyAddress, Via, Way};
use report::Report;
use target::{DirectAddresses, NODE, Url, expand, is_path};

/// Measure targets over their tunnels, directly and by the paths that `--via` adds, pair by pair.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// The nodes that {node} in a target stands for; default: all.
    #[arg(value_name = "NODE")]
    nodes: Vec<NodeName>,
    /// A target: http://, https:// or tcp://, then a node, pod or service with its port. {node} stands for each node.
    /// Can be repeated.
    #[arg(long = "target", value_name = "URL", default_value = "https://{node}:10250/healthz")]
    targets: Vec<String>,
    /// A path with a long response, to measure downloads.
    #[arg(long, value_name = "PATH")]
    download: Option<String>,
    /// A path that accepts a long body by POST, to measure uploads.
    #[arg(long, value_name = "PATH")]
    upload: Option<String>,
    /// The direct address of a host or target, if it differs: n1=10.0.0.5 or web.default.svc:80=10.3.0.7:8080.
    #[arg(long, value_name = "WHAT=WHERE")]
    direct: Vec<String>,
    /// Do not measure the direct path.
    #[arg(long)]
    no_direct: bool,
    /// A further path: a proxy with HTTP CONNECT (NAME=unix:PATH, NAME=http://HOST:PORT or NAME=https://HOST:PORT), or
    /// a port that is forwarded to the target, as by `ssh -L` (NAME=tcp:HOST:PORT).
    #[arg(long, value_name = "NAME=WHERE")]
    via: Vec<Via>,
    /// The agent's egress listener, in the form of --via; default: the Unix socket of the configuration.
    #[arg(long, value_name = "WHERE")]
    tunnel: Option<ProxyAddress>,
    /// The CA of https proxies; default: those of the system.
    #[arg(long, value_name = "FILE")]
    via_ca: Option<PathBuf>,
    /// The client certificate for https proxies.
    #[arg(long, value_name = "FILE", requires = "via_key")]
    via_cert: Option<PathBuf>,
    /// Its private key.
    #[arg(long, value_name = "FILE", requires = "via_cert")]
    via_key: Option<PathBuf>,
    /// The CA of https targets; default: proxy_urls.kubelet_ca of the configuration, or those of the system.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The client certificate for https targets; default: proxy_urls.kubelet_client_cert.
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Its private key.
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// A file with a bearer token, which is sent to targets.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Do not verify targets' certificates: anybody may answer and receive the token.
    #[arg(long)]
    insecure_skip_verify: bool,
    /// The number of rounds; each does the same work on all paths.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// New connections per round.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    connects: u16,
    /// Requests on a kept connection per round.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..))]
    requests: u16,
    /// Concurrent connections, for rates and throughput.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(2..=1024))]
    connections: u16,
    /// How long a rate is measured per round.
    #[arg(long, default_value = "500ms", value_parser = humantime::parse_duration, value_name = "TIME")]
    slice: Duration,
    /// The timeout of a single attempt.
    #[arg(long, default_value = "5s", value_parser = humantime::parse_duration, value_name = "TIME")]
    timeout: Duration,
    /// The output format.
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
    /// Also write the report as JSON to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also write the report as a self-contained HTML page with plots to this file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Format {
    #[default]
    Table,
    Json,
    Csv,
}

/// The values of the configuration, for arguments that are not given.
#[derive(Debug)]
pub struct Configured {
    /// The client of the running agent.
    pub agent: AdminClient,
    /// The Unix socket of HTTP CONNECT.
    pub connect: Option<PathBuf>,
    /// The CA of kubelets.
    pub kubelet_ca: Option<PathBuf>,
    /// The client certificate for kubelets, and its key.
    pub kubelet_client: Option<(PathBuf, PathBuf)>,
}

/// Runs `compare`.
pub async fn compare(configured: &Configured, args: CompareArgs) -> anyhow::Result<()> {
    let work = args.work()?;
    let report = args.report(configured, &work).await?;
    let json = serde_json::to_string_pretty(&report)? + "\n";
    for (file, text) in [(&args.html, &html::page(&report)), (&args.json, &json)] {
        if let Some(file) = file {
            std::fs::write(file, text).with_context(|| format!("can't write {}", file.display()))?;
        }
    }
    if let Err(error) = configured.agent.put_comparison(json.clone()).await {
        eprintln!("master-agent: the running agent did not accept the comparison for its page: {error:#}");
    }
    match args.output {
        Format::Table => stdout::print(print::table(&report)),
        Format::Json => stdout::print(&json),
        Format::Csv => stdout::print(print::csv(&report)),
    }
    if report.targets.iter().all(|target| target.figures.is_empty()) {
        bail!("nothing could be measured; the reasons are above");
    }
    Ok(())
}

impl CompareArgs {
    fn work(&self) -> anyhow::Result<Work> {
        for path in self.download.iter().chain(&self.upload) {
            if !is_path(path) {
                bail!("{path:?} is not a path: it must begin with / and have no spaces");
            }
        }
        if self.slice < Duration::from_millis(10) || self.timeout < Duration::from_millis(10) {
            bail!("--slice and --timeout must be at least 10ms");
        }
        Ok(Work {
            rounds: self.rounds.into(),
            connects: self.connects.into(),
            requests: self.requests.into(),
            connections: self.connections.into(),
            slice: self.slice,
            timeout: self.timeout,
            download: self.download.clone(),
            upload: self.upload.clone(),
        })
    }

    async fn report(&self, configured: &Configured, work: &Work) -> anyhow::Result<Report> {
        let urls = self.urls(&configured.agent).await?;
        let paths = self.paths(configured.connect.as_deref(), urls.len())?;
        let tls = Arc::new(self.target_tls(configured)?);
        let authorization = self.authorization()?;
        let mut direct_addresses = DirectAddresses::default();
        for rule in &self.direct {
            direct_addresses.add(rule).with_context(|| format!("--direct {rule}"))?;
        }
        let phases: usize = urls.iter().map(|(_, url)| work.phases(url.scheme).len()).sum();
        let bar = progress(phases * work.rounds);
        let (started, began) = (std::time::SystemTime::now(), Instant::now());
        let mut targets = Vec::new();
        for (node, url) in urls {
            let explained = configured.agent.explain(&url.target.to_string()).await?;
            let direct = direct_address(&explained, &direct_addresses, &url.target);
            let ways = paths.iter().map(|path| match &path.way {
                Way::Direct => direct.clone().map(|target| target.to_string()),
                Way::Connect(_) if path.name == TUNNEL => match &explained.node {
                    Some(node) => Ok(format!("{:?}, node {node}: {}", path.way, explained.reason)),
                    None => Err(explained.verdict.clone()),
                },
                Way::Connect(_) | Way::Forward(_) => Ok(format!("{:?}", path.way)),
            });
            let ways = ways.collect();
            let at = direct.unwrap_or_else(|_| url.target.clone());
            let client = Client::new(url, at, tls.clone(), authorization.clone());
            let name = client.url.to_string();
            let tick = |phase: Phase| {
                bar.set_message(format!("{name} {}", show_phase(phase)));
                bar.inc(1);
            };
            let mut target = measure(&client, &paths, ways, work, tick).await;
            target.node = explained.node.or(node);
            targets.push(target);
        }
        bar.finish_and_clear();
        Ok(Report {
            version: 1,
            started: humantime::format_rfc3339_seconds(started).to_string(),
            seconds: (began.elapsed().as_secs_f64() * 10.0).round() / 10.0,
            rounds: work.rounds,
            connections: work.connections,
            targets,
        })
    }

    async fn urls(&self, agent: &AdminClient) -> anyhow::Result<Vec<(Option<NodeName>, Url)>> {
        let mut nodes = self.nodes.clone();
        let known = agent.nodes().await?;
        if let Some(unknown) = nodes.iter().find(|node| known.iter().all(|k| &k.name != *node)) {
            let names: Vec<_> = known.iter().take(20).map(|node| node.name.as_str()).collect();
            bail!("the agent knows no node {unknown}; it knows {}", names.join(", "));
        }
        if nodes.is_empty() {
            nodes = known.into_iter().map(|node| node.name).collect();
        } else if self.targets.iter().all(|target| !target.contains(NODE)) {
            bail!("nodes are given, but no --target contains {NODE}");
        }
        let mut urls = Vec::new();
        for template in &self.targets {
            urls.extend(expand(template, &nodes).with_context(|| format!("--target {template}"))?);
        }
        if urls.is_empty() {
            bail!("there is no node to measure");
        }
        Ok(urls)
    }

    fn paths(&self, connect: Option<&std::path::Path>, targets: usize) -> anyhow::Result<Vec<Path>> {
        let tunnel = match (&self.tunnel, connect) {
            (Some(address), _) => address.way(|| self.via_tls())?,
            (None, Some(socket)) => Way::Connect(Proxy::Unix(socket.to_owned())),
            (None, None) => bail!(
                "the tunnel is reached by http_connect.unix, which is not configured: configure it, or name another \
                 egress listener with --tunnel"
            ),
        };
        let mut paths = Vec::new();
        if !self.no_direct {
            paths.push(Path { name: "direct".to_owned(), way: Way::Direct });
        }
        paths.push(Path { name: TUNNEL.to_owned(), way: tunnel });
        for via in &self.via {
            if matches!(via.address, ProxyAddress::Forward(_)) && targets > 1 {
                bail!("--via {}: a forwarded port leads to one target, and there are {targets}", via.name);
            }
            if paths.iter().any(|path| path.name == via.name) {
                bail!("--via {}: the name is taken", via.name);
            }
            paths.push(Path { name: via.name.clone(), way: via.address.way(|| self.via_tls())? });
        }
        Ok(paths)
    }

    fn via_tls(&self) -> anyhow::Result<Arc<ClientConfig>> {
        let identity = self.via_cert.clone().zip(self.via_key.clone());
        Ok(Arc::new(ClientTls { ca: self.via_ca.clone(), identity }.config()?))
    }

    fn target_tls(&self, configured: &Configured) -> anyhow::Result<ClientConfig> {
        let ca = self.ca.clone().or_else(|| configured.kubelet_ca.clone());
        let given = self.cert.clone().zip(self.key.clone());
        let identity = given.or_else(|| configured.kubelet_client.clone());
        if let Some(ca) = &ca {
            roots(ca)?;
        }
        let mut tls = ClientTls { ca, identity }.config()?;
        if self.insecure_skip_verify {
            eprintln!("master-agent: --insecure-skip-verify: any certificate of targets is accepted");
            believe_any(&mut tls);
        }
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Without resumption, every new connection does the same work.
        tls.resumption = rustls::client::Resumption::disabled();
        Ok(tls)
    }

    fn authorization(&self) -> anyhow::Result<Option<HeaderValue>> {
        let Some(file) = &self.token_file else { return Ok(None) };
        let token = read_text(file)?;
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
            .map_err(|_| anyhow::anyhow!("{} does not contain a bearer token", file.display()))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

/// The name of the path through the agent.
const TUNNEL: &str = "tunnel";

/// Returns a target's address on the direct path, which `--direct` gives or the far end of the tunnel finds.
fn direct_address(
    explained: &Explanation,
    direct_addresses: &DirectAddresses,
    target: &Target,
) -> Result<Target, String> {
    if let Some(given) = direct_addresses.get(target) {
        return Ok(given);
    }
    let taken = |candidate: &&ExplainedCandidate| Some(&candidate.node) == explained.node.as_ref();
    let way = explained.candidates.iter().find(taken).or(explained.candidates.first());
    if let Some(way) = way
        && let Ok(found) = way.target.parse::<Target>()
    {
        if matches!(found.host, Host::Addr(_)) {
            return Ok(found);
        }
        if let Some(address) = way.addresses.first() {
            return Ok(Target::new(Host::Addr(*address), found.port));
        }
    }
    if matches!(target.host, Host::Addr(_)) {
        return Ok(target.clone());
    }
    Err(format!("the direct address of {} is unknown: give --direct {}=ADDRESS", target.host, target.host))
}

fn progress(steps: usize) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr_with_hz(5));
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} (about {eta} left) {wide_msg}")
    {
        bar.set_style(style);
    }
    bar
}

fn show_phase(phase: Phase) -> String {
    match phase {
        Phase::Connect => "connections".to_owned(),
        Phase::Request => "requests".to_owned(),
        Phase::RequestMany => "requests at once".to_owned(),
        Phase::Download(n) => format!("download x{n}"),
        Phase::Upload(n) => format!("upload x{n}"),
    }
}
