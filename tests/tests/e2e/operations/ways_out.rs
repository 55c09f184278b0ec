//! Errors about ports and addresses that lead nowhere name the ways out.

use std::net::{SocketAddr, TcpListener};

use tests::{
    cluster::{Cluster, Kind, Options},
    openssh,
    process::{TempDir, free_port},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::commands::ran;

const WAYS_OUT: [&str; 3] = ["call_home:", "dial:", "master-agent sshd-config"];

#[test]
fn a_port_that_is_taken_gives_the_three_ways_out() {
    let dir = TempDir::new("taken").unwrap();
    let config = dir.path().join("node.yaml");
    let sshd = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = sshd.local_addr().unwrap();
    std::fs::write(
        &config,
        format!(
            "state_dir: state\nlisten: '{taken}'\nadmin: {{listen: '127.0.0.1:{}', socket: admin.sock}}\n",
            free_port()
        ),
    )
    .unwrap();
    let error = ran("node-agent", Some(&config), &["run"]).failed(1, &WAYS_OUT);
    assert!(error.contains(&taken.to_string()) && error.contains("is taken"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[derive(Clone, Copy, Debug)]
enum Service {
    /// Accepts and closes.
    Closes,
    /// Answers as a web server does.
    Http,
    /// Takes a line of its own protocol for a mistake and says so, for as long as it is connected.
    Complains,
    /// Waits for a request that it understands.
    Silent,
}

async fn serve(service: Service) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 1024];
                match service {
                    Service::Closes => {}
                    Service::Http => {
                        let _ = socket.read(&mut buffer).await;
                        let _ =
                            socket.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await;
                    }
                    Service::Complains => {
                        while socket.read(&mut buffer).await.is_ok_and(|n| n > 0) {
                            let _ = socket.write_all(b"-ERR unknown command\r\n").await;
                        }
                    }
                    Service::Silent => while socket.read(&mut buffer).await.is_ok_and(|n| n > 0) {},
                }
            });
        }
    });
    address
}

async fn the_reason_names_the_ways_out(service: Service) {
    let address = serve(service).await;
    let cluster = Cluster::start(Options {
        nodes: vec![("n1".to_owned(), Kind::Dialled)],
        master_config: "tunnels: {handshake_timeout: 1s}".to_owned(),
        dial: vec![("n1".to_owned(), address)],
        nodes_down: true,
        ..Options::default()
    })
    .await
    .unwrap();
    cluster.wait_state("n1", "retrying").await;
    let reason = cluster.node_status("n1").unwrap()["reason"].as_str().unwrap().to_owned();
    for way in WAYS_OUT {
        assert!(reason.contains(way), "{service:?}: no {way:?} in {reason:?}");
    }
    let table = cluster.command(&["node", "list"]).unwrap();
    assert!(table.contains("call_home:"), "{table}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dialling_what_closes_at_once_names_the_ways_out() {
    the_reason_names_the_ways_out(Service::Closes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dialling_a_web_server_names_the_ways_out() {
    the_reason_names_the_ways_out(Service::Http).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dialling_a_server_of_another_protocol_names_the_ways_out() {
    the_reason_names_the_ways_out(Service::Complains).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dialling_a_silent_server_names_the_ways_out() {
    the_reason_names_the_ways_out(Service::Silent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dialling_an_sshd_that_knows_no_master_says_what_it_lacks() {
    let dir = TempDir::new("sshd").unwrap();
    let port = free_port();
    openssh::keygen(&dir.path().join("host_key")).unwrap();
    let host_key = dir.path().join("host_key").display().to_string();
    let _sshd = openssh::sshd(dir.path(), port, &format!("HostKey {host_key}")).unwrap();
    let cluster = Cluster::start(Options {
        nodes: vec![("n1".to_owned(), Kind::Dialled)],
        dial: vec![("n1".to_owned(), SocketAddr::from(([127, 0, 0, 1], port)))],
        nodes_down: true,
        ..Options::default()
    })
    .await
    .unwrap();
    cluster.wait_state("n1", "retrying").await;
    let reason = cluster.node_status("n1").unwrap()["reason"].to_string();
    for way in ["master-agent token create", "master-agent sshd-config", "pin the key in the inventory"] {
        assert!(reason.contains(way), "no {way:?} in {reason}");
    }
}
