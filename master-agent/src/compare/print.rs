//! Prints a report as a table and as CSV.

use std::fmt::Write as _;

use super::report::{Figure, PathReport, Report, TargetReport};

/// Returns the table, with a block for each target, a line for each figure and a column for each path.
pub(super) fn table(report: &Report) -> String {
    let mut text = format!(
        "{} on {} in {} s; times are p50 / p90 / p99, ratios are medians of the rounds (quartiles)\n",
        count(report.rounds, "round"),
        count(report.targets.len(), "target"),
        report.seconds
    );
    for target in &report.targets {
        let node = target.node.as_ref().map_or_else(String::new, |node| format!("{node}  "));
        let _ = writeln!(text, "\n{node}{}", target.url);
        for path in &target.paths {
            let _ = writeln!(text, "  {}", path_line(path));
        }
        for line in lines(&rows(target)) {
            let _ = writeln!(text, "    {line}");
        }
        for what in target.not_measured.iter().filter(|_| !target.figures.is_empty()) {
            let _ = writeln!(text, "  not measured: {what}");
        }
    }
    text
}

pub(super) fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// Returns the description of a path and of its failures.
pub(super) fn path_line(path: &PathReport) -> String {
    let mut line = format!("{}: {}", path.name, path.way);
    if let Some(status) = path.status {
        let _ = write!(line, "; answers {status}");
    }
    if let Some(reason) = &path.closed {
        let _ = write!(line, "; CLOSED: {reason}");
        return line;
    }
    for (what, times) in path.failures.iter().take(5) {
        let _ = write!(line, "; failed {times} of {}: {what}", path.attempts);
    }
    line
}

/// Returns the paths of a target that are measured, with their indices.
pub(super) fn open(target: &TargetReport) -> impl Iterator<Item = (usize, &PathReport)> {
    target.paths.iter().enumerate().filter(|(_, path)| path.closed.is_none())
}

/// Returns the name of a figure, with the number of connections.
pub(super) fn title(figure: &Figure) -> String {
    match figure.connections {
        1 => figure.name.title().to_owned(),
        n => format!("{} x{n}", figure.name.title()),
    }
}

/// Returns the values of a path, as the table and the page show them.
pub(super) fn values(figure: &Figure, path: usize) -> Option<String> {
    let summary = figure.paths.get(path)?.as_ref()?;
    let show = |value| figure.unit.show(value);
    Some(match figure.unit.is_time() {
        true => format!("{} / {} / {}", show(summary.p50), show(summary.p90), show(summary.p99)),
        false => show(summary.p50),
    })
}

/// Returns the ratio of a path, as the table and the page show it.
pub(super) fn ratio(figure: &Figure, path: usize) -> Option<String> {
    figure.ratios.get(path)?.as_ref().map(|ratio| ratio.show())
}

fn rows(target: &TargetReport) -> Vec<Vec<String>> {
    if target.figures.is_empty() {
        return Vec::new();
    }
    let base = TargetReport::base(&target.paths);
    let mut head = vec![String::new()];
    for (at, path) in open(target) {
        head.push(path.name.clone());
        if let Some(base) = base.filter(|base| *base != at).and_then(|base| target.paths.get(base)) {
            head.push(format!("/ {}", base.name));
        }
    }
    let row = |figure: &Figure| {
        let mut row = vec![title(figure)];
        for (at, _) in open(target) {
            row.push(values(figure, at).unwrap_or_else(|| "-".to_owned()));
            if base != Some(at) {
                row.push(ratio(figure, at).unwrap_or_else(|| "-".to_owned()));
            }
        }
        row
    };
    std::iter::once(head).chain(target.figures.iter().map(row)).collect()
}

fn lines(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |at: usize| rows.iter().filter_map(|row| row.get(at)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let cell = |(cell, width): (&String, &usize)| format!("{cell:<width$}");
    rows.iter()
        .map(|row| row.iter().zip(&widths).map(cell).collect::<Vec<_>>().join("  ").trim_end().to_owned())
        .collect()
}

/// Returns CSV (RFC 4180) with a header and a line for each figure of each path. Unknown values are empty.
pub(super) fn csv(report: &Report) -> String {
    let mut text =
        "node,url,path,figure,connections,unit,samples,p50,p90,p99,min,max,ratio,ratio_low,ratio_high,\
                    attempts,failures,closed\r\n"
            .to_owned();
    for target in &report.targets {
        let node = target.node.as_ref().map_or("", |node| node.as_str());
        for (at, path) in target.paths.iter().enumerate() {
            let failures: u64 = path.failures.values().sum();
            let ends =
                [path.attempts.to_string(), failures.to_string(), path.closed.clone().unwrap_or_default()];
            let begins = [node, &target.url, &path.name].map(str::to_owned);
            if target.figures.is_empty() || path.closed.is_some() {
                let line: Vec<_> =
                    begins.iter().cloned().chain((0..12).map(|_| String::new())).chain(ends).collect();
                csv_line(&mut text, &line);
                continue;
            }
            for figure in &target.figures {
                let Some(Some(summary)) = figure.paths.get(at) else { continue };
                let unit = match serde_json::to_value(figure.unit) {
                    Ok(serde_json::Value::String(unit)) => unit,
                    _ => String::new(),
                };
                let ratio = figure.ratios.get(at).copied().flatten();
                let ratios = [ratio.map(|r| r.median), ratio.map(|r| r.low), ratio.map(|r| r.high)];
                let mut line: Vec<String> = begins.to_vec();
                line.extend([figure.name.title().to_owned(), figure.connections.to_string(), unit]);
                line.push(summary.samples.to_string());
                let values = [summary.p50, summary.p90, summary.p99, summary.min, summary.max];
                line.extend(values.map(|value| value.to_string()));
                line.extend(ratios.map(|ratio| ratio.map_or_else(String::new, |r| r.to_string())));
                line.extend(ends.clone());
                csv_line(&mut text, &line);
            }
        }
    }
    text
}

fn csv_line(text: &mut String, cells: &[String]) {
    let cell = |cell: &String| match cell.contains([',', '"', '\r', '\n']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell.clone(),
    };
    let _ = write!(text, "{}\r\n", cells.iter().map(cell).collect::<Vec<_>>().join(","));
}
