//! Bytes pass unchanged through every kind of node and both kinds of egress listener.

use std::time::Duration;

use tests::{
    client::{Door, read_head},
    cluster::{Cluster, Kind, Options},
    load::download,
    pattern::fill,
    process::free_port,
    target,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn three_nodes(port: u16) -> Cluster {
    let nodes = [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::Sshd)];
    let nodes = nodes.map(|(name, kind)| (name.to_owned(), kind)).to_vec();
    Cluster::start(Options { nodes, ports: vec![port], ..Options::default() }).await.unwrap()
}

#[tokio::test]
async fn the_recorded_requests_of_kube_apiserver_are_answered() {
    let port = target::start().await;
    let cluster = three_nodes(port).await;
    // The recording names 10.77.1.2; the same bytes with the address of a target here.
    let recorded = |file: &str, to: u16| {
        let bytes = std::fs::read(format!("{}/data/captures/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let end = text.find(" HTTP/1.1").unwrap();
        format!("CONNECT 127.0.0.1:{to}{}", &text[end..])
    };
    let Door::Unix(path) = &cluster.unix else { unreachable!() };

    let mut socket = tokio::net::UnixStream::connect(path).await.unwrap();
    socket.write_all(recorded("http-connect-uds-1.client.bin", port).as_bytes()).await.unwrap();
    let mut answer = vec![0; b"HTTP/1.1 200 Connection Established\r\n\r\nHTTP/1.1 200 OK\r\n".len()];
    socket.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 200 Connection Established\r\n\r\nHTTP/1.1 200 OK\r\n");

    let closed = free_port();
    let cluster = {
        drop(cluster);
        let nodes = vec![("n1".to_owned(), Kind::Dialled)];
        Cluster::start(Options { nodes, ports: vec![closed], ..Options::default() }).await.unwrap()
    };
    let Door::Unix(path) = &cluster.unix else { unreachable!() };
    let mut socket = tokio::net::UnixStream::connect(path).await.unwrap();
    socket.write_all(recorded("http-connect-uds-2.client.bin", closed).as_bytes()).await.unwrap();
    let (status, reason) = read_head(&mut socket).await.unwrap();
    assert_eq!((status, reason), (502, format!("dial tcp 127.0.0.1:{closed}: connection refused")));
}

#[tokio::test]
async fn ipv6_targets_work() {
    let port = target::start().await;
    let cluster = three_nodes(port).await;
    for door in cluster.doors() {
        download(&door, &format!("[::1]:{port}"), 1_000_000).await;
    }
}

#[tokio::test]
async fn early_bytes_reach_the_target_and_nothing_comes_before_it_speaks() {
    let port = target::start().await;
    let cluster = three_nodes(port).await;
    let mut stream = cluster.unix.enter().await.unwrap();
    let request = format!("CONNECT n1:{port} HTTP/1.1\r\n\r\nsource 1000\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(read_head(&mut stream).await.unwrap().0, 200);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    let mut expected = vec![0; 1000];
    fill(&mut expected, 0);
    assert_eq!(all, expected);

    let mut silent = cluster.unix.stream(&format!("n1:{port}")).await.unwrap();
    let byte = tokio::time::timeout(Duration::from_millis(300), silent.read_u8()).await;
    assert!(byte.is_err(), "{byte:?}");
}
