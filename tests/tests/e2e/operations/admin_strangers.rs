//! Unauthenticated clients of the admin ports keep nobody from health checks and metrics, whatever they hold and ask
//! for.

use std::{net::SocketAddr, time::Duration};

use tests::{
    cluster::{Cluster, Kind, Options},
    load::completes,
    process::Process,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const STRANGERS: usize = 1500;
/// Descriptors that an agent may have for them and for what goes on besides.
const DESCRIPTORS: u64 = 200;
/// Bytes.
const MEMORY: u64 = 40 << 20;

async fn say(address: SocketAddr, text: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    // Whoever has been sent away meanwhile learns it here.
    let _ = socket.write_all(text.as_bytes()).await;
    socket
}

async fn answer(address: SocketAddr, path: &str) -> String {
    let asked = async {
        let mut text = String::new();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        say(address, &request).await.read_to_string(&mut text).await.unwrap();
        text
    };
    // Less than a head may take, after which a stranger's connection ends by itself.
    tokio::time::timeout(Duration::from_secs(5), asked)
        .await
        .unwrap_or_else(|_| panic!("no answer to {path}"))
}

async fn withstands_strangers(address: SocketAddr, agent: &Process, said: &str) {
    let before = agent.usage();
    let mut held = Vec::new();
    for count in 1..=STRANGERS {
        held.push(say(address, said).await);
        if count % 250 == 0 {
            assert!(answer(address, "/livez").await.ends_with("\r\n\r\nok\n"), "{said:?}");
            assert!(answer(address, "/readyz").await.ends_with("\r\n\r\nok\n"), "{said:?}");
            assert!(answer(address, "/metrics").await.contains("# TYPE "), "{said:?}");
        }
    }
    let now = agent.usage();
    assert!(now.descriptors < before.descriptors + DESCRIPTORS, "{said:?}: {before:?}, {now:?}");
    assert!(now.memory < before.memory + MEMORY, "{said:?}: {before:?}, {now:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_who_hold_the_admin_ports_keep_nobody_from_health_and_metrics() {
    let nodes = vec![("n1".to_owned(), Kind::Dialled)];
    let cluster = Cluster::start(Options { nodes, ..Options::default() }).await.unwrap();
    let node = &cluster.nodes[0];
    for (address, agent) in [(cluster.admin, &cluster.master), (node.admin, node.process.as_ref().unwrap())] {
        for said in [
            // The strangers send nothing, a slow head, or an endless body, or ask for metrics and do not read them.
            "",
            "GET /livez HTTP/1.1\r\nHost: localhost\r\nX-A: ",
            "POST /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\nx",
            "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ] {
            completes("strangers", withstands_strangers(address, agent, said)).await;
        }
    }
}
