//! Bytes and peers that mean harm: malformed requests, malformed SSH, a node and a master that turned, callers that
//! dawdle, handshakes that never end. What is honest goes on, and nothing grows without bound.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::{Path, PathBuf},
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
        frame::{Decoder, Frame, MAX_DATA, encode},
        window,
    },
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tests::{
    client::Door,
    cluster::{Cluster, Kind, Options, SOON},
    load::completes,
    openssh::wait_for_port,
    process::eventually,
    rogue::{self, Deaf, Identity, MasterSession, NodeMux, RogueNode},
    steady::{Echo, Health, Steady, raise_descriptor_limit},
    target,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    task::JoinSet,
};

/// Each run does the same.
const SEED: u64 = 20_240_601;
/// Connections at a time.
const AT_ONCE: usize = 16;
const MB: u64 = 1024 * 1024;

fn options(nodes: &[(&str, Kind)], port: u16) -> Options {
    let nodes = nodes.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect();
    Options { nodes, ports: vec![port], ..Options::default() }
}

/// The files of a kept corpus, by name.
fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data/corpora").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&directory)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    assert!(files.len() > 50, "{} holds only {} files", directory.display(), files.len());
    files
}

/// Does `one` for each number below `total`, [`AT_ONCE`] at a time.
async fn in_turns<F: Future<Output = ()> + Send + 'static>(total: usize, one: impl Fn(usize) -> F) {
    let mut running = JoinSet::new();
    for i in 0..total {
        if running.len() >= AT_ONCE {
            running.join_next().await.unwrap().unwrap();
        }
        running.spawn(one(i));
    }
    while let Some(result) = running.join_next().await {
        result.unwrap();
    }
}

fn rng(number: usize) -> StdRng {
    StdRng::seed_from_u64(SEED + number as u64)
}

/// Changes bytes: a few single ones, a piece taken out, doubled or moved, a cut, or something nasty put in.
fn mutate(rng: &mut StdRng, bytes: &[u8], nasty: &[&[u8]]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.random_range(1..6) {
        let length = bytes.len();
        let (a, b) = (rng.random_range(0..=length), rng.random_range(0..=length));
        let (from, to) = (a.min(b), a.max(b).min(a.min(b) + 64));
        match rng.random_range(0..8) {
            0 | 1 if length > 0 => bytes[rng.random_range(0..length)] = rng.random(),
            2 if length > 0 => bytes[rng.random_range(0..length)] ^= 1 << rng.random_range(0..8),
            3 => drop(bytes.drain(from..to)),
            4 => {
                let piece = bytes[from..to].to_vec();
                bytes.splice(a..a, piece);
            }
            5 => bytes.truncate(a),
            _ => {
                let piece = nasty[rng.random_range(0..nasty.len())];
                let end = if rng.random() { from } else { to };
                bytes.splice(from..end, piece.iter().copied());
            }
        }
    }
    bytes
}

/// Sends bytes in pieces, ends the sending half, and gives what comes until the other side closes.
async fn throw(mut socket: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8], rng: &mut StdRng) -> Vec<u8> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let most = if rng.random_ratio(1, 4) { 40 } else { rest.len() };
        let n = rng.random_range(1..=most.min(rest.len()));
        // The other side may well have closed already.
        if socket.write_all(&rest[..n]).await.is_err() || socket.flush().await.is_err() {
            break;
        }
        if n < rest.len() {
            tokio::task::yield_now().await;
        }
        rest = &rest[n..];
    }
    let _ = socket.shutdown().await;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(n) = socket.read(&mut buffer).await {
        if n == 0 {
            break;
        }
        answer.extend_from_slice(&buffer[..n]);
    }
    answer
}

fn status(answer: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(answer.strip_prefix(b"HTTP/1.1 ")?.get(..3)?).ok()?;
    text.parse().ok()
}

fn status_lines(answer: &[u8]) -> usize {
    answer.split(|b| *b == b'\n').filter(|line| line.starts_with(b"HTTP/1.1 ")).count()
}

fn show(bytes: &[u8]) -> String {
    format!("{} bytes, {}", bytes.len(), bytes[..bytes.len().min(600)].escape_ascii())
}

fn judge_head(head: &[u8], answer: &[u8]) {
    let context = || format!("{}\nanswered with {}", show(head), show(answer));
    match proto::connect::parse(head) {
        Ok(Some(_)) => assert!(matches!(status(answer), Some(200 | 403 | 502 | 503)), "{}", context()),
        Ok(None) | Err(_) if answer.is_empty() => {}
        Ok(None) | Err(_) => assert!(matches!(status(answer), Some(400..=499)), "{}", context()),
    }
    if status(answer) != Some(200) {
        assert!(status_lines(answer) <= 1, "{}", context());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn malformed_connect_heads_are_refused() {
    let port = target::start().await;
    let cluster = Cluster::start(options(&[("n1", Kind::Dialled)], port)).await.unwrap();
    let Door::Unix(path) = cluster.unix.clone() else { unreachable!() };
    let mut steady = Steady::start(&cluster, "n1", port).await.unwrap();

    for (name, head) in corpus("connect") {
        let want = name.split('-').next().unwrap();
        let answer =
            completes(&name, throw(UnixStream::connect(&path).await.unwrap(), &head, &mut rng(0))).await;
        let got = status(&answer).map_or_else(|| "closed".to_owned(), |status| status.to_string());
        assert_eq!(got, want, "{name}: {}\nanswered with {}", show(&head), show(&answer));
        assert!(status_lines(&answer) <= 1, "{name}: {}", show(&answer));
    }

    let valid = Arc::new([
        format!(
            "CONNECT n1:{port} HTTP/1.1\r\nHost: n1:{port}\r\nUser-Agent: kube-apiserver/v1.33.0\r\n\r\n"
        ),
        format!("CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
        "CONNECT [::1]:1 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\necho\nhello".to_owned(),
        format!("CONNECT n1:{port} HTTP/1.0\r\n\r\n"),
        "CONNECT n1:10250 HTTP/1.1\r\nHost: x\r\nA: b\r\nC: d\r\nE: f\r\n\r\nGET / HTTP/1.1\r\n\r\n"
            .to_owned(),
    ]);
    let nasty: &[&[u8]] = &[
        b"\0",
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\x7f",
        b"\xff\xfe",
        b" ",
        b"\t",
        b":",
        b"\r\nContent-Length: 5",
        b"\r\nTransfer-Encoding: chunked",
        b"\r\n folded",
        b"http://",
        b"@",
        b"%0d%0a",
        b"[",
        b"]",
        b"HTTP/2.0",
        b"GET ",
        b"65536",
        b"18446744073709551616",
        b"\x16\x03\x01\x02\x00",
        &[b'a'; 17_000],
        &[b'\n'; 300],
    ];
    let head = move |number: usize| {
        let mut rng = rng(number);
        let base = valid[rng.random_range(0..valid.len())].as_bytes();
        (mutate(&mut rng, base, nasty), rng)
    };
    let unix = |number: usize| {
        let ((head, mut rng), path) = (head(number), path.clone());
        async move {
            let socket = UnixStream::connect(&path).await.unwrap();
            let answer = completes("a malformed head", throw(socket, &head, &mut rng)).await;
            judge_head(&head, &answer);
        }
    };
    let tls = |number: usize| {
        let ((head, mut rng), door) = (head(number), cluster.tls.clone());
        async move {
            let stream = door.enter().await.unwrap();
            let answer = completes("a malformed head over TLS", throw(stream, &head, &mut rng)).await;
            // A caller that has ended its TLS session has left, so it need not be answered.
            if !answer.is_empty() {
                judge_head(&head, &answer);
            }
        }
    };
    // What is allocated once is not growth.
    in_turns(300, unix).await;
    in_turns(50, tls).await;
    let health = Health::of(&cluster.master);
    in_turns(10_000, unix).await;
    in_turns(300, tls).await;
    endless_head(&path).await;

    steady.check(&cluster).await;
    Echo::open(&cluster.tls, &format!("n1:{port}")).await.unwrap();
    health.check(10 * MB).await;
    let refused =
        cluster.metric(cluster.admin, "master_agent_bad_requests_total{egress=\"connect-unix\"").await;
    assert!(refused.unwrap() > 5000.0);
}

/// A head without an end is cut off long before it fills the memory.
async fn endless_head(path: &Path) {
    let mut socket = UnixStream::connect(path).await.unwrap();
    let mut sent = 0;
    let chunk = vec![b'a'; 64 * 1024];
    let flood = async {
        while socket.write_all(&chunk).await.is_ok() {
            sent += chunk.len() as u64;
            assert!(sent < 16 * MB, "an endless head is read on and on");
        }
    };
    completes("an endless head", flood).await;
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

fn sample_frames(stream: u32, target: &str) -> Vec<Bytes> {
    let text = |s: &str| s.to_owned();
    let errors = [
        DialError::BadTarget(text("x")),
        DialError::Cancelled,
        DialError::NoTunnel { node: text("n1"), state: text("down") },
        DialError::Policy { rule: text("r"), reason: text("no") },
        DialError::TimedOut(text("late")),
    ];
    let mut frames: Vec<Frame<'_>> =
        errors.into_iter().map(|error| Frame::Refused { stream, error }).collect();
    frames.extend([
        Frame::Open { stream, timeout_ms: 10_000, target: text(target), origin: text("x") },
        Frame::Open { stream: stream + 1, timeout_ms: 0, target: text("[::1]:1"), origin: String::new() },
        Frame::Opened { stream },
        Frame::Data { stream, bytes: b"echo\nhello" },
        Frame::Credit { stream, bytes: 65_536 },
        Frame::Credit { stream, bytes: u32::MAX },
        Frame::Eof { stream },
        Frame::Reset { stream, reason: text("gone") },
        Frame::Ping(*b"12345678"),
        Frame::Pong([0xff; 8]),
        Frame::GoAway { reason: text("bye") },
        Frame::Certificate { text: text("ssh-ed25519-cert-v01@openssh.com AAAA") },
    ]);
    frames.iter().map(encode).collect()
}

/// Some frames, changed, and then bytes that are no frame wherever the reader stands.
fn malformed_frames(rng: &mut StdRng, target: &str) -> Vec<u8> {
    let samples = sample_frames(rng.random_range(1..4), target);
    let mut bytes = Vec::new();
    for _ in 0..rng.random_range(1..12) {
        bytes.extend_from_slice(&samples[rng.random_range(0..samples.len())]);
    }
    let nasty: &[&[u8]] = &[
        b"\0",
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        b"\0\0\xfc\0",
        b"\0\0\xfc\x01",
        b"\x04\0\0\0\x01\0\0\xfc\0",
        b"\x0b",
        b"\0\0\x40\0",
        b"\x01\0\0\0\x01\0\0\0\x05",
        &[0xff; 40],
    ];
    let mut bytes = mutate(rng, &bytes, nasty);
    bytes.extend_from_slice(&no_frame());
    bytes
}

/// Longer than any frame that it may be taken to belong to.
fn no_frame() -> Vec<u8> {
    vec![0xff; MAX_DATA + 1024]
}

/// What a master sends to a rogue node, frame by frame.
pub struct FromMaster {
    pub mux: NodeMux,
    pub decoder: Decoder,
}

impl FromMaster {
    /// The id of the next stream that the master asks for.
    pub async fn open(&mut self) -> u32 {
        loop {
            let bytes = completes("an OPEN", self.mux.received.recv()).await.expect("the tunnel has ended");
            let mut bytes = &bytes[..];
            while let Some(frame) = self.decoder.decode(&mut bytes).unwrap() {
                if let Frame::Open { stream, .. } = frame {
                    return stream;
                }
            }
        }
    }

    pub async fn send(&self, bytes: impl Into<Bytes>) {
        // The master may have had enough already.
        let _ = self.mux.handle.data(self.mux.channel, bytes.into()).await;
    }

    pub async fn frame(&self, frame: Frame<'_>) {
        self.send(encode(&frame)).await;
    }

    /// Waits until the master has closed the tunnel.
    pub async fn closed(mut self) {
        completes("the master closes a tunnel", async { while self.mux.received.recv().await.is_some() {} })
            .await;
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
        FromMaster { mux, decoder: Decoder::default() }
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
        tunnel.frame(Frame::Opened { stream }).await;
        for _ in 0..200 {
            tunnel.frame(Frame::Data { stream, bytes: &[b'x'; 60_000] }).await;
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
        tunnel.frame(Frame::Opened { stream }).await;
        let deaf = completes("the stream", deaf).await.unwrap().unwrap();
        for _ in 0..400 {
            tunnel.frame(Frame::Data { stream, bytes: &[b'x'; 60_000] }).await;
        }
        tunnel.closed().await;
        drop(deaf);
        logged("the node broke the stream protocol: stream 1: the peer sent more than its window").await;

        // A stream that the node opens.
        let tunnel = next().await;
        tunnel
            .frame(Frame::Open {
                stream: 7,
                timeout_ms: 1000,
                target: "127.0.0.1:1".into(),
                origin: "x".into(),
            })
            .await;
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
        tunnel.frame(Frame::Opened { stream }).await;
        tunnel.frame(Frame::Reset { stream, reason: "gone".into() }).await;
        answer.await.unwrap();
        tunnel.frame(Frame::Opened { stream }).await;
        tunnel.frame(Frame::Credit { stream, bytes: u32::MAX }).await;
        tunnel.frame(Frame::Eof { stream }).await;
        tunnel.frame(Frame::Refused { stream, error: DialError::Cancelled }).await;
        for _ in 0..500 {
            tunnel.frame(Frame::Data { stream, bytes: &[0; 20_000] }).await;
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
            let bytes = malformed_frames(&mut rng(i), &format!("127.0.0.1:{port}"));
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

/// A master that turned: its certificate is good.
pub struct RogueMaster {
    identity: Identity,
    node: SocketAddr,
}

/// Its session with a node, and the multiplexer in it.
pub struct Attack {
    session: MasterSession,
    channel: russh::ChannelWriteHalf<russh::client::Msg>,
    /// What the node sends; ends with the session.
    pub received: tokio::sync::mpsc::UnboundedReceiver<Bytes>,
    deaf: Arc<std::sync::atomic::AtomicBool>,
}

impl RogueMaster {
    pub fn new(cluster: &Cluster) -> Self {
        let args = [
            "-I",
            "rogue",
            "-n",
            "master-agent",
            "-V",
            "-1h:+1d",
            "-O",
            "clear",
            "-O",
            "permit-port-forwarding",
        ];
        let identity =
            Identity::certified(&cluster.path().join("rogue"), &cluster.path().join("master/user_ca"), &args)
                .unwrap();
        Self { identity, node: SocketAddr::from(([127, 0, 0, 1], cluster.nodes[0].port)) }
    }

    pub async fn attack(&self, window: u32) -> Attack {
        let (link, deaf) = Deaf::new(TcpStream::connect(self.node).await.unwrap());
        let (session, accepted) =
            rogue::authenticate(link, &self.identity, "master-agent", window).await.unwrap();
        assert!(accepted);
        let channel = session.channel_open_session().await.unwrap();
        let (mut read, channel) = channel.split();
        channel.request_subsystem(true, proto::mux::SUBSYSTEM).await.unwrap();
        let (sender, received) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(message) = read.wait().await {
                if let russh::ChannelMsg::Data { data } = message {
                    let _ = sender.send(data);
                }
            }
        });
        Attack { session, channel, received, deaf }
    }
}

impl Attack {
    /// `false` once the node has closed the session.
    pub async fn send(&self, bytes: impl Into<Bytes>) -> bool {
        // russh goes on waiting for room in a channel whose session has ended meanwhile.
        let closed = async {
            while !self.session.is_closed() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::select! {
            sent = self.channel.data_bytes(bytes) => sent.is_ok() && !self.session.is_closed(),
            () = closed => false,
        }
    }

    pub async fn frame(&self, frame: Frame<'_>) -> bool {
        self.send(encode(&frame)).await
    }

    pub async fn closed(mut self) {
        completes("the node closes a session", async { while self.received.recv().await.is_some() {} }).await;
    }

    /// Goes on sending `bytes` until the node closes the session; `more` is asked before each time.
    async fn flood(&self, bytes: &Bytes, mut more: impl FnMut() -> bool) {
        while more() {
            // A session of which neither side reads any more is closed by the node's keepalive.
            if !completes("a flood is taken", self.send(bytes.clone())).await {
                return;
            }
        }
    }
}

pub fn open(stream: u32, target: &str) -> Frame<'static> {
    Frame::Open { stream, timeout_ms: 30_000, target: target.to_owned(), origin: "rogue".to_owned() }
}

struct Turned {
    cluster: Cluster,
    master: RogueMaster,
    steady: Steady,
    health: Health,
    target: String,
}

/// A node with a tunnel to its real master, and a rogue one that knows it.
async fn turned_master() -> Turned {
    raise_descriptor_limit(20_000).unwrap();
    let port = target::start().await;
    let cluster = Cluster::start(options(&[("n1", Kind::Dialled)], port)).await.unwrap();
    let steady = Steady::start(&cluster, "n1", port).await.unwrap();
    let master = RogueMaster::new(&cluster);
    let target = format!("127.0.0.1:{port}");
    // The first session costs what later ones don't.
    let first = master.attack(1 << 30).await;
    first.send(no_frame()).await;
    first.closed().await;
    let health = Health::of(cluster.nodes[0].process.as_ref().unwrap());
    Turned { cluster, master, steady, health, target }
}

impl Turned {
    async fn unharmed(&mut self) {
        self.health.no_panic();
        self.steady.check(&self.cluster).await;
    }

    async fn log_says(&self, text: &str) {
        let node = self.cluster.nodes[0].process.as_ref().unwrap();
        eventually(text, SOON, async || node.log_text().contains(text).then_some(())).await;
    }

    fn bounded(&self, what: &str) {
        let growth = self.health.growth();
        assert!(growth < 64 * MB, "{what}: the node-agent has grown by {} MB", growth / MB);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_master_that_sends_malformed_frames_is_cut_off() {
    let mut turned = turned_master().await;
    for i in 0..300 {
        let attack = turned.master.attack(1 << 30).await;
        attack.send(malformed_frames(&mut rng(i), &turned.target)).await;
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

    // A target that never reads, and more data than the node granted.
    let attack = turned.master.attack(1 << 30).await;
    attack.frame(open(1, &turned.target)).await;
    attack.frame(Frame::Data { stream: 1, bytes: b"tiny\n" }).await;
    let data = encode(&Frame::Data { stream: 1, bytes: &[0; 60_000] });
    let mut left = 5000;
    attack
        .flood(&data, || {
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
        assert!(attack.frame(Frame::Reset { stream, reason: "x".into() }).await);
        assert!(attack.frame(Frame::Data { stream, bytes: &[0; 60_000] }).await);
        assert!(attack.frame(Frame::Credit { stream, bytes: u32::MAX }).await);
        assert!(attack.frame(Frame::Eof { stream }).await);
    }
    turned.bounded("data for streams that have ended");
    assert!(attack.frame(Frame::Ping(*b"are you?")).await);
    let mut decoder = Decoder::default();
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

/// Answers to OPENs, by stream.
async fn answers(attack: &mut Attack, count: usize) -> Option<HashMap<u32, bool>> {
    let mut answers = HashMap::new();
    let mut decoder = Decoder::default();
    while answers.len() < count {
        let bytes = completes("answers to OPEN", attack.received.recv()).await?;
        let mut bytes = &bytes[..];
        while let Some(frame) = decoder.decode(&mut bytes).unwrap() {
            match frame {
                Frame::Opened { stream } => drop(answers.insert(stream, true)),
                Frame::Refused { stream, .. } => drop(answers.insert(stream, false)),
                _ => {}
            }
        }
    }
    Some(answers)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_master_that_opens_twenty_thousand_streams_gets_no_more_than_its_share() {
    let mut turned = turned_master().await;
    let mut attack = turned.master.attack(1 << 30).await;
    let (mut opened, mut refused) = (0, 0);
    for batch in 0..40u32 {
        let ids = batch * 500 + 1..batch * 500 + 501;
        let bytes: Vec<u8> = ids.flat_map(|id| encode(&open(id, &turned.target))).collect();
        assert!(attack.send(bytes).await);
        let answers = answers(&mut attack, 500).await.expect("the session goes on");
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
    if let Some(answers) = answers(&mut attack, 20_000).await {
        assert!(answers.values().filter(|opened| **opened).count() <= 8192);
    }
    turned.bounded("20,000 streams at once");
    drop(attack);
    turned.unharmed().await;
    turned.health.check(64 * MB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_master_that_floods_with_pings_and_never_reads_is_bounded() {
    let mut turned = turned_master().await;
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
    let mut turned = turned_master().await;
    let mut attack = turned.master.attack(1 << 30).await;
    let bytes: Vec<u8> = (1..=64).flat_map(|id| encode(&open(id, &turned.target))).collect();
    assert!(attack.send(bytes).await);
    let answers = answers(&mut attack, 64).await.expect("the session goes on");
    assert!(answers.values().all(|opened| *opened));
    attack.deaf.store(true, Ordering::Relaxed);
    for stream in 1..=64 {
        // All that may be granted.
        assert!(attack.frame(Frame::Credit { stream, bytes: window::MAX - window::INITIAL }).await);
        assert!(attack.frame(Frame::Data { stream, bytes: b"firehose\n" }).await);
    }
    let admin = turned.cluster.nodes[0].admin;
    // Its keepalive tells the node that nobody listens.
    eventually("the node closes the session", Duration::from_secs(60), async || {
        turned.bounded("64 streams that nobody reads");
        (turned.cluster.metric(admin, "node_agent_sessions").await.ok()? == 1.0).then_some(())
    })
    .await;
    drop(attack);
    turned.unharmed().await;
    turned.health.check(64 * MB).await;
}

/// A request that comes byte by byte, for ever.
async fn dawdle(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Option<u16> {
    let head = b"CONNECT n1:1 HTTP/1.1\r\nHost: x\r\nA: ";
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    for byte in head.iter().chain(std::iter::repeat(&b'b')) {
        if stream.write_all(&[*byte]).await.is_err() || stream.flush().await.is_err() {
            break;
        }
        match tokio::time::timeout(Duration::from_millis(100), stream.read(&mut buffer)).await {
            Ok(Ok(0) | Err(_)) => break,
            Ok(Ok(n)) => answer.extend_from_slice(&buffer[..n]),
            Err(_) => {}
        }
        if !answer.is_empty() {
            break;
        }
    }
    // Nothing more is sent: the other side has to close.
    while let Ok(n) = stream.read(&mut buffer).await {
        if n == 0 {
            break;
        }
        answer.extend_from_slice(&buffer[..n]);
    }
    status(&answer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn callers_that_dawdle_are_cut_and_keep_nobody_out() {
    raise_descriptor_limit(4096).unwrap();
    let port = target::start().await;
    let cluster = start_with_egress(options(&[("n1", Kind::Dialled)], port), "  head_timeout: 1s\n").await;
    let mut steady = Steady::start(&cluster, "n1", port).await.unwrap();
    let Door::Tls(tls, _) = cluster.tls.clone() else { unreachable!() };
    let health = Health::of(&cluster.master);

    let cut = Arc::new(AtomicUsize::new(0));
    let rounds = Arc::new(AtomicUsize::new(1));
    let mut slow = JoinSet::new();
    let mut started = Vec::new();
    for i in 0..500 {
        let (doors, cut, rounds) = (cluster.doors(), cut.clone(), rounds.clone());
        let (tell, told) = tokio::sync::oneshot::channel();
        let mut tell = Some(tell);
        started.push(told);
        slow.spawn(async move {
            let mut mine = 0;
            while mine < rounds.load(Ordering::Relaxed) {
                mine += 1;
                match i % 5 {
                    // A TLS handshake that never completes, and one that never begins.
                    0 => {
                        let mut socket = TcpStream::connect(tls).await.unwrap();
                        let part: &[u8] =
                            if i % 2 == 0 { b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" } else { b"" };
                        socket.write_all(part).await.unwrap();
                        tell.take().map(|tell| tell.send(()));
                        let mut buffer = [0; 100];
                        while matches!(socket.read(&mut buffer).await, Ok(n) if n > 0) {}
                    }
                    kind => {
                        // On this busy machine a handshake may be among what is too slow.
                        let stream = doors[usize::from(kind == 1)].enter().await;
                        tell.take().map(|tell| tell.send(()));
                        if let Ok(stream) = stream {
                            let status = dawdle(stream).await;
                            assert!(matches!(status, Some(408) | None), "{status:?}");
                            if kind > 1 {
                                assert_eq!(status, Some(408), "a Unix caller is answered");
                            }
                        }
                    }
                }
                cut.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    for told in started {
        completes("a slow caller begins", told).await.unwrap();
    }
    for i in 0..40 {
        // Each slow caller is replaced until the honest ones are done.
        rounds.store(i + 2, Ordering::Relaxed);
        let mut echo = Echo::open(&cluster.doors()[i % 2], &format!("n1:{port}")).await.unwrap();
        echo.say().await.unwrap();
        steady.say().await.unwrap();
    }
    rounds.store(0, Ordering::Relaxed);
    completes("every slow caller is cut", slow.join_all()).await;
    assert!(cut.load(Ordering::Relaxed) >= 500);
    steady.check(&cluster).await;
    health.check(30 * MB).await;
}

/// Restarts the master with more lines of `http_connect:`.
async fn start_with_egress(options: Options, lines: &str) -> Cluster {
    let mut cluster = Cluster::start(options).await.unwrap();
    let file = cluster.path().join("master.yaml");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, config.replace("http_connect:\n", &format!("http_connect:\n{lines}"))).unwrap();
    cluster.restart_master().unwrap();
    cluster.wait_connected().await;
    cluster
}

#[tokio::test]
async fn callers_beyond_max_connections_are_turned_away() {
    let port = target::start().await;
    let cluster = start_with_egress(options(&[("n1", Kind::Dialled)], port), "  max_connections: 4\n").await;
    let target = format!("n1:{port}");
    let mut inside = Vec::new();
    // Each door has its own places, so that nobody at the one can shut the other.
    for i in 0..8 {
        inside.push(Echo::open(&cluster.doors()[i % 2], &target).await.unwrap());
    }
    for _ in 0..50 {
        for door in cluster.doors() {
            let stream = completes("a caller too many", door.connect(&target)).await;
            assert!(stream.is_err(), "a fifth caller was let in");
        }
        for echo in &mut inside {
            echo.say().await.unwrap();
        }
    }
    inside.truncate(6);
    eventually("the free places are given to others", SOON, async || {
        let unix = Echo::open(&cluster.unix, &target).await.ok()?;
        Some((unix, Echo::open(&cluster.tls, &target).await.ok()?))
    })
    .await;
    let log = cluster.master.log_text();
    assert!(log.contains("max_connections reached"), "{log}");
    Health::of(&cluster.master).no_panic();
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
