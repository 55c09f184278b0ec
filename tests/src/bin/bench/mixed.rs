//! Measures GETs on one connection beside one download through the same tunnel, and what the download keeps of its rate.
//! Neither their targets nor their callers share a thread.

use std::time::Duration;

use super::{
    paths::Bench,
    report::{Figures, Path, Samples, percentile},
    work::{Downloads, kept_gets},
};

#[derive(Default)]
pub struct Mixed {
    /// Microseconds.
    pub p50: Samples,
    pub p99: Samples,
    /// The download's MB/s beside the GETs, and that by its rate alone.
    pub download: Samples,
    pub kept: Samples,
}

/// On each path in turn: the download alone for `time`, then both for as long. `first` bytes of the download come
/// before.
pub async fn measure(
    bench: &Bench,
    paths: &[Path],
    n: usize,
    time: Duration,
    first: u64,
    settle: impl AsyncFn(),
) -> Mixed {
    let mut mixed = Mixed::default();
    for _ in 0..n {
        for path in paths {
            if let Err(e) = one(bench, *path, time, first, &mut mixed).await {
                eprintln!("{path:?}: {e:#}");
            }
            settle().await;
        }
    }
    mixed
}

async fn one(bench: &Bench, path: Path, time: Duration, first: u64, mixed: &mut Mixed) -> anyhow::Result<()> {
    let stream = bench.connect(path).await?;
    let downloads = Downloads::start(vec![bench.entry(path, 1)]);
    // A sleep begins when it is made, and not when it is awaited.
    let ((), alone) = downloads.during(first, async { tokio::time::sleep(time).await }).await?;
    let (times, beside) = downloads.during(0, kept_gets(stream, time)).await?;
    downloads.stop()?;
    let times = times?;
    for (samples, at) in [(&mut mixed.p50, 0.5), (&mut mixed.p99, 0.99)] {
        if let Some(value) = percentile(times.clone(), at) {
            samples.push(path, value);
        }
    }
    mixed.download.push(path, beside);
    mixed.kept.push(path, beside / alone);
    Ok(())
}

/// The figures on loopback.
pub async fn figures(bench: &Bench, n: usize, time: Duration) -> Figures {
    let mixed = measure(bench, &bench.paths(), n, time, 64 << 20, async || ()).await;
    Figures::from([
        ("mixed_get_p50", mixed.p50.figure("us")),
        ("mixed_get_p99", mixed.p99.figure("us")),
        ("mixed_download", mixed.download.figure("MB/s")),
        ("mixed_download_kept", mixed.kept.figure("ratio")),
    ])
}
