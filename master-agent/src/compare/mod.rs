//! `compare`: what a tunnel costs, beside the direct path and other proxies, on the same work at the same time.
//!
//! [`measure`] does the work and makes a [`report::Report`]; [`print`] and [`html`] only show it.

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
use rustls::ClientConfig;
use tokio::time::Instant;

use crate::{
    admin_client::AdminClient,
    egress::proxy_url::tls::believe_any,
    front_end::https_client::{ClientTls, roots},
    input::read_text,
    tunnels::explain::{self, Explanation},
};

use client::Client;
use measure::{Phase, Work, measure};
use path::{Path, Place, Proxy, Via, Way};
use report::Report;
use target::{Elsewhere, NODE, Url, expand, is_path};

/// Measure targets over their tunnels and directly, pair by pair, and whatever `--via` adds.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// The nodes that {node} in a target stands for; all by default.
    #[arg(value_name = "NODE")]
    nodes: Vec<NodeName>,
    /// What to ask for: http://, https:// or tcp://, then a node, pod or service with its port. {node} stands for
    /// each node. Several times for several.
    #[arg(long = "target", value_name = "URL", default_value = "https://{node}:10250/healthz")]
    targets: Vec<String>,
    /// A path with a long answer, for throughput.
    #[arg(long, value_name = "PATH")]
    download: Option<String>,
    /// A path that takes a long body by POST, for throughput.
    #[arg(long, value_name = "PATH")]
    upload: Option<String>,
    /// Where a host or a target is on the direct path, when that differs: n1=10.0.0.5, web.default.svc:80=10.3.0.7:8080.
    #[arg(long, value_name = "WHAT=WHERE")]
    direct: Vec<String>,
    /// Leave the direct path out.
    #[arg(long)]
    no_direct: bool,
    /// Another path: a proxy that takes HTTP CONNECT (NAME=unix:PATH, =http://HOST:PORT, =https://HOST:PORT), or a port
    /// that is forwarded to the target, as by `ssh -L` (NAME=tcp:HOST:PORT).
    #[arg(long, value_name = "NAME=WHERE")]
    via: Vec<Via>,
    /// The agent's egress listener, when the Unix socket of the configuration is not to be used: as in --via.
    #[arg(long, value_name = "WHERE")]
    tunnel: Option<Place>,
    /// The CA of https proxies; that of the system by default.
    #[arg(long, value_name = "FILE")]
    via_ca: Option<PathBuf>,
    /// The certificate to show https proxies.
    #[arg(long, value_name = "FILE", requires = "via_key")]
    via_cert: Option<PathBuf>,
    /// Its private key.
    #[arg(long, value_name = "FILE", requires = "via_cert")]
    via_key: Option<PathBuf>,
    /// The CA of https targets; by default proxy_urls.kubelet_ca of the configuration, else that of the system.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The certificate to show https targets; by default proxy_urls.kubelet_client_cert.
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Its private key.
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// A file with the bearer token that targets are sent.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Believe any certificate of targets: the token and the answers may be anyone's.
    #[arg(long)]
    insecure_skip_verify: bool,
    /// Rounds; each does the same on all paths.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// New connections in each round.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    connects: u16,
    /// Requests on a kept connection in each round.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..))]
    requests: u16,
    /// Connections at once, for rates and throughput of many.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(2..=1024))]
    connections: u16,
    /// How long each round measures a rate.
    #[arg(long, default_value = "500ms", value_parser = humantime::parse_duration, value_name = "TIME")]
    slice: Duration,
    /// For any single attempt.
    #[arg(long, default_value = "5s", value_parser = humantime::parse_duration, value_name = "TIME")]
    timeout: Duration,
    /// The form of the output.
    #[arg(long, short, value_enum, default_value_t)]
    output: Form,
    /// Write the report as JSON there as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with plots there as well: one file, which needs nothing else.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Form {
    #[default]
    Table,
    Json,
    Csv,
}

/// What the configuration says, where the arguments say nothing.
#[derive(Debug)]
pub struct Configured {
    /// Of the running agent.
    pub agent: AdminClient,
    /// The socket of HTTP CONNECT.
    pub connect: Option<PathBuf>,
    /// The CA of kubelets.
    pub kubelet_ca: Option<PathBuf>,
    /// The certificate that kubelets are shown, and its key.
    pub kubelet_client: Option<(PathBuf, PathBuf)>,
}

/// `compare`.
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
        eprintln!("master-agent: the running agent did not take the comparison for its page: {error:#}");
    }
    match args.output {
        Form::Table => print!("{}", print::table(&report)),
        Form::Json => print!("{json}"),
        Form::Csv => print!("{}", print::csv(&report)),
    }
    if report.targets.iter().all(|target| target.figures.is_empty()) {
        bail!("nothing could be measured: see why above");
    }
    Ok(())
}

impl CompareArgs {
    fn work(&self) -> anyhow::Result<Work> {
        for path in self.download.iter().chain(&self.upload) {
            if !is_path(path) {
                bail!("{path:?} is no path: it begins with / and has no spaces");
            }
        }
        if self.slice < Duration::from_millis(10) || self.timeout < Duration::from_millis(10) {
            bail!("--slice and --timeout are at least 10ms");
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
        let mut elsewhere = Elsewhere::default();
        for rule in &self.direct {
            elsewhere.add(rule).with_context(|| format!("--direct {rule}"))?;
        }
        let phases: usize = urls.iter().map(|(_, url)| work.phases(url.scheme).len()).sum();
        let bar = progress(phases * work.rounds);
        let (started, began) = (std::time::SystemTime::now(), Instant::now());
        let mut targets = Vec::new();
        for (node, url) in urls {
            let explained = configured.agent.explain(&url.target.to_string()).await?;
            let direct = whereabouts(&explained, &elsewhere, &url.target);
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
            bail!("nodes were given, but no --target has {NODE} in it");
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
            (Some(place), _) => place.way(|| self.via_tls())?,
            (None, Some(socket)) => Way::Connect(Proxy::Unix(socket.to_owned())),
            (None, None) => bail!(
                "the tunnel is entered by http_connect.unix, which is not configured: configure it, or say which \
                 egress listener to take with --tunnel"
            ),
        };
        let mut paths = Vec::new();
        if !self.no_direct {
            paths.push(Path { name: "direct".to_owned(), way: Way::Direct });
        }
        paths.push(Path { name: TUNNEL.to_owned(), way: tunnel });
        for via in &self.via {
            if matches!(via.place, Place::Forward(_)) && targets > 1 {
                bail!("--via {}: a forwarded port leads to one target, and there are {targets}", via.name);
            }
            if paths.iter().any(|path| path.name == via.name) {
                bail!("--via {}: the name is taken", via.name);
            }
            paths.push(Path { name: via.name.clone(), way: via.place.way(|| self.via_tls())? });
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
            eprintln!("master-agent: --insecure-skip-verify: any certificate of targets is believed");
            believe_any(&mut tls);
        }
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Every new connection does the same work.
        tls.resumption = rustls::client::Resumption::disabled();
        Ok(tls)
    }

    fn authorization(&self) -> anyhow::Result<Option<HeaderValue>> {
        let Some(file) = &self.token_file else { return Ok(None) };
        let token = read_text(file)?;
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
            .map_err(|_| anyhow::anyhow!("{} holds no bearer token", file.display()))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

/// What the path through the agent is called.
const TUNNEL: &str = "tunnel";

/// Where a target is on the direct path: as `--direct` says, or where the tunnel's end finds it.
fn whereabouts(explained: &Explanation, elsewhere: &Elsewhere, target: &Target) -> Result<Target, String> {
    if let Some(given) = elsewhere.get(target) {
        return Ok(given);
    }
    let taken = |way: &&explain::Way| Some(&way.node) == explained.node.as_ref();
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
    Err(format!("where {} is directly is not known: give --direct {}=ADDRESS", target.host, target.host))
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
