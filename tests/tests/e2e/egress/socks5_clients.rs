//! SOCKS5 brings kubectl and a web browser to what only a node reaches.

use std::{net::SocketAddr, path::PathBuf};

use tests::{
    browser::dump_dom,
    cluster::{Cluster, Kind, Options, SOON, binary},
    kubectl::{Kubectl, Release},
    load::completes,
    netns::Namespace,
    pattern::fill,
    person::{Outcome, finish},
    process::{Process, TempDir, eventually, free_port},
};
use tokio::io::{AsyncBufReadExt, BufReader};

/// A name of the node's own loopback that nobody else knows.
const NAME: &str = "dashboard.behind.test";
/// The same; it is in the API server's certificate.
const API: &str = "kubernetes.default.svc";

/// A node that is a host of its own, with a kube-apiserver and a web server on its loopback.
struct Site {
    cluster: Cluster,
    socks5: SocketAddr,
    /// Leads to the kube-apiserver as its own host sees it.
    kubeconfig: PathBuf,
    api_port: u16,
    web_port: u16,
    dir: TempDir,
    _processes: [Process; 2],
    _host: Namespace,
}

impl Site {
    async fn start() -> Self {
        let (host, dir) = (Namespace::new().unwrap(), TempDir::new("behind").unwrap());
        let kubeconfig = dir.path().join("kubeconfig");
        let mut command = host.command(env!("CARGO_BIN_EXE_apiserver"));
        command.arg(&kubeconfig).env("TMPDIR", dir.path());
        let api = Process::start("apiserver", &mut command, &dir.path().join("apiserver.log")).unwrap();
        let config = eventually("the kube-apiserver serves", SOON, async || {
            serde_json::from_slice::<serde_json::Value>(&std::fs::read(&kubeconfig).ok()?).ok()
        })
        .await;
        let server = config["clusters"][0]["cluster"]["server"].as_str().unwrap();
        let api_port = server.rsplit(':').next().unwrap().parse().unwrap();

        // The API server is a process of its own that chooses among the same ports.
        let other_port = || std::iter::repeat_with(free_port).find(|port| *port != api_port).unwrap();
        let (web_port, node_port) = (other_port(), other_port());
        let pages = dir.path().join("pages");
        std::fs::create_dir(&pages).unwrap();
        std::fs::write(
            pages.join("index.html"),
            "<title>Behind</title><p id=said></p><script src=a.js></script>",
        )
        .unwrap();
        std::fs::write(pages.join("a.js"), "said.textContent = ['run', 'at', location.host].join(' ')")
            .unwrap();
        let mut command = host.command("python3");
        command.args(["-m", "http.server", "--bind", "127.0.0.1", "--directory"]).arg(&pages);
        command.arg(web_port.to_string());
        let web = Process::start("web", &mut command, &dir.path().join("web.log")).unwrap();

        let socks5 = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut cluster = Cluster::start(Options {
            nodes: vec![("n1".to_owned(), Kind::Dialled)],
            inventory: "default_route: true".to_owned(),
            ports: vec![api_port, web_port],
            node_ports: vec![node_port],
            dial: vec![("n1".to_owned(), SocketAddr::from((host.inside, node_port)))],
            master_config: format!("socks5: {{tcp: {{listen: '{socks5}'}}}}"),
            nodes_down: true,
            ..Options::default()
        })
        .await
        .unwrap();
        let node = &mut cluster.nodes[0];
        // The support makes nodes on this host's loopback.
        let file = node.dir.join("node.yaml");
        let text = std::fs::read_to_string(&file).unwrap();
        let listen = |host: &str| format!("listen: '{host}:{node_port}'");
        std::fs::write(&file, text.replace(&listen("127.0.0.1"), &listen("0.0.0.0"))).unwrap();
        std::fs::write(node.dir.join("hosts"), format!("127.0.0.1 localhost {NAME} {API}\n")).unwrap();
        let mut command = host.command("sh");
        command.args(["-c", "mount --bind hosts /etc/hosts && exec \"$@\"", "sh"]).arg(binary("node-agent"));
        command.args(["--config", "node.yaml", "run"]).current_dir(&node.dir);
        node.process = Some(Process::start("n1", &mut command, &node.dir.join("log")).unwrap());
        cluster.wait_connected().await;
        Self { cluster, socks5, kubeconfig, api_port, web_port, dir, _processes: [api, web], _host: host }
    }

    fn proxy(&self) -> String {
        format!("socks5://{}", self.socks5)
    }

    fn kubectl(&self, release: Release) -> Kubectl {
        Kubectl::with_kubeconfig(release, self.dir.path(), self.kubeconfig.clone()).unwrap()
    }

    async fn browser(&self, socks5: Option<SocketAddr>, host: &str) -> Outcome {
        let profile = TempDir::new("browser").unwrap();
        dump_dom(profile.path(), socks5, &format!("http://{host}:{}/", self.web_port)).await.unwrap()
    }

    async fn dials(&self) -> f64 {
        let prefix = "master_agent_dials_total{egress=\"socks5-tcp\",result=\"ok\"";
        self.cluster.metric(self.cluster.admin, prefix).await.unwrap_or_default()
    }
}

#[tokio::test]
async fn kubectl_reaches_a_kube_apiserver_behind_a_node() {
    let site = Site::start().await;
    let (proxy, by_name) =
        (format!("--proxy-url={}", site.proxy()), format!("-shttps://{API}:{}", site.api_port));
    for release in Release::ALL {
        let kubectl = site.kubectl(release);
        let get = ["get", "pods", "-A", "-oname", "--request-timeout=30s"];
        // Neither the address nor the name is this host's.
        for args in [&get[..], &[&get[..], &[&by_name]].concat()] {
            let outcome = kubectl.run(args, b"").await.unwrap();
            assert_eq!((outcome.code, outcome.stdout.len()), (Some(1), 0), "{release:?}: {outcome:?}");
        }
        assert_eq!(site.dials().await, 0.0);
    }
    // All of them heed the environment, also the old one, which has no option for it.
    for release in Release::ALL {
        let before = site.dials().await;
        let mut command = site.kubectl(release).command(&["get", "--raw", "/version", &by_name]);
        command.env("HTTPS_PROXY", site.proxy());
        let outcome = finish(command, b"").await.unwrap();
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{release:?}");
        let version: serde_json::Value = serde_json::from_slice(&outcome.stdout).unwrap();
        assert_eq!(version["minor"], "36");
        assert!(site.dials().await > before);
    }
    let mut sent = vec![0; 1_000_000];
    fill(&mut sent, 0);
    let by_address = format!("-shttps://127.0.0.1:{}", site.api_port);
    for (release, server) in
        [Release::WebSocket, Release::Spdy].into_iter().flat_map(|r| [(r, &by_address), (r, &by_name)])
    {
        let kubectl = site.kubectl(release);
        let with = |args: &[&'static str]| kubectl.command(&[&[proxy.as_str(), server][..], args].concat());
        let succeeds = async |args: &[&'static str], input: &[u8]| {
            let outcome = finish(with(args), input).await.unwrap();
            assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{release:?} {args:?}");
            outcome.stdout
        };
        assert_eq!(succeeds(&["get", "pods", "-A", "-oname"], b"").await, b"pod/web\n");
        assert_eq!(succeeds(&["exec", "web", "--", "echo", "two words"], b"").await, b"two words\n");
        assert!(succeeds(&["exec", "-i", "web", "--", "cat"], &sent).await == sent);
        let failed = finish(with(&["exec", "web", "--", "exit", "7"]), b"").await.unwrap();
        assert_eq!(failed.code, Some(7), "{failed:?}");

        let mut child = with(&["logs", "--follow", "--tail=1", "web"]).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut next = async || completes("a line", lines.next_line()).await.unwrap().unwrap();
        let first: u64 = next().await.strip_prefix("line ").unwrap().parse().unwrap();
        for i in 1..20 {
            assert_eq!(next().await, format!("line {}", first + i));
        }
        child.kill().await.unwrap();
    }
    eventually("no stream is left", SOON, async || {
        let prefix = "master_agent_streams{egress=\"socks5-tcp\"";
        (site.cluster.metric(site.cluster.admin, prefix).await.ok()? == 0.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_browser_shows_a_page_that_only_the_node_reaches() {
    let site = Site::start().await;
    for host in [NAME, "127.0.0.1"] {
        let said = format!("run at {host}:{}", site.web_port);
        let before = site.dials().await;
        let direct = site.browser(None, host).await;
        assert!(
            direct.stdout.is_empty() && direct.stderr.contains("Page load failed: net::ERR_"),
            "{direct:?}"
        );
        assert_eq!(site.dials().await, before);

        let shown = site.browser(Some(site.socks5), host).await;
        let dom = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(dom.contains(&said) && dom.contains("<title>Behind</title>"), "{shown:?}");
        assert!(site.dials().await > before);
    }
    // The name went to the node as it was.
    site.cluster.master.says(&[&format!("target={NAME}:{}", site.web_port)]).await;
}
