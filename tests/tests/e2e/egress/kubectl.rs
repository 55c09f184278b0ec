//! The real kubectl, old and new, works against a stub kube-apiserver that reaches a kubelet by proxy URLs.

use std::{net::SocketAddr, process::Stdio};

use tests::{
    apiserver::ApiServer,
    cluster::{Cluster, Kind, Options, SOON, addresses},
    http::Base,
    kubectl::{Kubectl, Outcome, Printed, Release},
    kubelet::{Kubelet, hex},
    kubelet_port,
    load::completes,
    pattern::fill,
    process::{eventually, free_port},
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::MutexGuard,
};

const VOLUME: usize = 10_000_000;
const STREAMS: &str = "master_agent_streams{egress=\"proxy-url-tcp\"";

/// A node of each kind with a kubelet, and a kube-apiserver that knows of a pod: `web` in `default`, with the
/// container `c`.
struct Site {
    api: ApiServer,
    kubelets: Vec<Kubelet>,
    cluster: Cluster,
    door: SocketAddr,
    _kubelet_port: MutexGuard<'static, ()>,
}

impl Site {
    async fn start() -> Self {
        let nodes = [("n1", Kind::Dialled), ("n2", Kind::CallHome), ("n3", Kind::Sshd)];
        let nodes = nodes.map(|(name, kind)| (name.to_owned(), kind)).to_vec();
        let reserved = kubelet_port::reserve().await;
        let (mut kubelets, mut authorities) = (Vec::new(), Vec::new());
        for (i, (name, _)) in nodes.iter().enumerate() {
            let address = SocketAddr::new(addresses(i)[0], kubelet_port::PORT);
            let kubelet = Kubelet::start(address, &[name]).await.unwrap();
            authorities.extend(std::fs::read(kubelet.ca()).unwrap());
            kubelets.push(kubelet);
        }
        let api = ApiServer::start().await.unwrap();
        let kubelet_ca = api.directory().join("kubelet-ca.crt");
        std::fs::write(&kubelet_ca, authorities).unwrap();
        let door = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let cluster = Cluster::start(Options {
            nodes,
            ports: vec![kubelet_port::PORT],
            master_config: format!(
                "proxy_urls: {{tcp: {{listen: '{door}'}}, kubelet_ca: {}}}\n",
                kubelet_ca.display()
            ),
            ..Options::default()
        })
        .await
        .unwrap();
        Self { api, kubelets, cluster, door, _kubelet_port: reserved }
    }

    fn nodes(&self) -> impl Iterator<Item = OnNode<'_>> {
        (0..self.kubelets.len()).map(|index| OnNode { site: self, index })
    }
}

/// The site with the pod on one of the nodes.
#[derive(Clone, Copy)]
struct OnNode<'a> {
    site: &'a Site,
    index: usize,
}

impl OnNode<'_> {
    fn kubelet(&self) -> &Kubelet {
        &self.site.kubelets[self.index]
    }

    fn kubectl(&self, release: Release) -> Kubectl {
        let node = &self.site.cluster.nodes[self.index].name;
        let url = format!("http://{}/api/v1/nodes/{node}/proxy", self.site.door);
        self.site.api.set_kubelet(Base::new(&url, None).unwrap());
        Kubectl::new(release, &self.site.api).unwrap()
    }

    /// Streams that are open at the kubelet, and on the way there.
    async fn open(&self) -> (usize, f64) {
        let cluster = &self.site.cluster;
        (self.kubelet().open(), cluster.metric(cluster.admin, STREAMS).await.unwrap())
    }

    async fn is_quiet(&self) {
        eventually("no stream is left", SOON, async || (self.open().await == (0, 0.0)).then_some(())).await;
    }

    /// The protocol that the last stream was upgraded to.
    fn protocol(&self) -> String {
        self.kubelet().asked().pop().unwrap().splitn(3, ' ').nth(2).unwrap_or_default().to_owned()
    }
}

fn exec_protocol(release: Release) -> &'static str {
    match release {
        Release::Debian | Release::Spdy => "SPDY/3.1 v4.channel.k8s.io",
        Release::WebSocket => "websocket v5.channel.k8s.io",
    }
}

fn pattern() -> Vec<u8> {
    let mut bytes = vec![0; VOLUME];
    fill(&mut bytes, 0);
    bytes
}

fn assert_success(outcome: &Outcome) {
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{}", outcome.stdout.len());
}

#[tokio::test]
async fn logs_are_followed_line_by_line_and_the_stream_ends_with_kubectl() {
    let sites = Site::start().await;
    let releases = [Release::Debian, Release::WebSocket];
    for (site, release) in sites.nodes().flat_map(|site| releases.map(|release| (site, release))) {
        site.kubelet().log("first");
        let kubectl = site.kubectl(release);
        let outcome = kubectl.run(&["logs", "web"], b"").await.unwrap();
        assert_success(&outcome);
        assert!(outcome.stdout.starts_with(b"first\n"), "{outcome:?}");

        let mut child = kubectl.command(&["logs", "--follow", "--tail=1", "web"]).spawn().unwrap();
        let mut printed = Printed::by(&mut child);
        printed.line().await;
        // Each only after the one before has been seen.
        for i in 0..50 {
            site.kubelet().log(&format!("line {i}"));
            assert_eq!(printed.line().await, format!("line {i}"));
        }
        assert_eq!(site.open().await, (1, 1.0));
        child.kill().await.unwrap();
        site.is_quiet().await;
        assert!(
            site.kubelet()
                .asked()
                .contains(&"GET /containerLogs/default/web/c?follow=true&tailLines=1".to_owned()),
            "{:?}",
            site.kubelet().asked()
        );
    }
}

#[tokio::test]
async fn exec_carries_standard_streams_and_the_exit_code() {
    let sites = Site::start().await;
    let sent = pattern();
    for (site, release) in sites.nodes().flat_map(|site| Release::ALL.map(|release| (site, release))) {
        let kubectl = site.kubectl(release);
        let exec = async |stdin: bool, command: &[&str], input: &[u8]| {
            let mut args = vec!["exec", "web", "-c", "c"];
            args.extend(stdin.then_some("-i"));
            args.push("--");
            args.extend(command);
            let outcome = kubectl.run(&args, input).await.unwrap();
            assert_eq!(site.protocol(), exec_protocol(release), "{release:?} {outcome:?}");
            outcome
        };
        let echo = exec(false, &["echo", "two words", "&=%+", "ü"], b"").await;
        assert_success(&echo);
        assert_eq!(String::from_utf8_lossy(&echo.stdout), "two words &=%+ ü\n");

        use sha2::Digest;
        let digest = exec(true, &["sha256"], &sent).await;
        assert_success(&digest);
        assert_eq!(
            String::from_utf8_lossy(&digest.stdout),
            format!("{}\n", hex(&sha2::Sha256::digest(&sent)))
        );

        let cat = exec(true, &["cat"], &sent).await;
        assert_success(&cat);
        assert!(cat.stdout == sent, "{release:?}: {} bytes came back", cat.stdout.len());

        let stderr = exec(false, &["stderr", "oh", "no"], b"").await;
        assert_eq!((stderr.code, stderr.stdout.len(), stderr.stderr.as_str()), (Some(0), 0, "oh no\n"));
        for code in [1, 7, 255] {
            let exit = exec(true, &["exit", &code.to_string()], b"ignored").await;
            assert_eq!(exit.code, Some(code), "{release:?} {exit:?}");
        }
        site.is_quiet().await;
    }
}

#[tokio::test]
async fn exec_is_interactive_and_ends_with_kubectl() {
    let sites = Site::start().await;
    for (site, release) in sites.nodes().flat_map(|site| Release::ALL.map(|release| (site, release))) {
        let kubectl = site.kubectl(release);
        for verb in [&["exec", "-i", "web", "--", "cat"][..], &["attach", "-i", "web"]] {
            let mut child = kubectl.command(verb).stderr(Stdio::null()).spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            let mut printed = Printed::by(&mut child);
            for i in 0..20 {
                stdin.write_all(format!("{i}\n").as_bytes()).await.unwrap();
                assert_eq!(printed.line().await, i.to_string(), "{release:?}");
            }
            assert_eq!((site.protocol().as_str(), site.open().await), (exec_protocol(release), (1, 1.0)));
            drop(stdin);
            assert!(completes("kubectl's end", child.wait()).await.unwrap().success());
            site.is_quiet().await;
        }
        let mut child = kubectl.command(&["exec", "web", "--", "hold"]).spawn().unwrap();
        let mut printed = Printed::by(&mut child);
        assert_eq!(printed.line().await, "holding");
        assert_eq!(site.open().await, (1, 1.0));
        child.kill().await.unwrap();
        site.is_quiet().await;
    }
}

#[tokio::test]
async fn port_forward_carries_connections_side_by_side() {
    let sites = Site::start().await;
    let port = target::start().await;
    for (site, release) in sites.nodes().flat_map(|site| Release::ALL.map(|release| (site, release))) {
        let local = free_port();
        let mut child = site
            .kubectl(release)
            .command(&["port-forward", "--address=127.0.0.1", "pod/web", &format!("{local}:{port}")])
            .spawn()
            .unwrap();
        let mut printed = Printed::by(&mut child);
        assert_eq!(printed.line().await, format!("Forwarding from 127.0.0.1:{local} -> {port}"));
        let protocol = match release {
            Release::Debian | Release::Spdy => "SPDY/3.1 portforward.k8s.io",
            Release::WebSocket => "websocket SPDY/3.1+portforward.k8s.io",
        };
        assert_eq!(site.protocol(), protocol);

        let mut echo = TcpStream::connect(("127.0.0.1", local)).await.unwrap();
        echo.write_all(b"echo\n").await.unwrap();
        for i in 0..20 {
            let mut source = TcpStream::connect(("127.0.0.1", local)).await.unwrap();
            source.write_all(b"source 100000\n").await.unwrap();
            let mut bytes = Vec::new();
            completes("a download", source.read_to_end(&mut bytes)).await.unwrap();
            assert!(bytes == pattern()[..100_000], "{release:?}: {} bytes", bytes.len());
            echo.write_all(format!("{i:04}").as_bytes()).await.unwrap();
            let mut heard = [0; 4];
            completes("an echo", echo.read_exact(&mut heard)).await.unwrap();
            assert_eq!(heard, format!("{i:04}").as_bytes());
        }
        child.kill().await.unwrap();
        site.is_quiet().await;
    }
}

#[tokio::test]
async fn neither_exec_nor_followed_logs_notice_that_agents_reload() {
    let sites = Site::start().await;
    let (cluster, mut processes) = (&sites.cluster, Vec::new());
    for (site, release) in sites.nodes().flat_map(|site| Release::ALL.map(|release| (site, release))) {
        let kubectl = site.kubectl(release);
        site.kubelet().log("first");
        let mut following = kubectl.command(&["logs", "--follow", "--tail=1", "web"]).spawn().unwrap();
        let mut lines = Printed::by(&mut following);
        assert_eq!(lines.line().await, "first");
        let cat = &["exec", "-i", "web", "--", "cat"];
        let mut executing = kubectl.command(cat).stderr(Stdio::null()).spawn().unwrap();
        let mut stdin = executing.stdin.take().unwrap();
        let mut printed = Printed::by(&mut executing);
        for reload in ["none", "the master", "the node"] {
            match reload {
                "the master" => processes.push(cluster.next_master().unwrap()),
                "the node" if site.index < 2 => processes.push(cluster.next_node(site.index).unwrap()),
                _ => {}
            }
            site.kubelet().log(reload);
            assert_eq!(lines.line().await, reload, "{release:?}");
            stdin.write_all(format!("{reload}\n").as_bytes()).await.unwrap();
            assert_eq!(printed.line().await, reload, "{release:?}");
            let new = kubectl.run(&["exec", "web", "--", "echo", reload], b"").await.unwrap();
            assert_success(&new);
        }
        drop(stdin);
        assert!(completes("kubectl's end", executing.wait()).await.unwrap().success());
        following.kill().await.unwrap();
    }
}

#[tokio::test]
async fn a_node_that_dies_ends_what_kubectl_has_open() {
    let mut site = Site::start().await;
    for index in 0..site.kubelets.len() {
        let node = OnNode { site: &site, index };
        let mut open = Vec::new();
        for (release, args) in [
            (Release::WebSocket, &["logs", "--follow", "web"][..]),
            (Release::WebSocket, &["exec", "web", "--", "hold"]),
            (Release::Spdy, &["exec", "web", "--", "hold"]),
        ] {
            node.kubelet().log("line");
            let mut child = node.kubectl(release).command(args).stdin(Stdio::null()).spawn().unwrap();
            let mut printed = Printed::by(&mut child);
            printed.line().await;
            open.push((release, args, child, printed));
        }
        assert_eq!(node.open().await, (3, 3.0));
        site.cluster.kill_node(index);
        for (release, args, mut child, _printed) in open {
            let status =
                completes(&format!("{release:?} {args:?} on node {index}"), child.wait()).await.unwrap();
            // Over SPDY kubectl takes any end without a Status for success.
            let success = release == Release::Spdy;
            assert_eq!(status.success(), success, "{release:?} {args:?}");
        }
        OnNode { site: &site, index }.is_quiet().await;
    }
}
