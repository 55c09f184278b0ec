//! A tunnel makes further connections while its streams carry much.

use std::time::Duration;

use tests::{
    cluster::{Cluster, Kind, Options, SOON},
    load::{completes, download, gets, upload},
    process::eventually,
    target,
};

const MB: u64 = 1_000_000;

async fn transfers_get_further_connections(kind: Kind) {
    println!("{kind:?}");
    let port = target::start().await;
    let options = Options { nodes: vec![("n1".to_owned(), kind)], ports: vec![port], ..Options::default() };
    let cluster = Cluster::start(options).await.unwrap();
    let target = format!("n1:{port}");
    gets(&cluster.doors(), &target, 4, 100).await;
    assert_eq!(cluster.connections(0), 1);
    for up in [false, true] {
        let door = cluster.unix.clone();
        let transfers = async {
            loop {
                if up {
                    upload(&door, &target, 200 * MB).await;
                } else {
                    download(&door, &target, 200 * MB).await;
                }
            }
        };
        let grown = eventually("a further connection", Duration::from_secs(60), async || {
            Some(cluster.connections(0)).filter(|count| *count > 1)
        });
        tokio::select! {
            count = grown => println!("  {count} connections"),
            () = transfers => {}
        }
        // Whole transfers, which use it, and others beside them.
        let others = async {
            completes("others", gets(&cluster.doors(), &target, 8, 500)).await;
        };
        tokio::join!(
            completes("a download", download(&cluster.unix, &target, 300 * MB)),
            completes("an upload", upload(&cluster.unix, &target, 300 * MB)),
            others,
        );
    }
    let status = cluster.node_status("n1").unwrap();
    assert_eq!(status["tunnels"].as_array().map(Vec::len), Some(1), "{status}");
    let tunnels = cluster.metric(cluster.admin, "master_agent_tunnels_established_total").await.unwrap();
    assert_eq!(tunnels, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn transfers_get_further_connections_to_a_node_that_is_dialled() {
    transfers_get_further_connections(Kind::Dialled).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn transfers_get_further_connections_from_a_node_that_calls_home() {
    transfers_get_further_connections(Kind::CallHome).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn transfers_get_further_connections_from_a_node_that_calls_home_over_https() {
    transfers_get_further_connections(Kind::CallHomeHttps).await;
}

/// A node that is gone takes its further connections with it, and gets its tunnel again.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_node_that_comes_back_has_one_connection_again() {
    let port = target::start().await;
    let options =
        Options { nodes: vec![("n1".to_owned(), Kind::CallHome)], ports: vec![port], ..Options::default() };
    let mut cluster = Cluster::start(options).await.unwrap();
    let target = format!("n1:{port}");
    let (door, far) = (cluster.unix.clone(), target.clone());
    let transfers = tokio::spawn(async move {
        loop {
            download(&door, &far, 200 * MB).await;
        }
    });
    eventually("a further connection", Duration::from_secs(60), async || {
        Some(cluster.connections(0)).filter(|count| *count > 1)
    })
    .await;
    cluster.nodes[0].process.take();
    assert!(transfers.await.is_err(), "its stream was cut");
    cluster.start_node(0).unwrap();
    cluster.wait_state("n1", "connected").await;
    eventually("one connection", SOON, async || Some(cluster.connections(0)).filter(|count| *count == 1))
        .await;
    gets(&cluster.doors(), &target, 4, 100).await;
}
