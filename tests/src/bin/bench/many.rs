//! Measures a master with many nodes beside one with three. All addresses of pods and services lead to one target.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use tests::{client::Stream, netns::Island, process::TempDir, steady::raise_descriptor_limit};

use super::{
    fleet::Fleet,
    kubernetes::{Size, service_address},
    paths::target_process,
    report::{Figure, Figures, Path, Samples, by, percentile},
    work::{get, new_connections},
};

const FEW: Size = Size { nodes: 3 };
/// Nodes whose pods are asked while the others come back.
const FIRST: u32 = 100;
const POD: u16 = 8080;
const SERVICE: u16 = 80;

/// Waits `idle` before it looks at what an idle master takes for as long, dials `count` times in each of `n` rounds.
pub async fn figures(nodes: u32, n: usize, count: usize, idle: Duration) -> anyhow::Result<Figures> {
    // The master has a socket for each node, and its nodes have three.
    raise_descriptor_limit(u64::from(nodes) * 2 + 65_536)?;
    let (island, dir) = (Island::new()?, TempDir::new("bench-many")?);
    let _inside = island.enter()?;
    for network in ["10.0.0.0/8", "172.16.0.0/12"] {
        island.ip(&["route", "add", "local", network, "dev", "lo"])?;
    }
    let _pods = target_process(POD, &dir.path().join("pods.log"))?;
    let _services = target_process(SERVICE, &dir.path().join("services.log"))?;
    let few = Fleet::start(FEW, 1 << 20, true).await?;
    let mut many = Fleet::start(Size { nodes }, 0, true).await?;
    tokio::time::sleep(idle).await;
    let (memory, cpu) = (many.memory() / 1024.0, many.idle_cpu(idle).await);
    let (mut pod, mut service) = (Samples::default(), Samples::default());
    for _ in 0..n {
        for (path, fleet) in [(Path::Direct, &few), (Path::Ours, &many)] {
            pod.push(path, dial_p99(fleet, pod_target, count).await?);
            service.push(path, dial_p99(fleet, service_target, count).await?);
        }
    }
    drop(few);
    let (back, back_gets) = come_back(&mut many).await?;
    Ok(Figures::from([
        ("many_nodes", Figure::alone("nodes", Some(f64::from(nodes)))),
        ("many_tunnel_memory", Figure::alone("KB", Some(memory))),
        ("many_idle_cpu", Figure::alone("cores", Some(cpu))),
        ("many_pod_dial_p99", pod.figure("us")),
        ("many_service_dial_p99", service.figure("us")),
        ("many_back", Figure::alone("s", Some(back))),
        ("many_get_p99_while_back", back_gets),
    ]))
}

fn pod_target(size: Size, i: u32) -> SocketAddr {
    SocketAddr::from((size.pod_address(i % size.nodes), POD))
}

fn service_target(size: Size, i: u32) -> SocketAddr {
    SocketAddr::from((service_address(i % size.services()), SERVICE))
}

/// Microseconds of a new connection with a GET at the 99th percentile, each to the next target.
async fn dial_p99(fleet: &Fleet, target: fn(Size, u32) -> SocketAddr, count: usize) -> anyhow::Result<f64> {
    let next = std::cell::Cell::new(0u32);
    let connect = async || {
        next.set(next.get().wrapping_add(7919));
        fleet.cluster.unix.stream(&target(fleet.size, next.get()).to_string()).await
    };
    Ok(percentile(new_connections(connect, count).await?, 0.99).unwrap_or_default())
}

/// Kills the master and starts it again. Seconds until all nodes are connected, and the 99th percentile of GETs to the
/// first nodes meanwhile; as `direct`, before.
async fn come_back(fleet: &mut Fleet) -> anyhow::Result<(f64, Figure)> {
    let mut quiet = Vec::new();
    let mut streams = open_first(fleet).await;
    for _ in 0..20 {
        round(&mut streams, &mut quiet).await?;
    }
    drop(streams);
    let began = Instant::now();
    fleet.cluster.restart_master()?;
    let mut streams = open_first(fleet).await;
    let (mut times, mut asked) = (Vec::new(), Instant::now());
    loop {
        round(&mut streams, &mut times).await?;
        if asked.elapsed() > Duration::from_millis(250) {
            asked = Instant::now();
            if fleet.connected().await? == fleet.size.nodes {
                break;
            }
        }
    }
    let back = began.elapsed().as_secs_f64();
    let (direct, ours) = (percentile(quiet, 0.99), percentile(times, 0.99));
    Ok((back, Figure { direct, ratio: by(ours, direct), ..Figure::alone("us", ours) }))
}

/// A stream to a pod of each of the first nodes, as soon as there is a tunnel to it.
async fn open_first(fleet: &Fleet) -> Vec<Stream> {
    let mut streams = Vec::new();
    for i in 0..FIRST.min(fleet.size.nodes) {
        let target = pod_target(fleet.size, i).to_string();
        loop {
            match fleet.cluster.unix.stream(&target).await {
                Ok(stream) => break streams.push(stream),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
    streams
}

async fn round(streams: &mut [Stream], times: &mut Vec<f64>) -> anyhow::Result<()> {
    for stream in streams {
        let began = Instant::now();
        get(stream).await?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(())
}
