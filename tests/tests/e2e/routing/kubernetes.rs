//! Routes follow the recorded lists and watches of a real Kubernetes API, and survive its failures.

use std::time::Duration;

use hyper::StatusCode;
use serde_json::{Value, json};
use tests::{
    apiserver::{ApiServer, Fault, Kind, Verb},
    client::{Stream, http_get},
    cluster::{Cluster, Options, SOON, binary},
    load,
    netns::Namespace,
    openssh,
    process::{Process, eventually, free_port},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Seconds without a word from the API server after which the master is not ready.
const STALE_AFTER: u64 = 5;

/// A master-agent that follows the stub, and knows no node besides.
async fn follow(api: &ApiServer, more: &str) -> Cluster {
    let kubeconfig = api.directory().join("kubeconfig");
    api.write_kubeconfig(&kubeconfig).unwrap();
    let kubeconfig = kubeconfig.display();
    Cluster::start(Options {
        master_config: format!(
            "kubernetes: {{kubeconfig: '{kubeconfig}', stale_after: {STALE_AFTER}s, legacy_names: true{more}}}"
        ),
        ..Options::default()
    })
    .await
    .unwrap()
}

/// `NODE TARGET, …: REASON` as `explain` shows it, or why there is no route.
fn route(cluster: &Cluster, target: &str) -> String {
    let e: Value =
        serde_json::from_slice(&cluster.output(&["explain", target, "-o", "json"]).unwrap().stdout).unwrap();
    let ways: Vec<String> = e["candidates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|way| format!("{} {}", way["node"].as_str().unwrap(), way["target"].as_str().unwrap()))
        .collect();
    match ways.is_empty() {
        true => e["verdict"].as_str().unwrap().to_owned(),
        false => format!("{}: {}", ways.join(", "), e["reason"].as_str().unwrap()),
    }
}

/// Waits until the routes are these.
async fn routes_are(cluster: &Cluster, after: &str, expected: &[(&str, &str)]) {
    for (target, want) in expected {
        let mut last = String::new();
        let found = tokio::time::timeout(SOON, async {
            loop {
                last = route(cluster, target);
                if last.contains(want) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        assert!(found.await.is_ok(), "after {after}: {target} is {last:?}, not {want:?}");
    }
}

/// One request and its answer.
async fn get(stream: &mut Stream) -> std::io::Result<()> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await?;
    stream.read_exact(&mut [0; 40]).await.map(drop)
}

async fn ready(cluster: &Cluster) -> Result<String, String> {
    http_get(cluster.admin, "/readyz").await.map_err(|e| format!("{e:#}"))
}

async fn ready_says(cluster: &Cluster, what: &str) {
    let mut last = String::new();
    let said = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            last = ready(cluster).await.unwrap_or_else(|e| e);
            if last.contains(what) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    assert!(said.await.is_ok(), "readiness says {last:?}, not {what:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_recorded_answers_give_the_right_routes_after_every_event() {
    let api = ApiServer::start().await.unwrap();
    let cluster = follow(&api, "").await;
    for kind in Kind::ALL {
        api.wait_watched(kind).await;
    }
    let nowhere = "no route to";
    let none = "no node with a node-agent is connected";
    let n1 = "n1 10.77.1.2:10250: address of node n1";
    routes_are(
        &cluster,
        "the lists",
        &[
            ("n1:10250", "n1 n1:10250: node name n1"),
            ("10.77.1.2:10250", n1),
            ("10.244.1.9:80", "n1 10.244.1.9:80: CIDR 10.244.1.0/24 of node n1"),
            ("10.244.2.9:80", nowhere),
            ("n2:10250", nowhere),
            ("10.0.0.118:80", "n1 10.77.1.2:8080: service default/web"),
            ("web.default.svc:80", "n1 10.77.1.2:8080: service default/web"),
            ("web.default.svc.cluster.local:80", "n1 10.77.1.2:8080: service default/web"),
            ("10.0.0.118:81", "service default/web has no such TCP port"),
            // Its endpoint is the API server's address, which is on no node.
            ("10.0.0.1:443", none),
            ("10.0.0.85:53", nowhere),
        ],
    )
    .await;
    // Every recorded event of the nodes.
    let after: [(&str, &[(&str, &str)]); 4] = [
        (
            "ADDED n2",
            &[
                ("n2:10250", "n2 n2:10250: node name n2"),
                ("10.244.2.9:80", "n2 10.244.2.9:80: CIDR 10.244.2.0/24 of node n2"),
                ("[fd00:10:244:2::7]:80", "CIDR fd00:10:244:2::/64 of node n2"),
                ("10.77.2.2:1", nowhere),
            ],
        ),
        (
            "MODIFIED n2",
            &[
                ("10.77.2.2:1", "n2 10.77.2.2:1: address of node n2"),
                ("198.51.100.7:1", "n2 198.51.100.7:1: address of node n2"),
                ("[fd00:77::2]:1", "n2 [fd00:77::2]:1: address of node n2"),
            ],
        ),
        ("MODIFIED n1", &[("10.77.1.2:10250", n1), ("10.77.2.2:1", "address of node n2")]),
        (
            "DELETED n2",
            &[
                ("n2:10250", nowhere),
                ("10.77.2.2:1", nowhere),
                ("10.244.2.9:80", nowhere),
                ("[fd00:10:244:2::7]:80", nowhere),
                ("10.77.1.2:10250", n1),
            ],
        ),
    ];
    for (event, expected) in after {
        let sent = api.step(Kind::Nodes).unwrap();
        let name = sent["object"]["metadata"]["name"].as_str().unwrap();
        assert_eq!(format!("{} {name}", sent["type"].as_str().unwrap()), event);
        routes_are(&cluster, event, expected).await;
    }
    assert_eq!(api.step(Kind::Nodes), None);
    // Every one of the pods: all of them on their host's network, so the node keeps its address throughout.
    while let Some(event) = api.step(Kind::Pods) {
        routes_are(&cluster, &event["type"].to_string(), &[("10.77.1.2:10250", n1)]).await;
    }
    // A service comes; then its endpoints do, one of them not ready; one goes; the service goes.
    assert_eq!(api.step(Kind::Services).unwrap()["type"], "ADDED");
    routes_are(&cluster, "ADDED dns", &[("10.0.0.85:53", "service kube-system/dns has no ready endpoint")])
        .await;
    assert_eq!(api.step(Kind::EndpointSlices).unwrap()["type"], "ADDED");
    let dns = [
        ("10.0.0.85:53", "n1 10.244.1.5:5353: service kube-system/dns port dns-tcp"),
        ("dns.kube-system.svc:9153", "n1 10.244.1.5:9153: service kube-system/dns port metrics"),
    ];
    routes_are(&cluster, "ADDED dns-1", &dns).await;
    assert_eq!(api.step(Kind::EndpointSlices).unwrap()["type"], "MODIFIED");
    routes_are(&cluster, "MODIFIED dns-1", &dns).await;
    assert_eq!(api.step(Kind::Services).unwrap()["type"], "DELETED");
    routes_are(&cluster, "DELETED dns", &[("10.0.0.85:53", nowhere), ("dns.kube-system.svc:53", nowhere)])
        .await;
    for kind in Kind::ALL {
        assert_eq!((api.step(kind), api.count(kind, Verb::List)), (None, 1), "{kind:?}");
    }
    assert!(api.asked().iter().all(|asked| asked.authorized));
    assert_eq!(ready(&cluster).await.unwrap(), "ok\n");
}

/// The API server is away for longer than `stale_after`, comes back having forgotten what was, and says nonsense.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_api_server_that_fails_takes_no_route_along() {
    let api = ApiServer::start().await.unwrap();
    let mut cluster = follow(&api, "").await;
    let before = [
        ("n1:10250", "n1 n1:10250: node name n1"),
        ("10.0.0.118:80", "n1 10.77.1.2:8080: service default/web"),
    ];
    routes_are(&cluster, "the lists", &before).await;
    ready_says(&cluster, "ok").await;

    // Changes while it is away are known soon after it is back.
    api.refuse().await;
    ready_says(&cluster, "nodes are ").await;
    assert!(
        ready(&cluster).await.unwrap().starts_with("ok\n"),
        "a short absence is no reason not to be ready"
    );
    api.send(Kind::Nodes, "ADDED", json!({"metadata": {"name": "n7"}}));
    let late = eventually("the master is not ready", SOON, async || ready(&cluster).await.err()).await;
    assert!(late.contains("503") && late.contains("SSH Tunnel Check: nodes are "), "{late}");
    routes_are(&cluster, "a long absence", &before).await;
    let metrics = http_get(cluster.admin, "/metrics").await.unwrap();
    let stale = metrics.lines().find(|l| l.starts_with("apiserver_proxy_tunnel_sync_latency_secs ")).unwrap();
    assert!(stale.rsplit(' ').next().unwrap().parse::<u64>().unwrap() >= STALE_AFTER, "{stale}");
    api.accept().await.unwrap();
    routes_are(&cluster, "the return", &[("n7:1", "n7 n7:1: node name n7")]).await;
    ready_says(&cluster, "ok").await;
    eventually("readiness is all good again", SOON, async || {
        (ready(&cluster).await.ok()? == "ok\n").then_some(())
    })
    .await;

    // 410, as an event and as an answer: a new list, with what it has and without what it has not.
    let lists = api.count(Kind::Nodes, Verb::List);
    api.wait_watched(Kind::Nodes).await;
    api.compact(Kind::Nodes);
    api.send(Kind::Nodes, "DELETED", json!({"metadata": {"name": "n7"}}));
    routes_are(&cluster, "410 Gone", &[("n7:1", "no route to")]).await;
    routes_are(&cluster, "410 Gone", &before).await;
    assert!(api.count(Kind::Nodes, Verb::List) > lists);
    api.wait_watched(Kind::Nodes).await;
    let lists = api.count(Kind::Nodes, Verb::List);
    api.fail(Kind::Nodes, Verb::Watch, Some(Fault::Status(StatusCode::GONE)));
    api.cut_watches();
    eventually("nodes are listed again", SOON, async || {
        (api.count(Kind::Nodes, Verb::List) > lists + 1).then_some(())
    })
    .await;
    api.fail(Kind::Nodes, Verb::Watch, None);
    api.wait_watched(Kind::Nodes).await;
    routes_are(&cluster, "410 as an answer", &before).await;

    // Objects that are none: the former version stays, and what follows is taken.
    api.send(Kind::Nodes, "MODIFIED", json!({"metadata": {"name": "n1"}, "status": {"addresses": "many"}}));
    api.send(Kind::Nodes, "ADDED", json!({"metadata": {"name": "N_0"}, "spec": {"podCIDRs": ["0.0.0.0/0"]}}));
    api.send(Kind::Nodes, "ADDED", json!({"metadata": {"name": "n8"}, "spec": {"podCIDRs": ["x", "10.8.0.0/99"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "InternalIP", "address": "x"}]}}));
    api.send(
        Kind::EndpointSlices,
        "MODIFIED",
        json!({"metadata": {"name": "web-1", "namespace": "default"}, "ports": 7}),
    );
    api.send(Kind::Pods, "ADDED", json!({"metadata": {"name": 5}}));
    routes_are(&cluster, "garbage", &[("n8:1", "n8 n8:1: node name n8"), ("127.0.0.1:22", "no route to")])
        .await;
    routes_are(&cluster, "garbage", &before).await;
    ready_says(&cluster, "nodes: 1 can't be read, the last: n1: ").await;
    ready_says(&cluster, "endpointslices: 1 can't be read, the last: default/web-1: ").await;

    // Bytes that are no events, and lists that are no lists.
    api.send_bytes(Kind::Nodes, "\0\u{1}nonsense\n{\"type\": 5}\n[]\n");
    api.fail(Kind::Services, Verb::List, Some(Fault::Body("{\"items\": 5}".into())));
    api.compact(Kind::Services);
    ready_says(&cluster, "services are ").await;
    routes_are(&cluster, "nonsense", &before).await;
    api.fail(Kind::Services, Verb::List, None);
    api.send(Kind::Nodes, "DELETED", json!({"metadata": {"name": "n8"}}));
    routes_are(&cluster, "nonsense", &[("n8:1", "no route to")]).await;

    // An empty list that is a list is believed.
    let empty = json!({"kind": "ServiceList", "apiVersion": "v1", "metadata": {"resourceVersion": "99999"}, "items": []});
    api.set_list(Kind::Services, &empty).unwrap();
    routes_are(&cluster, "an empty list", &[("10.0.0.118:80", "no route to"), before[0]]).await;
    assert!(cluster.master.is_running());
    let log = std::fs::read_to_string(&cluster.master.log).unwrap();
    assert!(!log.contains("panicked"), "{log}");
    assert!(!log.contains(&api.token()), "the token is in the log");
}

/// As with kube-apiserver's own SSH tunneler: a user, a key, and the nodes as the API lists them, each with a plain
/// sshd; but host keys are verified.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nodes_of_the_cluster_are_dialled_with_a_key_of_the_users() {
    let host = Namespace::new().unwrap();
    let api = ApiServer::start().await.unwrap();
    openssh::create_account("master-agent").unwrap();
    let directory = api.directory();
    let (host_key, user_key) = (directory.join("host_key"), directory.join("id_ed25519"));
    openssh::keygen(&host_key).unwrap();
    openssh::keygen(&user_key).unwrap();
    std::fs::copy(directory.join("id_ed25519.pub"), directory.join("authorized_keys")).unwrap();
    let key = std::fs::read_to_string(directory.join("host_key.pub")).unwrap();
    let port = free_port();
    let known = format!("[{}]:{port} {key}", host.inside);
    std::fs::write(directory.join("known_hosts"), known).unwrap();
    std::fs::create_dir_all("/run/sshd").unwrap();
    std::fs::write(
        directory.join("sshd_config"),
        format!(
            "Port {port}\nPidFile none\nUsePAM no\nStrictModes no\nHostKey {}\nAuthorizedKeysFile {}\n",
            host_key.display(),
            directory.join("authorized_keys").display()
        ),
    )
    .unwrap();
    let mut sshd = host.command("/usr/sbin/sshd");
    sshd.args(["-D", "-e", "-f"]).arg(directory.join("sshd_config"));
    let _sshd = Process::start("sshd", &mut sshd, &directory.join("sshd.log")).unwrap();
    let web = free_port();
    let mut target = host.command(binary("target"));
    target.arg(format!("{}:{web}", host.inside));
    let _target = Process::start("target", &mut target, &directory.join("target.log")).unwrap();

    let nodes = format!(
        ", nodes: {{dial_port: {port}, user: master-agent, key_file: '{}', host_keys: {{known_hosts: '{}'}}}}",
        user_key.display(),
        directory.join("known_hosts").display()
    );
    let cluster = follow(&api, &nodes).await;
    let node = json!({
        "metadata": {"name": "plain", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "status": {"addresses": [{"type": "InternalIP", "address": host.inside}]},
    });
    api.wait_watched(Kind::Nodes).await;
    api.send(Kind::Nodes, "ADDED", node);
    let connected = async || {
        let nodes: Value =
            serde_json::from_str(&cluster.command(&["node", "list", "-o", "json"]).ok()?).ok()?;
        let plain = nodes.as_array()?.iter().find(|node| node["name"] == "plain")?.clone();
        (plain["state"] == "connected").then_some(plain)
    };
    let status = eventually("the node of the cluster is connected", SOON, connected).await;
    assert_eq!(status["tunnels"][0]["kind"], "sshd");
    let mut stream = cluster.unix.stream(&format!("{}:{web}", host.inside)).await.unwrap();
    get(&mut stream).await.unwrap();
    // Unlike the drop-in of `sshd-config`, this sshd opens a channel for the multiplexer before it refuses the subsystem.
    let target = format!("{}:{web}", host.inside);
    load::completes("an upload to a stock sshd", load::upload(&cluster.unix, &target, 8_000_000)).await;
    let text = cluster.command(&["explain", &format!("plain:{web}")]).unwrap();
    assert!(text.contains("the node allows it and the target answers"), "{text}");
    let metrics = http_get(cluster.admin, "/metrics").await.unwrap();
    let value = |name: &str| -> u64 {
        let line =
            metrics.lines().find(|l| l.starts_with(&format!("{name} "))).unwrap_or_else(|| panic!("{name}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    // The recorded n1 is nowhere to be reached.
    assert!(value("ssh_tunnel_open_count") > value("ssh_tunnel_open_fail_count"));
    assert_eq!(value("apiserver_proxy_tunnel_sync_latency_secs"), 0);

    // One error in listing nodes closes no tunnel; a node that is deleted loses its own.
    api.fail(Kind::Nodes, Verb::List, Some(Fault::Status(StatusCode::INTERNAL_SERVER_ERROR)));
    api.compact(Kind::Nodes);
    ready_says(&cluster, "nodes are ").await;
    get(&mut stream).await.unwrap();
    api.fail(Kind::Nodes, Verb::List, None);
    api.send(Kind::Nodes, "DELETED", json!({"metadata": {"name": "plain"}}));
    eventually("the node is gone", SOON, async || {
        let text = cluster.command(&["node", "list", "-o", "json"]).ok()?;
        (!text.contains("\"plain\"")).then_some(())
    })
    .await;
    assert!(get(&mut stream).await.is_err());
}
