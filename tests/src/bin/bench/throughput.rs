//! Measures bulk transfers, and what they cost.

use super::{
    paths::Bench,
    report::{Figures, Path, Samples, rounds},
    work::{at_once, download, upload},
};

/// Streams of the figures of several at once.
const STREAMS: u64 = 4;

/// One download and its cost, one upload, and four of each at once.
pub async fn figures(bench: &Bench, n: usize, megabytes: u64) -> Figures {
    let (paths, bytes) = (bench.paths(), megabytes << 20);
    let mut cpu = Samples::default();
    let one = rounds(&paths, n, async |path| {
        let before = bench.usage(path).cpu;
        let speed = download(bench.connect(path).await?, bytes).await?;
        if path != Path::Direct {
            cpu.push(path, (bench.usage(path).cpu - before) / (bytes as f64 / 1e9));
        }
        Ok(speed)
    })
    .await;
    let connect = async |path: Path| bench.connect(path).await;
    let up = rounds(&paths, n, async |path| upload(connect(path).await?, bytes).await).await;
    let four =
        rounds(&paths, n, async |path| at_once(STREAMS, async || connect(path).await, bytes, download).await);
    let four = four.await;
    let four_up =
        rounds(&paths, n, async |path| at_once(STREAMS, async || connect(path).await, bytes, upload).await);
    let four_up = four_up.await;
    Figures::from([
        ("download_throughput", one.figure("MB/s")),
        ("cpu_per_gb", cpu.figure("s/GB")),
        ("upload_throughput", up.figure("MB/s")),
        ("download_throughput_4", four.figure("MB/s")),
        ("upload_throughput_4", four_up.figure("MB/s")),
    ])
}
