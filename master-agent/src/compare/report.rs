//! The results of a comparison, from which the table, JSON, CSV and the page are made.

use std::collections::BTreeMap;

use proto::NodeName;
use serde::{Deserialize, Serialize};

/// The number of histogram buckets per factor of ten.
pub const BUCKETS_PER_DECADE: i32 = 20;

/// A comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The version of this format, 1.
    pub version: u32,
    /// The time at which the comparison began, in UTC (RFC 3339).
    pub started: String,
    pub seconds: f64,
    pub rounds: usize,
    /// The number of concurrent connections, for figures with more than one.
    pub connections: usize,
    pub targets: Vec<TargetReport>,
}

/// One target on all paths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetReport {
    /// The node through which the tunnel reaches the target, if known.
    pub node: Option<NodeName>,
    pub url: String,
    pub paths: Vec<PathReport>,
    pub figures: Vec<Figure>,
    /// The figures that could not be measured on any path, with the reasons.
    pub not_measured: Vec<String>,
}

/// One path to one target.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PathReport {
    pub name: String,
    /// A description: the route or the address.
    pub way: String,
    /// Why the path was not measured.
    pub closed: Option<String>,
    /// The status of the first response.
    pub status: Option<u16>,
    pub attempts: u64,
    /// The errors, and how often each of them occurred.
    pub failures: BTreeMap<String, u64>,
}

/// A figure of a target. `paths` and `ratios` have an entry for each path of the target, in the same order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    pub name: Name,
    pub unit: Unit,
    /// The number of concurrent connections.
    pub connections: usize,
    pub paths: Vec<Option<Summary>>,
    /// The ratios to the base path, round by round. The base is the direct path if it was measured, else the first one
    /// that was. `None` for the base itself and for paths that were not measured.
    pub ratios: Vec<Option<Ratio>>,
}

/// The overview at the top of a report, with a line for each target and path.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Overview {
    /// The names of the figures in each line.
    pub columns: Vec<String>,
    pub lines: Vec<Line>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// The index of the target.
    #[serde(skip)]
    pub at: usize,
    pub target: String,
    pub path: String,
    /// Whether the path was not measured.
    pub closed: bool,
    /// The formatted median, and its ratio to the base path.
    pub values: Vec<Option<(String, Option<String>)>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Name {
    /// The time of a new connection until the target has accepted it.
    Connect,
    /// The time from the beginning of a new connection, including TLS, to the first byte of the response.
    FirstByte,
    /// The time of a request on a kept connection until the end of the response.
    Request,
    /// Requests per second over all connections together.
    RequestRate,
    Download,
    Upload,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    #[serde(rename = "us")]
    Microseconds,
    #[serde(rename = "1/s")]
    PerSecond,
    /// Millions of bytes per second.
    #[serde(rename = "MB/s")]
    Megabytes,
}

/// A summary of all samples of all rounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub samples: usize,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub min: f64,
    pub max: f64,
    /// For times: the upper bounds and counts of the buckets that are not empty, [`BUCKETS_PER_DECADE`] per factor of
    /// ten.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub histogram: Vec<(f64, u64)>,
}

/// The median of the rounds' ratios, and their quartiles.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Name {
    pub fn title(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::FirstByte => "first byte",
            Self::Request => "request",
            Self::RequestRate => "request rate",
            Self::Download => "download",
            Self::Upload => "upload",
        }
    }

    pub fn unit(self) -> Unit {
        match self {
            Self::Connect | Self::FirstByte | Self::Request => Unit::Microseconds,
            Self::RequestRate => Unit::PerSecond,
            Self::Download | Self::Upload => Unit::Megabytes,
        }
    }
}

impl Unit {
    /// Formats a value with its unit, for the table and the page.
    pub fn show(self, value: f64) -> String {
        let digits = |value: f64| match value {
            v if v >= 99.95 => 0,
            v if v >= 9.995 => 1,
            _ => 2,
        };
        match self {
            Self::Microseconds => {
                let (value, unit) = if value >= 1e6 { (value / 1e6, "s") } else { (value / 1e3, "ms") };
                format!("{value:.*} {unit}", digits(value))
            }
            Self::PerSecond => format!("{value:.0}/s"),
            Self::Megabytes => format!("{value:.*} MB/s", digits(value)),
        }
    }

    pub fn is_time(self) -> bool {
        self == Self::Microseconds
    }
}

impl Ratio {
    pub fn show(&self) -> String {
        format!("{:.2} ({:.2}-{:.2})", self.median, self.low, self.high)
    }
}

impl Report {
    pub fn overview(&self) -> Overview {
        let kinds =
            [(Name::Connect, false), (Name::Request, false), (Name::Download, false), (Name::Download, true)];
        let column = |(name, many): (Name, bool)| {
            let many = if many { format!(" x{}", self.connections) } else { String::new() };
            format!("{}{many}", name.title())
        };
        let line = |at: usize, target: &TargetReport, index: usize, path: &PathReport| {
            let value = |(name, many): (Name, bool)| {
                let figure = target.figures.iter().find(|f| f.name == name && (f.connections > 1) == many)?;
                let median = figure.unit.show(figure.paths.get(index)?.as_ref()?.p50);
                let ratio = figure.ratios.get(index).and_then(Option::as_ref);
                Some((median, ratio.map(|ratio| format!("{:.2}", ratio.median))))
            };
            Line {
                at,
                target: target.title(),
                path: path.name.clone(),
                closed: path.closed.is_some(),
                values: kinds.into_iter().map(value).collect(),
            }
        };
        let targets = self.targets.iter().enumerate();
        let lines = targets.flat_map(|(at, target)| {
            target.paths.iter().enumerate().map(move |(index, path)| line(at, target, index, path))
        });
        Overview { columns: kinds.into_iter().map(column).collect(), lines: lines.collect() }
    }
}

impl TargetReport {
    /// Returns the URL, with the node if it is known.
    pub fn title(&self) -> String {
        match &self.node {
            Some(node) => format!("{node}: {}", self.url),
            None => self.url.clone(),
        }
    }

    /// Returns the path with which others are compared. This is the direct one if it was measured, else the first one
    /// that was.
    pub fn base(paths: &[PathReport]) -> Option<usize> {
        let open = |path: &PathReport| path.closed.is_none();
        let direct = paths.iter().position(|path| path.name == "direct" && open(path));
        direct.or_else(|| paths.iter().position(open))
    }
}

impl Figure {
    /// Summarises `samples`, which has the samples of each round of each path. `base` is the path to compare with.
    pub fn new(name: Name, connections: usize, samples: &[Vec<Vec<f64>>], base: Option<usize>) -> Self {
        let unit = name.unit();
        let paths = samples.iter().map(|rounds| Summary::new(&rounds.concat(), unit)).collect();
        let base_rounds = base.and_then(|base| samples.get(base));
        let ratio = |(path, rounds): (usize, &Vec<Vec<f64>>)| {
            if Some(path) == base { None } else { Ratio::new(base_rounds?, rounds) }
        };
        let ratios = samples.iter().enumerate().map(ratio).collect();
        Self { name, unit, connections, paths, ratios }
    }
}

impl Summary {
    /// Summarises samples. Returns `None` if there are none.
    fn new(samples: &[f64], unit: Unit) -> Option<Self> {
        let sorted = sorted(samples);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let at = |q| round(quantile(&sorted, q));
        Some(Self {
            samples: sorted.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            min: round(min),
            max: round(max),
            histogram: if unit.is_time() { histogram(&sorted) } else { Vec::new() },
        })
    }
}

impl Ratio {
    fn new(base: &[Vec<f64>], other: &[Vec<f64>]) -> Option<Self> {
        let median = |samples: &Vec<f64>| {
            let sorted = sorted(samples);
            (!sorted.is_empty()).then(|| quantile(&sorted, 0.5))
        };
        let pairs = base.iter().zip(other).filter_map(|(base, other)| {
            let (base, other) = (median(base)?, median(other)?);
            (base > 0.0).then_some(other / base)
        });
        let ratios = sorted(&pairs.collect::<Vec<_>>());
        let at = |q| (quantile(&ratios, q) * 1000.0).round() / 1000.0;
        (!ratios.is_empty()).then(|| Self { median: at(0.5), low: at(0.25), high: at(0.75) })
    }
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Returns the quantile by nearest rank, or 0 if there are no samples.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or_default()
}

/// Rounds to tenths, which is the precision of reports.
fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn histogram(sorted: &[f64]) -> Vec<(f64, u64)> {
    let mut buckets = BTreeMap::<i32, u64>::new();
    for value in sorted {
        let bucket = (value.max(0.1).log10() * f64::from(BUCKETS_PER_DECADE)).floor() as i32;
        *buckets.entry(bucket).or_default() += 1;
    }
    let end = |bucket: i32| round(10f64.powf(f64::from(bucket + 1) / f64::from(BUCKETS_PER_DECADE)));
    buckets.into_iter().map(|(bucket, count)| (end(bucket), count)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_summarise_their_samples() {
        let direct: Vec<Vec<f64>> =
            (0..4).map(|round| (1..=100).map(|i| f64::from(i + round)).collect()).collect();
        let tunnel: Vec<Vec<f64>> =
            direct.iter().map(|round| round.iter().map(|v| v * 2.0).collect()).collect();
        let figure = Figure::new(Name::Request, 1, &[tunnel, direct, vec![Vec::new(); 4]], Some(1));
        let (tunnel, direct) = (figure.paths[0].as_ref().unwrap(), figure.paths[1].as_ref().unwrap());
        assert_eq!((direct.samples, direct.min, direct.max), (400, 1.0, 103.0));
        assert_eq!((direct.p50, direct.p90, direct.p99), (52.0, 92.0, 101.0));
        assert_eq!((tunnel.p50, tunnel.p99), (104.0, 202.0));
        assert_eq!(direct.histogram.iter().map(|(_, count)| count).sum::<u64>(), 400);
        assert!(
            direct.histogram.iter().all(|(end, _)| *end >= 1.0 && *end <= 120.0),
            "{:?}",
            direct.histogram
        );
        assert_eq!(figure.paths[2], None);
        assert_eq!(figure.ratios, [Some(Ratio { median: 2.0, low: 2.0, high: 2.0 }), None, None]);
        // A round in which a path failed does not count for the ratio.
        let rates = [vec![vec![10.0], vec![], vec![30.0]], vec![vec![5.0], vec![7.0], vec![10.0]]];
        let figure = Figure::new(Name::RequestRate, 8, &rates, Some(1));
        assert_eq!(figure.ratios[0], Some(Ratio { median: 2.0, low: 2.0, high: 3.0 }));
        assert_eq!(Figure::new(Name::Connect, 1, &rates, None).ratios, [None, None]);
    }

    #[test]
    fn drift_on_both_paths_does_not_change_the_ratio() {
        let rounds = |factor: f64| (1..=9).map(|round| vec![factor * f64::from(round)]).collect::<Vec<_>>();
        let figure = Figure::new(Name::Download, 1, &[rounds(0.5), rounds(1.0)], Some(1));
        assert_eq!(figure.ratios[0], Some(Ratio { median: 0.5, low: 0.5, high: 0.5 }));
    }

    #[test]
    fn values_are_formatted_with_their_unit() {
        for (unit, value, shown) in [
            (Unit::Microseconds, 65.0, "0.07 ms"),
            (Unit::Microseconds, 20_060.0, "20.1 ms"),
            (Unit::Microseconds, 250_000.0, "250 ms"),
            (Unit::Microseconds, 2_500_000.0, "2.50 s"),
            (Unit::PerSecond, 12345.6, "12346/s"),
            (Unit::Megabytes, 49.96, "50.0 MB/s"),
            (Unit::Megabytes, 1500.0, "1500 MB/s"),
        ] {
            assert_eq!(unit.show(value), shown);
        }
    }
}
