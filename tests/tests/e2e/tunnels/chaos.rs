//! When peers die, freeze or fall silent, callers get a clear error, streams end on both sides, and the tunnel comes
//! back. How long each takes is printed; only never is a failure.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tests::{
    client::Door,
    cluster::{Cluster, Kind, Options, SOON},
    load::{completes, download, get, upload},
    pattern::Checker,
    process::{Usage, eventually, free_port},
    relay::Relay,
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
};

pub(super) const AGENTS: [Kind; 2] = [Kind::Dialled, Kind::CallHome];

pub(super) fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Streams that are idle, or busy in either direction, until they end.
pub(super) struct OpenStreams(Vec<(String, JoinHandle<()>)>);

impl OpenStreams {
    /// One of each by each door; all carry bytes already, unless idle.
    pub(super) async fn open(cluster: &Cluster, target: &str) -> Self {
        let mut streams = Vec::new();
        for door in cluster.doors() {
            let mut idle = door.stream(target).await.unwrap();
            idle.write_all(b"hold\n").await.unwrap();
            let mut kept = door.stream(target).await.unwrap();
            get(&mut kept).await.unwrap();
            let mut down = door.stream(target).await.unwrap();
            down.write_all(b"firehose\n").await.unwrap();
            let mut up = door.stream(target).await.unwrap();
            up.write_all(b"drain\n").await.unwrap();
            let (started, start) = tokio::sync::oneshot::channel();
            let read = async move {
                let (mut checker, mut buffer, mut started) =
                    (Checker::default(), vec![0; 64 * 1024], Some(started));
                while let Ok(n @ 1..) = down.read(&mut buffer).await {
                    checker.check(&buffer[..n]);
                    if checker.offset() > 1_000_000 {
                        started.take().map(|started| started.send(()));
                    }
                }
            };
            let write = async move {
                let bytes = vec![0; 64 * 1024];
                while up.write_all(&bytes).await.is_ok() {}
            };
            let end = |mut stream: tests::client::Stream| async move {
                assert!(!matches!(stream.read(&mut [0]).await, Ok(1..)), "a byte from nowhere");
            };
            let name = |what: &str| format!("{what} by {}", door.name());
            streams.push((name("idle"), tokio::spawn(end(idle))));
            streams.push((name("kept"), tokio::spawn(end(kept))));
            streams.push((name("download"), tokio::spawn(read)));
            streams.push((name("upload"), tokio::spawn(write)));
            completes("a download begins", start).await.unwrap();
        }
        Self(streams)
    }

    /// Waits until every one has ended for its caller.
    pub(super) async fn end(self, since: Instant) {
        for (name, stream) in self.0 {
            match tokio::time::timeout((SOON * 2).saturating_sub(since.elapsed()), stream).await {
                Ok(ended) => ended.unwrap(),
                Err(_) => panic!("{name}: still open after {:.1?}", since.elapsed()),
            }
        }
        println!("  open streams had ended after {:.1?}", since.elapsed());
    }
}

/// What CONNECT is answered from now on, until the master says that the node is not connected: each answer
/// must be 503 or 504, name the node, and come in time.
pub(super) async fn callers_get_errors(cluster: &Cluster, node: &str, target: &str, since: Instant) {
    let ask = async |door: &Door| {
        let began = Instant::now();
        let refused = match completes("an answer", door.connect(target)).await.expect("an answer") {
            // The node or its kernel had already accepted this one; it ends with the others.
            Ok(_) => return,
            Err(refused) => refused,
        };
        let took = began.elapsed();
        assert!(matches!(refused.status, 503 | 504), "{refused:?}");
        assert!(refused.reason.contains(node), "{refused:?}");
        assert!(took < SOON, "{refused:?} only after {took:.1?}");
        println!(
            "  {:.1?}: {} after {took:.1?}: {} {}",
            since.elapsed(),
            door.name(),
            refused.status,
            refused.reason
        );
    };
    for door in cluster.doors() {
        ask(&door).await;
    }
    not_connected(cluster, node, since).await;
    for door in cluster.doors() {
        let refused = completes("an answer", door.connect(target)).await.expect("an answer").err();
        let refused = refused.expect("connected to a node without a tunnel");
        println!("  {:.1?}: {} {}", since.elapsed(), refused.status, refused.reason);
        assert_eq!(refused.status, 503, "{refused:?}");
        assert!(refused.reason.starts_with(&format!("no tunnel to node {node}: ")), "{refused:?}");
    }
}

async fn not_connected(cluster: &Cluster, node: &str, since: Instant) {
    let limit = SOON.saturating_sub(since.elapsed());
    let status = eventually(&format!("{node} is not connected"), limit, async || {
        let status = cluster.node_status(node).ok()?;
        (status["state"] != "connected").then_some(status)
    })
    .await;
    println!("  {:.1?}: {node} is {}: {}", since.elapsed(), status["state"], status["reason"]);
    let state = status["state"].as_str().unwrap();
    assert!(matches!(state, "retrying" | "connecting" | "lost"), "{status}");
}

/// Waits for the tunnel, and uses it.
pub(super) async fn back(cluster: &Cluster, node: &str, target: &str, since: Instant) {
    cluster.wait_state(node, "connected").await;
    println!("  {node} was back after {:.1?}", since.elapsed());
    for door in cluster.doors() {
        completes("a download", download(&door, target, 1_000_000)).await;
        completes("an upload", upload(&door, target, 1_000_000)).await;
    }
}

/// Waits until a node-agent has no session and no stream.
async fn node_holds_nothing(cluster: &Cluster, index: usize, since: Instant) {
    let node = &cluster.nodes[index];
    let mut last = None;
    let limit = (SOON * 2).saturating_sub(since.elapsed());
    eventually("the node-agent has ended its session and streams", limit, async || {
        let sessions = cluster.metric(node.admin, "node_agent_sessions{role=\"master\"}").await.ok()?;
        let streams = cluster.metric(node.admin, "node_agent_streams").await.ok()?;
        if last != Some((sessions, streams)) {
            last = Some((sessions, streams));
            let descriptors = node.process.as_ref()?.usage().descriptors;
            println!(
                "  {:.1?}: {} has {sessions} sessions, {streams} streams, {descriptors} descriptors",
                since.elapsed(),
                node.name
            );
        }
        ((sessions, streams) == (0.0, 0.0)).then_some(())
    })
    .await;
}

pub(super) async fn door_streams(cluster: &Cluster) -> f64 {
    let mut sum = 0.0;
    for door in ["connect-unix", "connect-tls"] {
        // A door that has had no stream yet has no sample.
        let prefix = format!("master_agent_streams{{egress=\"{door}\"}}");
        sum += cluster.metric(cluster.admin, &prefix).await.unwrap_or_default();
    }
    sum
}

pub(super) async fn master_holds_no_stream(cluster: &Cluster) {
    eventually("the master holds no stream", SOON, async || {
        (door_streams(cluster).await == 0.0).then_some(())
    })
    .await;
}

async fn one_node(kind: Kind, port: u16) -> Cluster {
    let nodes = vec![("n1".to_owned(), kind)];
    Cluster::start(Options { nodes, ports: vec![port], ..Options::default() }).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_node_agent_that_is_killed_comes_back() {
    let port = target::start().await;
    for kind in AGENTS {
        println!("{kind:?}");
        let mut cluster = one_node(kind, port).await;
        let target = format!("n1:{port}");
        let streams = OpenStreams::open(&cluster, &target).await;
        cluster.nodes[0].process.as_mut().unwrap().kill();
        let since = Instant::now();
        callers_get_errors(&cluster, "n1", &target, since).await;
        streams.end(since).await;
        master_holds_no_stream(&cluster).await;
        let since = Instant::now();
        cluster.start_node(0).unwrap();
        back(&cluster, "n1", &target, since).await;
    }
}

/// Also a caller who reads nothing is told, and what its stream held is free.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn streams_of_stalled_readers_end_with_their_tunnel() {
    let port = target::start().await;
    for kind in [Kind::Dialled, Kind::CallHome, Kind::Sshd] {
        println!("{kind:?}");
        let mut cluster = one_node(kind, port).await;
        let mut stalled = Vec::new();
        for door in cluster.doors() {
            let mut stream = door.stream(&format!("n1:{port}")).await.unwrap();
            // Fits into what a stream may hold, so that nothing but the lost tunnel ends it.
            stream.write_all(b"source 2000000\n").await.unwrap();
            stream.read_u8().await.unwrap();
            stalled.push(stream);
        }
        cluster.kill_node(0);
        not_connected(&cluster, "n1", Instant::now()).await;
        master_holds_no_stream(&cluster).await;
        drop(stalled);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_master_agent_that_is_killed_comes_back() {
    let port = target::start().await;
    let nodes = [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::Sshd)];
    let nodes = nodes.map(|(name, kind)| (name.to_owned(), kind)).to_vec();
    let mut cluster =
        Cluster::start(Options { nodes, ports: vec![port], ..Options::default() }).await.unwrap();
    let mut streams = Vec::new();
    for node in ["n1", "n2", "n3"] {
        streams.push(OpenStreams::open(&cluster, &format!("{node}:{port}")).await);
    }
    let Door::Unix(socket) = cluster.unix.clone() else { unreachable!() };
    cluster.master.kill();
    let since = Instant::now();
    for streams in streams {
        streams.end(since).await;
    }
    for index in [0, 1] {
        node_holds_nothing(&cluster, index, since).await;
    }
    assert!(socket.exists(), "nothing removed the socket's file");
    cluster.unix.connect(&format!("n1:{port}")).await.map(drop).expect_err("nobody listens");
    let since = Instant::now();
    cluster.restart_master().unwrap();
    for node in ["n1", "n2", "n3"] {
        back(&cluster, node, &format!("{node}:{port}"), since).await;
    }
}

/// A stream whose target neither reads nor speaks is over with its session, and does not keep the agent from
/// stopping.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_node_agent_is_done_with_the_stalled_streams_of_a_killed_master() {
    let port = free_port();
    let listener = TcpListener::bind(local(port)).await.unwrap();
    tokio::spawn(async move {
        let mut silent = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            silent.push(socket);
        }
    });
    for kind in AGENTS {
        println!("{kind:?}");
        let mut cluster = Cluster::start(Options {
            nodes: vec![("n1".to_owned(), kind)],
            ports: vec![port],
            node_config: "shutdown_grace: 10m".to_owned(),
            ..Options::default()
        })
        .await
        .unwrap();
        let sent = Arc::new(AtomicU64::new(0));
        let mut stalled = Vec::new();
        for door in cluster.doors() {
            let (mut stream, sent) = (door.stream(&format!("n1:{port}")).await.unwrap(), sent.clone());
            stalled.push(tokio::spawn(async move {
                while stream.write_all(&[0; 65536]).await.is_ok() {
                    sent.fetch_add(65536, Ordering::Relaxed);
                }
            }));
        }
        let (mut last, mut same) = (0, 0);
        eventually("the writers are stalled", Duration::from_secs(120), async || {
            let now = sent.load(Ordering::Relaxed);
            same = if now == last { same + 1 } else { 0 };
            last = now;
            (now > 0 && same >= 50).then_some(())
        })
        .await;
        cluster.master.kill();
        let since = Instant::now();
        for stream in stalled {
            completes("a writer is told", stream).await.unwrap();
        }
        let admin = cluster.nodes[0].admin;
        eventually("the node-agent has no session", SOON, async || {
            (cluster.metric(admin, "node_agent_sessions{role=\"master\"}").await.ok()? == 0.0).then_some(())
        })
        .await;
        let streams = cluster.metric(admin, "node_agent_streams").await.unwrap();
        println!("  {:.1?}: no session, {streams} streams", since.elapsed());
        let process = cluster.nodes[0].process.as_mut().unwrap();
        process.signal("TERM");
        let stopped = process.wait(SOON * 2);
        println!("  {:.1?}: {:?}", since.elapsed(), stopped.as_ref().ok());
        assert_eq!(stopped.expect("it waits for streams that it no longer has"), Some(0));
    }
}

/// A cluster of one node whose link passes a relay.
async fn behind_a_relay(kind: Kind, port: u16, master_config: &str) -> (Cluster, Relay) {
    let (listen, node_port) = (local(free_port()), free_port());
    let options = Options {
        nodes: vec![("n1".to_owned(), kind)],
        ports: vec![port],
        node_ports: vec![node_port],
        dial: vec![("n1".to_owned(), listen)],
        call_home: Some(listen),
        master_config: master_config.to_owned(),
        nodes_down: true,
        ..Options::default()
    };
    let mut cluster = Cluster::start(options).await.unwrap();
    let to = if kind == Kind::CallHome { cluster.call_home } else { local(node_port) };
    let relay = Relay::start(listen, to, Duration::ZERO, None).await.unwrap();
    cluster.start_node(0).unwrap();
    cluster.wait_connected().await;
    (cluster, relay)
}

async fn link_falls_silent(kind: Kind, port: u16) {
    println!("{kind:?}");
    let (cluster, relay) = behind_a_relay(kind, port, "").await;
    let target = format!("n1:{port}");
    let streams = OpenStreams::open(&cluster, &target).await;
    relay.black_hole();
    let since = Instant::now();
    callers_get_errors(&cluster, "n1", &target, since).await;
    streams.end(since).await;
    master_holds_no_stream(&cluster).await;
    node_holds_nothing(&cluster, 0, since).await;
    let since = Instant::now();
    relay.restore();
    back(&cluster, "n1", &target, since).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_link_that_falls_silent_is_noticed_and_comes_back() {
    let port = target::start().await;
    join_all(AGENTS.map(|kind| link_falls_silent(kind, port))).await;
}

/// Idle from the first moment, so that nothing but keep-alives can tell.
async fn idle_link_falls_silent(kind: Kind, port: u16) {
    println!("{kind:?}");
    let (cluster, relay) = behind_a_relay(kind, port, "").await;
    relay.black_hole();
    let since = Instant::now();
    not_connected(&cluster, "n1", since).await;
    node_holds_nothing(&cluster, 0, since).await;
    let since = Instant::now();
    relay.restore();
    back(&cluster, "n1", &format!("n1:{port}"), since).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_silent_link_without_streams_is_noticed_too() {
    let port = target::start().await;
    join_all(AGENTS.map(|kind| idle_link_falls_silent(kind, port))).await;
}

/// 20, or what TEST_FLAPS says.
fn flaps() -> usize {
    std::env::var("TEST_FLAPS").ok().and_then(|v| v.parse().ok()).unwrap_or(20)
}

/// Cuts the link again and again under open streams.
async fn flap(kind: Kind) {
    let port = target::start().await;
    let (cluster, relay) =
        behind_a_relay(kind, port, "tunnels: {backoff_min: 20ms, backoff_max: 100ms}").await;
    let target = format!("n1:{port}");
    let usage =
        || -> [Usage; 2] { [cluster.master.usage(), cluster.nodes[0].process.as_ref().unwrap().usage()] };
    // A transfer may have brought the tunnel a further connection, which stays for minutes.
    let descriptors_but_connections =
        || usage().map(|usage| usage.descriptors.saturating_sub(cluster.connections(0)));
    completes("a download", download(&cluster.unix, &target, 1_000_000)).await;
    let (before, descriptors) = (usage(), descriptors_but_connections());
    let established =
        async || cluster.metric(cluster.admin, "master_agent_tunnels_established_total").await.ok();
    let mb = |usage: &Usage| usage.memory as f64 / 1e6;
    let since = Instant::now();
    let flaps = flaps();
    for i in 1..=flaps {
        let tunnels = established().await.unwrap();
        let streams = OpenStreams::open(&cluster, &target).await;
        let cut = Instant::now();
        relay.cut();
        streams.end(cut).await;
        eventually("another tunnel", SOON, async || (established().await? > tunnels).then_some(())).await;
        cluster.wait_state("n1", "connected").await;
        if i % 5 == 0 {
            let [master, node] = usage();
            println!("  {i} times in {:.1?}: {:.1} MB, {:.1} MB", since.elapsed(), mb(&master), mb(&node));
        }
    }
    let tunnels = established().await.unwrap();
    assert_eq!(tunnels, (flaps + 1) as f64);
    back(&cluster, "n1", &target, Instant::now()).await;
    master_holds_no_stream(&cluster).await;
    eventually("the agents have as many descriptors as before", SOON, async || {
        let now = descriptors_but_connections();
        (0..2).all(|i| now[i] <= descriptors[i]).then_some(())
    })
    .await;
    let after = usage();
    for (i, name) in ["master-agent", "node-agent"].into_iter().enumerate() {
        println!("  {name}: {:.1} MB before, {:.1} MB after", mb(&before[i]), mb(&after[i]));
    }
    eventually("no session is left over", SOON, async || {
        let sessions =
            cluster.metric(cluster.nodes[0].admin, "node_agent_sessions{role=\"master\"}").await.ok()?;
        (sessions == cluster.connections(0) as f64).then_some(())
    })
    .await;
    let status = cluster.node_status("n1").unwrap();
    assert_eq!(status["tunnels"].as_array().unwrap().len(), 1, "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_dialled_node_that_flaps_ends_connected_and_leaks_nothing() {
    flap(Kind::Dialled).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_node_that_calls_home_and_flaps_ends_connected_and_leaks_nothing() {
    flap(Kind::CallHome).await;
}

async fn node_agent_freezes(kind: Kind, port: u16) {
    println!("{kind:?}");
    let cluster = one_node(kind, port).await;
    let target = format!("n1:{port}");
    let streams = OpenStreams::open(&cluster, &target).await;
    let node = cluster.nodes[0].process.as_ref().unwrap();
    node.signal("STOP");
    let since = Instant::now();
    callers_get_errors(&cluster, "n1", &target, since).await;
    streams.end(since).await;
    master_holds_no_stream(&cluster).await;
    let since = Instant::now();
    node.signal("CONT");
    back(&cluster, "n1", &target, since).await;
    let admin = cluster.nodes[0].admin;
    eventually("the node has ended the streams of the old session", SOON, async || {
        let sessions = cluster.metric(admin, "node_agent_sessions{role=\"master\"}").await.ok()?;
        let streams = cluster.metric(admin, "node_agent_streams").await.ok()?;
        ((sessions, streams) == (cluster.connections(0) as f64, 0.0)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_frozen_node_agent_is_noticed_and_recovers() {
    let port = target::start().await;
    join_all(AGENTS.map(|kind| node_agent_freezes(kind, port))).await;
}

/// 3 nodes that are down and dialled, and 2 that call a master that is down.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_master_that_restarts_while_nodes_are_retrying_gets_them_all() {
    let port = target::start().await;
    let nodes: Vec<_> =
        (1..=5).map(|i| (format!("n{i}"), if i <= 3 { Kind::Dialled } else { Kind::CallHome })).collect();
    let mut cluster =
        Cluster::start(Options { nodes, ports: vec![port], ..Options::default() }).await.unwrap();
    for index in 0..3 {
        cluster.nodes[index].process.as_mut().unwrap().kill();
    }
    for round in 0..2 {
        for name in ["n1", "n2", "n3"] {
            cluster.wait_state(name, "retrying").await;
        }
        for name in ["n4", "n5"] {
            cluster.wait_state(name, "connected").await;
        }
        cluster.master.kill();
        for index in [3, 4] {
            let log = cluster.nodes[index].process.as_ref().unwrap().log.clone();
            let tries = || {
                std::fs::read_to_string(&log).unwrap_or_default().matches("no tunnel to the master").count()
            };
            let before = tries();
            eventually("the node calls a master that is not there", SOON, async || {
                (tries() >= before + 2).then_some(())
            })
            .await;
        }
        let since = Instant::now();
        cluster.restart_master().unwrap();
        for name in ["n4", "n5"] {
            cluster.wait_state(name, "connected").await;
            println!("  round {round}: {name} was back after {:.1?}", since.elapsed());
        }
    }
    for name in ["n1", "n2", "n3"] {
        cluster.wait_state(name, "retrying").await;
    }
    let since = Instant::now();
    for index in 0..3 {
        cluster.start_node(index).unwrap();
    }
    cluster.wait_connected().await;
    println!("  all were back after {:.1?}", since.elapsed());
    for i in 1..=5 {
        back(&cluster, &format!("n{i}"), &format!("n{i}:{port}"), since).await;
    }
}
