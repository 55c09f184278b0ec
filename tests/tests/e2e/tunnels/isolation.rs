//! A stream does nothing to other streams, and a caller that goes away leaves nothing behind.

use std::time::{Duration, Instant};

use tests::{
    client::{Door, Refused, Stream},
    cluster::{Cluster, Kind, Options, SOON},
    load::{completes, download, gets, upload},
    process::eventually,
    silent::NeverAnswers,
    staller::{Caller, FIREHOSE, Staller, TINY, feed},
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::{JoinHandle, JoinSet},
};

const MB: u64 = 1_000_000;
/// Bytes by which both agents together may grow, however many streams are stalled.
const GROWTH: u64 = 64 * MB;
/// The same for a master with an sshd. It buffers up to 32 MB for the streams of a connection, and a buffer may have twice
/// the size of what it holds.
const GROWTH_WITH_SSHD: u64 = 96 * MB;

/// The others are not to be reset because a busy machine lets their callers wait.
const PATIENT: &str = "tunnels: {sshd_stall_timeout: 2m}";

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
fn assert_bounded(kind: Kind, what: &str, before: u64, now: u64) {
    let grown = now.saturating_sub(before);
    println!("  {what}: memory grew by {:.1} MB, from {:.1} MB", grown as f64 / 1e6, before as f64 / 1e6);
    let most = if matches!(kind, Kind::Sshd) { GROWTH_WITH_SSHD } else { GROWTH };
    assert!(grown < most, "{what}: memory grew by {grown} bytes");
}

/// The work of all other streams.
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
    assert_bounded(kind, "8 stalled readers", before, memory(&cluster));
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
    let cluster = one_node(kind, &[port, staller.port], PATIENT).await;
    let before = memory(&cluster);
    let mut writers = Vec::new();
    let [unix, tls] = cluster.doors();
    // Two that write one byte at a time are enough: it takes each of them half a minute to fill its window.
    for (size, doors, count) in [(FIREHOSE, [&unix, &tls], 14), (TINY, [&unix, &unix], 2)] {
        for door in doors.into_iter().cycle().take(count) {
            writers.push(writer(door, &staller, size));
        }
    }
    staller.settled().await;
    others_work(&cluster, port).await;
    assert_bounded(kind, "16 targets that don't read", before, memory(&cluster));
    assert_eq!(staller.open(), 16);
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
    let cluster = one_node(Kind::Sshd, &[port, staller.port], "tunnels: {sshd_stall_timeout: 4s}").await;
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
    assert_bounded(Kind::Sshd, "8 stalled readers, master", memory_before, cluster.master.usage().memory);
    for mut caller in stalled {
        let ended = completes("a reset stream ends", caller.read_on(64 * MB)).await;
        assert!(!ended, "a stalled reader was not reset");
    }
    eventually("no stream is left", SOON, async || (streams_of(&cluster)? == 0).then_some(())).await;
    others_work(&cluster, port).await;
    let tunnels = cluster.metric(cluster.admin, "master_agent_tunnels_established_total").await.unwrap();
    assert_eq!(tunnels, 1.0, "the tunnel was lost");
}

/// A reader that was reset holds nothing any more, although it does nothing.
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
    let cluster = one_node(Kind::Sshd, &[port], PATIENT).await;
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

/// Waits until both agents hold no stream, and no descriptor that they had not `before`.
async fn nothing_is_left(cluster: &Cluster, before: (u64, u64)) {
    let mut last = None;
    let node = cluster.nodes[0].admin;
    eventually("nothing is left", SOON, async || {
        let streams = (streams_of(cluster)?, door_streams(cluster).await);
        let on_node = cluster.metric(node, "node_agent_streams").await.ok()?;
        let descriptors = cluster.descriptors();
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
    let before = cluster.descriptors_at_rest().await;
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
        eventually("the node dials", SOON, async || (silent.dials() as u64 >= DIALS).then_some(())).await;
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
    assert_bounded(kind, "200 cancelled dials", memory_before, memory(&cluster));
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
    let silent = NeverAnswers::start().await;
    for kind in [Kind::Dialled, Kind::CallHome, Kind::Sshd] {
        let cluster = one_node(kind, &[silent.port], "tunnels: {dial_timeout: 1s}").await;
        let target = format!("n1:{}", silent.port);
        let before = cluster.descriptors_at_rest().await;
        for door in cluster.doors() {
            let began = Instant::now();
            let refused = completes("an answer", door.connect(&target)).await;
            let took = began.elapsed();
            let refused = refusal(refused);
            println!("{kind:?} {}: {took:.2?} {refused:?}", door.name());
            assert_eq!(refused.status, 504, "{refused:?}");
            // A node-agent gives up first and says what it has tried.
            let cause = match kind {
                Kind::Sshd => {
                    format!("dial tcp 127.0.0.1:{}: the node's sshd gave no answer within 1s", silent.port)
                }
                _ => format!("dial tcp {target}: no answer within 875ms"),
            };
            assert_eq!(refused.reason, cause);
            assert!(took >= Duration::from_millis(850), "{took:?}");
            assert!(took < SOON, "{took:?}");
        }
        if kind != Kind::Sshd {
            nothing_is_left(&cluster, before).await;
        }
    }
}
