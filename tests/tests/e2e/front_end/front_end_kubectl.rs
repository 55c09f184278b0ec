//! The real kubectl, old and new, works through the front end with every kind of credential.

use std::{process::Stdio, time::Instant};

use serde_json::json;
use tests::{
    apiserver::Kind,
    cluster::SOON,
    front_end::{Credential, FrontEnd, Setup},
    http::Base,
    kubectl::{Kubectl, Printed, Release},
    kubelet::Kubelet,
    load::completes,
    pattern::fill,
    process::{eventually, free_port},
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const VOLUME: usize = 3_000_000;

/// A front end before a cluster with the pod `web`, whose kubelet is a stand-in.
struct Site {
    front_end: FrontEnd,
    kubelet: Kubelet,
}

impl Site {
    async fn start() -> Self {
        let front_end = FrontEnd::start(Setup::default()).await.unwrap();
        let address = ([127, 0, 0, 1], free_port()).into();
        let kubelet = Kubelet::start(address, &["127.0.0.1"]).await.unwrap();
        front_end.upstream.api().set_kubelet(Base::new(&kubelet.url(), Some(&kubelet.ca())).unwrap());
        Self { front_end, kubelet }
    }

    fn kubectl(&self, release: Release, credential: Credential) -> Kubectl {
        let kubeconfig = self.front_end.file(&format!("{credential:?}.kubeconfig"));
        self.front_end.write_kubeconfig(&kubeconfig, credential).unwrap();
        Kubectl::with_kubeconfig(release, self.front_end.path(), kubeconfig).unwrap()
    }

    /// All that kube-apiserver heard since the last time was of this caller.
    fn check(&self, credential: Credential) {
        let received = self.front_end.upstream.take();
        assert!(!received.is_empty());
        for request in received {
            let mut identity = request.identity().unwrap();
            if credential == Credential::Certificate {
                identity.extra.clear();
            }
            assert_eq!(identity, credential.identity(), "{request:?}");
            assert!(request.header("authorization").is_empty());
        }
    }
}

fn combinations() -> impl Iterator<Item = (Credential, Release)> {
    Credential::ALL.into_iter().flat_map(|credential| Release::ALL.map(|release| (credential, release)))
}

#[tokio::test]
async fn kubectl_gets_and_watches() {
    let site = Site::start().await;
    for (credential, release) in combinations().filter(|(_, release)| *release != Release::Spdy) {
        let kubectl = site.kubectl(release, credential);
        let outcome = kubectl.run(&["get", "pods", "--all-namespaces", "-o", "name"], b"").await.unwrap();
        assert_eq!(outcome.code, Some(0), "{credential:?} {release:?} {outcome:?}\n{}", site.front_end.log());
        assert!(outcome.stdout.starts_with(b"pod/web\n"), "{outcome:?}");

        let mut child = kubectl
            .command(&["get", "pods", "--all-namespaces", "--watch-only", "-o", "name"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut printed = Printed::by(&mut child);
        let api = site.front_end.upstream.api();
        api.wait_watched(Kind::Pods).await;
        let mut slowest = std::time::Duration::ZERO;
        for i in 0..10 {
            let name = format!("{credential:?}-{release:?}-{i}").to_lowercase();
            let sent = Instant::now();
            api.send(Kind::Pods, "ADDED", json!({"metadata": {"name": name, "namespace": "default"}}));
            assert_eq!(printed.line().await, format!("pod/{name}"));
            slowest = slowest.max(sent.elapsed());
            api.send(Kind::Pods, "DELETED", json!({"metadata": {"name": name, "namespace": "default"}}));
            printed.line().await;
        }
        println!("{credential:?} {release:?}: kubectl printed the slowest of 10 events after {slowest:?}");
        child.kill().await.unwrap();
        eventually("the watch is over", SOON, async || (api.watches(Kind::Pods) == 0).then_some(())).await;
        site.check(credential);
    }
    // kubectl shows a caller that it was refused.
    let kubeconfig = site.front_end.file("nobody.kubeconfig");
    site.front_end.write_kubeconfig(&kubeconfig, Credential::Token).unwrap();
    let wrong = std::fs::read_to_string(&kubeconfig).unwrap().replace(tests::front_end::TOKEN, "wrong");
    site.front_end.replace("nobody.kubeconfig", &wrong).unwrap();
    let kubectl = Kubectl::with_kubeconfig(Release::WebSocket, site.front_end.path(), kubeconfig).unwrap();
    let outcome = kubectl.run(&["get", "pods", "--all-namespaces"], b"").await.unwrap();
    assert!(outcome.code == Some(1) && outcome.stderr.contains("logged in"), "{outcome:?}");
    assert_eq!(site.front_end.upstream.received().len(), 0);
}

#[tokio::test]
async fn kubectl_follows_logs_and_runs_commands() {
    let site = Site::start().await;
    let mut sent = vec![0; VOLUME];
    fill(&mut sent, 0);
    for (credential, release) in combinations() {
        let kubectl = site.kubectl(release, credential);
        if release != Release::Spdy {
            site.kubelet.log("first");
            let mut child = kubectl.command(&["logs", "--follow", "--tail=1", "web"]).spawn().unwrap();
            let mut printed = Printed::by(&mut child);
            printed.line().await;
            for i in 0..20 {
                site.kubelet.log(&format!("line {i}"));
                assert_eq!(printed.line().await, format!("line {i}"));
            }
            child.kill().await.unwrap();
            eventually("no log is followed", SOON, async || (site.kubelet.open() == 0).then_some(())).await;
        }
        let cat = kubectl.run(&["exec", "-i", "web", "--", "cat"], &sent).await.unwrap();
        assert_eq!((cat.code, cat.stderr.as_str()), (Some(0), ""), "{credential:?} {release:?}");
        assert!(cat.stdout == sent, "{credential:?} {release:?}: {} bytes came back", cat.stdout.len());
        let protocol = match release {
            Release::Debian | Release::Spdy => "SPDY/3.1 v4.channel.k8s.io",
            Release::WebSocket => "websocket v5.channel.k8s.io",
        };
        let asked = site.kubelet.asked().pop().unwrap();
        assert!(asked.ends_with(protocol), "{release:?} {asked}");
        let exit = kubectl.run(&["exec", "web", "--", "exit", "7"], b"").await.unwrap();
        assert_eq!(exit.code, Some(7), "{exit:?}");
        let mut child = kubectl.command(&["exec", "web", "--", "hold"]).spawn().unwrap();
        assert_eq!(Printed::by(&mut child).line().await, "holding");
        child.kill().await.unwrap();
        eventually("no command runs", SOON, async || (site.kubelet.open() == 0).then_some(())).await;
        site.check(credential);
    }
}

#[tokio::test]
async fn kubectl_forwards_ports() {
    let site = Site::start().await;
    let port = target::start().await;
    for (credential, release) in combinations() {
        let local = free_port();
        let mut child = site
            .kubectl(release, credential)
            .command(&["port-forward", "--address=127.0.0.1", "pod/web", &format!("{local}:{port}")])
            .spawn()
            .unwrap();
        let mut printed = Printed::by(&mut child);
        assert_eq!(printed.line().await, format!("Forwarding from 127.0.0.1:{local} -> {port}"));
        let mut wanted = vec![0; 100_000];
        fill(&mut wanted, 0);
        for _ in 0..5 {
            let mut source = TcpStream::connect(("127.0.0.1", local)).await.unwrap();
            source.write_all(b"source 100000\n").await.unwrap();
            let mut bytes = Vec::new();
            completes("a download", source.read_to_end(&mut bytes)).await.unwrap();
            assert!(bytes == wanted, "{credential:?} {release:?}: {} bytes", bytes.len());
        }
        child.kill().await.unwrap();
        eventually("nothing is forwarded", SOON, async || (site.kubelet.open() == 0).then_some(())).await;
        site.check(credential);
    }
}
