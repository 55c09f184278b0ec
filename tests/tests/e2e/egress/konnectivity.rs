//! The egress selector's GRPC mode answers every case of the protocol.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use proto::konnectivity::{DialRequest, Packet, Payload};
use tests::{
    client::Door,
    cluster::{Cluster, Kind, Options, SOON},
    konnectivity::{Call, Connection},
    load::completes,
    pattern::{Checker, fill},
    pki::{Authority, client_config},
    process::{eventually, free_port},
    silent::NeverAnswers,
    target,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, UnixStream},
    task::JoinSet,
};

const MB: u64 = 1_000_000;

/// Sent each way where data is checked.
const VOLUME: u64 = 64 * MB;

pub(super) struct Site {
    pub(super) cluster: Cluster,
    pub(super) unix: Door,
    pub(super) tls: Door,
}

impl Site {
    pub(super) async fn start(kind: Kind, ports: &[u16]) -> Self {
        let tls = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let master_config = format!(
            "konnectivity:\n  unix: {{path: konnectivity.sock}}\n  \
             tls: {{listen: '{tls}', cert: server.crt, key: server.key, client_ca: ca.crt, allowed_names: [kube-apiserver]}}\n\
             tunnels: {{dial_timeout: 60s}}\n"
        );
        let options = Options {
            nodes: vec![("n1".to_owned(), kind)],
            ports: ports.to_vec(),
            master_config,
            ..Options::default()
        };
        let cluster = Cluster::start(options).await.unwrap();
        let path = cluster.path();
        let config = client_config(&path.join("ca.crt"), Some((path, "kube-apiserver"))).unwrap();
        let mut config = Arc::unwrap_or_clone(config);
        config.alpn_protocols = vec![b"h2".to_vec()];
        let (unix, tls) = (Door::Unix(path.join("konnectivity.sock")), Door::Tls(tls, Arc::new(config)));
        Self { cluster, unix, tls }
    }

    pub(super) async fn metric(&self, prefix: &str) -> f64 {
        // An event that has not happened yet has no sample.
        self.cluster.metric(self.cluster.admin, prefix).await.unwrap_or_default()
    }

    pub(super) async fn dials(&self, door: &str, result: &str) -> f64 {
        self.metric(&format!("master_agent_dials_total{{egress=\"konnectivity-{door}\",result=\"{result}\""))
            .await
    }

    pub(super) fn memory(&self) -> u64 {
        let node = self.cluster.nodes[0].process.as_ref().unwrap();
        self.cluster.master.usage().memory + node.usage().memory
    }

    pub(super) async fn streams_on_node(&self) -> Option<f64> {
        self.cluster.metric(self.cluster.nodes[0].admin, "node_agent_streams").await.ok()
    }

    /// Waits until both agents hold no stream and no descriptor that they had not `before`.
    pub(super) async fn nothing_is_left(&self, before: (u64, u64)) {
        let mut last = None;
        let settled = tokio::time::timeout(
            SOON,
            eventually("nothing is left", SOON * 2, async || {
                let on_node = self.streams_on_node().await?;
                let now = self.cluster.descriptors();
                last = Some((on_node, now));
                (on_node == 0.0 && now.0 <= before.0 && now.1 <= before.1).then_some(())
            }),
        );
        assert!(settled.await.is_ok(), "streams on the node, descriptors: {last:?}; before {before:?}");
        for door in ["unix", "tls"] {
            let prefix = format!("master_agent_streams{{egress=\"konnectivity-{door}\"}}");
            assert_eq!(self.metric(&prefix).await, 0.0);
        }
    }
}

async fn unknown(call: &mut Call, id: i64) {
    match call.next().await.unwrap() {
        Some(Payload::CloseResponse(answer)) if answer.connect_id == id => {
            assert_eq!(answer.error, format!("there is no connection {id}"));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn every_packet_has_its_answer() {
    let (port, silent, closed) = (target::start().await, NeverAnswers::start().await, free_port());
    let site = Site::start(Kind::Dialled, &[port, silent.port, closed]).await;
    let before = site.cluster.descriptors_at_rest().await;
    for door in [&site.unix, &site.tls] {
        let connection = Connection::open(door).await.unwrap();
        let error = connection.call_method("/ProxyService/Connect").await.err().unwrap();
        assert_eq!(error.code(), tonic::Code::Unimplemented, "{error}");
        let mut call = connection.call().await.unwrap();
        for (address, says) in [
            (format!("n1:{closed}"), "connection refused"),
            ("10.99.99.99:80".to_owned(), "no route to 10.99.99.99:80"),
            ("n1:22".to_owned(), "refused by node policy"),
            ("n1".to_owned(), "no port"),
        ] {
            let error = call.dial(3, &address).await.unwrap().unwrap_err();
            assert!(error.contains(says), "{address}: {error}");
        }
        let (protocol, address) = ("udp".to_owned(), format!("n1:{port}"));
        call.send(Payload::DialRequest(DialRequest { protocol, address, random: 4 }).into()).await;
        assert!(
            matches!(call.next().await.unwrap(), Some(Payload::DialResponse(r)) if r.error.contains("\"udp\""))
        );
        call.data(99, "x").await;
        unknown(&mut call, 99).await;
        call.send(Packet::close_request(98)).await;
        unknown(&mut call, 98).await;

        // A dial that is given up before it is answered.
        call.send(Packet::dial_request(5, &format!("n1:{}", silent.port))).await;
        eventually("the dial is under way", SOON, async || (silent.dials() > 0).then_some(())).await;
        call.send(Packet::close_dial(5)).await;
        eventually("the dial is cancelled", SOON, async || {
            let counted = site.dials(door.name(), "cancelled").await;
            (silent.dials() == 0 && counted == 1.0).then_some(())
        })
        .await;
        // One that is given up after.
        let late = call.dial(6, &format!("n1:{port}")).await.unwrap().unwrap();
        call.send(Packet::close_dial(6)).await;
        assert_eq!(call.read_to_close(late, |_| ()).await.unwrap(), "the dial was given up");

        // Connections are closed while data comes, by the target, and in order.
        let id = call.dial(7, &format!("n1:{port}")).await.unwrap().unwrap();
        call.data(id, "firehose\n").await;
        for _ in 0..100 {
            call.read(id).await.unwrap();
        }
        call.send(Packet::close_request(id)).await;
        assert_eq!(call.read_to_close(id, |_| ()).await.unwrap(), "");
        call.data(id, "x").await;
        unknown(&mut call, id).await;
        let id = call.dial(8, &format!("n1:{port}")).await.unwrap().unwrap();
        call.data(id, "source 100000\n").await;
        let mut checker = Checker::default();
        assert_eq!(call.read_to_close(id, |bytes| checker.check(bytes)).await.unwrap(), "");
        assert_eq!(checker.offset(), 100_000);
        drop((call, connection));
        site.nothing_is_left(before).await;
        let door = format!("egress=\"konnectivity-{}\"", door.name());
        eventually("the streams are recorded", SOON, async || {
            let recorded = ["stream ended", &door, "outcome=\"closed\""];
            let log = site.cluster.master.log_text();
            log.lines().any(|line| recorded.iter().all(|part| line.contains(part))).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_thousand_connections_share_one_stream_and_a_hundred_streams_one_connection() {
    let port = target::start().await;
    let site = Site::start(Kind::Dialled, &[port]).await;
    let before = site.cluster.descriptors_at_rest().await;
    let connection = Connection::open(&site.unix).await.unwrap();
    let mut call = connection.call().await.unwrap();
    let (mut ids, mut echoes) = (HashMap::new(), HashMap::<i64, Vec<u8>>::new());
    let packets = call.packets.clone();
    let dialling = tokio::spawn(async move {
        for random in 0..1000 {
            packets.send(Packet::dial_request(random, &format!("n1:{port}"))).await.unwrap();
        }
    });
    while ids.len() < 1000 {
        match call.next().await.unwrap() {
            Some(Payload::DialResponse(r)) if r.error.is_empty() => ids.insert(r.connect_id, r.random),
            other => panic!("{other:?}"),
        };
    }
    dialling.await.unwrap();
    let packets = call.packets.clone();
    let talk: Vec<_> = ids.clone().into_iter().collect();
    tokio::spawn(async move {
        for (id, random) in talk {
            packets.send(Packet::data(id, format!("echo\nthis is {random:09}").into())).await.unwrap();
        }
    });
    let len = "this is 000000000".len();
    while echoes.len() < 1000 || echoes.values().any(|heard| heard.len() < len) {
        match call.next().await.unwrap() {
            Some(Payload::Data(data)) => {
                echoes.entry(data.connect_id).or_default().extend_from_slice(&data.data)
            }
            other => panic!("{other:?}"),
        }
    }
    for (id, heard) in &echoes {
        assert_eq!(*heard, format!("this is {:09}", ids[id]).into_bytes());
    }
    let packets = call.packets.clone();
    tokio::spawn(async move {
        for id in ids.into_keys() {
            packets.send(Packet::close_request(id)).await.unwrap();
        }
    });
    for _ in 0..1000 {
        match call.next().await.unwrap() {
            Some(Payload::CloseResponse(r)) => assert_eq!(r.error, ""),
            other => panic!("{other:?}"),
        }
    }
    let mut streams = JoinSet::new();
    for _ in 0..100 {
        let connection = connection.clone();
        streams.spawn(async move {
            let (mut call, id) = connection.dial(&format!("n1:{port}")).await.unwrap();
            call.data(id, "source 300000\n").await;
            let mut checker = Checker::default();
            assert_eq!(call.read_to_close(id, |bytes| checker.check(bytes)).await.unwrap(), "");
            assert_eq!(checker.offset(), 300_000);
        });
    }
    streams.join_all().await;
    drop((call, connection));
    site.nothing_is_left(before).await;
}

#[tokio::test]
async fn a_client_that_vanishes_leaves_nothing() {
    let (port, silent) = (target::start().await, NeverAnswers::start().await);
    let site = Site::start(Kind::CallHome, &[port, silent.port]).await;
    let before = site.cluster.descriptors_at_rest().await;
    for door in [&site.unix, &site.tls] {
        let connection = Connection::open(door).await.unwrap();
        let mut calls = Vec::new();
        for line in ["hold\n", "firehose\n", "echo\n"] {
            let (call, id) = connection.dial(&format!("n1:{port}")).await.unwrap();
            call.data(id, line).await;
            call.send(Packet::dial_request(1, &format!("n1:{}", silent.port))).await;
            calls.push(call);
        }
        // There are three streams, and three dials that hold a socket each.
        eventually("all is open", SOON, async || {
            (site.streams_on_node().await? == 3.0 && silent.dials() == 3).then_some(())
        })
        .await;
        // First one call ends, and then the whole connection.
        calls.pop();
        eventually("a call is gone", SOON, async || (site.streams_on_node().await? == 2.0).then_some(()))
            .await;
        drop((calls, connection));
        site.nothing_is_left(before).await;
    }
}

/// A target that reads the pattern to its end; gives the port, and later the number of bytes.
async fn sink() -> (u16, tokio::task::JoinHandle<u64>) {
    let port = free_port();
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let reading = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let (mut checker, mut buffer) = (Checker::default(), vec![0; 256 * 1024]);
        loop {
            match socket.read(&mut buffer).await.unwrap() {
                0 => return checker.offset(),
                n => checker.check(&buffer[..n]),
            }
        }
    });
    (port, reading)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_byte_arrives_both_ways() {
    let port = target::start().await;
    for kind in [Kind::Dialled, Kind::Sshd] {
        let (sinks, ports) = {
            let (a, b) = (sink().await, sink().await);
            let ports = [port, a.0, b.0];
            ([a, b], ports)
        };
        let site = Site::start(kind, &ports).await;
        for (door, (sink_port, sink)) in [&site.unix, &site.tls].into_iter().zip(sinks) {
            let connection = Connection::open(door).await.unwrap();
            let (mut call, id) = connection.dial(&format!("n1:{port}")).await.unwrap();
            let began = std::time::Instant::now();
            call.data(id, format!("source {VOLUME}\n")).await;
            let mut checker = Checker::default();
            assert_eq!(call.read_to_close(id, |bytes| checker.check(bytes)).await.unwrap(), "");
            assert_eq!(checker.offset(), VOLUME);
            let down = began.elapsed();
            // Data that was sent before the end reaches the target, since there is no other way to end.
            let (mut call, id) = connection.dial(&format!("n1:{sink_port}")).await.unwrap();
            let mut buffer = vec![0; 64_000];
            for offset in (0..VOLUME).step_by(buffer.len()) {
                fill(&mut buffer, offset);
                call.data(id, &buffer).await;
            }
            call.send(Packet::close_request(id)).await;
            assert_eq!(call.read_to_close(id, |_| ()).await.unwrap(), "");
            assert_eq!(completes("the target gets the rest", sink).await.unwrap(), VOLUME);
            println!(
                "{kind:?} {}: {VOLUME} bytes, {down:.1?} down, {:.1?} up",
                door.name(),
                began.elapsed() - down
            );
        }
    }
}

#[tokio::test]
async fn only_the_right_certificate_enters() {
    let port = target::start().await;
    let site = Site::start(Kind::Dialled, &[port]).await;
    let Door::Tls(address, good) = &site.tls else { unreachable!() };
    let path = site.cluster.path();
    let ca = path.join("ca.crt");
    let other = path.join("other");
    std::fs::create_dir_all(&other).unwrap();
    Authority::new("another CA").unwrap().client(&other, "kube-apiserver").unwrap();
    let mut http1 = (**good).clone();
    http1.alpn_protocols = vec![b"http/1.1".to_vec()];
    for (what, config) in [
        ("no certificate", client_config(&ca, None).unwrap()),
        ("another CA", client_config(&ca, Some((&other, "kube-apiserver"))).unwrap()),
        ("HTTP/1.1", Arc::new(http1)),
    ] {
        let call = async {
            let connection = Connection::open(&Door::Tls(*address, config)).await?;
            connection.dial(&format!("n1:{port}")).await.map(drop)
        };
        assert!(completes(what, call).await.is_err(), "{what} enters");
    }
    assert_eq!(site.dials("tls", "ok").await, 0.0);
    let (call, _) = Connection::open(&site.tls).await.unwrap().dial(&format!("n1:{port}")).await.unwrap();
    assert_eq!(site.dials("tls", "ok").await, 1.0);
    drop(call);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn stalled_readers_hold_up_nobody_on_their_http2_connection() {
    let port = target::start().await;
    let site = Site::start(Kind::Dialled, &[port]).await;
    let connection = Connection::open(&site.unix).await.unwrap();
    let before = site.memory();
    let mut stalled = Vec::new();
    for _ in 0..32 {
        let (mut call, id) = connection.dial(&format!("n1:{port}")).await.unwrap();
        call.data(id, "firehose\n").await;
        let mut checker = Checker::default();
        checker.check(&call.read(id).await.unwrap());
        stalled.push((call, id, checker));
    }
    for _ in 0..2 {
        let (mut call, id) = connection.dial(&format!("n1:{port}")).await.unwrap();
        call.data(id, format!("source {VOLUME}\n")).await;
        let mut checker = Checker::default();
        assert_eq!(call.read_to_close(id, |bytes| checker.check(bytes)).await.unwrap(), "");
        assert_eq!(checker.offset(), VOLUME);
    }
    let grown = site.memory().saturating_sub(before);
    println!("32 stalled readers: memory grew by {:.1} MB", grown as f64 / 1e6);
    assert!(grown < 64 * MB, "{grown}");
    for (call, id, checker) in &mut stalled {
        while checker.offset() < 8 * MB {
            checker.check(&call.read(*id).await.unwrap());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stuck_target_is_ended_and_the_others_of_its_stream_go_on() {
    let port = target::start().await;
    let idle = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let idle_port = idle.local_addr().unwrap().port();
    let idle = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((socket, _)) = idle.accept().await {
            held.push(socket);
        }
    });
    let site = Site::start(Kind::Dialled, &[port, idle_port]).await;
    let connection = Connection::open(&site.unix).await.unwrap();
    let mut call = connection.call().await.unwrap();
    let mut echoes = Vec::new();
    for random in 0..50 {
        let id = call.dial(random, &format!("n1:{port}")).await.unwrap().unwrap();
        call.data(id, "echo\n").await;
        echoes.push(id);
    }
    let stuck = call.dial(99, &format!("n1:{idle_port}")).await.unwrap().unwrap();
    let before = site.memory();
    let packets = call.packets.clone();
    let (said, rounds) = (echoes.clone(), 1000);
    let talking = tokio::spawn(async move {
        for round in 0..rounds {
            packets.send(Packet::data(stuck, vec![b'x'; 64 * 1024].into())).await.unwrap();
            let id = said[round % said.len()];
            packets.send(Packet::data(id, format!("{round:08}").into())).await.unwrap();
        }
    });
    let (mut ended, mut heard) = (false, HashMap::<i64, Vec<u8>>::new());
    while !ended || heard.values().map(Vec::len).sum::<usize>() < rounds * 8 {
        match call.next().await.unwrap() {
            Some(Payload::Data(data)) => {
                heard.entry(data.connect_id).or_default().extend_from_slice(&data.data)
            }
            Some(Payload::CloseResponse(r)) if r.connect_id == stuck => ended |= r.error.contains("too slow"),
            other => panic!("{other:?}"),
        }
    }
    talking.await.unwrap();
    for (i, id) in echoes.iter().enumerate() {
        let expected: String = (i..rounds).step_by(echoes.len()).map(|round| format!("{round:08}")).collect();
        assert_eq!(heard[id], expected.as_bytes());
    }
    let grown = site.memory().saturating_sub(before);
    assert!(grown < 32 * MB, "{grown}");

    // Alone on its stream, a slow target makes its client wait, for as long as it likes.
    let (call, id) = connection.dial(&format!("n1:{idle_port}")).await.unwrap();
    let sending = async {
        loop {
            call.packets.send(Packet::data(id, vec![b'x'; 64 * 1024].into())).await.unwrap();
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(5), sending).await.is_err());
    let on_node = site.streams_on_node().await.unwrap();
    assert_eq!(on_node, echoes.len() as f64 + 1.0);
    // hyper's client tells nobody of a call that it drops while it waits to send; the target's end ends it.
    idle.abort();
    eventually("it is gone", SOON, async || (site.streams_on_node().await? < on_node).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_stops_lets_idle_clients_go_at_once() {
    let port = target::start().await;
    let mut site = Site::start(Kind::Dialled, &[port]).await;
    let connection = Connection::open(&site.unix).await.unwrap();
    let (mut call, id) = connection.dial(&format!("n1:{port}")).await.unwrap();
    call.data(id, "echo\nhello").await;
    assert_eq!(&call.read(id).await.unwrap()[..], b"hello");
    site.cluster.master.signal("TERM");
    let log = site.cluster.master.log.clone();
    eventually("it stops", SOON, async || {
        std::fs::read_to_string(&log).ok()?.contains("stopping").then_some(())
    })
    .await;
    // Calls that are under way go on; nothing new begins.
    call.data(id, "more").await;
    assert_eq!(&call.read(id).await.unwrap()[..], b"more");
    assert!(connection.dial(&format!("n1:{port}")).await.is_err());
    call.send(Packet::close_request(id)).await;
    assert_eq!(call.read_to_close(id, |_| ()).await.unwrap(), "");
    drop(call);
    assert_eq!(site.cluster.master.wait(Duration::from_secs(15)).unwrap(), Some(0));
}

#[tokio::test]
async fn what_is_not_grpc_is_refused_and_counted() {
    let port = target::start().await;
    let site = Site::start(Kind::Dialled, &[port]).await;
    let before = site.cluster.descriptors_at_rest().await;
    let Door::Unix(path) = &site.unix else { unreachable!() };
    for bytes in [
        b"CONNECT n1:80 HTTP/1.1\r\n\r\n".as_slice(),
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        &[0; 100],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x01\x04\0\0\0\x01",
    ] {
        let mut socket = BufReader::new(UnixStream::connect(path).await.unwrap());
        socket.write_all(bytes).await.unwrap();
        let mut line = Vec::new();
        let closed = async { while socket.read_until(b'\n', &mut line).await.is_ok_and(|n| n > 0) {} };
        completes("it is closed", closed).await;
    }
    eventually("all are counted", SOON, async || {
        (site.metric("master_agent_bad_requests_total{egress=\"konnectivity-unix\"}").await == 4.0)
            .then_some(())
    })
    .await;
    site.nothing_is_left(before).await;
}
