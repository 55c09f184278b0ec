//! Measures long and lossy paths. A relay of bytes shows what windows of streams do; over packets, TCP's congestion
//! control is part of what is measured.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use tests::{
    packet_path::{Conditions, PacketPath},
    process::TempDir,
};
use tokio::io::AsyncWriteExt;

use super::{
    mixed,
    paths::{Bench, Between, Entry, Target},
    report::{Figure, Figures, Path, Samples},
    work::{Downloads, download_piece},
};

const PATHS: [Path; 3] = [Path::Direct, Path::OpenSsh, Path::Ours];
/// Bits a second of the long paths: well below what a hop in user space can carry beside agents on two cores.
const RATE: f64 = 400e6;
const NARROW: f64 = 100e6;
const SEED: u64 = 1;

/// Over the relay, with a round trip of 100 ms: one download, and what a second stream gets of its rate while the first,
/// whose window has grown, stays open and idle.
pub async fn relay(n: usize, megabytes: u64) -> anyhow::Result<Figures> {
    let bench = Bench::start(Between::Delay(Duration::from_millis(50)), None).await?;
    let (mut first, mut second) = (Samples::default(), Samples::default());
    for _ in 0..n {
        for path in [Path::OpenSsh, Path::Ours] {
            let mut streams = [bench.connect(path).await?, bench.connect(path).await?];
            let mut speeds = [0.0; 2];
            for (stream, speed) in streams.iter_mut().zip(&mut speeds) {
                stream.write_all(b"repeat\n").await?;
                *speed = download_piece(stream, megabytes << 20).await?;
            }
            first.push(path, speeds[0]);
            second.push(path, speeds[1] / speeds[0]);
        }
    }
    Ok(Figures::from([
        ("download_100ms_rtt", first.figure("MB/s")),
        ("second_stream_100ms_rtt", second.figure("ratio")),
    ]))
}

/// How a path of packets is made.
#[derive(Clone, Copy)]
pub struct Packets<'a> {
    pub rounds: usize,
    pub time: Duration,
    pub congestion_control: Option<&'a str>,
}

impl Packets<'_> {
    fn path(&self, conditions: Conditions) -> anyhow::Result<PacketPath> {
        PacketPath::start(conditions, SEED, self.congestion_control)
    }

    /// What the hop can carry if nothing else has work, and the share of a core that it takes for that.
    pub async fn capacity(&self) -> anyhow::Result<Figures> {
        let free = Conditions { delay: Duration::from_millis(1), rate: None, queue: 0.0, loss: 0.0 };
        let (path, dir) = (self.path(free)?, TempDir::new("bench")?);
        let target = {
            let _far = path.far.enter()?;
            Target::start(dir.path())?
        };
        let entry = Entry::Tcp(SocketAddr::from((path.far_address, target.address.port())));
        let _near = path.near.enter()?;
        let downloads = Downloads::start(vec![entry]);
        let (cpu, speed) = downloads.during(1 << 20, share(&path, self.time)).await?;
        downloads.stop()?;
        if speed * 8e6 < RATE * 2.0 {
            eprintln!(
                "the path carries only {speed:.0} MB/s on this machine: figures over packets are too low"
            );
        }
        let direct = |unit, value| Figure { unit, direct: Some(value), ..Figure::default() };
        Ok(Figures::from([
            ("packets_capacity", direct("MB/s", speed)),
            ("packets_capacity_hop_cpu", direct("cores", cpu)),
        ]))
    }

    /// One download and four at once over a round trip of 50 ms with 0.1 % loss, and over one of 300 ms without loss.
    pub async fn long(&self) -> anyhow::Result<Figures> {
        let (lossy, far) = (Duration::from_millis(50), Duration::from_millis(300));
        let [one, four, cpu] = self.downloads(Conditions::new(lossy, RATE, 0.001)).await?;
        let [far_one, far_four, far_cpu] = self.downloads(Conditions::new(far, RATE, 0.0)).await?;
        Ok(Figures::from([
            ("packets_50ms_loss_download", one.figure("MB/s")),
            ("packets_50ms_loss_download_4", four.figure("MB/s")),
            ("packets_50ms_loss_hop_cpu", cpu.figure("cores")),
            ("packets_300ms_download", far_one.figure("MB/s")),
            ("packets_300ms_download_4", far_four.figure("MB/s")),
            ("packets_300ms_hop_cpu", far_cpu.figure("cores")),
        ]))
    }

    /// MB/s of one download and of four, and the hop's share of a core meanwhile.
    async fn downloads(&self, conditions: Conditions) -> anyhow::Result<[Samples; 3]> {
        let path = self.path(conditions)?;
        let _near = path.near.enter()?;
        let bench = Bench::start(Between::Packets(&path), None).await?;
        let [mut one, mut four, mut hop] = [(); 3].map(|()| Samples::default());
        for _ in 0..self.rounds {
            for way in PATHS {
                for (count, samples) in [(1, &mut one), (4, &mut four)] {
                    let downloads = Downloads::start(vec![bench.entry(way, 1); count]);
                    match downloads.during(1, share(&path, self.time)).await {
                        Ok((cpu, speed)) => {
                            samples.push(way, speed);
                            hop.push(way, cpu);
                        }
                        Err(e) => eprintln!("{way:?}: {e:#}"),
                    }
                    downloads.stop()?;
                    path.until_idle().await;
                }
            }
        }
        // Those in the far namespace end once the path has brought them the end of their connections.
        drop(bench);
        path.until_idle().await;
        Ok([one, four, hop])
    }

    /// GETs beside a download over a round trip of 20 ms at 100 Mbit/s.
    pub async fn narrow(&self) -> anyhow::Result<Figures> {
        let path = self.path(Conditions::new(Duration::from_millis(20), NARROW, 0.0))?;
        let _near = path.near.enter()?;
        let bench = Bench::start(Between::Packets(&path), None).await?;
        let settle = async || path.until_idle().await;
        let mixed = mixed::measure(&bench, &PATHS, self.rounds, self.time, 1 << 20, settle).await;
        drop(bench);
        path.until_idle().await;
        Ok(Figures::from([
            ("packets_20ms_get_p50", mixed.p50.figure("us")),
            ("packets_20ms_get_p99", mixed.p99.figure("us")),
            ("packets_20ms_download", mixed.download.figure("MB/s")),
        ]))
    }
}

/// The share of a core that the hop takes for `time`.
async fn share(path: &PacketPath, time: Duration) -> f64 {
    let (began, before) = (Instant::now(), path.cpu());
    tokio::time::sleep(time).await;
    (path.cpu() - before) / began.elapsed().as_secs_f64()
}
