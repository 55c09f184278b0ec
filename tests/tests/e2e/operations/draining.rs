//! Agents that are told to stop complete what is under way, serve on meanwhile, since nobody else may, and cut what never
//! ends after the grace.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use tests::{
    client::{Door, Stream, echo, still_echoes},
    cluster::{Cluster, Kind, Options, SOON},
    pattern::{Checker, fill},
    process::{eventually, free_port},
    relay::Relay,
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};

use super::operate::{PATIENCE, local, nodes, until};

/// A download that has begun.
pub(super) struct Download {
    pub(super) stream: Stream,
    pub(super) checker: Checker,
    pub(super) bytes: u64,
}

impl Download {
    pub(super) async fn begin(door: &Door, target: &str, bytes: u64) -> Self {
        let mut stream = door.stream(target).await.unwrap();
        stream.write_all(format!("source {bytes}\n").as_bytes()).await.unwrap();
        let mut first = [0; 1024];
        stream.read_exact(&mut first).await.unwrap();
        let mut checker = Checker::default();
        checker.check(&first);
        Self { stream, checker, bytes }
    }

    pub(super) async fn finish(mut self) {
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let n =
                tokio::time::timeout(PATIENCE, self.stream.read(&mut buffer)).await.expect("bytes").unwrap();
            if n == 0 {
                break;
            }
            self.checker.check(&buffer[..n]);
        }
        assert_eq!(self.checker.offset(), self.bytes, "the download is cut short");
        // A TLS caller that just left would count as cut off.
        let _ = self.stream.shutdown().await;
    }
}

/// New streams get no further than to a refusal.
pub(super) async fn closed(door: &Door, target: &str) {
    eventually(&format!("the {} door takes no new streams", door.name()), SOON, async || {
        match door.connect(target).await {
            Err(_) => Some(()),
            Ok(Err(refused)) => {
                assert_eq!(refused.status, 503, "{}", refused.reason);
                Some(())
            }
            Ok(Ok(_)) => None,
        }
    })
    .await;
}

async fn port_closes(address: SocketAddr) {
    eventually(&format!("nothing listens on {address}"), SOON, async || {
        TcpStream::connect(address).await.err()
    })
    .await;
}

async fn the_master_drains(terms: usize) {
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::Sshd)];
    let mut cluster =
        Cluster::start(Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() })
            .await
            .unwrap();
    let mut downloads = Vec::new();
    for node in ["n1", "n2"] {
        for door in cluster.doors() {
            downloads.push(Download::begin(&door, &format!("{node}:{port}"), 20_000_000).await);
        }
    }
    let mut idle = echo(&cluster.unix, &format!("n1:{port}")).await;
    // A plain sshd has no flow control for each stream: a download that waits is one that it resets.
    let mut of_sshd = echo(&cluster.tls, &format!("n3:{port}")).await;
    cluster.master.signal("TERM");
    assert_eq!(until(cluster.admin, "/readyz", 503).await, "not ready: stopping\n");
    until(cluster.admin, "/livez", 200).await;
    for door in cluster.doors() {
        for node in ["n1", "n2", "n3"] {
            drop(echo(&door, &format!("{node}:{port}")).await);
        }
    }
    for _ in 1..terms {
        cluster.master.signal("TERM");
    }
    still_echoes(&mut idle).await;
    still_echoes(&mut of_sshd).await;
    for download in downloads {
        download.finish().await;
    }
    assert!(cluster.master.is_running(), "{}", cluster.master.log_text());
    of_sshd.shutdown().await.unwrap();
    of_sshd.read_to_end(&mut Vec::new()).await.unwrap();
    drop(of_sshd);
    idle.shutdown().await.unwrap();
    idle.read_to_end(&mut Vec::new()).await.unwrap();
    drop(idle);
    assert_eq!(
        cluster.master.wait(Duration::from_secs(25)).unwrap(),
        Some(0),
        "{}",
        cluster.master.log_text()
    );
    cluster.master.says(&["stopped cut=0"]).await;
    for door in cluster.doors() {
        closed(&door, &format!("n1:{port}")).await;
    }
    port_closes(cluster.call_home).await;
    for node in &cluster.nodes[..2] {
        node.process.as_ref().unwrap().says(&["the master takes no new streams"]).await;
    }
    for node in &mut cluster.nodes {
        assert!(node.process.as_mut().unwrap().is_running());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_drains_the_master() {
    the_master_drains(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sigterm_does_not_hurry_the_masters_drain() {
    the_master_drains(2).await;
}

async fn a_node_drains(terms: usize, kind: Kind) {
    let port = target::start().await;
    let kinds = [("n1", kind), ("n2", Kind::CallHome)];
    let mut cluster =
        Cluster::start(Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() })
            .await
            .unwrap();
    let target = format!("n1:{port}");
    let mut downloads = Vec::new();
    for door in cluster.doors() {
        downloads.push(Download::begin(&door, &target, 20_000_000).await);
    }
    let mut idle = echo(&cluster.unix, &target).await;
    let mut elsewhere = echo(&cluster.unix, &format!("n2:{port}")).await;
    cluster.nodes[0].process.as_ref().unwrap().signal("TERM");
    assert_eq!(until(cluster.nodes[0].admin, "/readyz", 503).await, "not ready: stopping\n");
    until(cluster.nodes[0].admin, "/livez", 200).await;
    for door in cluster.doors() {
        drop(echo(&door, &target).await);
    }
    for _ in 1..terms {
        cluster.nodes[0].process.as_ref().unwrap().signal("TERM");
    }
    still_echoes(&mut idle).await;
    for download in downloads {
        download.finish().await;
    }
    let node = cluster.nodes[0].process.as_mut().unwrap();
    assert!(node.is_running(), "{}", node.log_text());
    idle.shutdown().await.unwrap();
    idle.read_to_end(&mut Vec::new()).await.unwrap();
    drop(idle);
    assert_eq!(node.wait(Duration::from_secs(25)).unwrap(), Some(0), "{}", node.log_text());
    node.says(&["stopped cut=0"]).await;
    cluster.master.says(&["the node takes no new streams"]).await;
    for door in cluster.doors() {
        closed(&door, &target).await;
    }
    if kind == Kind::Dialled {
        port_closes(local(cluster.nodes[0].port)).await;
    }
    still_echoes(&mut elsewhere).await;
    assert!(cluster.master.is_running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_drains_a_dialled_node() {
    a_node_drains(1, Kind::Dialled).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_drains_a_node_that_calls_home() {
    a_node_drains(1, Kind::CallHome).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sigterm_does_not_hurry_a_nodes_drain() {
    a_node_drains(2, Kind::Dialled).await;
}

/// Passes on what comes from `to` at 1 MB/s and takes no more than that off the network, so that what was sent
/// waits in the sender's socket, as on a slow path; the other direction is fast.
async fn narrow(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind(local(0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpSocket::new_v4().unwrap();
            far.set_recv_buffer_size(32 * 1024).unwrap();
            let Ok(far) = far.connect(to).await else { continue };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let ((mut near_read, mut near_write), (mut far_read, mut far_write)) =
                (near.into_split(), far.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut near_read, &mut far_write).await });
            tokio::spawn(async move {
                let mut buffer = vec![0; 8 * 1024];
                while let Ok(n @ 1..) = far_read.read(&mut buffer).await {
                    if near_write.write_all(&buffer[..n]).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_secs_f64(n as f64 / 1e6)).await;
                }
            });
        }
    });
    address
}

/// Much of what the target has sent is still on the way when the node's own part in the stream is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_on_the_way_when_a_node_drains_arrives() {
    let (port, node_port) = (target::start().await, free_port());
    let mut cluster = Cluster::start(Options {
        nodes: nodes(&[("n1", Kind::Dialled)]),
        ports: vec![port],
        node_ports: vec![node_port],
        dial: vec![("n1".to_owned(), narrow(local(node_port)).await)],
        ..Options::default()
    })
    .await
    .unwrap();
    for _ in 0..3 {
        let mut download = Download::begin(&cluster.unix, &format!("n1:{port}"), 2_000_000).await;
        // The other direction is over, so that the stream ends on the node with what the target sends.
        download.stream.shutdown().await.unwrap();
        let node = cluster.nodes[0].process.as_mut().unwrap();
        node.signal("TERM");
        download.finish().await;
        assert_eq!(node.wait(PATIENCE).unwrap(), Some(0), "{}", node.log_text());
        cluster.start_node(0).unwrap();
        cluster.wait_state("n1", "connected").await;
    }
}

/// Data that a caller sends last arrives, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_on_the_way_when_the_master_drains_arrives() {
    let (port, node_port) = (target::start().await, free_port());
    let slow = Relay::start(local(0), local(node_port), Duration::from_millis(20), Some(5e6)).await.unwrap();
    let mut cluster = Cluster::start(Options {
        nodes: nodes(&[("n1", Kind::Dialled)]),
        ports: vec![port],
        node_ports: vec![node_port],
        dial: vec![("n1".to_owned(), slow.address)],
        ..Options::default()
    })
    .await
    .unwrap();
    let mut upload = cluster.unix.stream(&format!("n1:{port}")).await.unwrap();
    upload.write_all(b"sink\n").await.unwrap();
    cluster.master.signal("TERM");
    until(cluster.admin, "/readyz", 503).await;
    let mut bytes = vec![0; 10_000_000];
    fill(&mut bytes, 0);
    tokio::time::timeout(PATIENCE, upload.write_all(&bytes)).await.unwrap().unwrap();
    upload.shutdown().await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, upload.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, "10000000\n");
    assert_eq!(cluster.master.wait(PATIENCE).unwrap(), Some(0), "{}", cluster.master.log_text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_never_ends_is_cut_after_the_grace() {
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled), ("n2", Kind::CallHome)];
    let grace = "shutdown_grace: 1s".to_owned();
    let mut cluster = Cluster::start(Options {
        nodes: nodes(&kinds),
        ports: vec![port],
        master_config: grace.clone(),
        node_config: grace,
        ..Options::default()
    })
    .await
    .unwrap();
    for victim in ["n1", "n2", "master"] {
        let through = if victim == "n1" { "n1" } else { "n2" };
        if victim == "master" {
            cluster.start_node(1).unwrap();
            cluster.wait_state("n2", "connected").await;
        }
        let mut idle = echo(&cluster.unix, &format!("{through}:{port}")).await;
        let mut busy = cluster.tls.stream(&format!("{through}:{port}")).await.unwrap();
        busy.write_all(b"firehose\n").await.unwrap();
        busy.read_u8().await.unwrap();
        let process = match victim {
            "n1" => cluster.nodes[0].process.as_mut().unwrap(),
            "n2" => cluster.nodes[1].process.as_mut().unwrap(),
            _ => &mut cluster.master,
        };
        let began = Instant::now();
        process.signal("TERM");
        let drained = tokio::spawn(async move {
            // The stream fails or ends. Either way nothing follows.
            let mut buffer = vec![0; 256 * 1024];
            while busy.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
        });
        assert_eq!(process.wait(Duration::from_secs(20)).unwrap(), Some(0), "{}", process.log_text());
        assert!(began.elapsed() >= Duration::from_secs(1), "{victim} gave no grace");
        process.says(&["stopped cut=2"]).await;
        tokio::time::timeout(SOON, drained).await.expect("the busy stream ends").unwrap();
        let rest = tokio::time::timeout(SOON, idle.read_to_end(&mut Vec::new()))
            .await
            .expect("the idle stream ends");
        assert!(rest.is_err() || rest.is_ok_and(|n| n == 0));
    }
}
