//! Bursts of callers over mutual TLS who do not try again: each of them is served, also beside strangers who never end a
//! handshake.

use std::{net::SocketAddr, sync::Arc};

use rustls::ClientConnection;
use tests::{
    client::Door,
    cluster::{Cluster, Kind, Options},
    konnectivity::Connection,
    load::completes,
    pki::client_config,
    process::free_port,
    steady::{Echo, raise_descriptor_limit},
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};

const CALLERS: usize = 2000;
const STRANGERS: usize = 2000;
/// More than there are handshakes at once.
const MANY_STRANGERS: usize = 4200;
/// The beginning of a ClientHello.
const BEGINNING: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";

struct World {
    cluster: Cluster,
    konnectivity: Door,
    target: String,
}

async fn world() -> World {
    raise_descriptor_limit(16_384).unwrap();
    let target = target::start().await;
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let options = Options {
        nodes: vec![("n1".to_owned(), Kind::Dialled)],
        ports: vec![target],
        master_config: format!(
            "konnectivity: {{tls: {{listen: '{address}', cert: server.crt, key: server.key, client_ca: ca.crt}}}}\n"
        ),
        ..Options::default()
    };
    let cluster = Cluster::start(options).await.unwrap();
    let path = cluster.path();
    let config = client_config(&path.join("ca.crt"), Some((path, "kube-apiserver"))).unwrap();
    let mut config = Arc::unwrap_or_clone(config);
    config.alpn_protocols = vec![b"h2".to_vec()];
    let konnectivity = Door::Tls(address, Arc::new(config));
    World { cluster, konnectivity, target: format!("n1:{target}") }
}

/// Strangers who connect again whenever they are cut. Half of them send the beginning of a handshake.
async fn strangers(door: &Door) -> JoinSet<()> {
    let Door::Tls(address, _) = *door else { unreachable!() };
    let mut strangers = JoinSet::new();
    for number in 0..STRANGERS {
        let mut first = Some(TcpStream::connect(address).await.unwrap());
        strangers.spawn(async move {
            loop {
                let socket = match first.take() {
                    Some(socket) => Ok(socket),
                    None => TcpStream::connect(address).await,
                };
                let Ok(mut socket) = socket else { continue };
                if number % 2 == 0 {
                    let _ = socket.write_all(BEGINNING).await;
                }
                while matches!(socket.read(&mut [0; 64]).await, Ok(n) if n > 0) {}
            }
        });
    }
    strangers
}

/// Strangers of another network than the callers, who send a whole ClientHello and nothing else.
async fn strangers_who_have_begun(door: &Door) -> Vec<TcpStream> {
    let Door::Tls(address, config) = door else { unreachable!() };
    let mut hello = Vec::new();
    let mut client = ClientConnection::new(config.clone(), "localhost".try_into().unwrap()).unwrap();
    client.write_tls(&mut hello).unwrap();
    let mut strangers = Vec::new();
    for _ in 0..MANY_STRANGERS {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.1.1:0".parse().unwrap()).unwrap();
        let mut stranger = socket.connect(*address).await.unwrap();
        let _ = stranger.write_all(&hello).await;
        strangers.push(stranger);
    }
    strangers
}

/// Lets callers call at once, and keeps what each of them gets until all have been served.
async fn all_are_served<T: Send + 'static>(
    callers: impl Iterator<Item = impl Future<Output = anyhow::Result<T>> + Send + 'static>,
) {
    let mut calls = JoinSet::new();
    for caller in callers {
        calls.spawn(completes("a caller", caller));
    }
    let served = calls.join_all().await;
    let failures: Vec<_> = served.iter().filter_map(|result| result.as_ref().err()).collect();
    let (count, all) = (failures.len(), served.len());
    assert!(failures.is_empty(), "{count} of {all} were not served: {:#}", failures[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connect_callers_are_served_in_a_burst_and_beside_strangers() {
    let world = world().await;
    let callers = || {
        (0..CALLERS).map(|_| {
            let (door, target) = (world.cluster.tls.clone(), world.target.clone());
            async move { Echo::open(&door, &target).await }
        })
    };
    all_are_served(callers()).await;
    let _strangers = strangers(&world.cluster.tls).await;
    all_are_served(callers()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_tunnels_are_served_in_a_burst_and_beside_strangers() {
    let world = world().await;
    let callers = || {
        (0..CALLERS).map(|_| {
            let (door, target) = (world.konnectivity.clone(), world.target.clone());
            async move {
                let connection = Connection::open(&door).await?;
                let (mut call, id) = connection.dial(&target).await?;
                call.data(id, "echo\nhello").await;
                let heard = call.read(id).await?;
                anyhow::ensure!(&heard[..] == b"hello", "heard {heard:?}");
                Ok((connection, call))
            }
        })
    };
    all_are_served(callers()).await;
    let _strangers = strangers(&world.konnectivity).await;
    all_are_served(callers()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_are_served_while_strangers_of_another_network_hold_all_handshakes() {
    let world = world().await;
    let _strangers = strangers_who_have_begun(&world.cluster.tls).await;
    all_are_served((0..CALLERS / 4).map(|_| {
        let (door, target) = (world.cluster.tls.clone(), world.target.clone());
        async move { Echo::open(&door, &target).await }
    }))
    .await;
}
