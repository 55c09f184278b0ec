//! A path of packets between two network namespaces, which does what a long, narrow or lossy network does. TCP's own
//! congestion control runs over it, which a relay of bytes hides. It needs root, and TUN devices.
//!
//! A [`Line`] is one direction. It decides about every packet as it comes, so it needs neither devices nor a clock.

use std::{
    collections::VecDeque,
    net::Ipv4Addr,
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::{Instant, sleep_until};
use tokio_tun::Tun;
use tokio_util::sync::CancellationToken;

use crate::{
    netns::{self, Island},
    openssh::run,
    process::cpu_of_task,
};

/// Addresses for documentation (RFC 5737), which no network has.
const NEAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const MTU: usize = 1500;
/// Packets that a device keeps for the hop, so that none is lost while the hop has no CPU for some milliseconds.
const DEVICE_QUEUE: &str = "10000";
/// Packets that are taken from one device before the other has its turn.
const BATCH: usize = 64;

/// What both directions of a path do to packets.
#[derive(Clone, Copy, Debug)]
pub struct Conditions {
    /// Of each direction.
    pub delay: Duration,
    /// Bytes a second; `None` is without limit.
    pub rate: Option<f64>,
    /// Bytes that wait for the line at most; what does not fit is dropped.
    pub queue: f64,
    /// The part of the packets that is lost at random.
    pub loss: f64,
}

impl Conditions {
    /// A path with this round trip and rate in bits a second. Its queues hold what the line carries in 50 ms.
    pub fn new(round_trip: Duration, bits: f64, loss: f64) -> Self {
        let rate = bits / 8.0;
        Self { delay: round_trip / 2, rate: Some(rate), queue: rate * 0.05, loss }
    }
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    OnItsWay,
    Lost,
    /// The queue was full.
    Overflowed,
}

/// One direction of a path.
#[derive(Debug)]
pub struct Line {
    conditions: Conditions,
    random: StdRng,
    /// When the line has sent what waits for it.
    free: Instant,
    on_the_way: VecDeque<(Instant, Vec<u8>)>,
}

impl Line {
    pub fn new(conditions: Conditions, seed: u64, now: Instant) -> Self {
        Self { conditions, random: StdRng::seed_from_u64(seed), free: now, on_the_way: VecDeque::new() }
    }

    pub fn offer(&mut self, packet: &[u8], now: Instant) -> Fate {
        let Conditions { delay, rate, queue, loss } = self.conditions;
        if loss > 0.0 && self.random.random_bool(loss) {
            return Fate::Lost;
        }
        self.free = self.free.max(now);
        if let Some(rate) = rate {
            let waiting = (self.free - now).as_secs_f64() * rate;
            if waiting + packet.len() as f64 > queue {
                return Fate::Overflowed;
            }
            self.free += Duration::from_secs_f64(packet.len() as f64 / rate);
        }
        self.on_the_way.push_back((self.free + delay, packet.to_vec()));
        Fate::OnItsWay
    }

    /// When the next packet arrives.
    pub fn due(&self) -> Option<Instant> {
        self.on_the_way.front().map(|(due, _)| *due)
    }

    /// The next packet, once it has arrived.
    pub fn take(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.due().filter(|due| *due <= now)?;
        self.on_the_way.pop_front().map(|(_, packet)| packet)
    }
}

/// How many packets had which fate, in both directions together.
#[derive(Debug, Default)]
struct Counts {
    passed: AtomicU64,
    lost: AtomicU64,
    overflowed: AtomicU64,
}

/// The same at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub passed: u64,
    pub lost: u64,
    pub overflowed: u64,
}

/// Two namespaces and the path between them, until it is dropped. Processes in them have to end before.
#[derive(Debug)]
pub struct PacketPath {
    pub near: Island,
    pub far: Island,
    pub near_address: Ipv4Addr,
    pub far_address: Ipv4Addr,
    counts: Arc<Counts>,
    /// The thread that carries the packets, in /proc.
    task: PathBuf,
    stop: CancellationToken,
    hop: Option<JoinHandle<anyhow::Result<()>>>,
}

impl PacketPath {
    /// Loss follows `seed`. Both namespaces have the host's congestion control unless another one is named.
    pub fn start(
        conditions: Conditions,
        seed: u64,
        congestion_control: Option<&str>,
    ) -> anyhow::Result<Self> {
        let (near, far) = (Island::new()?, Island::new()?);
        for island in [&near, &far] {
            let _inside = island.enter()?;
            // Otherwise a connection would begin with what an earlier one to the same address has learnt.
            set("tcp_no_metrics_save", "1")?;
            if let Some(name) = congestion_control {
                set("tcp_congestion_control", name)?;
            }
        }
        let (counts, stop) = (Arc::<Counts>::default(), CancellationToken::new());
        let (tell, told) = std::sync::mpsc::channel();
        let hop = std::thread::Builder::new().name("hop".to_owned()).spawn({
            let (near, far) = (near.name.clone(), far.name.clone());
            let (counts, stop) = (counts.clone(), stop.clone());
            move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    let devices = [device(&near, NEAR)?, device(&far, FAR)?];
                    tell.send(std::fs::canonicalize("/proc/thread-self")?)?;
                    stop.run_until_cancelled(carry(&devices, conditions, seed, &counts))
                        .await
                        .unwrap_or(Ok(()))
                })
            }
        })?;
        let Ok(task) = told.recv() else {
            let outcome = hop.join().unwrap_or_else(|_| anyhow::bail!("the hop panicked"));
            return outcome.and_then(|()| anyhow::bail!("the hop has ended")).context("no path of packets");
        };
        Ok(Self { near, far, near_address: NEAR, far_address: FAR, counts, task, stop, hop: Some(hop) })
    }

    pub fn traffic(&self) -> Traffic {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Counts { passed, lost, overflowed } = &*self.counts;
        Traffic { passed: read(passed), lost: read(lost), overflowed: read(overflowed) }
    }

    /// User and system time of the hop, seconds. It includes what the kernel does to deliver a packet.
    pub fn cpu(&self) -> f64 {
        cpu_of_task(&self.task).unwrap_or_default()
    }

    /// Waits until next to nothing passes.
    pub async fn until_idle(&self) {
        let mut before = self.traffic().passed;
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = self.traffic().passed;
            if now - before < 20 {
                return;
            }
            before = now;
        }
    }
}

impl Drop for PacketPath {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(hop) = self.hop.take() {
            let _ = hop.join();
        }
    }
}

/// Sets a property of TCP in this thread's namespace.
fn set(name: &str, value: &str) -> anyhow::Result<()> {
    let file = format!("/proc/sys/net/ipv4/{name}");
    std::fs::write(&file, value).with_context(|| format!("{file}: {value}"))
}

/// Makes a TUN device with this address, in a network of the two ends alone.
fn device(namespace: &str, address: Ipv4Addr) -> anyhow::Result<Tun> {
    let _inside = netns::enter(namespace)?;
    let mut devices = Tun::builder().mtu(MTU as i32).build().context("a TUN device")?;
    let device = devices.pop().context("no TUN device")?;
    let (name, network) = (device.name(), format!("{address}/30"));
    run(Command::new("ip").args(["link", "set", name, "txqueuelen", DEVICE_QUEUE, "up"]))?;
    run(Command::new("ip").args(["address", "add", &network, "dev", name]))?;
    Ok(device)
}

/// Carries packets both ways for ever.
async fn carry(devices: &[Tun; 2], conditions: Conditions, seed: u64, counts: &Counts) -> anyhow::Result<()> {
    let [near, far] = devices;
    let mut lines = [seed, seed.wrapping_add(1)].map(|seed| Line::new(conditions, seed, Instant::now()));
    let mut buffers = [[0; MTU]; 2];
    loop {
        let due = lines.iter().filter_map(Line::due).min();
        let arrival = sleep_until(due.unwrap_or_else(Instant::now));
        let [from_near, from_far] = &mut buffers;
        let received = tokio::select! {
            length = near.recv(from_near) => Some((0, length?)),
            length = far.recv(from_far) => Some((1, length?)),
            () = arrival, if due.is_some() => None,
        };
        let now = Instant::now();
        if let Some((from, length)) = received {
            let (line, device, buffer) = (&mut lines[from], &devices[from], &mut buffers[from]);
            counts.count(line.offer(&buffer[..length], now));
            for _ in 1..BATCH {
                let Ok(length) = device.try_recv(buffer) else { break };
                counts.count(line.offer(&buffer[..length], now));
            }
        }
        for (line, device) in lines.iter_mut().zip([far, near]) {
            while let Some(packet) = line.take(now) {
                // A device that is going down takes nothing more, which its own end tells.
                let _ = device.try_send(&packet);
            }
        }
    }
}

impl Counts {
    fn count(&self, fate: Fate) {
        let count = match fate {
            Fate::OnItsWay => &self.passed,
            Fate::Lost => &self.lost,
            Fate::Overflowed => &self.overflowed,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const FREE: Conditions = Conditions { delay: Duration::ZERO, rate: None, queue: 0.0, loss: 0.0 };

    fn line(conditions: Conditions) -> (Line, Instant) {
        let now = Instant::now();
        (Line::new(conditions, 1, now), now)
    }

    #[test]
    fn packets_arrive_in_order_after_the_delay_and_not_before() {
        let (mut line, start) = line(Conditions { delay: 50 * MS, ..FREE });
        for i in 0..3 {
            assert_eq!(line.offer(&[i], start + u32::from(i) * MS), Fate::OnItsWay);
        }
        assert_eq!(line.due(), Some(start + 50 * MS));
        assert_eq!(line.take(start + 49 * MS), None);
        assert_eq!(line.take(start + 51 * MS), Some(vec![0]));
        assert_eq!(line.take(start + 51 * MS), Some(vec![1]));
        assert_eq!(line.take(start + 51 * MS), None);
        assert_eq!(line.take(start + 60 * MS), Some(vec![2]));
        assert_eq!(line.due(), None);
    }

    #[test]
    fn a_line_sends_one_packet_after_the_other_at_its_rate() {
        let (mut line, start) =
            line(Conditions { delay: 10 * MS, rate: Some(1000.0 * 1000.0), queue: 1e6, loss: 0.0 });
        for _ in 0..3 {
            line.offer(&[0; 1000], start);
        }
        for i in 1..=3 {
            assert_eq!(line.due(), Some(start + (10 + i) * MS));
            line.take(start + (10 + i) * MS).unwrap();
        }
        // The line has been free meanwhile.
        line.offer(&[0; 1000], start + 100 * MS);
        assert_eq!(line.due(), Some(start + 111 * MS));
    }

    #[test]
    fn a_full_queue_drops_what_comes_last_and_takes_more_once_it_has_sent() {
        let (mut line, start) =
            line(Conditions { delay: 500 * MS, rate: Some(1000.0 * 1000.0), queue: 5000.0, loss: 0.0 });
        let mut offer = |now| line.offer(&[0; 1000], now);
        let fates: Vec<_> = (0..7).map(|_| offer(start)).collect();
        assert!(fates[..5].iter().all(|fate| *fate == Fate::OnItsWay), "{fates:?}");
        assert!(fates[5..].iter().all(|fate| *fate == Fate::Overflowed), "{fates:?}");
        // What is on its way behind the line does not count: one packet has left the queue, and makes room for one.
        assert_eq!([start + MS; 2].map(&mut offer), [Fate::OnItsWay, Fate::Overflowed]);
    }

    #[test]
    fn loss_is_as_frequent_as_it_should_be_and_the_same_for_the_same_seed() {
        let run = |seed| {
            let now = Instant::now();
            let mut line = Line::new(Conditions { loss: 0.01, ..FREE }, seed, now);
            (0..100_000).map(|_| line.offer(&[0], now)).collect::<Vec<_>>()
        };
        let (first, again, other) = (run(7), run(7), run(8));
        assert!(first == again && first != other);
        let lost = first.iter().filter(|fate| **fate == Fate::Lost).count();
        assert!((900..1100).contains(&lost), "{lost}");
    }

    #[test]
    fn a_lost_packet_takes_no_room() {
        let lossy = Conditions { rate: Some(1e6), queue: 1000.0, loss: 1.0, ..FREE };
        let (mut line, now) = line(lossy);
        assert!((0..10).all(|_| line.offer(&[0; 1000], now) == Fate::Lost));
        assert_eq!(line.due(), None);
    }

    #[test]
    fn queues_hold_what_the_line_carries_in_50_ms() {
        let conditions = Conditions::new(20 * MS, 100e6, 0.0);
        assert_eq!((conditions.delay, conditions.rate), (10 * MS, Some(12.5e6)));
        assert_eq!(conditions.queue, 625_000.0);
    }
}
