//! Measures what stalled readers cost the other streams of their tunnel, through both egress listeners of kube-
//! apiserver.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::bail;
use tests::{
    client::Stream,
    konnectivity::{Call, Connection},
};
use tokio::io::AsyncWriteExt;

use super::{Bench, Figure, Path, download, kept_get_rate, median, try_all};

/// Short ones differ by more than what is to be seen.
const TIME: Duration = Duration::from_millis(1500);
const VOLUME: u64 = 512 << 20;
const STALLED: usize = 8;

/// A way to the target through the agents.
pub enum Way<'a> {
    Connect(&'a Bench),
    /// All of its calls are on one HTTP/2 connection.
    Konnectivity(&'a Bench, Connection),
}

/// A stream that nobody reads.
#[expect(dead_code, reason = "held open")]
enum Held {
    Stream(Stream),
    Call(Box<Call>),
}

/// Lines that make the targets of stalled streams send as much as fits, or one byte at a time.
const SENDERS: [&str; 2] = ["firehose\n", "tiny\n"];

/// The others' rate and throughput while readers are stalled, relative to what they were before. The quick form does
/// without targets that send one byte at a time: they take a minute to fill what lies between them and their readers.
pub async fn figures(way: Way<'_>, n: usize, quick: bool) -> anyhow::Result<BTreeMap<&'static str, Figure>> {
    let senders = if quick { &SENDERS[..1] } else { &SENDERS };
    let (Way::Connect(bench) | Way::Konnectivity(bench, _)) = &way;
    let (mut rates, mut speeds, mut grown) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..n {
        let (quiet, quiet_speed) = (way.rate().await?, way.speed().await?);
        let before = bench.usage(Path::Ours).memory;
        let mut stalled = Vec::new();
        for i in 0..STALLED {
            stalled.push(way.stall(senders[i % senders.len()]).await?);
        }
        bench.until_idle(Path::Ours).await;
        let (rate, speed) = (way.rate().await?, way.speed().await?);
        grown.push((bench.usage(Path::Ours).memory as f64 - before as f64) / 1e6);
        rates.push(rate / quiet);
        speeds.push(speed / quiet_speed);
    }
    let names = match way {
        Way::Connect(_) => ["isolation_rate", "isolation_throughput", "isolation_memory"],
        Way::Konnectivity(..) => [
            "konnectivity_isolation_rate",
            "konnectivity_isolation_throughput",
            "konnectivity_isolation_memory",
        ],
    };
    let ours = [median(rates), median(speeds), median(grown)];
    let alone = |unit: &'static str, ours| {
        let ratio = if unit == "ratio" { ours } else { None };
        Figure { unit, direct: None, openssh: None, ours, ratio }
    };
    let all = names.into_iter().zip(["ratio", "ratio", "MB"]).zip(ours);
    Ok(all.map(|((name, unit), ours)| (name, alone(unit, ours))).collect())
}

impl Way<'_> {
    async fn stall(&self, what: &str) -> anyhow::Result<Held> {
        Ok(match self {
            Self::Connect(bench) => {
                let mut stream = bench.connect(Path::Ours).await?;
                stream.write_all(what.as_bytes()).await?;
                Held::Stream(stream)
            }
            Self::Konnectivity(bench, connection) => {
                let (call, id) = connection.dial(&bench.target.to_string()).await?;
                call.data(id, what).await;
                Held::Call(Box::new(call))
            }
        })
    }

    /// GETs a second on 32 streams.
    async fn rate(&self) -> anyhow::Result<f64> {
        let (bench, connection) = match self {
            Self::Connect(bench) => {
                return kept_get_rate(async || bench.connect(Path::Ours).await, TIME).await;
            }
            Self::Konnectivity(bench, connection) => (bench, connection),
        };
        let began = Instant::now();
        let done = std::cell::Cell::new(0u64);
        let workers = (0..32).map(|_| async {
            let (mut call, id) = connection.dial(&bench.target.to_string()).await?;
            while began.elapsed() < TIME {
                call.data(id, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
                let mut got = 0;
                while got < 40 {
                    got += call.read(id).await?.len();
                }
                done.set(done.get() + 1);
            }
            anyhow::Ok(())
        });
        try_all(workers).await?;
        Ok(done.get() as f64 / began.elapsed().as_secs_f64())
    }

    /// One download, MB/s.
    async fn speed(&self) -> anyhow::Result<f64> {
        let (bench, connection) = match self {
            Self::Connect(bench) => return download(bench.connect(Path::Ours).await?, VOLUME).await,
            Self::Konnectivity(bench, connection) => (bench, connection),
        };
        let (mut call, id) = connection.dial(&bench.target.to_string()).await?;
        let began = Instant::now();
        call.data(id, format!("source {VOLUME}\n")).await;
        let mut got = 0;
        let error = call.read_to_close(id, |bytes| got += bytes.len() as u64).await?;
        if got != VOLUME || !error.is_empty() {
            bail!("{got} of {VOLUME} bytes arrived: {error}");
        }
        Ok(VOLUME as f64 / 1e6 / began.elapsed().as_secs_f64())
    }
}
