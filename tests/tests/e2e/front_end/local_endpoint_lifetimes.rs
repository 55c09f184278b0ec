//! Local endpoints follow their tunnels and their agents, and listen where they should.

use std::{net::SocketAddr, time::Duration};

use tests::{
    cluster::{Kind, SOON},
    load::completes,
    process::{eventually, free_port},
    relay::Relay,
    rogue::{self, Identity},
};
use tokio::{io::AsyncReadExt, net::TcpStream};

use super::local_endpoint::{ALL, MB, world};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_are_cut_with_their_tunnel_and_the_next_one_serves_again() {
    let (ports, home) = ([free_port(), free_port(), free_port()], free_port());
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut relays = Vec::new();
    for port in [ports[0], home, ports[2]] {
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        relays.push(Relay::start(any, to, Duration::ZERO, None).await.unwrap());
    }
    let world = world(&ALL, "", |options| {
        options.node_ports = ports.to_vec();
        options.dial = vec![("n1".to_owned(), relays[0].address), ("n3".to_owned(), relays[2].address)];
        options.call_home = Some(relays[1].address);
        options.call_home_port = Some(home);
    })
    .await;
    for (node, relay) in relays.iter().enumerate() {
        let endpoint = world.tcp(node);
        world.served(&endpoint).await;
        let mut held = world.begin(&endpoint, "GET /hold HTTP/1.1").await;
        relay.cut();
        // The connection ends, in whichever way.
        let ended = completes("the caller is cut", held.read_u8()).await;
        assert!(ended.is_err(), "{ended:?}");
        world.served(&endpoint).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_tunnel_callers_wait_a_moment_and_are_closed() {
    let mut world = world(&[Kind::Dialled], "", |_| {}).await;
    world.served(&world.tcp(0)).await;
    world.cluster.master.kill();
    let result = "node_agent_front_end_callers_total{result=\"no_tunnel\"}";
    for endpoint in world.endpoints(0) {
        let mut socket = completes("to be closed", endpoint.connect()).await.unwrap();
        assert_eq!(completes("the end", socket.read(&mut [0; 10])).await.unwrap_or(0), 0);
    }
    let admin = world.cluster.nodes[0].admin;
    assert_eq!(world.cluster.metric(admin, result).await.unwrap(), 2.0);
    world.cluster.restart_master().unwrap();
    world.served(&world.tcp(0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_configured_is_refused_with_the_reason() {
    for front_end in ["through_tunnels: false", ""] {
        let world = world(&[Kind::Dialled, Kind::Sshd], front_end, |options| {
            if front_end.is_empty() {
                options.master_config = String::new();
            }
        })
        .await;
        let mut socket = world.tcp(0).connect().await.unwrap();
        assert_eq!(completes("the end", socket.read(&mut [0; 10])).await.unwrap_or(0), 0);
        let node = world.cluster.nodes[0].process.as_ref().unwrap();
        node.says(&["no master offered its front end"]).await;
        // The sshd was not asked to listen at all.
        assert!(world.tcp(1).connect().await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_are_drained_when_either_agent_stops() {
    let mut world = world(&[Kind::Dialled], "", |_| {}).await;
    let endpoint = world.tcp(0);
    for who in ["master", "node"] {
        world.served(&endpoint).await;
        let mut slow = world.begin(&endpoint, &format!("GET /bytes/{} HTTP/1.1", 16 * MB)).await;
        slow.read_u8().await.unwrap();
        match who {
            "master" => world.cluster.master.signal("TERM"),
            _ => world.cluster.nodes[0].process.as_ref().unwrap().signal("TERM"),
        }
        let log = match who {
            "master" => world.cluster.master.log.clone(),
            _ => world.cluster.nodes[0].process.as_ref().unwrap().log.clone(),
        };
        eventually("it stops", SOON, async || {
            std::fs::read_to_string(&log).unwrap().contains("stopping").then_some(())
        })
        .await;
        let mut rest = 1;
        let mut buffer = vec![0; 256 * 1024];
        while rest < 16 * MB {
            let n = completes("the rest", slow.read(&mut buffer)).await.unwrap();
            assert!(n > 0, "cut after {rest} bytes");
            rest += n as u64;
        }
        drop(slow);
        match who {
            "master" => {
                world.cluster.master.wait(SOON).unwrap();
                world.cluster.restart_master().unwrap();
            }
            _ => {
                world.cluster.nodes[0].process.as_mut().unwrap().wait(SOON).unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_a_local_endpoint_keeps_its_tunnel() {
    let world = world(&[Kind::Dialled, Kind::Sshd], "", |options| {
        options.local_endpoints.clear();
        options.ports = vec![1];
    })
    .await;
    for node in ["n1", "n2"] {
        let refused = world.cluster.unix.connect(&format!("{node}:1")).await.unwrap().err().unwrap();
        assert_eq!(refused.status, 502, "{refused:?}");
        let status = world.cluster.node_status(node).unwrap();
        assert_eq!(status["tunnels"].as_array().unwrap().len(), 1);
    }
    let log = world.cluster.master.log_text();
    for bad in ["ERROR", "tunnel ended", "no streams to the front end"] {
        assert!(!log.contains(bad), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sshd_listens_on_the_address_of_the_inventory_and_on_no_other() {
    let mut world = world(&[Kind::Sshd], "", |_| {}).await;
    world.served(&world.tcp(0)).await;
    world.cluster.master.kill();
    // The rogue has the powers of the master.
    let (path, node) =
        (world.cluster.path(), SocketAddr::from(([127, 0, 0, 1], world.cluster.nodes[0].port)));
    let args =
        ["-I", "m", "-n", "master-agent", "-V", "-1h:+1d", "-O", "clear", "-O", "permit-port-forwarding"];
    let identity = Identity::certified(&path.join("rogue"), &path.join("master/user_ca"), &args).unwrap();
    let link = TcpStream::connect(node).await.unwrap();
    let (session, accepted) = rogue::authenticate(link, &identity, "master-agent", 1 << 20).await.unwrap();
    assert!(accepted);
    let allowed = world.cluster.local_endpoint(0);
    for (host, port) in [
        (allowed.ip().to_string(), free_port()),
        ("127.0.0.9".to_owned(), allowed.port()),
        ("0.0.0.0".to_owned(), allowed.port()),
        ("localhost".to_owned(), allowed.port()),
        (String::new(), allowed.port()),
        ("*".to_owned(), allowed.port()),
    ] {
        let answer = session.tcpip_forward(host.clone(), u32::from(port)).await;
        assert!(matches!(answer, Err(russh::Error::RequestDenied)), "{host:?}:{port}: {answer:?}");
    }
    eventually("the address is free again and given", SOON, async || {
        session.tcpip_forward(allowed.ip().to_string(), u32::from(allowed.port())).await.ok()
    })
    .await;
    let sockets = std::process::Command::new("ss").args(["-tlnH"]).output().unwrap();
    let port = format!(":{}", allowed.port());
    let text = String::from_utf8(sockets.stdout).unwrap();
    let local: Vec<_> = text
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3))
        .filter(|a| a.ends_with(&port))
        .collect();
    assert_eq!(local, [allowed.to_string()]);
}
