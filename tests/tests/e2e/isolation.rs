//! What one stream may do to the others: nothing. What a caller that goes away leaves behind: nothing.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tests::{
    client::{Door, Refused, Stream},
    cluster::{Cluster, Kind, Options, SOON},
    load::{completes, download, gets, upload},
    pattern::{Checker, fill},
    process::{eventually, free_port},
    target,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

const MB: u64 = 1_000_000;
/// What both agents together may grow by, however many streams are stalled.
const GROWTH: u64 = 64 * MB;
/// Bytes of one write: as many as fit, or one at a time.
const FIREHOSE: usize = 256 * 1024;
const TINY: usize = 1;

/// A target that shows how far its streams have come. After the first line,
/// `feed N` sends the pattern for ever, N bytes at a time;
/// `stuck` reads nothing until it is released, then checks the pattern to its end and answers with its length.
struct Staller {
    port: u16,
    moved: Arc<AtomicU64>,
    open: Arc<AtomicU64>,
    release: watch::Sender<bool>,
}

impl Staller {
    fn start() -> Self {
        let port = free_port();
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        // Small, so that soon it is the agents who would have to hold what nobody takes.
        socket.set_recv_buffer_size(64 * 1024).unwrap();
        socket.set_send_buffer_size(64 * 1024).unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
        let listener = socket.listen(1024).unwrap();
        let (release, _) = watch::channel(false);
        let staller = Self { port, moved: Arc::default(), open: Arc::default(), release };
        let (moved, open, release) =
            (staller.moved.clone(), staller.open.clone(), staller.release.subscribe());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (moved, open, release) = (moved.clone(), open.clone(), release.clone());
                tokio::spawn(async move {
                    open.fetch_add(1, Ordering::Relaxed);
                    // The caller's end shows in what it gets, not here.
                    let _ = stall(socket, &moved, release).await;
                    open.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
        staller
    }

    /// Waits until next to nothing moves: a kernel's full buffers still take a trickle of tiny packets. Going on
    /// too early makes a test weaker, not wrong.
    async fn settled(&self) {
        let (mut mark, mut looks) = (0, 0);
        let began = Instant::now();
        eventually("stalled streams come to a rest", Duration::from_secs(240), async || {
            let now = self.moved.load(Ordering::Relaxed);
            looks += 1;
            if now - mark > 64 * 1024 {
                (mark, looks) = (now, 0);
            }
            (now > 0 && looks >= 100).then_some(())
        })
        .await;
        println!("  at rest after {:.1} MB and {:.1?}", mark as f64 / 1e6, began.elapsed());
    }

    fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }
}

async fn stall(
    socket: TcpStream,
    moved: &AtomicU64,
    mut release: watch::Receiver<bool>,
) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut socket = BufReader::with_capacity(64, socket);
    let mut line = String::new();
    socket.read_line(&mut line).await?;
    if let Some(size) = line.trim().strip_prefix("feed ") {
        return feed(socket.get_mut(), size.parse().unwrap(), moved, || false).await.map(drop);
    }
    assert_eq!(line.trim(), "stuck");
    let _ = release.wait_for(|released| *released).await;
    let mut checker = Checker::default();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = socket.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        checker.check(&buffer[..n]);
    }
    socket.write_all(format!("{}\n", checker.offset()).as_bytes()).await
}

/// Writes the pattern, `size` bytes at a time, until told to stop; gives the number of bytes.
async fn feed(
    socket: &mut (impl AsyncWriteExt + Unpin),
    size: usize,
    moved: &AtomicU64,
    stop: impl Fn() -> bool,
) -> std::io::Result<u64> {
    let mut buffer = vec![0; FIREHOSE];
    let mut offset = 0;
    loop {
        fill(&mut buffer, offset);
        for piece in buffer.chunks(size) {
            if stop() {
                return Ok(offset);
            }
            socket.write_all(piece).await?;
            socket.flush().await?;
            offset += piece.len() as u64;
            moved.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
    }
}

/// A caller that reads the pattern when it is told to.
struct Caller {
    stream: Stream,
    checker: Checker,
}

impl Caller {
    /// Starts to read and then stops.
    async fn stalled(door: &Door, target: &str, line: &str) -> Self {
        let mut stream = door.stream(target).await.unwrap();
        stream.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        let mut caller = Self { stream, checker: Checker::default() };
        assert!(caller.read_on(1000).await, "{line}: the stream ended at once");
        caller
    }

    /// Reads `bytes` more; `false` if the stream ends before.
    async fn read_on(&mut self, bytes: u64) -> bool {
        let until = self.checker.offset() + bytes;
        let mut buffer = vec![0; 64 * 1024];
        while self.checker.offset() < until {
            let room = buffer.len().min((until - self.checker.offset()) as usize);
            match self.stream.read(&mut buffer[..room]).await {
                Ok(0) | Err(_) => return false,
                Ok(n) => self.checker.check(&buffer[..n]),
            }
        }
        true
    }
}

async fn one_node(kind: Kind, ports: &[u16], master_config: &str) -> Cluster {
    let options = Options {
        nodes: vec![("n1".to_owned(), kind)],
        ports: ports.to_vec(),
        master_config: master_config.to_owned(),
        ..Options::default()
    };
    Cluster::start(options).await.unwrap()
}

fn memory(cluster: &Cluster) -> u64 {
    cluster.master.usage().memory + cluster.nodes[0].process.as_ref().unwrap().usage().memory
}

/// Asserts that what the agents hold is bounded; for an sshd, what the master holds.
fn assert_bounded(what: &str, before: u64, now: u64) {
    let grown = now.saturating_sub(before);
    println!("  {what}: memory grew by {:.1} MB, from {:.1} MB", grown as f64 / 1e6, before as f64 / 1e6);
    assert!(grown < GROWTH, "{what}: memory grew by {grown} bytes");
}

/// What everybody else does meanwhile.
async fn others_work(cluster: &Cluster, port: u16) {
    let (doors, target) = (cluster.doors(), format!("n1:{port}"));
    completes("2,000 requests on 32 kept connections", gets(&doors, &target, 32, 2000)).await;
    for door in &doors {
        completes("a download", download(door, &target, 64 * MB)).await;
        completes("an upload", upload(door, &target, 64 * MB)).await;
    }
}

fn streams_of(cluster: &Cluster) -> Option<u64> {
    let status = cluster.node_status("n1").ok()?;
    status["tunnels"].as_array()?.iter().map(|tunnel| tunnel["streams"].as_u64()).sum()
}

/// Streams that the master's egress listeners hold.
async fn door_streams(cluster: &Cluster) -> f64 {
    let mut sum = 0.0;
    for door in ["connect-unix", "connect-tls"] {
        // A door that has had no stream yet has no sample.
        let prefix = format!("master_agent_streams{{egress=\"{door}\"}}");
        sum += cluster.metric(cluster.admin, &prefix).await.unwrap_or_default();
    }
    sum
}

async fn stalled_readers_hold_up_nobody(kind: Kind) {
    println!("{kind:?}");
    let (port, staller) = (target::start().await, Staller::start());
    let cluster = one_node(kind, &[port, staller.port], "").await;
    let before = memory(&cluster);
    let mut stalled = Vec::new();
    let [unix, tls] = cluster.doors();
    // One byte at a time, the kernel's buffers of a TCP connection take minutes to fill.
    for (size, doors) in [(FIREHOSE, [&unix, &tls]), (TINY, [&unix, &unix])] {
        for door in doors.into_iter().cycle().take(4) {
            let target = format!("n1:{}", staller.port);
            stalled.push((size, Caller::stalled(door, &target, &format!("feed {size}")).await));
        }
    }
    staller.settled().await;
    others_work(&cluster, port).await;
    assert_bounded("8 stalled readers", before, memory(&cluster));
    for (size, caller) in &mut stalled {
        // More than lay on the way, so that the stream must have come to life again.
        let bytes = if *size == TINY { 20_000 } else { 16 * MB };
        assert!(completes("a stalled reader reads on", caller.read_on(bytes)).await);
    }
    assert_eq!(staller.open(), 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn stalled_readers_hold_up_nobody_on_a_dialled_node() {
    stalled_readers_hold_up_nobody(Kind::Dialled).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn stalled_readers_hold_up_nobody_on_a_node_that_calls_home() {
    stalled_readers_hold_up_nobody(Kind::CallHome).await;
}

/// A caller that sends the pattern until its target is released; gives what it sent and what the target got.
fn writer(door: &Door, staller: &Staller, size: usize) -> JoinHandle<(u64, String)> {
    let (door, target, moved) = (door.clone(), format!("n1:{}", staller.port), staller.moved.clone());
    let release = staller.release.subscribe();
    tokio::spawn(async move {
        let mut stream = door.stream(&target).await.unwrap();
        stream.write_all(b"stuck\n").await.unwrap();
        let sent = feed(&mut stream, size, &moved, || *release.borrow()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        (sent, answer)
    })
}

async fn targets_that_do_not_read_hold_up_nobody(kind: Kind) {
    println!("{kind:?}");
    let (port, staller) = (target::start().await, Staller::start());
    let cluster = one_node(kind, &[port, staller.port], "").await;
    let before = memory(&cluster);
    let mut writers = Vec::new();
    let [unix, tls] = cluster.doors();
    for (size, doors) in [(FIREHOSE, [&unix, &tls]), (TINY, [&unix, &unix])] {
        for door in doors.into_iter().cycle().take(4) {
            writers.push(writer(door, &staller, size));
        }
    }
    staller.settled().await;
    others_work(&cluster, port).await;
    assert_bounded("8 targets that don't read", before, memory(&cluster));
    assert_eq!(staller.open(), 8);
    staller.release.send(true).unwrap();
    for writer in writers {
        let (sent, answer) = completes("a stalled writer goes on", writer).await.unwrap();
        assert_eq!(answer.trim(), sent.to_string());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn targets_that_do_not_read_hold_up_nobody_on_a_dialled_node() {
    targets_that_do_not_read_hold_up_nobody(Kind::Dialled).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn targets_that_do_not_read_hold_up_nobody_on_a_node_that_calls_home() {
    targets_that_do_not_read_hold_up_nobody(Kind::CallHome).await;
}

/// sshd waits for windows itself, so nothing but the target is stalled.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn targets_that_do_not_read_hold_up_nobody_on_an_sshd() {
    targets_that_do_not_read_hold_up_nobody(Kind::Sshd).await;
}

struct SshdWithStalledReaders {
    cluster: Cluster,
    port: u16,
    staller: Staller,
    stalled: Vec<Caller>,
    memory_before: u64,
}

async fn sshd_with_stalled_readers() -> SshdWithStalledReaders {
    let (port, staller) = (target::start().await, Staller::start());
    let cluster = one_node(Kind::Sshd, &[port, staller.port], "").await;
    let memory_before = cluster.master.usage().memory;
    let mut stalled = Vec::new();
    for size in [FIREHOSE, 1024] {
        for door in cluster.doors().iter().cycle().take(4) {
            let target = format!("n1:{}", staller.port);
            stalled.push(Caller::stalled(door, &target, &format!("feed {size}")).await);
        }
    }
    SshdWithStalledReaders { cluster, port, staller, stalled, memory_before }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn stalled_readers_on_an_sshd_are_reset_and_the_others_complete() {
    let SshdWithStalledReaders { cluster, port, staller, stalled, memory_before } =
        sshd_with_stalled_readers().await;
    others_work(&cluster, port).await;
    eventually("the targets of the stalled readers see an end", SOON, async || {
        (staller.open() == 0).then_some(())
    })
    .await;
    assert_bounded("8 stalled readers, master", memory_before, cluster.master.usage().memory);
    for mut caller in stalled {
        let ended = completes("a reset stream ends", caller.read_on(64 * MB)).await;
        assert!(!ended, "a stalled reader was not reset");
    }
    eventually("no stream is left", SOON, async || (streams_of(&cluster)? == 0).then_some(())).await;
    others_work(&cluster, port).await;
    let tunnels = cluster.metric(cluster.admin, "master_agent_tunnels_established_total").await.unwrap();
    assert_eq!(tunnels, 1.0, "the tunnel was lost");
}

/// What a reset reader held is free again although that reader does nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_reset_stream_s_socket_is_closed_although_its_reader_does_not_read() {
    let SshdWithStalledReaders { cluster, staller, stalled, .. } = sshd_with_stalled_readers().await;
    eventually("the targets of the stalled readers see an end", SOON, async || {
        (staller.open() == 0).then_some(())
    })
    .await;
    eventually("the master has closed the sockets of the stalled readers", SOON, async || {
        (door_streams(&cluster).await == 0.0).then_some(())
    })
    .await;
    drop(stalled);
}

/// A stalled reader whose stream fits into its buffer holds up nobody, and is left alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stalled_reader_on_an_sshd_that_holds_up_nobody_is_not_reset() {
    let port = target::start().await;
    let cluster = one_node(Kind::Sshd, &[port], "").await;
    let target = format!("n1:{port}");
    let bytes = 2 * 1024 * 1024;
    let mut stalled = Vec::new();
    for door in cluster.doors() {
        stalled.push(Caller::stalled(&door, &target, &format!("source {bytes}")).await);
    }
    others_work(&cluster, port).await;
    for caller in &mut stalled {
        let left = bytes - caller.checker.offset();
        assert!(completes("the rest", caller.read_on(left)).await, "reset at {}", caller.checker.offset());
        assert!(!caller.read_on(1).await);
    }
}

/// Reads 256 KiB at a time, at a steady pace well above what a stream must take to be let alone (256 KiB in
/// 250 ms). `Err` when this reader itself did not keep to that, the machine being busy.
async fn read_steadily(door: &Door, target: &str) -> Result<(), Duration> {
    const QUANTUM: u64 = 256 * 1024;
    let mut caller = Caller::stalled(door, target, &format!("feed {FIREHOSE}")).await;
    let mut pace = tokio::time::interval(Duration::from_millis(100));
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    for _ in 0..50 {
        pace.tick().await;
        let complete = completes("a quantum", caller.read_on(QUANTUM)).await;
        longest = longest.max(last.elapsed());
        last = Instant::now();
        if !complete {
            let offset = caller.checker.offset();
            println!("  {}: ended at {offset}; the longest pause was {longest:.0?}", door.name());
            if longest > Duration::from_millis(150) {
                return Err(longest);
            }
            panic!("reset at {offset}, though it took {QUANTUM} bytes at least every {longest:.0?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_slow_but_steady_reader_on_an_sshd_is_not_reset() {
    let staller = Staller::start();
    let cluster = one_node(Kind::Sshd, &[staller.port], "").await;
    for door in cluster.doors() {
        let mut result = Ok(());
        for _ in 0..10 {
            result = read_steadily(&door, &format!("n1:{}", staller.port)).await;
            if result.is_ok() {
                break;
            }
        }
        result.expect("this machine is too busy for a steady reader");
    }
}

fn refusal<T>(result: anyhow::Result<Result<T, Refused>>) -> Refused {
    match result.unwrap() {
        Ok(_) => panic!("not refused"),
        Err(refused) => refused,
    }
}

/// A stream that stays open.
async fn hold(door: &Door, target: &str) -> Result<Stream, Refused> {
    let mut stream = door.connect(target).await.unwrap()?;
    stream.write_all(b"hold\n").await.unwrap();
    Ok(stream)
}

async fn a_cap_answers_503_and_names_itself(kind: Kind, setting: &str) {
    println!("{kind:?} {setting}");
    let port = target::start().await;
    let cluster = one_node(kind, &[port], &format!("tunnels: {{{setting}: 5}}")).await;
    let target = format!("n1:{port}");
    for door in cluster.doors() {
        let mut held = Vec::new();
        for _ in 0..5 {
            let what = "a place is free";
            held.push(eventually(what, SOON, async || hold(&door, &target).await.ok()).await);
        }
        let refused = refusal(door.connect(&target).await);
        assert_eq!(refused.status, 503, "{refused:?}");
        assert!(refused.reason.contains(setting), "{refused:?}");
        drop(held);
    }
    eventually("no stream is left", SOON, async || (streams_of(&cluster)? == 0).then_some(())).await;

    let mut callers = JoinSet::new();
    for door in cluster.doors().into_iter().cycle().take(60) {
        let target = target.clone();
        callers.spawn(async move { hold(&door, &target).await });
    }
    let results = completes("60 callers at once are answered", callers.join_all()).await;
    for refused in results.iter().filter_map(|r| r.as_ref().err()) {
        assert_eq!(refused.status, 503, "{refused:?}");
        assert!(refused.reason.contains(setting), "{refused:?}");
    }
    let opened = results.iter().filter(|r| r.is_ok()).count();
    assert_eq!(opened, 5, "of 60 callers at once");
    drop(results);
    eventually("no stream is left", SOON, async || (streams_of(&cluster)? == 0).then_some(())).await;
    download(&cluster.unix, &target, MB).await;
}

const PER_TUNNEL: &str = "max_streams_per_tunnel";
const PER_NODE: &str = "max_streams_per_node";

#[tokio::test]
async fn the_cap_of_a_tunnel_answers_503_and_names_itself() {
    for kind in [Kind::Dialled, Kind::CallHome] {
        a_cap_answers_503_and_names_itself(kind, PER_TUNNEL).await;
    }
}

#[tokio::test]
async fn the_cap_of_a_tunnel_to_an_sshd_answers_503_and_names_itself() {
    a_cap_answers_503_and_names_itself(Kind::Sshd, PER_TUNNEL).await;
}

#[tokio::test]
async fn the_cap_of_a_node_answers_503_and_names_itself() {
    for kind in [Kind::Dialled, Kind::CallHome, Kind::Sshd] {
        a_cap_answers_503_and_names_itself(kind, PER_NODE).await;
    }
}

/// A listener that answers no further SYN, since its queue is full.
pub struct NeverAnswers {
    pub port: u16,
    listener: TcpListener,
    waiting: Vec<TcpStream>,
}

impl NeverAnswers {
    pub async fn start() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        socket.bind(address).unwrap();
        let listener = socket.listen(1).unwrap();
        let mut waiting = Vec::new();
        // Two in a row unanswered: once may be a busy machine.
        let mut unanswered = 0;
        while unanswered < 2 {
            match tokio::time::timeout(Duration::from_secs(2), TcpStream::connect(address)).await {
                Ok(connected) => {
                    waiting.push(connected.unwrap());
                    unanswered = 0;
                }
                Err(_) => unanswered += 1,
            }
        }
        Self { port: address.port(), listener, waiting }
    }
}

fn descriptors(cluster: &Cluster) -> (u64, u64) {
    (cluster.master.usage().descriptors, cluster.nodes[0].process.as_ref().unwrap().usage().descriptors)
}

/// Waits until both agents hold no stream, and no descriptor that they had not `before`.
async fn nothing_is_left(cluster: &Cluster, before: (u64, u64)) {
    let mut last = None;
    let node = cluster.nodes[0].admin;
    eventually("nothing is left", SOON, async || {
        let streams = (streams_of(cluster)?, door_streams(cluster).await);
        let on_node = cluster.metric(node, "node_agent_streams").await.ok()?;
        let descriptors = descriptors(cluster);
        let now = Some((streams, on_node, descriptors));
        if last != now {
            println!(
                "  streams {streams:?}, on the node {on_node}, descriptors {descriptors:?}, before {before:?}"
            );
            last = now;
        }
        let ended = streams == (0, 0.0) && on_node == 0.0;
        (ended && descriptors.0 <= before.0 && descriptors.1 <= before.1).then_some(())
    })
    .await;
}

async fn dials_given_up_are_cancelled(kind: Kind) {
    println!("{kind:?}");
    const DIALS: u64 = 100;
    let silent = NeverAnswers::start().await;
    let cluster = one_node(kind, &[silent.port], "tunnels: {dial_timeout: 120s}").await;
    let target = format!("n1:{}", silent.port);
    let node = cluster.nodes[0].admin;
    let before = descriptors(&cluster);
    let memory_before = memory(&cluster);
    for (i, door) in cluster.doors().iter().enumerate() {
        let mut callers = Vec::new();
        for _ in 0..DIALS {
            let mut caller = door.enter().await.unwrap();
            caller.write_all(format!("CONNECT {target} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
            callers.push(caller);
        }
        eventually("all dials are under way", SOON, async || (streams_of(&cluster)? == DIALS).then_some(()))
            .await;
        eventually("the node dials", SOON, async || {
            (descriptors(&cluster).1 >= before.1 + DIALS).then_some(())
        })
        .await;
        drop(callers);
        let expected = (DIALS * (i as u64 + 1)) as f64;
        eventually("the node has cancelled every dial", SOON, async || {
            let cancelled =
                cluster.metric(node, "node_agent_dials_total{result=\"cancelled\"}").await.ok()?;
            (cancelled == expected).then_some(())
        })
        .await;
        nothing_is_left(&cluster, before).await;
        let prefix =
            format!("master_agent_dials_total{{egress=\"connect-{}\",result=\"cancelled\"", door.name());
        assert_eq!(cluster.metric(cluster.admin, &prefix).await.unwrap(), DIALS as f64);
    }
    assert_bounded("200 cancelled dials", memory_before, memory(&cluster));
}

#[tokio::test]
async fn dials_given_up_are_cancelled_on_a_dialled_node() {
    dials_given_up_are_cancelled(Kind::Dialled).await;
}

#[tokio::test]
async fn dials_given_up_are_cancelled_on_a_node_that_calls_home() {
    dials_given_up_are_cancelled(Kind::CallHome).await;
}

/// SSH can't take an open back: what sshd opens late is closed at once, and its place is free.
#[tokio::test]
async fn a_dial_given_up_on_an_sshd_is_closed_when_it_is_answered() {
    let NeverAnswers { port, listener, waiting } = NeverAnswers::start().await;
    let cluster =
        one_node(Kind::Sshd, &[port], "tunnels: {dial_timeout: 120s, max_streams_per_node: 1}").await;
    let target = format!("n1:{port}");
    for door in cluster.doors() {
        let mut caller = door.enter().await.unwrap();
        caller.write_all(format!("CONNECT {target} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
        eventually("the one place is taken", SOON, async || {
            let mut probe = cluster.unix.enter().await.ok()?;
            probe.write_all(format!("CONNECT {target} HTTP/1.1\r\n\r\n").as_bytes()).await.ok()?;
            let answer = tests::client::read_head(&mut probe);
            let answer = tokio::time::timeout(Duration::from_millis(300), answer).await.ok()?.ok()?;
            (answer.0 == 503 && answer.1.contains(PER_NODE)).then_some(())
        })
        .await;
        drop(caller);
    }
    let before = cluster.master.usage().descriptors;
    drop(waiting);
    // Callers given up, the probes among them, reach the target now and are closed without a byte.
    let accept_all = async {
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            tokio::spawn(async move { socket.read_to_end(&mut Vec::new()).await });
        }
    };
    let stream = async {
        eventually("the place is free again", SOON * 2, async || {
            let connect = tokio::time::timeout(SOON, cluster.unix.connect(&target)).await.ok()?;
            connect.ok()?.ok()
        })
        .await
    };
    let stream = tokio::select! {
        stream = stream => stream,
        () = accept_all => unreachable!(),
    };
    drop(stream);
    drop(listener);
    eventually("no channel is left", SOON * 2, async || (streams_of(&cluster)? == 0).then_some(())).await;
    eventually("no descriptor is left", SOON, async || {
        (cluster.master.usage().descriptors <= before).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_target_that_never_answers_gets_504_within_the_dial_timeout() {
    for kind in [Kind::Dialled, Kind::CallHome, Kind::Sshd] {
        let silent = NeverAnswers::start().await;
        let cluster = one_node(kind, &[silent.port], "tunnels: {dial_timeout: 1s}").await;
        let target = format!("n1:{}", silent.port);
        let before = descriptors(&cluster);
        for door in cluster.doors() {
            let began = Instant::now();
            let refused = completes("an answer", door.connect(&target)).await;
            let took = began.elapsed();
            let refused = refusal(refused);
            println!("{kind:?} {}: {took:.2?} {refused:?}", door.name());
            assert_eq!(refused.status, 504, "{refused:?}");
            assert!(
                refused.reason.contains("1s") && refused.reason.contains(&silent.port.to_string()),
                "{refused:?}"
            );
            assert!(took >= Duration::from_millis(900), "{took:?}");
            assert!(took < SOON, "{took:?}");
        }
        if kind != Kind::Sshd {
            nothing_is_left(&cluster, before).await;
        }
    }
}
