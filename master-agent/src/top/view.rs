//! Draws the state of `top`. Colours only repeat what words say.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize},
    text::{Line, Span},
    widgets::{Block, Cell, Clear, Paragraph, Row as Cells, Sparkline, Table, TableState},
};

use super::model::{Model, Row, Sort, show_age, show_bytes, show_rate};
use crate::admin_api::{EventKind, NodeDetail, state};

const HELP: [&str; 9] = [
    "up, down, j, k    select",
    "PgUp, PgDn        move by a page",
    "Home, End         go to the first, the last",
    "Enter             show the node's streams and events",
    "Esc, Backspace    go back; clear the filter",
    "s                 sort by the next column",
    "r                 reverse the order",
    "/                 filter; Enter keeps it",
    "q                 quit",
];

/// The title of each column, its width, and the width of the screen from which on the column is shown. A column is
/// shown only if at least 11 characters are left for the name of the node.
const COLUMNS: [(&str, u16, u16); 11] = [
    ("NODE", 20, 0),
    ("STATE", 10, 24),
    ("DIRECTION", 15, 85),
    ("KIND", 10, 107),
    ("RTT", 8, 51),
    ("STREAMS", 7, 60),
    ("UP/s", 7, 41),
    ("DOWN/s", 7, 41),
    ("ERRORS", 6, 68),
    ("CHANGED", 8, 95),
    ("REASON", 30, 132),
];

pub(super) fn draw(frame: &mut Frame<'_>, model: &Model, now_unix_milliseconds: u64) {
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(1), Constraint::Length(1)])
            .areas(frame.area());
    frame.render_widget(heading(model), head);
    match &model.opened {
        Some(name) => draw_node(frame, body, model, name, now_unix_milliseconds),
        None => draw_nodes(frame, body, model, now_unix_milliseconds),
    }
    frame.render_widget(footing(model), foot);
    if model.help {
        draw_help(frame, body);
    }
}

fn heading(model: &Model) -> Line<'static> {
    let ((nodes, connected), (up, down)) = (model.counts(), model.rates());
    let mut spans = vec![
        Span::from("master-agent ").bold(),
        Span::from(format!("{connected} of {nodes} nodes connected")),
        Span::from(format!("  up {}/s  down {}/s", show_bytes(up), show_bytes(down))),
    ];
    if connected < nodes {
        spans.insert(2, Span::styled(format!(", {} not", nodes - connected), Style::new().fg(Color::Red)));
    }
    Line::from(spans)
}

fn footing(model: &Model) -> Line<'static> {
    if let Some(error) = &model.error {
        return Line::styled(error.clone(), Style::new().fg(Color::Red));
    }
    if model.typing {
        return Line::from(format!("filter: {}_", model.filter));
    }
    let filter = if model.filter.is_empty() { String::new() } else { format!("  filter: {}", model.filter) };
    let keys = match model.opened {
        Some(_) => "Esc back  q quit  ? help",
        None => "Enter open  s sort  r reverse  / filter  q quit  ? help",
    };
    Line::from(vec![Span::from(keys).dim(), Span::from(filter)])
}

fn state_style(state: &str) -> Style {
    match state {
        state::CONNECTED => Style::new().fg(Color::Green),
        "waiting" | "connecting" | state::DRAINING | state::DRAINED => Style::new().fg(Color::Yellow),
        _ => Style::new().fg(Color::Red).add_modifier(Modifier::BOLD),
    }
}

fn sorted_by(title: &str) -> Option<Sort> {
    Some(match title {
        "NODE" => Sort::Name,
        "STATE" => Sort::State,
        "DIRECTION" => Sort::Direction,
        "RTT" => Sort::RoundTrip,
        "STREAMS" => Sort::Streams,
        "DOWN/s" => Sort::Rate,
        "ERRORS" => Sort::Errors,
        "CHANGED" => Sort::Change,
        _ => return None,
    })
}

fn cell(title: &str, row: &Row, now: u64) -> Cell<'static> {
    Cell::from(match title {
        "NODE" => row.name.clone(),
        "STATE" => return Cell::from(row.state.clone()).style(state_style(&row.state)),
        "DIRECTION" => row.direction.clone(),
        "KIND" => row.kind.clone(),
        "RTT" => show_round_trip(row.round_trip.map(|time| time.as_secs_f64() * 1e3)),
        "STREAMS" => row.streams.to_string(),
        "UP/s" => show_rate(row.up),
        "DOWN/s" => show_rate(row.down),
        "ERRORS" => row.errors.to_string(),
        "CHANGED" => show_age(row.changed_unix_milliseconds, now),
        _ => row.reason.clone(),
    })
}

fn show_round_trip(milliseconds: Option<f64>) -> String {
    milliseconds.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}ms"))
}

fn draw_nodes(frame: &mut Frame<'_>, area: Rect, model: &Model, now: u64) {
    let columns: Vec<_> = COLUMNS.iter().filter(|(_, _, from)| area.width >= *from).collect();
    let head = columns.iter().map(|(title, ..)| {
        let mark = match (sorted_by(title) == Some(model.sort), model.reversed) {
            (false, _) => "",
            (true, false) => "*",
            (true, true) => "'",
        };
        Cell::from(format!("{title}{mark}"))
    });
    let widths = columns.iter().map(|(title, width, _)| match *title {
        "NODE" | "REASON" => Constraint::Fill(*width),
        _ => Constraint::Length(*width + 1),
    });
    let rows = model.rows();
    let selected = model.selected();
    // Only visible rows are built.
    let height = usize::from(area.height.saturating_sub(1)).max(1);
    let first = (selected + 1).saturating_sub(height).max(selected.saturating_sub(height / 2));
    let first = first.min(rows.len().saturating_sub(height));
    let cells = rows
        .iter()
        .skip(first)
        .take(height)
        .map(|row| Cells::new(columns.iter().map(|(title, ..)| cell(title, row, now))));
    let table = Table::new(cells, widths)
        .header(Cells::new(head).style(Style::new().add_modifier(Modifier::UNDERLINED)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state =
        TableState::new().with_selected((!rows.is_empty()).then_some(selected - first.min(selected)));
    frame.render_stateful_widget(table, area, &mut state);
}

fn draw_node(frame: &mut Frame<'_>, area: Rect, model: &Model, name: &str, now: u64) {
    let Some(detail) = &model.detail else {
        frame.render_widget(Paragraph::new(format!("{name}: loading")), area);
        return;
    };
    let events = u16::try_from(detail.detail.events.len()).unwrap_or(u16::MAX).clamp(1, 6);
    let [about, plot, streams, lately] = Layout::vertical([
        Constraint::Length(u16::try_from(detail.status.tunnels.len()).unwrap_or(8).clamp(1, 4) + 1),
        Constraint::Length(if area.height >= 18 { 4 } else { 0 }),
        Constraint::Min(3),
        Constraint::Length(events + 1),
    ])
    .areas(area);
    frame.render_widget(Paragraph::new(about_lines(detail)), about);
    draw_round_trips(frame, plot, detail);
    draw_streams(frame, streams, model, detail);
    let title = Line::from("LAST EVENTS").style(Style::new().add_modifier(Modifier::UNDERLINED));
    let lines = detail.detail.events.iter().map(|event| {
        let times = if event.times > 1 { format!(" ({} times)", event.times) } else { String::new() };
        let age = show_age(Some(event.unix_milliseconds), now);
        Line::from(vec![
            Span::from(format!("{age:>8} ago  ")),
            Span::styled(event_name(event.kind), event_style(event.kind)),
            Span::from(format!("{times}  {}", event.text)),
        ])
    });
    frame.render_widget(Paragraph::new(std::iter::once(title).chain(lines).collect::<Vec<_>>()), lately);
}

fn event_name(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Connected => "connected",
        EventKind::Lost => "lost",
        EventKind::Retrying => "retrying",
        EventKind::Impostor => "impostor",
        EventKind::Policy => "policy",
        EventKind::DialFailed => "dial failed",
    }
}

fn event_style(kind: EventKind) -> Style {
    match kind {
        EventKind::Connected => Style::new().fg(Color::Green),
        EventKind::Policy | EventKind::DialFailed => Style::new().fg(Color::Yellow),
        EventKind::Lost | EventKind::Retrying | EventKind::Impostor => Style::new().fg(Color::Red),
    }
}

fn about_lines(detail: &NodeDetail) -> Vec<Line<'static>> {
    let status = &detail.status;
    let mut lines = vec![Line::from(vec![
        Span::from(format!("{}  ", status.name)).bold(),
        Span::styled(status.state.clone(), state_style(&status.state)),
        Span::from(format!(
            "  {}  streams so far {}, up {}, down {}, tunnels lost {}, impostors {}",
            status.reason,
            status.totals.streams,
            show_bytes(status.totals.up as f64),
            show_bytes(status.totals.down as f64),
            status.totals.lost,
            status.refused,
        )),
    ])];
    lines.extend(status.tunnels.iter().map(|tunnel| {
        Line::from(format!(
            "  {} {} {} {}  {} streams, round trip {}",
            tunnel.role,
            tunnel.direction,
            tunnel.kind,
            tunnel.peer.map_or_else(|| "-".to_owned(), |peer| peer.to_string()),
            tunnel.streams,
            show_round_trip(tunnel.round_trip_microseconds.map(|us| us as f64 / 1e3)),
        ))
    }));
    lines
}

fn draw_round_trips(frame: &mut Frame<'_>, area: Rect, detail: &NodeDetail) {
    if area.height == 0 {
        return;
    }
    let all = &detail.detail.round_trips_microseconds;
    let seen = all.len().saturating_sub(usize::from(area.width));
    let data: Vec<Option<u64>> = all.iter().skip(seen).map(|us| us.map(u64::from)).collect();
    let top = data.iter().flatten().max().copied().unwrap_or_default();
    let title = format!(
        "ROUND TRIP, one every {} s, up to {}",
        detail.detail.sample_seconds,
        show_round_trip(Some(top as f64 / 1e3))
    );
    frame.render_widget(Sparkline::default().data(data).block(Block::new().title(title)), area);
}

fn draw_streams(frame: &mut Frame<'_>, area: Rect, model: &Model, detail: &NodeDetail) {
    let wide = area.width >= 90;
    let mut streams: Vec<_> = detail.detail.streams.iter().collect();
    let rate = |id| model.stream_rates.get(&id).map_or(0.0, |(up, down)| up + down);
    streams.sort_by(|a, b| rate(b.id).total_cmp(&rate(a.id)).then(a.id.cmp(&b.id)));
    let rows = streams.iter().skip(model.scrolled.min(streams.len().saturating_sub(1))).map(|stream| {
        let rates = model.stream_rates.get(&stream.id);
        let mut cells = vec![
            stream.target.clone(),
            format!("{:.0}s", stream.seconds),
            show_rate(rates.map(|(up, _)| *up)),
            show_rate(rates.map(|(_, down)| *down)),
        ];
        if wide {
            cells.extend([
                show_bytes(stream.up as f64),
                show_bytes(stream.down as f64),
                format!("{}: {}", stream.egress, stream.origin),
            ]);
        }
        Cells::new(cells)
    });
    let mut titles = vec!["STREAM TO", "AGE", "UP/s", "DOWN/s"];
    let mut widths =
        vec![Constraint::Fill(2), Constraint::Length(8), Constraint::Length(8), Constraint::Length(8)];
    if wide {
        titles.extend(["UP", "DOWN", "FROM"]);
        widths.extend([Constraint::Length(8), Constraint::Length(8), Constraint::Fill(3)]);
    }
    let head = Cells::new(titles).style(Style::new().add_modifier(Modifier::UNDERLINED));
    frame.render_widget(Table::new(rows, widths).header(head), area);
}

fn draw_help(frame: &mut Frame<'_>, area: Rect) {
    let (width, height) = (56.min(area.width), 11.min(area.height));
    let place =
        Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    frame.render_widget(Clear, place);
    let lines: Vec<Line<'_>> = HELP.iter().map(|line| Line::from(format!(" {line}"))).collect();
    let block = Block::bordered().title("keys").title_alignment(Alignment::Center);
    frame.render_widget(Paragraph::new(lines).block(block), place);
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use ratatui::{Terminal, backend::TestBackend};

    use super::{super::model::Key, *};
    use crate::admin_api::{Detail, Event, NodeStatus, StreamStatus, Totals};

    fn node(i: usize) -> NodeStatus {
        let lost = i % 7 == 3;
        NodeStatus {
            name: format!("node-{i}").parse().unwrap(),
            state: if lost { "lost" } else { "connected" }.to_owned(),
            reason: if lost { "no answer".to_owned() } else { String::new() },
            tunnels: Vec::new(),
            refused: 0,
            totals: Totals { changed_unix_milliseconds: Some(1000), ..Totals::default() },
            drain: None,
        }
    }

    fn screen(model: &Model, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model, 61_000)).unwrap();
        terminal.backend().to_string()
    }

    fn detail() -> NodeDetail {
        let stream = |id| StreamStatus {
            id,
            egress: "connect-unix".to_owned(),
            origin: "unix uid=0".to_owned(),
            target: format!("10.0.0.{id}:80"),
            reason: String::new(),
            seconds: 3.0,
            up: 0,
            down: 1000 * id,
        };
        NodeDetail {
            status: node(1),
            detail: Detail {
                streams: (0..40).map(stream).collect(),
                events: vec![Event {
                    unix_milliseconds: 1000,
                    kind: EventKind::Policy,
                    text: "169.254.169.254:80: rule default".to_owned(),
                    rule: Some("default".to_owned()),
                    times: 3,
                }],
                round_trips_microseconds: vec![Some(100), None, Some(900)],
                sample_seconds: 5,
            },
        }
    }

    #[test]
    fn a_thousand_nodes_are_drawn_at_any_size() {
        let mut model = Model::new(Sort::Name, String::new());
        model.take((0..1000).map(node).collect(), Instant::now());
        let wide = screen(&model, 140, 30);
        for text in ["857 of 1000 nodes connected, 143 not", "NODE*", "REASON", "node-26 ", "lost", "1m00s"] {
            assert!(wide.contains(text), "{text}: {wide}");
        }
        let small = screen(&model, 60, 15);
        assert!(
            small.contains("node-11 ") && small.contains("STREAMS") && !small.contains("REASON"),
            "{small}"
        );
        assert!(model.press(Key::Last));
        let last = screen(&model, 60, 15);
        assert!(
            last.contains("node-999") && last.contains("node-988") && !last.contains("node-987"),
            "{last}"
        );
        assert!(model.press(Key::Up(3)) && screen(&model, 60, 15).contains("node-999"));
        assert!(model.press(Key::Char('?')) && screen(&model, 60, 15).contains("reverse the order"));
        for (width, height) in [(1, 1), (5, 2), (20, 3), (300, 80)] {
            screen(&model, width, height);
        }
    }

    #[test]
    fn the_name_of_a_node_is_readable_at_any_width() {
        let mut model = Model::new(Sort::Name, String::new());
        model.take((100_000..100_003).map(node).collect(), Instant::now());
        for width in 24..=200 {
            let shown = screen(&model, width, 10);
            assert!(shown.contains("node-100001"), "{width}: {shown}");
        }
    }

    #[test]
    fn a_node_is_drawn_with_its_streams_and_events() {
        let mut model = Model::new(Sort::Name, String::new());
        let now = Instant::now();
        model.take((0..3).map(node).collect(), now);
        assert!(model.press(Key::Down(1)) && model.press(Key::Enter));
        assert!(screen(&model, 100, 30).contains("node-1: loading"));
        model.take_detail(detail(), now);
        let mut later = detail();
        later.detail.streams[7].down += 4_000_000;
        model.take_detail(later, now + Duration::from_secs(2));
        let shown = screen(&model, 100, 30);
        for text in [
            "ROUND TRIP, one every 5 s, up to 0.9ms",
            "2.0 MB",
            "policy (3 times)  169.254.169.254:80",
            "1m00s ago",
        ] {
            assert!(shown.contains(text), "{text}: {shown}");
        }
        let streams = shown.lines().position(|line| line.contains("STREAM TO")).unwrap();
        assert!(
            shown.lines().nth(streams + 1).unwrap().contains("10.0.0.7:80"),
            "the busiest comes first: {shown}"
        );
        assert!(model.press(Key::Down(500)) && screen(&model, 60, 15).contains("10.0.0."));
        for (width, height) in [(1, 1), (10, 4), (60, 15), (90, 18)] {
            screen(&model, width, height);
        }
    }
}
