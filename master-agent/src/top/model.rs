//! The state of `top` without a terminal, which is the rows, their order and the selection.

use std::{
    cmp::Ordering,
    collections::HashMap,
    time::{Duration, Instant},
};

use clap::ValueEnum;

use crate::admin_api::{NodeDetail, NodeStatus, state};

/// The order of nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    #[default]
    Name,
    State,
    Direction,
    RoundTrip,
    Streams,
    Rate,
    Errors,
    Change,
}

impl Sort {
    pub(crate) const ALL: [Self; 8] = [
        Self::Name,
        Self::State,
        Self::Direction,
        Self::RoundTrip,
        Self::Streams,
        Self::Rate,
        Self::Errors,
        Self::Change,
    ];

    fn next(self) -> Self {
        let at = Self::ALL.iter().position(|sort| *sort == self).unwrap_or_default();
        Self::ALL.get(at + 1).copied().unwrap_or_default()
    }
}

/// A node in the table.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub name: String,
    pub state: String,
    pub reason: String,
    /// The direction of the active tunnel: `dialled`, `call-home` or `call-home-https`.
    pub direction: String,
    pub kind: String,
    pub tunnels: usize,
    pub round_trip: Option<Duration>,
    pub streams: usize,
    /// Bytes per second since the last update. It is `None` after the first update.
    pub up: Option<f64>,
    pub down: Option<f64>,
    /// The number of failed dials, impostors and lost tunnels.
    pub errors: u64,
    pub changed_unix_milliseconds: Option<u64>,
}

impl Row {
    fn new(node: &NodeStatus, before: Option<(&NodeStatus, f64)>) -> Self {
        let tunnel = node.tunnels.first();
        let text = |text: Option<&String>| text.cloned().unwrap_or_else(|| "-".to_owned());
        let rate = |now: u64, of: fn(&NodeStatus) -> u64| {
            before.map(|(before, seconds)| now.saturating_sub(of(before)) as f64 / seconds)
        };
        Self {
            name: node.name.to_string(),
            state: node.state.clone(),
            reason: node.reason.clone(),
            direction: text(tunnel.map(|t| &t.direction)),
            kind: text(tunnel.map(|t| &t.kind)),
            tunnels: node.tunnels.len(),
            round_trip: tunnel.and_then(|t| t.round_trip_microseconds).map(Duration::from_micros),
            streams: node.streams(),
            up: rate(node.totals.up, |n| n.totals.up),
            down: rate(node.totals.down, |n| n.totals.down),
            errors: node.errors(),
            changed_unix_milliseconds: node.totals.changed_unix_milliseconds,
        }
    }

    fn rate(&self) -> f64 {
        self.up.unwrap_or_default() + self.down.unwrap_or_default()
    }

    fn compare(&self, other: &Self, sort: Sort) -> Ordering {
        // Nodes that are broken, busy, slow or recently changed come first.
        let order = match sort {
            Sort::Name => Ordering::Equal,
            Sort::State => rank(&self.state).cmp(&rank(&other.state)),
            Sort::Direction => self.direction.cmp(&other.direction).then_with(|| self.kind.cmp(&other.kind)),
            Sort::RoundTrip => other.round_trip.cmp(&self.round_trip),
            Sort::Streams => other.streams.cmp(&self.streams),
            Sort::Rate => other.rate().total_cmp(&self.rate()),
            Sort::Errors => other.errors.cmp(&self.errors),
            Sort::Change => other.changed_unix_milliseconds.cmp(&self.changed_unix_milliseconds),
        };
        order.then_with(|| natural(&self.name, &other.name))
    }

    fn matches(&self, filter: &str) -> bool {
        [&self.name, &self.state, &self.reason, &self.direction, &self.kind]
            .iter()
            .any(|text| text.to_lowercase().contains(filter))
    }
}

fn rank(state: &str) -> u8 {
    match state {
        "lost" => 0,
        "retrying" => 1,
        "connecting" => 2,
        "waiting" => 3,
        state::DRAINING | state::DRAINED => 4,
        _ => 5,
    }
}

/// Compares names so that n2 comes before n10.
fn natural(a: &str, b: &str) -> Ordering {
    let number = |name: &str| {
        let digits = name.bytes().rev().take_while(u8::is_ascii_digit).count();
        let (text, digits) = name.split_at(name.len() - digits);
        (text.to_owned(), digits.parse::<u64>().unwrap_or_default())
    };
    number(a).cmp(&number(b)).then_with(|| a.cmp(b))
}

/// The state of the view.
#[derive(Default)]
pub(crate) struct Model {
    nodes: Vec<NodeStatus>,
    taken: Option<Instant>,
    rows: Vec<Row>,
    pub sort: Sort,
    pub reversed: bool,
    pub filter: String,
    /// Whether the filter is being typed.
    pub typing: bool,
    pub help: bool,
    selected: Option<String>,
    /// The node whose streams are shown.
    pub opened: Option<String>,
    pub detail: Option<NodeDetail>,
    rates: HashMap<u64, (u64, u64)>,
    pub stream_rates: HashMap<u64, (f64, f64)>,
    detail_taken: Option<Instant>,
    /// The number of streams that are scrolled out of view.
    pub scrolled: usize,
    pub error: Option<String>,
}

/// A key, by its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    Up(usize),
    Down(usize),
    First,
    Last,
    Enter,
    Back,
    Char(char),
    Erase,
}

impl Model {
    pub(crate) fn new(sort: Sort, filter: String) -> Self {
        Self { sort, filter, ..Self::default() }
    }

    /// Takes the nodes as the agent reported them at `now`.
    pub(crate) fn take(&mut self, nodes: Vec<NodeStatus>, now: Instant) {
        let seconds = self.taken.map(|taken| now.duration_since(taken).as_secs_f64()).filter(|s| *s > 0.0);
        let before: HashMap<&str, &NodeStatus> = self.nodes.iter().map(|n| (n.name.as_str(), n)).collect();
        let rows =
            nodes.iter().map(|node| Row::new(node, before.get(node.name.as_str()).copied().zip(seconds)));
        self.rows = rows.collect();
        self.nodes = nodes;
        self.taken = Some(now);
        self.error = None;
        self.sort_rows();
    }

    pub(crate) fn take_detail(&mut self, detail: NodeDetail, now: Instant) {
        let seconds = self.detail_taken.map(|taken| now.duration_since(taken).as_secs_f64());
        self.stream_rates.clear();
        for stream in &detail.detail.streams {
            if let (Some((up, down)), Some(seconds)) =
                (self.rates.get(&stream.id), seconds.filter(|s| *s > 0.0))
            {
                let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
                self.stream_rates.insert(stream.id, (rate(stream.up, *up), rate(stream.down, *down)));
            }
        }
        self.rates = detail.detail.streams.iter().map(|s| (s.id, (s.up, s.down))).collect();
        self.detail_taken = Some(now);
        self.detail = Some(detail);
        self.scrolled = self.scrolled.min(self.last_stream());
    }

    fn sort_rows(&mut self) {
        let (sort, reversed) = (self.sort, self.reversed);
        self.rows.sort_by(|a, b| {
            let order = a.compare(b, sort);
            if reversed { order.reverse() } else { order }
        });
    }

    /// Returns the rows that match the filter.
    pub(crate) fn rows(&self) -> Vec<&Row> {
        let filter = self.filter.to_lowercase();
        self.rows.iter().filter(|row| row.matches(&filter)).collect()
    }

    /// Returns the number of nodes, and of those with a tunnel.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.rows.len(), self.rows.iter().filter(|row| state::has_tunnel(&row.state)).count())
    }

    /// Returns the bytes per second of all nodes, up and down.
    pub(crate) fn rates(&self) -> (f64, f64) {
        let sum = |of: fn(&Row) -> Option<f64>| self.rows.iter().filter_map(of).fold(0.0, |a, b| a + b);
        (sum(|row| row.up), sum(|row| row.down))
    }

    /// Returns the index of the selected row in [`Self::rows`].
    pub(crate) fn selected(&self) -> usize {
        let rows = self.rows();
        let selected = self.selected.as_ref();
        rows.iter().position(|row| Some(&row.name) == selected).unwrap_or_default()
    }

    /// Returns the index of the last stream of the node that is open.
    fn last_stream(&self) -> usize {
        self.detail.as_ref().map_or(0, |detail| detail.detail.streams.len().saturating_sub(1))
    }

    fn select(&mut self, to: usize) {
        let rows = self.rows();
        let name = rows.get(to.min(rows.len().saturating_sub(1))).map(|row| row.name.clone());
        self.selected = name;
    }

    /// Handles a key. Returns whether to go on.
    pub(crate) fn press(&mut self, key: Key) -> bool {
        if self.help {
            self.help = false;
            return true;
        }
        if self.typing {
            match key {
                Key::Char(c) if self.filter.len() < 100 => self.filter.push(c),
                Key::Erase => drop(self.filter.pop()),
                Key::Enter => self.typing = false,
                Key::Back => {
                    self.filter.clear();
                    self.typing = false;
                }
                Key::Char(_) | Key::Up(_) | Key::Down(_) | Key::First | Key::Last => {}
            }
            return true;
        }
        let down = |model: &mut Self, by: usize| match model.opened {
            Some(_) => model.scrolled = model.scrolled.saturating_add(by).min(model.last_stream()),
            None => model.select(model.selected().saturating_add(by)),
        };
        let up = |model: &mut Self, by| match model.opened {
            Some(_) => model.scrolled = model.scrolled.saturating_sub(by),
            None => model.select(model.selected().saturating_sub(by)),
        };
        match key {
            Key::Char('q') => return false,
            Key::Back | Key::Erase => match (&self.opened, self.filter.is_empty()) {
                (Some(_), _) => self.close(),
                (None, false) => self.filter.clear(),
                (None, true) if key == Key::Back => return false,
                (None, true) => {}
            },
            Key::Enter => self.open(),
            Key::Up(by) => up(self, by),
            Key::Down(by) => down(self, by),
            Key::Char('k') => up(self, 1),
            Key::Char('j') => down(self, 1),
            Key::First => up(self, usize::MAX),
            Key::Last => down(self, usize::MAX),
            Key::Char('/') => self.typing = true,
            Key::Char('?' | 'h') => self.help = true,
            Key::Char('s') => {
                self.sort = self.sort.next();
                self.sort_rows();
            }
            Key::Char('r') => {
                self.reversed = !self.reversed;
                self.sort_rows();
            }
            Key::Char(_) => {}
        }
        true
    }

    fn open(&mut self) {
        if self.opened.is_none() {
            self.opened = self.rows().get(self.selected()).map(|row| row.name.clone());
            self.selected.clone_from(&self.opened);
        }
    }

    fn close(&mut self) {
        (self.opened, self.detail, self.detail_taken, self.scrolled) = (None, None, None, 0);
        self.rates.clear();
        self.stream_rates.clear();
    }
}

/// Formats bytes per second in at most seven characters.
pub(crate) fn show_rate(rate: Option<f64>) -> String {
    match rate {
        None => "-".to_owned(),
        Some(rate) if rate < 1.0 => "0".to_owned(),
        Some(rate) => show_bytes(rate),
    }
}

/// Formats bytes in at most seven characters.
pub(crate) fn show_bytes(bytes: f64) -> String {
    let mut value = bytes;
    for unit in ["B", "kB", "MB", "GB", "TB"] {
        if value < 999.5 {
            return if unit == "B" || value >= 99.95 {
                format!("{value:.0} {unit}")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1000.0;
    }
    format!("{value:.0} PB")
}

/// Formats the time since something happened in at most six characters.
pub(crate) fn show_age(since_unix_milliseconds: Option<u64>, now_unix_milliseconds: u64) -> String {
    let Some(since) = since_unix_milliseconds else { return "-".to_owned() };
    let seconds = now_unix_milliseconds.saturating_sub(since) / 1000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::admin_api::{Detail, StreamStatus, Totals};

    pub(crate) fn node(name: &str, state: &str, up: u64) -> NodeStatus {
        NodeStatus {
            name: name.parse().unwrap(),
            state: state.to_owned(),
            reason: String::new(),
            tunnels: Vec::new(),
            refused: 0,
            totals: Totals { up, ..Totals::default() },
            drain: None,
        }
    }

    fn names(model: &Model) -> Vec<String> {
        model.rows().iter().map(|row| row.name.clone()).collect()
    }

    #[test]
    fn rows_are_sorted_and_filtered_and_the_selection_follows() {
        let now = Instant::now();
        let mut model = Model::new(Sort::Name, String::new());
        model.take(vec![node("n10", "connected", 0), node("n2", "lost", 0), node("x", "retrying", 0)], now);
        assert_eq!(names(&model), ["n2", "n10", "x"]);
        assert!(model.press(Key::Down(1)) && model.press(Key::Down(50)) && model.press(Key::Up(1)));
        assert_eq!(model.selected(), 1);
        // The selection follows its node.
        assert!(model.press(Key::Char('s')));
        assert_eq!((names(&model), model.selected()), (["n2", "x", "n10"].map(str::to_owned).into(), 2));
        assert!(model.press(Key::Char('r')) && model.selected() == 0);
        for key in "/LOS".chars().map(Key::Char).chain([Key::Enter]) {
            assert!(model.press(key));
        }
        assert_eq!(names(&model), ["n2"]);
        assert!(model.press(Key::Enter) && model.opened.as_deref() == Some("n2"));
        assert!(model.press(Key::Back) && model.opened.is_none());
        assert!(model.press(Key::Back) && names(&model).len() == 3);
        assert!(!model.press(Key::Back) && !model.press(Key::Char('q')));
    }

    #[test]
    fn streams_scroll_to_the_last_one_and_no_further() {
        let now = Instant::now();
        let detail = |streams: u64| {
            let stream = |id| StreamStatus {
                id,
                egress: String::new(),
                origin: String::new(),
                target: String::new(),
                reason: String::new(),
                seconds: 0.0,
                up: 0,
                down: 0,
            };
            let detail = Detail { streams: (0..streams).map(stream).collect(), ..Detail::default() };
            NodeDetail { status: node("n1", "connected", 0), detail }
        };
        let mut model = Model::new(Sort::Name, String::new());
        model.take(vec![node("n1", "connected", 0)], now);
        assert!(model.press(Key::Enter) && model.press(Key::Last) && model.scrolled == 0, "nothing is known");
        model.take_detail(detail(10), now);
        for _ in 0..10 {
            assert!(model.press(Key::Last) && model.scrolled == 9);
        }
        assert!(model.press(Key::Down(usize::MAX)) && model.scrolled == 9);
        assert!(model.press(Key::Up(1)) && model.scrolled == 8, "one key leads back");
        model.take_detail(detail(5), now);
        assert_eq!(model.scrolled, 4, "streams have ended");
        model.take_detail(detail(0), now);
        assert!(model.press(Key::Down(1)) && model.scrolled == 0);
        assert!(model.press(Key::First) && model.scrolled == 0);
    }

    #[test]
    fn rates_are_differences_between_updates() {
        let now = Instant::now();
        let mut model = Model::new(Sort::Rate, String::new());
        model.take(vec![node("a", "connected", 1000), node("b", "connected", 1000)], now);
        assert_eq!(model.rows()[0].up, None);
        model.take(
            vec![node("a", "connected", 1000), node("b", "connected", 5000), node("c", "connected", 9)],
            now + Duration::from_secs(2),
        );
        let rates: Vec<_> = model.rows().iter().map(|row| (row.name.clone(), row.up)).collect();
        assert_eq!(rates[..2], [("b".to_owned(), Some(2000.0)), ("a".to_owned(), Some(0.0))]);
        assert_eq!((model.rates(), model.counts()), ((2000.0, 0.0), (3, 3)));
        // Keys do nothing if there are no nodes.
        model.take(Vec::new(), now + Duration::from_secs(3));
        for key in [Key::Down(1), Key::Up(1), Key::First, Key::Last, Key::Enter] {
            assert!(model.press(key) && model.opened.is_none());
        }
    }

    #[test]
    fn values_are_short() {
        for (bytes, shown) in [
            (0.0, "0 B"),
            (999.0, "999 B"),
            (1000.0, "1.0 kB"),
            (123_456.0, "123 kB"),
            (99_960_000.0, "100 MB"),
        ] {
            assert_eq!(show_bytes(bytes), shown);
        }
        assert_eq!((show_rate(None), show_rate(Some(0.2))), ("-".to_owned(), "0".to_owned()));
        for (age, shown) in [(5, "5s"), (65, "1m05s"), (3700, "1h01m"), (90_000, "1d01h")] {
            assert_eq!(show_age(Some(1000), 1000 + age * 1000), shown);
        }
        assert_eq!(show_age(None, 0), "-");
    }
}
