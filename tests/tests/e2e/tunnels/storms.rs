//! A master whom many nodes call at once tells further ones when to come again, and they do.

use tests::{
    cluster::{Cluster, Kind, Options, SOON},
    load::{completes, download},
    process::eventually,
    target,
};
use tokio::{io::AsyncReadExt, net::TcpStream};

/// As many handshakes in progress as the master takes before it tells others to come again.
const BUSY: usize = 64;
const HELLO: &[u8] = b"SSH-2.0-master-agent\r\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_node_that_is_told_to_come_again_does_so_and_is_connected() {
    let port = target::start().await;
    for (kind, said) in [
        (Kind::CallHome, "the master wants to be called again later"),
        (Kind::CallHomeHttps, "503 Service Unavailable too many nodes call home at once: come again in"),
    ] {
        println!("{kind:?}");
        let mut cluster = Cluster::start(Options {
            nodes: vec![("n1".to_owned(), kind)],
            ports: vec![port],
            master_config: "tunnels: {handshake_timeout: 60s}".to_owned(),
            nodes_down: true,
            ..Options::default()
        })
        .await
        .unwrap();
        let mut callers = Vec::new();
        for _ in 0..BUSY {
            let mut caller = TcpStream::connect(cluster.call_home).await.unwrap();
            let mut hello = [0; HELLO.len()];
            completes("the beginning of a handshake", caller.read_exact(&mut hello)).await.unwrap();
            assert_eq!(hello, HELLO);
            callers.push(caller);
        }
        cluster.start_node(0).unwrap();
        let log = cluster.nodes[0].dir.join("log");
        eventually(said, SOON, async || {
            std::fs::read_to_string(&log).unwrap_or_default().contains(said).then_some(())
        })
        .await;
        cluster.wait_state("n1", "connected").await;
        completes("a download", download(&cluster.unix, &format!("n1:{port}"), 1_000_000)).await;
        let busy = "master_agent_tunnels_refused_total{reason=\"busy\"}";
        assert_eq!(cluster.metric(cluster.admin, busy).await.unwrap(), 1.0);
        drop(callers);
    }
}
