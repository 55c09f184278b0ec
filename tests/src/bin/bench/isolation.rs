//! Measures what stalled readers cost the other streams of their tunnel, through both egress listeners of kube-
//! apiserver.

use std::time::{Duration, Instant};

use anyhow::bail;
use tests::{
    client::Stream,
    konnectivity::{Call, Connection},
};
use tokio::io::AsyncWriteExt;

use super::{
    paths::Bench,
    report::{Figures, Path, Samples},
    work::{download, kept_get_rate, try_all},
};

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

/// The others' rate and throughput while readers are stalled, by what they were before; as `direct`, the same of two
/// measurements before, which is what repetition alone changes. Half of the readers are fed by tiny writes. The quick
/// form does without those: they take a minute to fill what lies between them and their readers.
pub async fn figures(way: Way<'_>, n: usize, quick: bool) -> anyhow::Result<Figures> {
    let senders = if quick { &SENDERS[..1] } else { &SENDERS };
    // Short ones differ by more than what is to be seen.
    let (milliseconds, bytes) = if quick { (300, 128 << 20) } else { (1500, 512 << 20) };
    let time = Duration::from_millis(milliseconds);
    let (Way::Connect(bench) | Way::Konnectivity(bench, _)) = &way;
    let [mut rates, mut speeds, mut grown] = [(); 3].map(|()| Samples::default());
    for _ in 0..n {
        let (quiet, quiet_speed) = (way.rate(time).await?, way.speed(bytes).await?);
        rates.push(Path::Direct, way.rate(time).await? / quiet);
        speeds.push(Path::Direct, way.speed(bytes).await? / quiet_speed);
        let before = bench.usage(Path::Ours).memory;
        let mut stalled = Vec::new();
        for i in 0..STALLED {
            stalled.push(way.stall(senders[i % senders.len()]).await?);
        }
        bench.until_idle(Path::Ours).await;
        rates.push(Path::Ours, way.rate(time).await? / quiet);
        speeds.push(Path::Ours, way.speed(bytes).await? / quiet_speed);
        grown.push(Path::Ours, (bench.usage(Path::Ours).memory as f64 - before as f64) / 1e6);
    }
    let names = match way {
        Way::Connect(_) => ["isolation_rate", "isolation_throughput", "isolation_memory"],
        Way::Konnectivity(..) => [
            "konnectivity_isolation_rate",
            "konnectivity_isolation_throughput",
            "konnectivity_isolation_memory",
        ],
    };
    let figures = [rates.figure("ratio"), speeds.figure("ratio"), grown.figure("MB")];
    Ok(names.into_iter().zip(figures).collect())
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
                let (call, id) = connection.dial(&bench.targets[0].address.to_string()).await?;
                call.data(id, what).await;
                Held::Call(Box::new(call))
            }
        })
    }

    /// GETs a second on 32 streams, for `time`.
    async fn rate(&self, time: Duration) -> anyhow::Result<f64> {
        let (bench, connection) = match self {
            Self::Connect(bench) => {
                return kept_get_rate(async || bench.connect(Path::Ours).await, time).await;
            }
            Self::Konnectivity(bench, connection) => (bench, connection),
        };
        let began = Instant::now();
        let done = std::cell::Cell::new(0u64);
        let workers = (0..32).map(|_| async {
            let (mut call, id) = connection.dial(&bench.targets[0].address.to_string()).await?;
            while began.elapsed() < time {
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

    /// One download of so many bytes, MB/s.
    async fn speed(&self, bytes: u64) -> anyhow::Result<f64> {
        let (bench, connection) = match self {
            Self::Connect(bench) => return download(bench.connect(Path::Ours).await?, bytes).await,
            Self::Konnectivity(bench, connection) => (bench, connection),
        };
        let (mut call, id) = connection.dial(&bench.targets[0].address.to_string()).await?;
        let began = Instant::now();
        call.data(id, format!("source {bytes}\n")).await;
        let mut got = 0;
        let error = call.read_to_close(id, |bytes| got += bytes.len() as u64).await?;
        if got != bytes || !error.is_empty() {
            bail!("{got} of {bytes} bytes arrived: {error}");
        }
        Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
    }
}
