//! Measures small requests, on new connections and on kept ones.

use std::time::Duration;

use anyhow::Context;

use super::{
    paths::Bench,
    report::{Figures, Path, median, rounds},
    work::{kept_get_p50, kept_get_rate, new_connection_rate, new_connections},
};

/// One connection with one GET after the other, `count` times; and 32 at once.
pub async fn new_connection(bench: &Bench, n: usize, count: usize) -> Figures {
    let paths = bench.paths();
    let connect = async |path: Path| bench.connect(path).await;
    let p50 = rounds(&paths, n, async |path| {
        median(new_connections(async || connect(path).await, count).await?).context("no GET was answered")
    })
    .await;
    let rate =
        rounds(&paths, n, async |path| new_connection_rate(async || connect(path).await, count * 2).await);
    Figures::from([
        ("new_connection_get_p50", p50.figure("us")),
        ("new_connection_rate_32", rate.await.figure("1/s")),
    ])
}

/// GETs for `time` on one kept connection, and on 32.
pub async fn kept(bench: &Bench, n: usize, time: Duration) -> Figures {
    let paths = bench.paths();
    let connect = async |path: Path| bench.connect(path).await;
    let p50 = rounds(&paths, n, async |path| kept_get_p50(connect(path).await?, time).await).await;
    let rate = rounds(&paths, n, async |path| kept_get_rate(async || connect(path).await, time).await).await;
    Figures::from([("kept_get_p50", p50.figure("us")), ("kept_get_rate_32", rate.figure("1/s"))])
}
