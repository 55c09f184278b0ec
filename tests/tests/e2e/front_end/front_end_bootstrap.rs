//! A kubelet's TLS bootstrap works through the front end: with a bootstrap token it asks for a certificate, waits for
//! it, and goes on with that. The real kubectl and the real OpenSSL play the kubelet's part.

use std::{net::SocketAddr, process::Command};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tests::{
    certificates::{PATH, SIGNER},
    cluster::{Kind, SOON},
    front_end::{BOOTSTRAP, Credential, FrontEnd, Setup},
    kubectl::{Kubectl, Release},
    load::completes,
    openssh::run,
    process::eventually,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A node's host, as far as files go.
struct Host<'a> {
    front_end: &'a FrontEnd,
    name: String,
    /// Where the kubelet is told that kube-apiserver is.
    server: String,
}

impl Host<'_> {
    fn kubectl(&self, kubeconfig: &str, user: &Value) -> Kubectl {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {
                "server": self.server,
                "certificate-authority": self.front_end.file("ca.crt"),
            }}],
            "users": [{"name": "kubelet", "user": user}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "kubelet"}}],
            "current-context": "c",
        });
        let name = format!("{}-{kubeconfig}", self.name);
        self.front_end.replace(&name, &config.to_string()).unwrap();
        let file = self.front_end.file(&name);
        Kubectl::with_kubeconfig(Release::WebSocket, self.front_end.path(), file).unwrap()
    }

    /// A key, and what a kubelet asks a certificate with.
    fn request(&self) -> String {
        let (key, csr) =
            (self.front_end.file(&format!("{}.key", self.name)), self.front_end.file("kubelet.csr"));
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
        openssl.arg("-subj").arg(format!("/O=system:nodes/CN=system:node:{}", self.name));
        run(openssl.arg("-keyout").arg(&key).arg("-out").arg(&csr)).unwrap();
        let request = json!({
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"generateName": "node-csr-"},
            "spec": {
                "request": BASE64_STANDARD.encode(std::fs::read(csr).unwrap()),
                "signerName": SIGNER,
                "usages": ["digital signature", "client auth"],
                "expirationSeconds": 86400,
            },
        });
        request.to_string()
    }

    async fn bootstraps(&self) {
        let upstream = &self.front_end.upstream;
        upstream.take();
        let kubectl = self.kubectl("bootstrap.kubeconfig", &json!({"token": BOOTSTRAP}));
        let request = self.request();
        let create = ["create", "--raw", PATH, "-f", "-"];
        let created = kubectl.run(&create, request.as_bytes()).await.unwrap();
        assert_eq!(created.code, Some(0), "{created:?}\n{}", self.front_end.log());
        let created: Value = serde_json::from_slice(&created.stdout).unwrap();
        let name = created["metadata"]["name"].as_str().unwrap().to_owned();
        assert_eq!(created["spec"]["username"], "system:bootstrap:abcdef");
        let received = upstream.take().into_iter().find(|r| r.method == "POST").unwrap();
        // Byte for byte, and from whom the token is.
        assert_eq!((received.body.as_ref(), received.whole), (request.as_bytes(), true));
        assert_eq!(received.identity().unwrap(), Credential::Bootstrap.identity());
        assert!(received.header("authorization").is_empty(), "{received:?}");

        // The watch begins before there is anything to see, and hears of the certificate when there is one.
        let watched = format!("{PATH}?watch=true&fieldSelector=metadata.name%3D{name}");
        let watch = async { kubectl.run(&["get", "--raw", &watched], b"").await.unwrap() };
        let approve = async {
            let begun = || upstream.received().iter().any(|r| r.target.contains("watch=true"));
            eventually("the watch is there", SOON, async || begun().then_some(())).await;
            let (ca, key) = (self.front_end.file("clients-ca.crt"), self.front_end.file("clients-ca.key"));
            upstream.certificates().approve(&name, &ca, &key).unwrap();
        };
        let (event, ()) = completes("the watch", async { tokio::join!(watch, approve) }).await;
        let event: Value = serde_json::from_slice(&event.stdout).unwrap();
        assert_eq!(event["object"]["status"]["conditions"][0]["type"], "Approved");
        let certificate = event["object"]["status"]["certificate"].as_str().unwrap();
        let certificate = BASE64_STANDARD.decode(certificate).unwrap();
        let file = self.front_end.file(&format!("{}.crt", self.name));
        std::fs::write(&file, certificate).unwrap();

        // From now on it is the node.
        upstream.take();
        let key = self.front_end.file(&format!("{}.key", self.name));
        let kubelet =
            self.kubectl("kubelet.kubeconfig", &json!({"client-certificate": file, "client-key": key}));
        let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
        let lease =
            json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self.name}});
        for (args, body) in [
            (
                &["create", "--raw", "/api/v1/nodes", "-f", "-"][..],
                json!({"kind": "Node", "metadata": {"name": self.name}}),
            ),
            (&["create", "--raw", leases, "-f", "-"], lease),
        ] {
            let body = body.to_string();
            let outcome = kubelet.run(args, body.as_bytes()).await.unwrap();
            assert_eq!(outcome.code, Some(0), "{args:?}: {outcome:?}");
            let received = upstream.take();
            let [received] = &received[..] else { panic!("{received:?}") };
            let mut identity = received.identity().unwrap();
            identity.extra.clear();
            assert_eq!(identity.user, format!("system:node:{}", self.name));
            assert_eq!(identity.groups, ["system:nodes", "system:authenticated"]);
            assert_eq!(received.body, body.as_bytes());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kubelet_gets_its_certificate_with_a_bootstrap_token_and_uses_it() {
    let nodes = vec![
        ("n1".to_owned(), Kind::Dialled),
        ("n2".to_owned(), Kind::CallHome),
        ("n3".to_owned(), Kind::Sshd),
    ];
    let front_end = FrontEnd::start(Setup { nodes, ..Setup::default() }).await.unwrap();
    front_end.replace("clients-ca.key", &front_end.clients.key_pem()).unwrap();
    let straight = Host { front_end: &front_end, name: "straight".to_owned(), server: front_end.url() };
    straight.bootstraps().await;
    for (index, node) in front_end.cluster.nodes.iter().enumerate() {
        let endpoint: SocketAddr = front_end.cluster.local_endpoint(index);
        eventually("the local endpoint serves", SOON, async || {
            let mut socket = TcpStream::connect(endpoint).await.ok()?;
            socket.write_all(b"no TLS\r\n\r\n").await.ok()?;
            // The front end answers with an alert.
            (socket.read(&mut [0; 16]).await.ok()? > 0).then_some(())
        })
        .await;
        // Its certificate is for 127.0.0.1, and the name is as good on any address.
        let server = format!("https://localhost:{}", endpoint.port());
        let host = Host { front_end: &front_end, name: node.name.clone(), server };
        if endpoint.ip() == std::net::Ipv4Addr::LOCALHOST {
            host.bootstraps().await;
        } else {
            // localhost is another node's address.
            let relay = tests::relay::Relay::start(
                SocketAddr::from(([127, 0, 0, 1], 0)),
                endpoint,
                std::time::Duration::ZERO,
                None,
            );
            let server = format!("https://localhost:{}", relay.await.unwrap().address.port());
            Host { server, ..host }.bootstraps().await;
        }
    }
    assert_eq!(front_end.upstream.certificates().names().len(), 4);

    // The token is good for nothing in other hands' spelling, and no token for nothing at all.
    let nobody = Host { front_end: &front_end, name: "nobody".to_owned(), server: front_end.url() };
    front_end.upstream.take();
    for user in [json!({}), json!({"token": "abcdef.fedcba9876543210"})] {
        let kubectl = nobody.kubectl("nobody.kubeconfig", &user);
        let outcome =
            kubectl.run(&["create", "--raw", PATH, "-f", "-"], nobody.request().as_bytes()).await.unwrap();
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
    }
    assert!(front_end.upstream.take().is_empty());
}
