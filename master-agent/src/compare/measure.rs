//! The measurements. Every round does the same work on each path, in alternating order, so that other load on the
//! machines and the network affects all paths.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use futures_util::future::{join_all, select_all, try_join_all};
use tokio::time::{Instant, sleep, timeout};

use super::{
    client::{Client, Connection},
    path::Path,
    report::{Figure, Name, PathReport, TargetReport},
    target::Scheme,
};

/// The number of consecutive failures after which a path is abandoned.
const GIVE_UP: u32 = 5;
/// The sizes of the first upload and of the largest one, in bytes.
const UPLOAD: (f64, f64) = (262_144.0, 4e9);

/// How much work to do.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub rounds: usize,
    /// The number of new connections per round.
    pub connects: usize,
    /// The number of requests on a kept connection per round.
    pub requests: usize,
    /// The number of concurrent connections, for figures with more than one.
    pub connections: usize,
    /// How long a rate is measured per round.
    pub slice: Duration,
    /// The timeout of a single attempt.
    pub timeout: Duration,
    /// The HTTP paths that measure throughput.
    pub download: Option<String>,
    pub upload: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Connect,
    Request,
    RequestMany,
    Download(usize),
    Upload(usize),
}

impl Work {
    /// Returns the phases of a round, in their order.
    pub(super) fn phases(&self, scheme: Scheme) -> Vec<Phase> {
        let mut phases = vec![Phase::Connect];
        if scheme == Scheme::Tcp {
            return phases;
        }
        phases.extend([Phase::Request, Phase::RequestMany]);
        if self.download.is_some() {
            phases.extend([Phase::Download(1), Phase::Download(self.connections)]);
        }
        if self.upload.is_some() {
            phases.extend([Phase::Upload(1), Phase::Upload(self.connections)]);
        }
        phases
    }

    fn not_measured(&self, scheme: Scheme) -> Vec<String> {
        let mut all = Vec::new();
        if scheme == Scheme::Tcp {
            return vec!["requests and throughput: nothing is sent to a tcp:// target".to_owned()];
        }
        if self.download.is_none() {
            all.push("download: give --download PATH, with a long response".to_owned());
        }
        if self.upload.is_none() {
            all.push("upload: give --upload PATH, which accepts a long body by POST".to_owned());
        }
        all
    }
}

/// Measures one target on all paths. `ways` describe the paths; a path with an error is not tried. `tick` is called
/// after every phase of every round.
pub(super) async fn measure(
    client: &Client,
    paths: &[Path],
    ways: Vec<Result<String, String>>,
    work: &Work,
    mut tick: impl FnMut(Phase),
) -> TargetReport {
    let mut lanes: Vec<Lane<'_>> =
        paths.iter().zip(ways).map(|(path, way)| Lane::new(client, path, work, way)).collect();
    for lane in &mut lanes {
        lane.probe().await;
    }
    let mut samples = Samples { rounds: work.rounds, paths: paths.len(), figures: Vec::new() };
    let phases = work.phases(client.url.scheme);
    for round in 0..work.rounds {
        for phase in &phases {
            match phase {
                Phase::Connect => {
                    for turn in 0..work.connects {
                        for at in order(lanes.len(), round + turn) {
                            let Some(lane) = lanes.get_mut(at) else { continue };
                            lane.connect(samples.cell(at, round)).await;
                        }
                    }
                }
                Phase::Request => {
                    for turn in 0..work.requests {
                        for at in order(lanes.len(), round + turn) {
                            let Some(lane) = lanes.get_mut(at) else { continue };
                            lane.request(samples.cell(at, round)).await;
                        }
                    }
                }
                Phase::RequestMany | Phase::Download(_) | Phase::Upload(_) => {
                    for at in order(lanes.len(), round) {
                        let Some(lane) = lanes.get_mut(at) else { continue };
                        lane.rate(*phase, samples.cell(at, round)).await;
                    }
                }
            }
            tick(*phase);
        }
    }
    let reports: Vec<PathReport> = lanes.into_iter().map(|lane| lane.report).collect();
    let base = TargetReport::base(&reports);
    let figures = samples.figures.iter();
    TargetReport {
        node: None,
        url: client.url.to_string(),
        figures: figures.map(|((name, n), samples)| Figure::new(*name, *n, samples, base)).collect(),
        paths: reports,
        not_measured: work.not_measured(client.url.scheme),
    }
}

/// Returns the order of the paths, which alternates from turn to turn.
fn order(paths: usize, turn: usize) -> Vec<usize> {
    if turn.is_multiple_of(2) { (0..paths).collect() } else { (0..paths).rev().collect() }
}

/// The samples of each round of each path.
type SamplesByPath = Vec<Vec<Vec<f64>>>;

/// The samples so far, by figure.
struct Samples {
    rounds: usize,
    paths: usize,
    figures: Vec<((Name, usize), SamplesByPath)>,
}

/// The place of the samples of one path in one round.
struct Cell<'a> {
    samples: &'a mut Samples,
    path: usize,
    round: usize,
}

impl Samples {
    fn cell(&mut self, path: usize, round: usize) -> Cell<'_> {
        Cell { samples: self, path, round }
    }
}

impl Cell<'_> {
    fn add(&mut self, name: Name, connections: usize, value: f64) {
        let Samples { rounds, paths, figures } = &mut *self.samples;
        let key = (name, connections);
        let at = figures.iter().position(|(k, _)| *k == key).unwrap_or_else(|| {
            figures.push((key, vec![vec![Vec::new(); *rounds]; *paths]));
            figures.len() - 1
        });
        let of_path = figures.get_mut(at).and_then(|(_, paths)| paths.get_mut(self.path));
        if let Some(samples) = of_path.and_then(|rounds| rounds.get_mut(self.round)) {
            samples.push(value);
        }
    }
}

/// One path with its state.
struct Lane<'a> {
    client: &'a Client,
    path: &'a Path,
    work: &'a Work,
    report: PathReport,
    kept: Option<Connection>,
    failures: u32,
    /// The time of an empty request.
    latency: Duration,
    /// The bytes per second of the last uploads over one connection, and over all connections together.
    uploaded: [Option<f64>; 2],
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

impl<'a> Lane<'a> {
    fn new(client: &'a Client, path: &'a Path, work: &'a Work, way: Result<String, String>) -> Self {
        let (way, closed) = match way {
            Ok(way) => (way, None),
            Err(error) => (format!("{:?}", path.way), Some(error)),
        };
        let report = PathReport { name: path.name.clone(), way, closed, ..PathReport::default() };
        let (kept, failures, latency) = (None, 0, Duration::ZERO);
        Self { client, path, work, report, kept, failures, latency, uploaded: [None; 2] }
    }

    fn is_open(&self) -> bool {
        self.report.closed.is_none() && self.failures < GIVE_UP
    }

    /// Runs an attempt and counts its outcome.
    async fn attempt<T>(
        &mut self,
        limit: Duration,
        attempt: impl Future<Output = anyhow::Result<T>>,
    ) -> Option<T> {
        self.report.attempts += 1;
        let error = match timeout(limit, attempt).await {
            Ok(Ok(done)) => {
                self.failures = 0;
                return Some(done);
            }
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => format!("not completed within {}", humantime::format_duration(limit)),
        };
        self.failures += 1;
        *self.report.failures.entry(error).or_default() += 1;
        None
    }

    /// Finds out whether the path can be measured.
    async fn probe(&mut self) {
        if !self.is_open() {
            return;
        }
        let (client, path) = (self.client, self.path);
        let probe = async {
            if client.url.scheme == Scheme::Tcp {
                return client.connect(path).await.map(|_| None);
            }
            let first = client.first(path).await?;
            let mut connection = first.connection;
            Ok(Some((first.status.as_u16(), client.get(&mut connection).await?)))
        };
        match self.attempt(self.work.timeout, probe).await {
            Some(Some((status, latency))) => {
                self.report.status = Some(status);
                self.latency = latency;
            }
            Some(None) => {}
            None => self.report.closed = self.report.failures.keys().next().cloned(),
        }
    }

    async fn connect(&mut self, mut cell: Cell<'_>) {
        if !self.is_open() {
            return;
        }
        let (client, path) = (self.client, self.path);
        if client.url.scheme == Scheme::Tcp {
            if let Some(connected) = self.attempt(self.work.timeout, client.connect(path)).await {
                cell.add(Name::Connect, 1, micros(connected));
            }
        } else if let Some(first) = self.attempt(self.work.timeout, client.first(path)).await {
            cell.add(Name::Connect, 1, micros(first.connected));
            cell.add(Name::FirstByte, 1, micros(first.first_byte));
        }
    }

    async fn request(&mut self, mut cell: Cell<'_>) {
        if !self.is_open() {
            return;
        }
        let (client, path) = (self.client, self.path);
        let kept = match self.kept.take() {
            Some(kept) => Some(kept),
            None => {
                self.attempt(self.work.timeout, client.open(path)).await.map(|(connection, _)| connection)
            }
        };
        let Some(mut kept) = kept else { return };
        if let Some(time) = self.attempt(self.work.timeout, client.get(&mut kept)).await {
            cell.add(Name::Request, 1, micros(time));
            self.kept = Some(kept);
        }
    }

    /// Measures a rate, on connections that are opened for it.
    async fn rate(&mut self, phase: Phase, mut cell: Cell<'_>) {
        if !self.is_open() {
            return;
        }
        let (client, path, work) = (self.client, self.path, self.work);
        let count = match phase {
            Phase::Download(count) | Phase::Upload(count) => count,
            Phase::Connect | Phase::Request | Phase::RequestMany => work.connections,
        };
        let open = try_join_all((0..count).map(|_| client.open(path)));
        let Some(opened) = self.attempt(work.timeout, open).await else { return };
        let mut connections: Vec<Connection> = opened.into_iter().map(|(connection, _)| connection).collect();
        let limit = work.timeout + work.slice * 4;
        match phase {
            Phase::RequestMany => {
                let Some((times, elapsed)) =
                    self.attempt(limit, requests(client, connections, work.slice)).await
                else {
                    return;
                };
                let rate = times.len() as f64 / elapsed.as_secs_f64();
                cell.add(Name::RequestRate, count, rate);
                for time in times {
                    cell.add(Name::Request, count, micros(time));
                }
            }
            Phase::Download(_) => {
                let Some(from) = &work.download else { return };
                let warm = work.slice / 4 + self.latency * 4;
                let download = download(client, &mut connections, from, warm, work.slice);
                if let Some(rate) = self.attempt(limit + warm, download).await {
                    cell.add(Name::Download, count, rate / 1e6);
                }
            }
            Phase::Upload(_) => {
                let (Some(to), kind) = (&work.upload, usize::from(count > 1)) else { return };
                let known = self.uploaded.get(kind).copied().flatten();
                let upload = Upload { path: to, known, slice: work.slice, latency: self.latency };
                if let Some(rate) = self.attempt(limit * 2, upload.run(client, &mut connections)).await {
                    cell.add(Name::Upload, count, rate / 1e6);
                    if let Some(known) = self.uploaded.get_mut(kind) {
                        *known = Some(rate);
                    }
                }
            }
            Phase::Connect | Phase::Request => {}
        }
    }
}

/// Makes requests on all connections during `slice`.
async fn requests(
    client: &Client,
    connections: Vec<Connection>,
    slice: Duration,
) -> anyhow::Result<(Vec<Duration>, Duration)> {
    let began = Instant::now();
    let one = |mut connection: Connection| async move {
        let mut times = Vec::new();
        while began.elapsed() < slice {
            times.push(client.get(&mut connection).await?);
        }
        anyhow::Ok(times)
    };
    let times = try_join_all(connections.into_iter().map(one)).await?.concat();
    Ok((times, began.elapsed()))
}

/// Returns the bytes per second that arrive over all connections, measured after `warm`.
async fn download(
    client: &Client,
    connections: &mut [Connection],
    path: &str,
    warm: Duration,
    slice: Duration,
) -> anyhow::Result<f64> {
    let count = AtomicU64::new(0);
    let loads = connections.iter_mut().map(|connection| Box::pin(client.download(connection, path, &count)));
    let watch = async {
        sleep(warm).await;
        let (before, began) = (count.load(Relaxed), Instant::now());
        sleep(slice).await;
        (count.load(Relaxed) - before) as f64 / began.elapsed().as_secs_f64()
    };
    tokio::select! {
        rate = watch => Ok(rate),
        (failed, _, _) = select_all(loads) => match failed? {},
    }
}

/// One measurement of an upload.
struct Upload<'a> {
    /// The HTTP path.
    path: &'a str,
    /// The rate of the last upload in bytes per second.
    known: Option<f64>,
    slice: Duration,
    /// The time that an empty request takes, which is subtracted.
    latency: Duration,
}

impl Upload<'_> {
    /// Returns the bytes per second that are sent over all connections, measured until the responses arrive, since
    /// bytes in buffers do not count. The size is what fills the slice at the known rate, or is found by trying.
    async fn run(self, client: &Client, connections: &mut [Connection]) -> anyhow::Result<f64> {
        let Self { path, known, slice, latency } = self;
        let count = connections.len().max(1) as f64;
        let share = |all: f64| all.clamp(UPLOAD.0, UPLOAD.1) / count;
        let mut bytes = share(known.map_or(UPLOAD.0, |rate| rate * slice.as_secs_f64())) as u64;
        loop {
            let began = Instant::now();
            let loads = connections.iter_mut().map(|connection| client.upload(connection, path, bytes));
            for done in join_all(loads).await {
                done?;
            }
            let elapsed = began.elapsed();
            let taken = elapsed - latency.min(elapsed / 2);
            let all = bytes as f64 * count;
            let rate = all / taken.as_secs_f64().max(1e-6);
            if known.is_some() || elapsed > slice / 2 || all >= UPLOAD.1 {
                return Ok(rate);
            }
            bytes = share((rate * slice.as_secs_f64()).min(all * 8.0)).max(bytes as f64 + 1.0) as u64;
        }
    }
}
