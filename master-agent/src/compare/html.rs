//! The page of a report, which is self-contained. It has no scripts, and loads no other files.

use std::fmt::{self, Display, Write as _};

use super::{
    print::{count, open, path_line, ratio, title, values},
    report::{BUCKETS_PER_DECADE, Figure, Name, Report, Summary, TargetReport},
};

const STYLE: &str = include_str!("report.css");

/// The size of a plot in its own units.
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 200.0;
/// The height of the axis below a plot.
const AXIS: f64 = 34.0;
/// The height of a bar.
const BAR: f64 = 26.0;
/// The least upper bound of a histogram's buckets, which is the precision of reports.
const LEAST_END: f64 = 0.1;

/// A text that is escaped for any position in HTML.
struct Escaped<T>(T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.to_string().chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

pub fn page(report: &Report) -> String {
    let mut page = String::new();
    // Writing to a String cannot fail.
    let _ = write_page(&mut page, report);
    page
}

fn write_page(page: &mut String, report: &Report) -> fmt::Result {
    let started = Escaped(&report.started);
    writeln!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>Tunneled and direct paths, {started}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <h1>Tunneled and direct paths</h1>\n\
         <p>Begun at <time datetime=\"{started}\">{started}</time>; {} in {} s, each with the same work on every path. \
         Times are p50 / p90 / p99. A ratio is the median over the rounds, with its quartiles.</p>",
        count(report.rounds, "round"),
        report.seconds
    )?;
    overview(page, report)?;
    for (at, target) in report.targets.iter().enumerate() {
        section(page, at, target)?;
    }
    page.push_str("</main>\n</body>\n</html>\n");
    Ok(())
}

/// Begins a table, which may be wider than the screen.
fn begin_table(page: &mut String, label: &str) -> fmt::Result {
    let label = Escaped(label);
    writeln!(
        page,
        "<div class=\"wide\" role=\"region\" tabindex=\"0\" aria-label=\"{label}\">\n<table>\n<caption>{label}</caption>"
    )
}

fn overview(page: &mut String, report: &Report) -> fmt::Result {
    let overview = report.overview();
    begin_table(page, "All targets")?;
    page.push_str("<thead><tr><th scope=\"col\">target</th><th scope=\"col\">path</th>");
    for column in &overview.columns {
        write!(page, "<th scope=\"col\">{column}</th>")?;
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for line in &overview.lines {
        write!(
            page,
            "<tr><th scope=\"row\"><a href=\"#t{}\">{}</a></th><td>{}</td>",
            line.at,
            Escaped(&line.target),
            Escaped(&line.path)
        )?;
        if line.closed {
            writeln!(page, "<td colspan=\"{}\" class=\"closed\">closed</td></tr>", line.values.len())?;
            continue;
        }
        for value in &line.values {
            let (median, ratio) = match value {
                Some((median, ratio)) => (median.as_str(), ratio.as_ref()),
                None => ("-", None),
            };
            let ratio = ratio.map_or_else(String::new, |ratio| format!(" <b>x {ratio}</b>"));
            write!(page, "<td>{}{ratio}</td>", Escaped(median))?;
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table>\n</div>\n");
    Ok(())
}

fn section(page: &mut String, at: usize, target: &TargetReport) -> fmt::Result {
    writeln!(
        page,
        "<section id=\"t{at}\" aria-labelledby=\"h{at}\">\n<h2 id=\"h{at}\">{}</h2>\n<ul class=\"paths\">",
        Escaped(target.title())
    )?;
    for (index, path) in target.paths.iter().enumerate() {
        let closed = if path.closed.is_some() { " class=\"closed\"" } else { "" };
        writeln!(
            page,
            "<li{closed}><span class=\"key c{}\"></span>{}</li>",
            index % 5,
            Escaped(path_line(path))
        )?;
    }
    page.push_str("</ul>\n");
    if target.figures.is_empty() {
        page.push_str("<p>Nothing could be measured.</p>\n</section>\n");
        return Ok(());
    }
    figures(page, target)?;
    for figure in target.figures.iter().filter(|figure| figure.name == Name::Request) {
        distribution(page, target, figure)?;
    }
    let bars = [Name::RequestRate, Name::Download, Name::Upload];
    for figure in target.figures.iter().filter(|figure| bars.contains(&figure.name)) {
        throughput(page, target, figure)?;
    }
    for what in &target.not_measured {
        writeln!(page, "<p class=\"note\">Not measured: {}.</p>", Escaped(what))?;
    }
    page.push_str("</section>\n");
    Ok(())
}

fn figures(page: &mut String, target: &TargetReport) -> fmt::Result {
    begin_table(page, &format!("Figures of {}", target.title()))?;
    page.push_str("<thead><tr><th scope=\"col\">figure</th>");
    let base = TargetReport::base(&target.paths);
    let base_name = base.and_then(|base| target.paths.get(base)).map(|path| path.name.as_str());
    for (at, path) in open(target) {
        write!(page, "<th scope=\"col\">{}</th>", Escaped(&path.name))?;
        if let Some(base_name) = base_name.filter(|_| base != Some(at)) {
            write!(page, "<th scope=\"col\">/ {}</th>", Escaped(base_name))?;
        }
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for figure in &target.figures {
        write!(page, "<tr><th scope=\"row\">{}</th>", title(figure))?;
        for (at, _) in open(target) {
            let dash = || "-".to_owned();
            write!(page, "<td>{}</td>", Escaped(values(figure, at).unwrap_or_else(dash)))?;
            if base != Some(at) {
                write!(page, "<td>{}</td>", Escaped(ratio(figure, at).unwrap_or_else(dash)))?;
            }
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table>\n</div>\n");
    Ok(())
}

/// Returns the buckets of a summary that can be plotted. The agent's page shows reports that it was sent, which may hold
/// any numbers.
fn buckets(summary: &Summary) -> impl Iterator<Item = &(f64, u64)> {
    summary.histogram.iter().filter(|(end, _)| end.is_finite() && *end >= LEAST_END)
}

/// Plots the distribution of times: a line for each path over a logarithmic axis, as high as the share of samples.
fn distribution(page: &mut String, target: &TargetReport, figure: &Figure) -> fmt::Result {
    let all = || figure.paths.iter().flatten().flat_map(buckets);
    let low = all().map(|(end, _)| *end).fold(f64::INFINITY, f64::min);
    let high = all().map(|(end, _)| *end).fold(0.0, f64::max);
    if !low.is_finite() || high <= 0.0 {
        return Ok(());
    }
    let step = 1.0 / f64::from(BUCKETS_PER_DECADE);
    let (from, to) = (low.log10() - 2.0 * step, high.log10() + 2.0 * step);
    let x = |log: f64| (log - from) / (to - from) * WIDTH;
    let share = |count: u64, samples: usize| count as f64 / samples.max(1) as f64;
    let shares = figure.paths.iter().flatten();
    let top = shares
        .flat_map(|summary| buckets(summary).map(|(_, count)| share(*count, summary.samples)))
        .fold(0.0, f64::max);
    let y = |share: f64| HEIGHT * (1.0 - 0.95 * share / top.max(1e-9));
    let mut spoken = Vec::new();
    for (at, path) in open(target) {
        if let Some(values) = values(figure, at) {
            spoken.push(format!("{} {values}", path.name));
        }
    }
    begin_plot(page, &format!("Times of {}: {}", title(figure), spoken.join(", ")))?;
    writeln!(page, "<figcaption>How the times of {} are spread</figcaption>", title(figure))?;
    svg(page, HEIGHT + AXIS)?;
    for decade in (from.floor() as i32)..=(to.ceil() as i32) {
        for digit in [1.0, 2.0, 5.0] {
            let value: f64 = digit * 10f64.powi(decade);
            let at = x(value.log10());
            if (0.0..=WIDTH).contains(&at) {
                write!(
                    page,
                    "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"0\" y2=\"{HEIGHT}\"/>"
                )?;
                // Dense labels would overlap.
                if digit == 1.0 || to - from < 1.6 {
                    let at_label = at.clamp(46.0, WIDTH - 48.0);
                    writeln!(
                        page,
                        "<text x=\"{at_label:.1}\" y=\"{:.1}\">{}</text>",
                        HEIGHT + 20.0,
                        figure.unit.show(value)
                    )?;
                }
            }
        }
    }
    for (at, _) in open(target) {
        let Some(Some(summary)) = figure.paths.get(at) else { continue };
        let mut points = format!("M0 {HEIGHT}");
        let mut last = f64::NEG_INFINITY;
        for (end, count) in buckets(summary) {
            let end = end.log10();
            let begin = end - step;
            if begin > last + step / 2.0 {
                let _ = write!(points, "L{:.1} {HEIGHT}L{:.1} {HEIGHT}", x(last.max(from)), x(begin));
            }
            let level = y(share(*count, summary.samples));
            let _ = write!(points, "L{:.1} {level:.1}L{:.1} {level:.1}", x(begin), x(end));
            last = end;
        }
        let _ = write!(points, "L{:.1} {HEIGHT}L{WIDTH} {HEIGHT}", x(last.max(from)));
        writeln!(page, "<path class=\"line s{}\" d=\"{points}\"/>", at % 5)?;
    }
    end_plot(page, target)
}

/// Plots throughput: a bar for each path.
fn throughput(page: &mut String, target: &TargetReport, figure: &Figure) -> fmt::Result {
    let bars: Vec<_> =
        open(target).filter_map(|(at, path)| Some((at, path, figure.paths.get(at)?.as_ref()?))).collect();
    let top = bars.iter().map(|(_, _, summary)| summary.p50).fold(0.0, f64::max);
    if top <= 0.0 {
        return Ok(());
    }
    let spoken: Vec<_> =
        bars.iter().map(|(_, path, s)| format!("{} {}", path.name, figure.unit.show(s.p50))).collect();
    let height = bars.len() as f64 * (BAR + 8.0);
    begin_plot(page, &format!("{}: {}", title(figure), spoken.join(", ")))?;
    writeln!(page, "<figcaption>{}</figcaption>", title(figure))?;
    svg(page, height)?;
    for (row, (at, path, summary)) in bars.iter().enumerate() {
        let (y, width) = (row as f64 * (BAR + 8.0), (summary.p50 / top * (WIDTH - 300.0)).max(2.0));
        let middle = y + BAR / 2.0 + 5.0;
        writeln!(
            page,
            "<text class=\"left\" x=\"0\" y=\"{middle:.1}\">{}</text>\
             <rect class=\"f{}\" x=\"130\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\"/>\
             <text class=\"left\" x=\"{:.1}\" y=\"{middle:.1}\">{}</text>",
            Escaped(path.name.chars().take(16).collect::<String>()),
            at % 5,
            138.0 + width,
            figure.unit.show(summary.p50)
        )?;
    }
    end_plot(page, target)
}

fn begin_plot(page: &mut String, label: &str) -> fmt::Result {
    writeln!(page, "<figure role=\"img\" aria-label=\"{}\">", Escaped(label))
}

fn svg(page: &mut String, height: f64) -> fmt::Result {
    writeln!(page, "<svg viewBox=\"0 0 {WIDTH} {height}\" aria-hidden=\"true\">")
}

fn end_plot(page: &mut String, target: &TargetReport) -> fmt::Result {
    page.push_str("</svg>\n<div class=\"keys\" aria-hidden=\"true\">");
    for (at, path) in open(target) {
        write!(page, "<span><span class=\"key c{}\"></span>{}</span> ", at % 5, Escaped(&path.name))?;
    }
    page.push_str("</div>\n</figure>\n");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::report::*, *};

    fn report(text: &str) -> Report {
        let rounds =
            |factor: f64| (1..=5).map(|r| vec![factor * f64::from(r) * 100.0; 3]).collect::<Vec<_>>();
        let paths = ["direct", "tunnel", text].map(|name| PathReport {
            name: name.to_owned(),
            way: text.to_owned(),
            closed: (name == text).then(|| text.to_owned()),
            status: Some(200),
            attempts: 9,
            failures: [(text.to_owned(), 1)].into(),
        });
        let samples = [rounds(1.0), rounds(3.0), vec![Vec::new(); 5]];
        let figure = |name, n| Figure::new(name, n, &samples, Some(0));
        Report {
            version: 1,
            started: "2026-01-02T03:04:05Z".to_owned(),
            seconds: 1.0,
            rounds: 5,
            connections: 16,
            targets: vec![TargetReport {
                node: Some("n1".parse().unwrap()),
                url: format!("http://n1:80/{text}"),
                paths: paths.into(),
                figures: vec![figure(Name::Request, 1), figure(Name::Download, 16)],
                not_measured: vec![text.to_owned()],
            }],
        }
    }

    #[test]
    fn texts_of_peers_are_escaped() {
        let page = page(&report("<script>alert(\"1\")</script>&'"));
        assert!(!page.contains("<script"), "{page}");
        assert!(page.contains("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;&#39;"));
        assert!(!page.contains("http-equiv=\"refresh\"") && !page.contains("src="));
    }

    #[test]
    fn numbers_that_no_comparison_has_are_not_plotted() {
        let mut report = report("x");
        let plain = page(&report).len();
        for figure in &mut report.targets[0].figures {
            for summary in figure.paths.iter_mut().flatten() {
                let odd = [0.0, -1.0, 1e-300, 0.09, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
                summary.histogram.extend(odd.map(|end| (end, 1)));
            }
        }
        assert_eq!(page(&report).len(), plain);
        report.targets[0].figures[0].paths[0].as_mut().unwrap().histogram = vec![(0.1, 1), (f64::MAX, 1)];
        let page = page(&report);
        assert!(page.len() < 200_000 && !page.contains("NaN") && !page.contains("inf"), "{}", page.len());
    }

    #[test]
    fn the_page_shows_the_values_of_the_table() {
        let report = report("x");
        let page = page(&report);
        let figure = &report.targets[0].figures[0];
        for value in [values(figure, 0), values(figure, 1), ratio(figure, 1)] {
            assert!(page.contains(&value.clone().unwrap()), "{value:?}");
        }
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    }
}
