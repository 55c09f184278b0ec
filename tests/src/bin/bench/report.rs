//! Figures, their medians, and how they are printed.

use std::{collections::BTreeMap, fmt::Write};

use serde::Serialize;

use super::machine::Machine;

/// A way to the target.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Path {
    Direct,
    /// `ssh -L` with the cipher that the agents negotiate.
    OpenSsh,
    /// `ssh -L` with the cipher that OpenSSH prefers.
    OpenSshDefault,
    Ours,
    /// The binaries given with `--peer`.
    Konnectivity,
}

/// One measured value for each way that has one.
#[derive(Default, Serialize)]
pub struct Figure {
    pub unit: &'static str,
    pub direct: Option<f64>,
    pub openssh: Option<f64>,
    pub openssh_default: Option<f64>,
    pub ours: Option<f64>,
    pub konnectivity: Option<f64>,
    /// Ours by OpenSSH's with the same cipher; where OpenSSH has no such figure, ours by direct.
    pub ratio: Option<f64>,
    /// Ours by OpenSSH's with its default cipher.
    pub ratio_default: Option<f64>,
}

impl Figure {
    pub fn new(unit: &'static str, values: &BTreeMap<Path, f64>) -> Self {
        let get = |path| values.get(&path).copied();
        let (direct, openssh, ours) = (get(Path::Direct), get(Path::OpenSsh), get(Path::Ours));
        let openssh_default = get(Path::OpenSshDefault);
        Self {
            unit,
            direct,
            openssh,
            openssh_default,
            ours,
            konnectivity: get(Path::Konnectivity),
            ratio: by(ours, openssh.or(direct)),
            ratio_default: by(ours, openssh_default),
        }
    }

    /// A figure that only this project has.
    pub fn alone(unit: &'static str, ours: Option<f64>) -> Self {
        Self { unit, ours, ..Self::default() }
    }
}

/// By name.
pub type Figures = BTreeMap<&'static str, Figure>;

/// Values of several rounds, by the way on which they were measured.
#[derive(Default)]
pub struct Samples(BTreeMap<Path, Vec<f64>>);

impl Samples {
    pub fn push(&mut self, path: Path, value: f64) {
        self.0.entry(path).or_default().push(value);
    }

    /// The medians.
    pub fn figure(self, unit: &'static str) -> Figure {
        let medians = self.0.into_iter().filter_map(|(path, values)| Some((path, median(values)?))).collect();
        Figure::new(unit, &medians)
    }
}

/// Measures `work` on each path in turn, for a number of rounds.
pub async fn rounds(
    paths: &[Path],
    rounds: usize,
    mut work: impl AsyncFnMut(Path) -> anyhow::Result<f64>,
) -> Samples {
    let mut samples = Samples::default();
    for _ in 0..rounds {
        for path in paths {
            match work(*path).await {
                Ok(value) => samples.push(*path, value),
                Err(e) => eprintln!("{path:?}: {e:#}"),
            }
        }
    }
    samples
}

pub fn by(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    a.zip(b).map(|(a, b)| a / b)
}

pub fn median(values: Vec<f64>) -> Option<f64> {
    percentile(values, 0.5)
}

pub fn percentile(mut values: Vec<f64>, at: f64) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get((values.len() as f64 * at) as usize).copied()
}

/// What a run prints.
#[derive(Serialize)]
pub struct Report {
    pub machine: Machine,
    pub figures: Figures,
}

const COLUMNS: [&str; 9] = [
    "figure",
    "unit",
    "direct",
    "openssh",
    "openssh default",
    "ours",
    "ratio",
    "ratio default",
    "konnectivity",
];

impl Report {
    /// The columns' texts, for every figure; the last column only if a peer was measured.
    fn rows(&self) -> Vec<Vec<String>> {
        let peer = self.figures.values().any(|f| f.konnectivity.is_some());
        let columns = if peer { COLUMNS.len() } else { COLUMNS.len() - 1 };
        let show = |value: Option<f64>| match value {
            None => "-".to_owned(),
            Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
            Some(value) => format!("{value:.2}"),
        };
        let row = |(name, f): (&&str, &Figure)| {
            let values =
                [f.direct, f.openssh, f.openssh_default, f.ours, f.ratio, f.ratio_default, f.konnectivity];
            let mut row = vec![(*name).to_owned(), f.unit.to_owned()];
            row.extend(values.map(show));
            row
        };
        let heading = COLUMNS.iter().map(|&name| name.to_owned()).collect();
        let mut rows: Vec<Vec<String>> =
            std::iter::once(heading).chain(self.figures.iter().map(row)).collect();
        rows.iter_mut().for_each(|row| row.truncate(columns));
        rows
    }

    /// A table for terminals.
    pub fn text(&self) -> String {
        let rows = self.rows();
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
        let mut text = String::new();
        for (name, value) in &self.machine {
            let _ = writeln!(text, "{name}: {value}");
        }
        for row in &rows {
            let _ = write!(text, "{:<1$}", row[0], widths[0]);
            for (cell, width) in row.iter().zip(&widths).skip(1) {
                let _ = write!(text, "  {cell:>width$}");
            }
            text.push('\n');
        }
        text
    }

    /// A page of the reference.
    pub fn markdown(&self) -> String {
        let mut text = INTRODUCTION.to_owned();
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        text += "| machine | |\n| --- | --- |\n";
        for (name, value) in &self.machine {
            text += &line(&[name.clone(), value.clone()]);
        }
        text.push('\n');
        for (i, row) in self.rows().iter().enumerate() {
            text += &line(row);
            if i == 0 {
                text += &format!("| --- | --- |{}\n", " ---: |".repeat(row.len() - 2));
            }
        }
        text
    }
}

const INTRODUCTION: &str = "\
# Benchmark

`tests/bench.sh --table` has written this page. It measures the same work directly, through OpenSSH's `ssh -L` and
through the agents, one after the other in every round; the figures are medians. All of it runs on one machine, so the
ratios say more than the values.

- `openssh` has the cipher that the agents negotiate, and `openssh default` the one that OpenSSH prefers.
- `ratio` is ours by `openssh`, or by `direct` where OpenSSH has no such figure; `ratio default` is ours by
  `openssh default`.
- Some figures compare this project with itself: `direct` is call home over TCP for `call_home_https`, without observers
  for `watching`, before any stream stalls for `isolation`, and of three nodes for `many`.

";

#[cfg(test)]
mod tests {
    use super::*;

    fn report(konnectivity: Option<f64>) -> Report {
        let values = BTreeMap::from([
            (Path::Direct, 1000.0),
            (Path::OpenSsh, 200.0),
            (Path::OpenSshDefault, 100.0),
            (Path::Ours, 300.0),
        ]);
        let figure = Figure { konnectivity, ..Figure::new("MB/s", &values) };
        let machine = Machine::from([("cores".to_owned(), "2".to_owned())]);
        Report { machine, figures: Figures::from([("download", figure)]) }
    }

    #[test]
    fn ours_is_compared_with_both_ciphers() {
        let report = report(None);
        let rows = report.rows();
        assert_eq!(rows[1], ["download", "MB/s", "1000", "200", "100", "300", "1.50", "3.00"]);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["machine"]["cores"], "2");
        assert_eq!(json["figures"]["download"]["ratio_default"], 3.0);
    }

    #[test]
    fn a_peer_has_a_column_only_if_it_was_measured() {
        assert!(!report(None).text().contains("konnectivity"));
        assert!(report(Some(50.0)).text().lines().last().unwrap().ends_with("50.00"));
    }

    #[test]
    fn the_table_is_markdown() {
        let text = report(None).markdown();
        assert!(text.contains("| cores | 2 |\n"));
        let ends = "| download | MB/s | 1000 | 200 | 100 | 300 | 1.50 | 3.00 |\n";
        assert!(text.ends_with(ends), "{text}");
        let columns = text
            .lines()
            .filter(|line| line.starts_with("| --- | --- | ---:"))
            .map(|line| line.matches('|').count());
        assert_eq!(columns.collect::<Vec<_>>(), [9]);
    }

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let values: Vec<f64> = (0..100).rev().map(f64::from).collect();
        assert_eq!(percentile(values.clone(), 0.99), Some(99.0));
        assert_eq!(median(values), Some(50.0));
        assert_eq!(median(Vec::new()), None);
    }
}
