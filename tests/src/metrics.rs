//! Reads metrics as a scraper does, and compares them with what the guide and the golden files say.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::Context;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

pub const OPEN_METRICS: &str = "application/openmetrics-text;version=1.0.0";
pub const ANYTHING: &str = "*/*";

pub struct Scraped {
    pub content_type: String,
    pub text: String,
}

/// Gets `/metrics` with a header `Accept`.
pub async fn scrape(admin: SocketAddr, accept: &str) -> anyhow::Result<Scraped> {
    let mut socket = TcpStream::connect(admin).await?;
    let request =
        format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    anyhow::ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let content_type = head.lines().find_map(|l| l.strip_prefix("content-type: ")).unwrap_or_default();
    Ok(Scraped { content_type: content_type.to_owned(), text: body.to_owned() })
}

/// One metric: its type, its help, the names of its labels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metric {
    pub kind: String,
    pub help: String,
    pub labels: BTreeSet<String>,
}

/// By name: a counter's with its `_total`, a histogram's without endings.
pub type Metrics = BTreeMap<String, Metric>;

impl Scraped {
    /// The sum of a metric's samples.
    pub fn total(&self, name: &str) -> f64 {
        let samples = self.text.lines().filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
        let own = samples.filter(|(labels, _)| labels.is_empty() || labels.starts_with('{'));
        own.map(|(_, value)| value.parse::<f64>().unwrap()).sum()
    }

    /// Checks that it is OpenMetrics text, and gives the metrics that have samples.
    pub fn metrics(&self) -> Metrics {
        let openmetrics = "application/openmetrics-text; version=1.0.0";
        assert!(self.content_type.starts_with(openmetrics), "{}", self.content_type);
        let text = self.text.strip_suffix("# EOF\n").expect("the end of OpenMetrics text");
        let (mut all, mut help, mut current) = (Metrics::new(), None, None);
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                help = rest.split_once(' ');
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (family, kind) = rest.split_once(' ').unwrap();
                let (of, help) = help.take().expect("help before the type");
                assert!(of == family && help.len() > 10 && help.ends_with('.'), "{line}: {help}");
                current = Some((family, kind, help));
            } else {
                let (family, kind, help) = current.expect(line);
                let (series, value) = line.rsplit_once(' ').unwrap();
                value.parse::<f64>().unwrap();
                let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
                let shown = match (kind, name.strip_prefix(family)) {
                    ("counter", Some("_total")) | ("gauge" | "unknown", Some("")) => name,
                    ("histogram", Some("_bucket" | "_sum" | "_count")) => family,
                    _ => panic!("{line} is not of {family}, a {kind}"),
                };
                // A counter with another program's name, which the text format says.
                let kind = if kind == "unknown" { "counter" } else { kind };
                let fresh = || Metric { kind: kind.to_owned(), help: help.to_owned(), ..Metric::default() };
                let metric = all.entry(shown.to_owned()).or_insert_with(fresh);
                assert_eq!(metric.help, help, "{shown} twice");
                let labels =
                    labels.strip_suffix('}').unwrap().split("\",").filter_map(|l| Some(l.split_once('=')?.0));
                metric.labels.extend(labels.filter(|l| *l != "le").map(str::to_owned));
            }
        }
        all
    }
}

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The text of a golden file: one metric a line, with type, labels and help.
pub fn text(metrics: &Metrics) -> String {
    let mut text = String::new();
    for (name, Metric { kind, help, labels }) in metrics {
        let labels = labels.iter().cloned().collect::<Vec<_>>().join(",");
        writeln!(text, "{name} {kind} {{{labels}}} {help}").unwrap();
    }
    text
}

/// The golden file of an agent's metrics, or of a set of them.
pub fn golden(name: &str) -> Metrics {
    let path = root().join("tests/data/metrics").join(name).with_extension("txt");
    let mut all = Metrics::new();
    for line in std::fs::read_to_string(&path).unwrap_or_default().lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        let [name, kind, labels, help] = words[..] else { panic!("{}: {line}", path.display()) };
        let labels = labels.trim_matches(['{', '}']).split(',').filter(|label| !label.is_empty());
        let metric = Metric {
            kind: kind.to_owned(),
            help: help.to_owned(),
            labels: labels.map(str::to_owned).collect(),
        };
        assert!(all.insert(name.to_owned(), metric).is_none(), "{line} twice");
    }
    all
}

/// Fails with the text that the golden file should have.
pub fn assert_golden(metrics: &Metrics, name: &str) {
    let wanted = golden(name);
    assert!(*metrics == wanted, "tests/data/metrics/{name}.txt should be:\n{}", text(metrics));
}

/// The metrics that the guide's table names, with their labels.
pub fn documented() -> BTreeMap<String, BTreeSet<String>> {
    let page = std::fs::read_to_string(root().join("deploy/guide/metrics.md")).unwrap();
    let table = page
        .lines()
        .skip_while(|l| *l != "| name | labels | meaning |")
        .skip(2)
        .take_while(|l| l.starts_with('|'));
    let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let mut metrics = BTreeMap::new();
    for row in table {
        let cells: Vec<&str> = row.split('|').collect();
        for name in quoted(cells[1]) {
            let labels = quoted(cells[2]).into_iter().collect();
            assert!(metrics.insert(name, labels).is_none(), "{row} twice");
        }
    }
    metrics
}
