//! Health, metrics and the inventory follow what happens to the agents.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use serde_json::Value;
use tests::{
    client::{Door, echo, still_echoes},
    cluster::{Cluster, Kind, Options, SOON, addresses},
    metrics::{Metrics, OPEN_METRICS, assert_golden, documented, scrape},
    pki::client_config,
    process::{eventually, free_port},
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Longer than any drain here takes on a machine that does other things as well.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

pub(super) fn nodes(nodes: &[(&str, Kind)]) -> Vec<(String, Kind)> {
    nodes.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect()
}

struct Answer {
    status: u16,
    body: String,
}

async fn http(address: SocketAddr, request: &str) -> Option<Answer> {
    let mut socket = TcpStream::connect(address).await.ok()?;
    let request = format!("{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.ok()?;
    let mut text = String::new();
    socket.read_to_string(&mut text).await.ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    Some(Answer { status: head.split(' ').nth(1)?.parse().ok()?, body: body.to_owned() })
}

/// Waits until `GET path` gives a status, and gives the body.
pub(super) async fn until(address: SocketAddr, path: &str, status: u16) -> String {
    eventually(&format!("{address}{path} answers {status}"), SOON, async || {
        let answer = http(address, &format!("GET {path}")).await?;
        (answer.status == status).then_some(answer.body)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_masters_health_follows_its_tunnels() {
    let options = Options {
        nodes: nodes(&[("n1", Kind::Dialled), ("n2", Kind::CallHome)]),
        nodes_down: true,
        ..Options::default()
    };
    let mut cluster = Cluster::start(options).await.unwrap();
    let admin = cluster.admin;
    assert_eq!(until(admin, "/livez", 200).await, "ok\n");
    assert_eq!(until(admin, "/readyz", 503).await, "not ready: none of 2 nodes is connected\n");
    cluster.start_node(0).unwrap();
    assert_eq!(until(admin, "/readyz", 200).await, "ok\n");
    let node = cluster.nodes[0].admin;
    assert_eq!(
        (until(node, "/livez", 200).await, until(node, "/readyz", 200).await),
        ("ok\n".into(), "ok\n".into())
    );
    cluster.nodes[0].process.as_mut().unwrap().kill();
    until(admin, "/readyz", 503).await;
    until(admin, "/livez", 200).await;
    cluster.start_node(1).unwrap();
    until(admin, "/readyz", 200).await;
    for (address, request, status) in [
        (admin, "GET /nonesuch", 404),
        (admin, "POST /livez", 405),
        (cluster.nodes[1].admin, "GET /nonesuch", 404),
    ] {
        assert_eq!(http(address, request).await.unwrap().status, status, "{request}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_only_calls_home_is_ready_with_a_master() {
    let mut cluster =
        Cluster::start(Options { nodes: nodes(&[("n1", Kind::CallHome)]), ..Options::default() })
            .await
            .unwrap();
    let node = cluster.nodes[0].admin;
    until(node, "/readyz", 200).await;
    cluster.master.kill();
    assert_eq!(until(node, "/readyz", 503).await, "not ready: no master is connected\n");
    until(node, "/livez", 200).await;
    cluster.restart_master().unwrap();
    until(node, "/readyz", 200).await;
}

fn labels(metrics: Metrics) -> BTreeMap<String, BTreeSet<String>> {
    metrics.into_iter().map(|(name, metric)| (name, metric.labels)).collect()
}

fn documented_of(prefix: &str) -> BTreeMap<String, BTreeSet<String>> {
    documented().into_iter().filter(|(name, _)| name.starts_with(prefix)).collect()
}

/// By somebody it knows, who also wants to be somebody else, and by strangers until they are too many.
async fn front_end_is_called(cluster: &Cluster, front_end: SocketAddr) {
    let ca = cluster.path().join("ca.crt");
    for (shown, header, status) in [
        (true, "", "HTTP/1.1 200"),
        (true, "Impersonate-User: root\r\n", "HTTP/1.1 403"),
        (false, "", "HTTP/1.1 401"),
        (false, "", "HTTP/1.1 401"),
        (false, "", "HTTP/1.1 429"),
    ] {
        let identity = shown.then_some((cluster.path(), "kube-apiserver"));
        let door = Door::Tls(front_end, client_config(&ca, identity).unwrap());
        let mut stream = door.enter().await.unwrap();
        let request = format!("GET /api HTTP/1.1\r\nHost: localhost\r\n{header}Connection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        assert!(answer.starts_with(status), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_metrics_are_those_of_the_guide() {
    let (port, closed_port) = (target::start().await, free_port());
    let api = tests::apiserver::ApiServer::start().await.unwrap();
    let kubeconfig = api.directory().join("kubeconfig");
    api.write_kubeconfig(&kubeconfig).unwrap();
    let front_end = local(free_port());
    let mut cluster = Cluster::start(Options {
        nodes: nodes(&[("n1", Kind::Dialled), ("n2", Kind::CallHome)]),
        ports: vec![port, closed_port],
        local_endpoints: vec![local(free_port()), local(free_port())],
        // Certificates are renewed when a third of this is left.
        master_config: format!(
            "certificates: {{host_ttl: 20s}}\nkubernetes: {{kubeconfig: '{}'}}\n\
             front_end:\n  listen: '{front_end}'\n  limits: {{failures_per_second_per_address: 1}}\n  certificates: [{{cert: server.crt, key: server.key}}]\n  \
             authentication: [{{x509: {{ca: ca.crt}}}}]\n  upstream: {{servers: ['http://127.0.0.1:{port}']}}\n",
            kubeconfig.display(),
        ),
        nodes_down: true,
        ..Options::default()
    })
    .await
    .unwrap();
    cluster.wait_state("n1", "retrying").await;
    cluster.start_node(0).unwrap();
    cluster.start_node(1).unwrap();
    cluster.wait_connected().await;
    for door in cluster.doors() {
        for node in ["n1", "n2"] {
            let mut stream = door.stream(&format!("{node}:{port}")).await.unwrap();
            stream.write_all(b"source 1000\n").await.unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            assert_eq!(all.len(), 1000);
            drop(stream);
            for (target, status) in [
                (format!("{node}:{closed_port}"), 502),
                (format!("{node}:1"), 403),
                ("192.0.2.1:1".into(), 502),
            ] {
                let refused = door.connect(&target).await.unwrap().err().expect("a refusal");
                assert_eq!(refused.status, status, "{target}: {}", refused.reason);
            }
        }
        let mut caller = door.enter().await.unwrap();
        caller.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert_eq!(tests::client::read_head(&mut caller).await.unwrap().0, 405);
    }
    // No TLS, so the front end answers with an alert.
    let mut caller = TcpStream::connect(cluster.local_endpoint(1)).await.unwrap();
    caller.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    caller.shutdown().await.unwrap();
    let _ = caller.read_to_end(&mut Vec::new()).await;
    let mut stranger = TcpStream::connect(local(cluster.nodes[0].port)).await.unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    stranger.shutdown().await.unwrap();
    let _ = stranger.read_to_end(&mut Vec::new()).await;
    let inventory = cluster.path().join("inventory.yaml");
    let good = std::fs::read_to_string(&inventory).unwrap();
    for (text, reason) in [("nodes: 1\n", "failed"), (&good, "ok")] {
        std::fs::write(&inventory, text).unwrap();
        cluster.master.signal("HUP");
        let name = format!("master_agent_inventory_reloads_total{{reason=\"{reason}\"}}");
        eventually(&name, SOON, async || cluster.metric(cluster.admin, &name).await.ok()).await;
    }
    let bad_line = format!("node-agent join {} --ca-pin SHA256:x --token mat1.x", cluster.call_home);
    cluster.node_command(1, &bad_line).unwrap_err();
    let token = cluster.command(&["token", "create"]).unwrap().replace("mat1.", "mat1.x");
    cluster.node_command(1, token.trim()).unwrap_err();
    let renewed = "node_agent_certificate_renewals_total{result=\"ok\"}";
    for node in &cluster.nodes {
        eventually(renewed, PATIENCE, async || cluster.metric(node.admin, renewed).await.ok()).await;
    }
    cluster.nodes[0].process.as_mut().unwrap().kill();
    cluster.start_node(0).unwrap();
    let lost = async || {
        (cluster.total(cluster.admin, "master_agent_tunnels_lost_total").await.ok()? >= 1.0).then_some(())
    };
    eventually("the tunnel was lost", SOON, lost).await;
    cluster.wait_connected().await;

    front_end_is_called(&cluster, front_end).await;
    let scraped = scrape(cluster.admin, OPEN_METRICS).await.unwrap();
    assert_golden(&scraped.metrics(), "master-agent");
    assert_eq!(labels(scraped.metrics()), documented_of("master_agent_"));
    for (sample, value) in [
        ("master_agent_stream_bytes_total{egress=\"connect-unix\",direction=\"up\"}", 24.0),
        ("master_agent_stream_bytes_total{egress=\"connect-tls\",direction=\"down\"}", 2000.0),
        ("master_agent_dials_total{egress=\"connect-unix\",result=\"ok\",fault=\"none\"}", 2.0),
        ("master_agent_dials_total{egress=\"connect-tls\",result=\"policy\",fault=\"policy\"}", 2.0),
        ("master_agent_dials_total{egress=\"connect-unix\",result=\"refused\",fault=\"target\"}", 2.0),
        ("master_agent_dials_total{egress=\"connect-unix\",result=\"no_route\",fault=\"route\"}", 2.0),
        ("master_agent_dial_duration_seconds_count", 4.0),
        ("master_agent_bad_requests_total{egress=\"connect-unix\"}", 1.0),
        ("master_agent_streams{egress=\"connect-unix\"}", 0.0),
        ("master_agent_joins_total{reason=\"ok\"}", 2.0),
        ("master_agent_joins_total{reason=\"refused\"}", 1.0),
        ("master_agent_nodes", 2.0),
        ("master_agent_nodes_connected", 2.0),
        ("master_agent_tunnels_lost_total{reason=\"link\"}", 1.0),
        ("master_agent_node_absence_seconds_count", 1.0),
        ("master_agent_node_reconnects_total{node=\"n1\"}", 1.0),
        ("master_agent_node_reconnects_total{node=\"n2\"}", 0.0),
        ("master_agent_stream_size_bytes_sum{egress=\"connect-tls\",direction=\"down\"}", 2000.0),
        ("master_agent_stream_duration_seconds_count{egress=\"connect-unix\"}", 2.0),
        ("master_agent_policy_refusals_total{rule=\"loopback\"}", 4.0),
        ("master_agent_node_dials_failed_total{node=\"n1\",fault=\"policy\"}", 2.0),
        ("master_agent_front_end_requests_total{code=\"2xx\",outcome=\"served\"}", 1.0),
        ("master_agent_front_end_requests_total{code=\"4xx\",outcome=\"forbidden\"}", 1.0),
        ("master_agent_front_end_requests_total{code=\"4xx\",outcome=\"unauthenticated\"}", 2.0),
        ("master_agent_front_end_requests_total{code=\"4xx\",outcome=\"limited\"}", 1.0),
        ("master_agent_front_end_authentications_total{authenticator=\"x509\",result=\"ok\"}", 2.0),
        ("master_agent_front_end_limited_total{limit=\"failures_per_address\"}", 1.0),
    ] {
        assert_eq!(cluster.metric(cluster.admin, &format!("{sample} ")).await.unwrap(), value, "{sample}");
    }
    let certificates: BTreeSet<&str> = scraped
        .text
        .lines()
        .filter_map(|line| {
            line.strip_prefix("master_agent_certificate_expiry_timestamp_seconds{certificate=\"")
        })
        .filter_map(|rest| rest.split('"').next())
        .collect();
    let wanted =
        ["ssh_user", "node_hosts", "connect", "connect_client_ca", "front_end", "front_end_client_ca"];
    assert_eq!(certificates, BTreeSet::from(wanted));
    // The node that was not restarted; its counters, and the other's which strangers came to.
    let called_home = scrape(cluster.nodes[1].admin, OPEN_METRICS).await.unwrap();
    assert_golden(&called_home.metrics(), "node-agent");
    assert_eq!(labels(called_home.metrics()), documented_of("node_agent_"));
    for (sample, value) in [
        ("node_agent_stream_bytes_total{direction=\"up\"}", 24.0),
        ("node_agent_stream_bytes_total{direction=\"down\"}", 2000.0),
        ("node_agent_dials_total{result=\"ok\"}", 2.0),
        ("node_agent_policy_refusals_total{rule=\"", 2.0),
        ("node_agent_streams ", 0.0),
        ("node_agent_sessions{role=\"master\"}", 1.0),
        ("node_agent_handshakes_total{result=\"ok\"}", 1.0),
        ("node_agent_front_end_callers_total{result=\"ok\"}", 1.0),
        ("node_agent_front_end_stream_bytes_total{direction=\"up\"}", 18.0),
        ("node_agent_front_end_streams ", 0.0),
    ] {
        assert_eq!(cluster.metric(cluster.nodes[1].admin, sample).await.unwrap(), value, "{sample}");
    }
}

/// An inventory of the nodes at these places, which says of them what the cluster's first one does.
pub(super) fn inventory(cluster: &Cluster, nodes: &[usize], more: &str) -> String {
    let mut text = "nodes:\n".to_owned();
    for i in nodes {
        let node = &cluster.nodes[*i];
        let own: Vec<String> = addresses(*i).iter().map(|a| format!("'{a}'")).collect();
        let dial = match node.kind {
            Kind::CallHome | Kind::CallHomeHttps => String::new(),
            Kind::Dialled | Kind::Sshd => format!(", dial: '{}'", local(node.port)),
        };
        text += &format!("  - {{name: {}, addresses: [{}]{dial}}}\n", node.name, own.join(", "));
    }
    text + more
}

async fn reloads(cluster: &Cluster, result: &str) -> f64 {
    let name = format!("master_agent_inventory_reloads_total{{reason=\"{result}\"}}");
    cluster.metric(cluster.admin, &name).await.unwrap_or(0.0)
}

/// Puts an inventory in place of the present one as an editor does, and waits until the master has seen it.
async fn change(cluster: &Cluster, text: &str, hang_up: bool, result: &str) {
    let before = reloads(cluster, result).await;
    let temporary = cluster.path().join("inventory.new");
    std::fs::write(&temporary, text).unwrap();
    std::fs::rename(&temporary, cluster.path().join("inventory.yaml")).unwrap();
    if hang_up {
        cluster.master.signal("HUP");
    }
    eventually("the inventory is read again", SOON, async || {
        (reloads(cluster, result).await > before).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_inventory_adds_and_takes_out_nodes_and_disturbs_no_other() {
    let port = target::start().await;
    let kinds =
        [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::Dialled), ("n4", Kind::CallHome)];
    let cluster = Cluster::start(Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() })
        .await
        .unwrap();
    let mut kept =
        [echo(&cluster.unix, &format!("n1:{port}")).await, echo(&cluster.tls, &format!("n2:{port}")).await];
    let since = |node: &str| cluster.node_status(node).unwrap()["tunnels"][0]["since_unix_seconds"].clone();
    let before = [since("n1"), since("n2")];

    for hang_up in [true, false] {
        let mut lost = [
            echo(&cluster.unix, &format!("n3:{port}")).await,
            echo(&cluster.unix, &format!("n4:{port}")).await,
        ];
        change(&cluster, &inventory(&cluster, &[0, 1], ""), hang_up, "ok").await;
        for (name, address) in [("n3", "127.0.0.3"), ("n4", "127.0.0.4")] {
            assert!(cluster.node_status(name).is_err(), "{name} is still known");
            for host in [name, address] {
                let refused =
                    cluster.unix.connect(&format!("{host}:{port}")).await.unwrap().err().expect("no route");
                assert_eq!(refused.status, 502, "{}", refused.reason);
            }
        }
        for stream in &mut lost {
            let end = tokio::time::timeout(SOON, stream.read(&mut [0; 1]))
                .await
                .expect("the stream of a lost tunnel ends");
            assert!(end.is_err() || end.is_ok_and(|n| n == 0));
        }
        for node in &cluster.nodes[2..] {
            eventually("the node has no session", SOON, async || {
                (cluster.metric(node.admin, "node_agent_sessions{role=\"master\"}").await.ok()? == 0.0)
                    .then_some(())
            })
            .await;
        }
        for stream in &mut kept {
            still_echoes(stream).await;
        }
        change(&cluster, &inventory(&cluster, &[0, 1, 2, 3], ""), hang_up, "ok").await;
        cluster.wait_connected().await;
        for target in [format!("n3:{port}"), format!("127.0.0.4:{port}")] {
            echo(&cluster.unix, &target).await;
        }
    }
    for stream in &mut kept {
        still_echoes(stream).await;
    }
    assert_eq!(before, [since("n1"), since("n2")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_inventory_leaves_the_old_one() {
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled), ("n2", Kind::CallHome)];
    let cluster = Cluster::start(Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() })
        .await
        .unwrap();
    let mut streams =
        [echo(&cluster.unix, &format!("n1:{port}")).await, echo(&cluster.unix, &format!("n2:{port}")).await];
    let good = reloads(&cluster, "ok").await;
    let broken =
        inventory(&cluster, &[0], "  - {name: n5, dail: 'n5:22'}\n  - {name: n6, addresses: [10.0.0]}\n");
    change(&cluster, &broken, true, "failed").await;
    let file = cluster.path().join("inventory.yaml");
    for mistake in ["3:16: nodes[1].dail", "4:28: nodes[2].addresses[0]"] {
        cluster.master.says(&[&format!("{}:{mistake}", file.display())]).await;
    }
    cluster.master.says(&["ERROR", "inventory"]).await;
    change(&cluster, &broken.replace("dail", "dialled"), false, "failed").await;
    assert_eq!(reloads(&cluster, "ok").await, good);
    std::fs::remove_file(&file).unwrap();
    cluster.master.signal("HUP");
    eventually("a lost file is a failure", SOON, async || {
        (reloads(&cluster, "failed").await >= 3.0).then_some(())
    })
    .await;
    for name in ["master_agent_nodes ", "master_agent_nodes_connected "] {
        assert_eq!(cluster.metric(cluster.admin, name).await.unwrap(), 2.0, "{name}");
    }
    for (i, node) in ["n1", "n2"].into_iter().enumerate() {
        still_echoes(&mut streams[i]).await;
        echo(&cluster.tls, &format!("{node}:{port}")).await;
    }
    change(&cluster, &inventory(&cluster, &[0], ""), false, "ok").await;
    assert!(cluster.node_status("n2").is_err());
    still_echoes(&mut streams[0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_running_agent_can_be_asked_while_the_inventory_is_broken() {
    let kinds = [("n1", Kind::Dialled)];
    let cluster = Cluster::start(Options { nodes: nodes(&kinds), ..Options::default() }).await.unwrap();
    change(&cluster, "nodes: 1\n", true, "failed").await;
    let commands = [&["node", "list"][..], &["explain", "n1:1"], &["token", "create"], &["token", "list"]];
    let failed: Vec<String> =
        commands.iter().filter_map(|args| Some(cluster.command(args).err()?.to_string())).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_cidr_of_a_node_does_not_cut_its_streams() {
    let port = target::start().await;
    let kinds = [("n1", Kind::Dialled)];
    let cluster = Cluster::start(Options { nodes: nodes(&kinds), ports: vec![port], ..Options::default() })
        .await
        .unwrap();
    let mut stream = echo(&cluster.unix, &format!("n1:{port}")).await;
    let wider = inventory(&cluster, &[0], "").replace("addresses:", "cidrs: [10.244.1.0/24], addresses:");
    change(&cluster, &wider, true, "ok").await;
    let way: Value =
        serde_json::from_str(&cluster.command(&["explain", "10.244.1.1:80", "-o", "json"]).unwrap()).unwrap();
    assert_eq!(way["candidates"][0]["node"], "n1");
    still_echoes(&mut stream).await;
}
