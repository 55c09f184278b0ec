//! Every kind of node and both kinds of egress listener carry a gigabyte each way. On a busy machine, a reader behind an
//! sshd can be so late that its stream is reset.

use tests::{
    cluster::{Cluster, Kind, Options},
    load::{download, upload},
    target,
};

/// Bytes sent each way through each cell: 1 GB, or what TEST_BYTES says.
fn volume() -> u64 {
    std::env::var("TEST_BYTES").ok().and_then(|v| v.parse().ok()).unwrap_or(1_000_000_000)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_kind_of_node_and_door_carries_a_gigabyte_each_way_and_half_closes() {
    let port = target::start().await;
    let nodes = [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::Sshd)];
    let nodes = nodes.map(|(name, kind)| (name.to_owned(), kind)).to_vec();
    let cluster = Cluster::start(Options { nodes, ports: vec![port], ..Options::default() }).await.unwrap();
    for node in ["n1", "n2", "n3"] {
        for door in cluster.doors() {
            let target = format!("{node}:{port}");
            let began = std::time::Instant::now();
            download(&door, &target, volume()).await;
            let down = began.elapsed();
            upload(&door, &target, volume()).await;
            println!(
                "{node} {}: {} bytes each way, {down:.1?} down, {:.1?} up",
                door.name(),
                volume(),
                began.elapsed() - down
            );
        }
    }
}
