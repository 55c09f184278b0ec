//! Bytes and peers that mean harm: malformed SSH, a node and a master that have turned hostile, handshakes that never
//! end. Honest peers are not disturbed, and nothing grows without bound.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use proto::{
    DialError,
    mux::{
        Version,
        frame::{self, Frame, Hello},
        window,
    },
};
use rand::{RngExt, rngs::StdRng};
use tests::{
    cluster::{Cluster, Kind, Options, SOON},
    hostile_bytes::{corpus, in_turns, mutate, rng, show, status, status_lines, throw},
    load::completes,
    openssh::wait_for_port,
    process::eventually,
    rogue::{Identity, RogueNode},
    rogue_frames::{
        FromMaster, Turned, credit, data, decoder, encode, eof, malformed_frames, no_frame, open, opened,
        reset,
    },
    steady::{Echo, Health, Steady, raise_descriptor_limit},
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

const MB: u64 = 1024 * 1024;

fn options(nodes: &[(&str, Kind)], port: u16) -> Options {
    let nodes = nodes.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect();
    Options { nodes, ports: vec![port], ..Options::default() }
}

const SSH_NASTY: &[&[u8]] = &[
    b"\0\0\0\0",
    b"\0\0\0\x01",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\x04\0\0",
    b"\0",
    b"\r\n",
    b"\n",
    b"SSH-2.0-x\r\n",
    b"SSH-1.5-x\r\n",
    b"\x14",
    b"\x15",
    b"\x1e",
    b"\x1f",
    b"\x01",
    b"\x02",
    b"\x05",
    b"\x32",
    b"\x50",
    b"\x5a",
    b"\x5e",
    b",",
    b"none",
    b"ssh-rsa",
    b"curve25519-sha256",
    b"mlkem768x25519-sha256",
    b"ssh-ed25519-cert-v01@openssh.com",
    b"kex-strict-c-v00@openssh.com",
    &[0; 2000],
    &[0xff; 300],
];

/// Mutations of a recorded beginning, or pure noise.
fn ssh_bytes(rng: &mut StdRng, beginning: &[u8]) -> Vec<u8> {
    match rng.random_range(0..10) {
        0 => {
            let mut noise = b"SSH-2.0-x\r\n".to_vec();
            noise.extend((0..rng.random_range(0..2000)).map(|_| rng.random::<u8>()));
            noise
        }
        1 => {
            // Only the version line is whole, so that the packet behind it is looked at.
            let line = beginning.iter().position(|b| *b == b'\n').unwrap() + 1;
            let mut bytes = beginning[..line].to_vec();
            bytes.extend(mutate(rng, &beginning[line..], SSH_NASTY));
            bytes
        }
        _ => mutate(rng, beginning, SSH_NASTY),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn malformed_ssh_is_refused_by_both_agents() {
    let port = target::start().await;
    let mut options = options(&[("n1", Kind::Dialled), ("n2", Kind::CallHome)], port);
    options.master_config = "tunnels: {handshake_timeout: 5s}".to_owned();
    options.node_config = "limits: {handshake_timeout: 5s}".to_owned();
    let cluster = Cluster::start(options).await.unwrap();
    let mut steady = [
        Steady::start(&cluster, "n1", port).await.unwrap(),
        Steady::start(&cluster, "n2", port).await.unwrap(),
    ];
    let node = SocketAddr::from(([127, 0, 0, 1], cluster.nodes[0].port));
    let corpus = corpus("ssh");
    let beginning = |name: &str| -> Arc<[u8]> {
        corpus.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.clone().into()).unwrap()
    };
    let doors = [
        (node, beginning("valid-client-beginning")),
        (cluster.call_home, beginning("valid-server-beginning")),
    ];

    for (address, _) in &doors {
        for (name, bytes) in &corpus {
            let socket = TcpStream::connect(address).await.unwrap();
            completes(name, throw(socket, bytes, &mut rng(0))).await;
        }
    }
    let attack = |(address, beginning): (SocketAddr, Arc<[u8]>)| {
        move |number: usize| {
            let mut rng = rng(number);
            let bytes = ssh_bytes(&mut rng, &beginning);
            async move {
                let socket = TcpStream::connect(address).await.unwrap();
                completes("malformed SSH", throw(socket, &bytes, &mut rng)).await;
            }
        }
    };
    for door in &doors {
        in_turns(500, attack(door.clone())).await;
    }
    let health = [&cluster.master, cluster.nodes[0].process.as_ref().unwrap()].map(Health::of);
    for door in &doors {
        let began = std::time::Instant::now();
        in_turns(10_000, attack(door.clone())).await;
        println!("{}: {:?}", door.0, began.elapsed());
        for steady in &mut steady {
            steady.check(&cluster).await;
        }
    }

    // Those that don't even leave are cut.
    let mut slow = JoinSet::new();
    for (address, beginning) in doors {
        for i in 0..40 {
            let sent = beginning[..beginning.len() * i / 40].to_vec();
            slow.spawn(async move {
                let mut socket = TcpStream::connect(address).await.unwrap();
                let _ = socket.write_all(&sent).await;
                let mut buffer = [0; 4096];
                while matches!(socket.read(&mut buffer).await, Ok(n) if n > 0) {}
            });
        }
    }
    completes("handshakes that stand still", slow.join_all()).await;

    for (steady, node) in steady.iter_mut().zip(["n1", "n2"]) {
        steady.check(&cluster).await;
        Echo::open(&cluster.unix, &format!("{node}:{port}")).await.unwrap();
    }
    for health in health {
        health.check(10 * MB).await;
    }
    for (admin, metric) in [
        (cluster.admin, "master_agent_tunnels_refused_total{reason=\"ssh\"}"),
        (cluster.nodes[0].admin, "node_agent_handshakes_total{result=\"failed\"}"),
    ] {
        let counted = cluster.metric(admin, metric).await.unwrap();
        assert!(counted >= 10_000.0, "{metric} {counted}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_node_that_turns_harms_only_its_own_tunnel() {
    let port = target::start().await;
    let mut options = options(&[("n1", Kind::Dialled), ("n2", Kind::Dialled)], port);
    options.nodes_down = true;
    options.master_config = "tunnels: {backoff_min: 10ms, backoff_max: 50ms}".to_owned();
    let mut cluster = Cluster::start(options).await.unwrap();
    cluster.start_node(1).unwrap();
    cluster.wait_state("n2", "connected").await;
    let mut steady = Steady::start(&cluster, "n2", port).await.unwrap();
    // The identity is genuine: it is what the node has turned that is tested.
    let identity = Identity::read(&cluster.nodes[0].dir.join("state/host_key")).unwrap();
    let mut rogue = RogueNode::listen(cluster.nodes[0].port, identity, true).await.unwrap();
    let log = cluster.master.log.clone();
    let mut next = async || {
        let mux = completes("the master comes again", rogue.tunnels.recv()).await.unwrap();
        FromMaster { mux, decoder: decoder() }
    };
    let logged = async |text: &str| {
        eventually(text, SOON, async || std::fs::read_to_string(&log).unwrap().contains(text).then_some(()))
            .await;
    };
    let caller = || {
        let (door, target) = (cluster.unix.clone(), format!("n1:{port}"));
        tokio::spawn(async move {
            let mut stream = door.enter().await.unwrap();
            stream.write_all(format!("CONNECT {target} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            answer
        })
    };

    let mut health = None;
    for round in 0..2 {
        // More data than the master granted, to a caller that reads, and then no frame at all.
        let mut tunnel = next().await;
        cluster.wait_state("n1", "connected").await;
        let answer = caller();
        let stream = tunnel.open().await;
        tunnel.frame(opened(stream)).await;
        for _ in 0..200 {
            tunnel.frame(data(stream, &[b'x'; 60_000])).await;
        }
        tunnel.send(no_frame()).await;
        tunnel.closed().await;
        assert_eq!(status(&answer.await.unwrap()), Some(200));

        // The same to one that does not read.
        let mut tunnel = next().await;
        cluster.wait_state("n1", "connected").await;
        let (door, target) = (cluster.unix.clone(), format!("n1:{port}"));
        let deaf = tokio::spawn(async move { door.stream(&target).await });
        let stream = tunnel.open().await;
        tunnel.frame(opened(stream)).await;
        let deaf = completes("the stream", deaf).await.unwrap().unwrap();
        for _ in 0..400 {
            tunnel.frame(data(stream, &[b'x'; 60_000])).await;
        }
        tunnel.closed().await;
        drop(deaf);
        logged("the node broke the stream protocol: stream 1: the peer sent more than its window").await;

        // The node opens a stream.
        let tunnel = next().await;
        tunnel.frame(open(7, "127.0.0.1:1")).await;
        tunnel.closed().await;
        logged("the node broke the stream protocol: stream 7: OPEN by the side that may not open streams")
            .await;

        // Line breaks in a refusal don't reach the caller's status line.
        let mut tunnel = next().await;
        cluster.wait_state("n1", "connected").await;
        let answer = caller();
        let stream = tunnel.open().await;
        let text = || "a\r\nSet-Cookie: b\r\n\r\nHTTP/1.1 200 OK\r\n\r\n".to_owned();
        tunnel
            .frame(Frame::Refused { stream, error: DialError::Policy { rule: text(), reason: text() } })
            .await;
        let answer = answer.await.unwrap();
        assert_eq!((status(&answer), status_lines(&answer)), (Some(403), 1), "{}", show(&answer));
        assert!(!answer.split(|b| *b == b'\n').any(|l| l.starts_with(b"Set-Cookie")), "{}", show(&answer));

        // Nonsense about a stream that the node has ended.
        let answer = caller();
        let stream = tunnel.open().await;
        tunnel.frame(opened(stream)).await;
        tunnel.frame(reset(stream, "gone")).await;
        answer.await.unwrap();
        tunnel.frame(opened(stream)).await;
        tunnel.frame(credit(stream, u32::MAX)).await;
        tunnel.frame(eof(stream)).await;
        tunnel.frame(Frame::Refused { stream, error: DialError::Cancelled }).await;
        for _ in 0..500 {
            tunnel.frame(data(stream, &[0; 20_000])).await;
        }
        for i in 0..20_000u64 {
            tunnel.frame(Frame::Ping(i.to_be_bytes())).await;
        }
        tunnel.frame(Frame::Certificate { text: "ssh-ed25519-cert-v01@openssh.com AAAA".into() }).await;
        tunnel.frame(Frame::GoAway { reason: "leave me".into() }).await;
        tunnel.send(no_frame()).await;
        tunnel.closed().await;

        for i in 0..if round == 0 { 30 } else { 300 } {
            let tunnel = next().await;
            let bytes = malformed_frames(&mut rng(i), Version::V1, &format!("127.0.0.1:{port}"));
            tunnel.send(bytes).await;
            tunnel.closed().await;
            if i % 10 == 0 {
                steady.say().await.unwrap();
            }
        }
        health.get_or_insert_with(|| Health::of(&cluster.master));
    }

    drop(rogue);
    logged("the node broke the stream protocol: frame type 255 is unknown").await;
    let identity = Identity::read(&cluster.nodes[0].dir.join("state/host_key")).unwrap();
    let mut rogue = eventually("the port is free", SOON, async || {
        RogueNode::listen_with(cluster.nodes[0].port, identity.clone(), Version::V2).await.ok()
    })
    .await;
    for i in 0..100 {
        let mux = completes("the master comes", rogue.tunnels.recv()).await.unwrap();
        let tunnel = FromMaster { mux, decoder: decoder() };
        let hello = Frame::Hello(Hello { capabilities: i, instance: [7; 16], session: [8; 16] });
        tunnel.send(frame::encode(Version::V2, &hello)).await;
        tunnel.send(malformed_frames(&mut rng(i as usize), Version::V2, &format!("127.0.0.1:{port}"))).await;
        tunnel.closed().await;
    }
    steady.say().await.unwrap();
    drop(rogue);
    let reason = eventually("the reason is shown", SOON, async || {
        let status = cluster.node_status("n1").ok()?;
        (status["state"] == "retrying").then(|| status["reason"].as_str().map(str::to_owned))?
    })
    .await;
    assert!(!reason.is_empty());
    steady.check(&cluster).await;
    Echo::open(&cluster.unix, &format!("n2:{port}")).await.unwrap();
    health.unwrap().check(10 * MB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_master_that_sends_malformed_frames_is_cut_off() {
    let mut turned = Turned::start().await;
    for (i, version) in (0..300).zip(Version::ALL.into_iter().cycle()) {
        let attack = turned.master.attack_with(version, 1 << 30).await;
        attack.send(malformed_frames(&mut rng(i), version, &turned.target)).await;
        attack.closed().await;
        if i % 10 == 0 {
            turned.steady.say().await.unwrap();
        }
    }
    turned.log_says("frame type 255 is unknown").await;

    let attack = turned.master.attack(1 << 30).await;
    for _ in 0..2 {
        attack.frame(open(1, &turned.target)).await;
    }
    attack.closed().await;
    turned.log_says("stream 1: OPEN with an id that was used before").await;

    // The target never reads, and the master sends more data than the node granted.
    let attack = turned.master.attack(1 << 30).await;
    attack.frame(open(1, &turned.target)).await;
    attack.frame(data(1, b"tiny\n")).await;
    let frame = encode(&data(1, &[0; 60_000]));
    let mut left = 5000;
    attack
        .flood(&frame, || {
            left -= 1;
            turned.bounded("an overrun window");
            left > 0
        })
        .await;
    assert!(left > 0, "300 MB were taken for a target that does not read");
    attack.closed().await;
    turned.log_says("stream 1: the peer sent more than its window").await;

    // Streams that have ended.
    let mut attack = turned.master.attack(1 << 30).await;
    for stream in 1..=1000 {
        assert!(attack.frame(reset(stream, "x")).await);
        assert!(attack.frame(data(stream, &[0; 60_000])).await);
        assert!(attack.frame(credit(stream, u32::MAX)).await);
        assert!(attack.frame(eof(stream)).await);
    }
    turned.bounded("data for streams that have ended");
    assert!(attack.frame(Frame::Ping(*b"are you?")).await);
    let mut decoder = decoder();
    completes("the answer to a PING", async {
        loop {
            let bytes = attack.received.recv().await.expect("the session goes on");
            let mut bytes = &bytes[..];
            while let Some(frame) = decoder.decode(&mut bytes).unwrap() {
                if frame == Frame::Pong(*b"are you?") {
                    return;
                }
            }
        }
    })
    .await;
    drop(attack);
    turned.unharmed().await;
    turned.health.check(64 * MB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_master_that_opens_twenty_thousand_streams_gets_no_more_than_its_share() {
    let mut turned = Turned::start().await;
    let mut attack = turned.master.attack(1 << 30).await;
    let (mut opened, mut refused) = (0, 0);
    for batch in 0..40 {
        let ids = batch * 500 + 1..batch * 500 + 501;
        let bytes: Vec<u8> = ids.flat_map(|id| encode(&open(id, &turned.target))).collect();
        assert!(attack.send(bytes).await);
        let answers = attack.answers(500).await.expect("the session goes on");
        opened += answers.values().filter(|opened| **opened).count();
        refused += answers.values().filter(|opened| !**opened).count();
        turned.bounded("20,000 streams");
    }
    println!("{opened} streams: the node-agent has grown by {} KB", turned.health.growth() / 1024);
    assert_eq!((opened, refused), (8192, 20_000 - 8192));
    turned.unharmed().await;
    drop(attack);
    turned.health.check(64 * MB).await;

    // The same at once: the node may also close the session.
    let mut attack = turned.master.attack(1 << 30).await;
    let bytes: Vec<u8> = (1..=20_000).flat_map(|id| encode(&open(id, &turned.target))).collect();
    for piece in bytes.chunks(50_000) {
        if !attack.send(piece.to_vec()).await {
            break;
        }
    }
    if let Some(answers) = attack.answers(20_000).await {
        assert!(answers.values().filter(|opened| **opened).count() <= 8192);
    }
    turned.bounded("20,000 streams at once");
    drop(attack);
    turned.unharmed().await;
    turned.health.check(64 * MB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_master_that_floods_with_pings_and_never_reads_is_bounded() {
    let mut turned = Turned::start().await;
    let pings: Vec<u8> = (0..1000u64).flat_map(|i| encode(&Frame::Ping(i.to_be_bytes()))).collect();
    let pings = Bytes::from(pings);
    // A channel window that takes all the answers, and one that takes next to none.
    for window in [1 << 30, 1024] {
        let attack = turned.master.attack(window).await;
        attack.deaf.store(true, Ordering::Relaxed);
        let mut left = 5000;
        attack
            .flood(&pings, || {
                left -= 1;
                turned.bounded("PINGs, and a peer that never reads");
                left > 0
            })
            .await;
        println!("window {window}: {} million PINGs sent", f64::from(5000 - left) / 1000.0);
        drop(attack);
        turned.unharmed().await;
    }
    turned.health.check(64 * MB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_master_that_grants_all_and_never_reads_is_bounded() {
    let mut turned = Turned::start().await;
    let mut attack = turned.master.attack(1 << 30).await;
    let bytes: Vec<u8> = (1..=64).flat_map(|id| encode(&open(id, &turned.target))).collect();
    assert!(attack.send(bytes).await);
    let answers = attack.answers(64).await.expect("the session goes on");
    assert!(answers.values().all(|opened| *opened));
    attack.deaf.store(true, Ordering::Relaxed);
    for stream in 1..=64 {
        // All that may be granted.
        assert!(attack.frame(credit(stream, window::MAX - window::INITIAL)).await);
        assert!(attack.frame(data(stream, b"firehose\n")).await);
    }
    let admin = turned.cluster.nodes[0].admin;
    // Its keepalive tells the node that nobody listens.
    eventually("the node closes the session", Duration::from_secs(60), async || {
        turned.bounded("64 streams that nobody reads");
        (turned.cluster.metric(admin, "node_agent_sessions{role=\"master\"}").await.ok()? == 1.0)
            .then_some(())
    })
    .await;
    drop(attack);
    turned.unharmed().await;
    turned.health.check(64 * MB).await;
}

/// Connections that never get beyond the beginning, each opened anew as soon as it is cut.
struct HalfOpen {
    tasks: JoinSet<()>,
    opened: Arc<AtomicUsize>,
}

impl HalfOpen {
    async fn start(count: usize, address: SocketAddr) -> Self {
        let opened = Arc::new(AtomicUsize::new(0));
        let first = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        for i in 0..count {
            let (opened, first) = (opened.clone(), first.clone());
            tasks.spawn(async move {
                let mut mine = 0;
                loop {
                    let Ok(mut socket) = TcpStream::connect(address).await else {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        continue;
                    };
                    mine += 1;
                    if mine == 1 {
                        first.fetch_add(1, Ordering::Relaxed);
                    }
                    opened.fetch_add(1, Ordering::Relaxed);
                    if i % 2 == 0 && socket.write_all(b"SSH-2.0-half\r\n").await.is_err() {
                        continue;
                    }
                    let mut buffer = [0; 4096];
                    while matches!(socket.read(&mut buffer).await, Ok(n) if n > 0) {}
                }
            });
        }
        eventually("all have connected", Duration::from_secs(60), async || {
            (first.load(Ordering::Relaxed) == count).then_some(())
        })
        .await;
        Self { tasks, opened }
    }

    async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

impl Drop for HalfOpen {
    fn drop(&mut self) {
        println!("{} half-open connections in all", self.opened.load(Ordering::Relaxed));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn half_open_handshakes_at_the_master_keep_no_node_out() {
    raise_descriptor_limit(10_000).unwrap();
    let port = target::start().await;
    let mut options = options(&[("n1", Kind::CallHome)], port);
    options.nodes_down = true;
    let mut cluster = Cluster::start(options).await.unwrap();
    let health = Health::of(&cluster.master);
    let half_open = HalfOpen::start(2000, cluster.call_home).await;
    let began = std::time::Instant::now();
    cluster.start_node(0).unwrap();
    cluster.wait_state("n1", "connected").await;
    println!("a tunnel after {:?}", began.elapsed());
    let mut echo = Echo::open(&cluster.unix, &format!("n1:{port}")).await.unwrap();
    echo.say().await.unwrap();
    half_open.stop().await;
    echo.say().await.unwrap();
    health.no_panic();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn half_open_handshakes_at_a_node_keep_no_master_out() {
    raise_descriptor_limit(10_000).unwrap();
    let port = target::start().await;
    let mut options = options(&[("n1", Kind::Dialled)], port);
    options.nodes_down = true;
    let mut cluster = Cluster::start(options).await.unwrap();
    cluster.master.kill();
    cluster.start_node(0).unwrap();
    wait_for_port(cluster.nodes[0].port).unwrap();
    let half_open = HalfOpen::start(2000, SocketAddr::from(([127, 0, 0, 1], cluster.nodes[0].port))).await;
    let began = std::time::Instant::now();
    cluster.restart_master().unwrap();
    cluster.wait_state("n1", "connected").await;
    println!("a tunnel after {:?}", began.elapsed());
    let mut echo = Echo::open(&cluster.unix, &format!("n1:{port}")).await.unwrap();
    echo.say().await.unwrap();
    half_open.stop().await;
    echo.say().await.unwrap();
    Health::of(cluster.nodes[0].process.as_ref().unwrap()).no_panic();
}
