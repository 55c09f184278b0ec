//! Measures what streams and tunnels cost that nobody uses.

use std::time::Duration;

use tests::netns::Island;

use super::{
    fleet::Fleet,
    kubernetes::Size,
    paths::{Bench, Between},
    report::{Figure, Figures, Path, rounds},
    work::get,
};

/// Kilobytes of both agents for an idle stream.
pub async fn streams(count: usize) -> anyhow::Result<Figures> {
    // Agents that have carried something before have memory left over from it.
    let bench = Bench::start(Between::Loopback, None).await?;
    let values =
        rounds(&[Path::Ours, Path::OpenSsh], 1, async |path| stream_memory(&bench, path, count).await).await;
    Ok(Figures::from([("idle_stream_memory", values.figure("KB"))]))
}

async fn stream_memory(bench: &Bench, path: Path, count: usize) -> anyhow::Result<f64> {
    // The first ones pay for what is needed once.
    let open = async |count| {
        let mut streams = Vec::new();
        for _ in 0..count {
            let mut stream = bench.connect(path).await?;
            get(&mut stream).await?;
            streams.push(stream);
        }
        anyhow::Ok(streams)
    };
    drop(open(100).await?);
    let before = bench.usage(path).memory;
    let streams = open(count).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = bench.usage(path).memory;
    drop(streams);
    Ok(after.saturating_sub(before) as f64 / 1024.0 / count as f64)
}

/// The master's memory and CPU time for each of `nodes` idle tunnels.
pub async fn tunnels(nodes: u32, time: Duration) -> anyhow::Result<Figures> {
    let island = Island::new()?;
    let _inside = island.enter()?;
    let fleet = Fleet::start(Size { nodes }, 0, false).await?;
    let cpu = fleet.idle_cpu(time).await / f64::from(nodes) * 1e6;
    Ok(Figures::from([
        ("idle_tunnel_memory", Figure::alone("KB", Some(fleet.memory() / 1024.0))),
        ("idle_tunnel_cpu", Figure::alone("us/s", Some(cpu))),
    ]))
}
