//! Nodes call home, and hosts join, over the front end's HTTPS port.

pub(super) mod false_servers;

use std::{
    net::SocketAddr,
    path::Path,
    process::Command,
    sync::atomic::Ordering,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use false_servers::{fake, proxy};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tests::{
    client::Stream,
    cluster::{Cluster, Kind, Options, SOON, binary},
    front_end::role,
    front_end::{Heard, hear},
    load::{completes, download, upload},
    pki::{Authority, client_config},
    process::{Process, TempDir, eventually},
    target,
};
use tokio::{io::AsyncWriteExt, net::TcpStream};
use tokio_rustls::TlsConnector;

pub(super) const MB: u64 = 1 << 20;
pub(super) const BOOTSTRAP: &str = "abcdef.0123456789abcdef";
const EXPIRED: &str = "abcdeg.0123456789abcdef";

/// The token of a user whose group is allowed nothing.
const OTHER_GROUP: &str = "token-of-another-group";
const ISSUER: &str = "https://kubernetes.default.svc";

/// Bytes each way: 64 MB, or what TEST_BYTES says.
fn volume() -> u64 {
    std::env::var("TEST_BYTES").ok().and_then(|v| v.parse().ok()).unwrap_or(64 * MB)
}

pub(super) fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

pub(super) struct World {
    pub(super) cluster: Cluster,
    pub(super) target: u16,
    pub(super) files: TempDir,
    pub(super) service_accounts: rcgen::KeyPair,
}

/// Nodes n1 and n2, which call home over HTTPS with their client certificates.
pub(super) async fn world(change: impl FnOnce(&mut Options, &Path)) -> World {
    let files = TempDir::new("credentials").unwrap();
    let path = files.path();
    let file = |name: &str| path.join(name).display().to_string();
    let service_accounts = rcgen::KeyPair::generate().unwrap();
    std::fs::write(path.join("sa.pub"), service_accounts.public_key_pem()).unwrap();
    let rule = "apiGroups: [master-agent], resources: [nodes/link, nodes/join], verbs: [create]";
    let group = "apiGroup: rbac.authorization.k8s.io, kind: Group, name: 'system:bootstrappers'";
    let account = "kind: ServiceAccount, name: node-agent, namespace: kube-system";
    std::fs::write(path.join("rbac.yaml"), role("call-home", rule, &[group, account])).unwrap();
    let secret = |name: &str, text: &str| {
        proto_config::secret_file::replace(&path.join(name), text.as_bytes()).unwrap()
    };
    secret("bootstrap.csv", &format!("{BOOTSTRAP},,\n{EXPIRED},2020-01-01T00:00:00Z,\n"));
    secret("tokens.csv", &format!("{OTHER_GROUP},sam,uid-7,others\n"));
    let target = target::start().await;
    let mut options = Options {
        nodes: ["n1", "n2"].map(|name| (name.to_owned(), Kind::CallHomeHttps)).to_vec(),
        ports: vec![target],
        node_config: "limits: {dial_timeout: 2s}".to_owned(),
        front_end: Some(format!(
            "  authentication:\n  - x509: {{ca: ca.crt}}\n  - service_account: {{issuers: ['{ISSUER}'], audiences: \
             ['{ISSUER}'], key_files: [{}]}}\n  - bootstrap_tokens: {{file: {}}}\n  - token_file: {}\n  authorization: \
             [{{node: {{}}}}, {{rbac: {{files: [{}]}}}}]\n  limits: {{failures_per_second_per_address: 1000, \
             head_timeout: 2s}}\n",
            file("sa.pub"),
            file("bootstrap.csv"),
            file("tokens.csv"),
            file("rbac.yaml"),
        )),
        ..Options::default()
    };
    change(&mut options, path);
    let cluster = completes("the cluster starts", Cluster::start(options)).await.unwrap();
    World { cluster, target, files, service_accounts }
}

impl World {
    /// A token of the service account `kube-system/node-agent`, of a pod on `node`.
    pub(super) fn service_account(&self, node: &str, audience: &str, expires: u64) -> String {
        let claims = json!({
            "iss": ISSUER,
            "aud": [audience],
            "sub": "system:serviceaccount:kube-system:node-agent",
            "iat": now() - 100,
            "nbf": now() - 100,
            "exp": expires,
            "kubernetes.io": {
                "namespace": "kube-system",
                "serviceaccount": {"name": "node-agent", "uid": "u"},
                "pod": {"name": "node-agent-x", "uid": "p"},
                "node": {"name": node, "uid": "n"},
            },
        });
        let key = EncodingKey::from_ec_pem(self.service_accounts.serialize_pem().as_bytes()).unwrap();
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &key).unwrap()
    }

    /// A TLS connection with this node's certificate.
    pub(super) async fn connect(&self, certificate: Option<&str>) -> Stream {
        let dir = certificate.map(|node| self.cluster.path().join(node));
        let identity = dir.as_deref().map(|dir| (dir, "client"));
        let config = client_config(&self.cluster.path().join("ca.crt"), identity).unwrap();
        let socket = TcpStream::connect(self.cluster.https).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        Box::new(TlsConnector::from(config).connect(name, socket).await.unwrap())
    }

    /// The answer to a request, and the connection.
    pub(super) async fn ask(&self, certificate: Option<&str>, head: &str) -> (Heard, Stream) {
        let mut stream = self.connect(certificate).await;
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        let heard = completes("an answer", hear(&mut stream)).await.unwrap().expect(head);
        (heard, stream)
    }

    pub(super) async fn refused(&self, reason: &str) -> f64 {
        let prefix = format!("master_agent_tunnels_refused_total{{reason=\"{reason}\"}}");
        self.cluster.metric(self.cluster.admin, &prefix).await.unwrap_or(0.0)
    }

    /// Writes another configuration for a node.
    pub(super) fn configure(&self, index: usize, call_home: &str, lines: &str) {
        let node = &self.cluster.nodes[index];
        let text = format!(
            "state_dir: state\nadmin: {{listen: '{}', socket: admin.sock}}\ncall_home: ['{call_home}']\nlimits: {{dial_timeout: 2s}}\n\
             policy: {{allow: [{{name: all, to: 127.0.0.0/8, ports: 1-65535}}]}}\n{lines}\n",
            node.admin
        );
        std::fs::write(node.dir.join("node.yaml"), text).unwrap();
    }

    /// Audit records of a subresource, whole lines only.
    pub(super) fn audited(&self, subresource: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.cluster.path().join("audit.log")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let records = whole.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        records.filter(|record| record["subresource"] == subresource).collect()
    }

    pub(super) async fn says(&self, node: usize, part: &str) {
        let log = self.cluster.nodes[node].dir.join("log");
        eventually(&format!("{part:?} in {}", log.display()), SOON, async || {
            std::fs::read_to_string(&log).unwrap_or_default().contains(part).then_some(())
        })
        .await;
    }

    /// Runs a node that is to fail, until it says why. Gives its whole log.
    pub(super) async fn fails(&mut self, call_home: &str, lines: &str, part: &str) -> String {
        self.cluster.kill_node(0);
        let _ = std::fs::remove_file(self.cluster.nodes[0].dir.join("log"));
        self.configure(0, call_home, lines);
        self.cluster.start_node(0).unwrap();
        self.says(0, part).await;
        self.cluster.kill_node(0);
        std::fs::read_to_string(self.cluster.nodes[0].dir.join("log")).unwrap()
    }
}

pub(super) fn upgrade(path: &str, lines: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: master-agent-link\r\n{lines}\r\n"
    )
}

pub(super) const LINK: &str = "/apis/master-agent/v1/nodes/n1/link";
pub(super) const JOIN: &str = "/apis/master-agent/v1/nodes/n1/join";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_carries_traffic_comes_back_and_has_its_certificate_renewed() {
    let mut world = world(|options, _| {
        options.master_config =
            "certificates: {host_ttl: 30s}\ntunnels: {max_further_connections: 0}".to_owned()
    })
    .await;
    let expiry = "node_agent_host_certificate_expiry_timestamp_seconds ";
    let first = world.cluster.metric(world.cluster.nodes[0].admin, expiry).await.unwrap();
    for node in ["n1", "n2"] {
        let tunnel = world.cluster.node_status(node).unwrap()["tunnels"][0].clone();
        assert_eq!(tunnel["direction"], "call-home-https");
        let target = format!("{node}:{}", world.target);
        for door in world.cluster.doors() {
            download(&door, &target, volume()).await;
            upload(&door, &target, volume()).await;
        }
    }
    let list = world.cluster.command(&["node", "list"]).unwrap();
    assert!(list.contains("call-home-https"), "{list}");
    let admin = world.cluster.nodes[0].admin;
    eventually("the certificate is renewed", Duration::from_secs(60), async || {
        (world.cluster.metric(admin, expiry).await.ok()? > first).then_some(())
    })
    .await;
    // One record at the beginning of a link, before anything went over it; which of the two linked first is open.
    let mut links = world.audited("link");
    links.sort_by_key(|record| record["user"].to_string());
    assert_eq!(links.len(), 2, "{links:?}");
    for (record, node) in links.iter().zip(["n1", "n2"]) {
        assert_eq!((&record["code"], &record["decision"]), (&json!(101), &json!("allow")), "{record}");
        assert_eq!((&record["authorizer"], &record["rule"]), (&json!("node"), &json!("own")), "{record}");
        assert_eq!(record["user"], format!("system:node:{node}"), "{record}");
        assert_eq!((&record["bytes_in"], &record["bytes_out"]), (&json!(0), &json!(0)), "{record}");
    }
    // There is another record at its end, under the same id.
    world.cluster.kill_node(0);
    world.cluster.wait_state("n1", "lost").await;
    eventually("a record of the end", SOON, async || {
        let last =
            world.audited("link").into_iter().filter(|record| record["id"] == links[0]["id"]).nth(1)?;
        let bytes = |name: &str| last[name].as_u64().unwrap();
        assert!(bytes("bytes_in") > 2 * volume() && bytes("bytes_out") > 2 * volume(), "{last}");
        Some(())
    })
    .await;
    world.cluster.start_node(0).unwrap();
    world.cluster.wait_state("n1", "connected").await;
    world.cluster.restart_master().unwrap();
    eventually("the nodes come back", SOON, async || {
        let state =
            |node: &str| world.cluster.node_status(node).ok().map(|status| status["state"] == "connected");
        (state("n1")? && state("n2")?).then_some(())
    })
    .await;
    download(&world.cluster.unix, &format!("n1:{}", world.target), MB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_call_home_as_whom() {
    let world = world(|_, _| {}).await;
    let service_account = |node: &str| world.service_account(node, ISSUER, now() + 600);
    let bearer = |token: &str| format!("Authorization: Bearer {token}\r\n");
    let none = String::new;
    let link = |node: &str| format!("/apis/master-agent/v1/nodes/{node}/link");
    let join = |node: &str| format!("/apis/master-agent/v1/nodes/{node}/join");
    let before = world.refused("other_node").await;
    let others = [
        (None, bearer(&service_account("n2")), link("n1")),
        (None, bearer(&service_account("n2")), join("n1")),
        (None, bearer(&service_account("n1")), join("-")),
    ];
    for (certificate, lines, path) in &others {
        let (heard, _) = world.ask(*certificate, &upgrade(path, lines)).await;
        assert_eq!(heard.status, 403, "{path}: {heard:?}");
    }
    assert_eq!(world.refused("other_node").await - before, others.len() as f64);
    assert!(world.cluster.node_status("n1").unwrap()["refused"].as_u64().unwrap() >= 2);

    for (i, (certificate, lines, path, status)) in [
        (Some("n1"), none(), link("n1"), 101),
        (Some("n1"), none(), join("n1"), 101),
        (Some("n1"), none(), link("n2"), 403),
        (Some("n2"), none(), link("n1"), 403),
        (Some("n2"), none(), join("n1"), 403),
        (Some("n1"), none(), join("-"), 403),
        (None, none(), link("n1"), 401),
        (None, none(), join("n1"), 401),
        (None, bearer(BOOTSTRAP), link("n1"), 101),
        (None, bearer(BOOTSTRAP), join("n1"), 101),
        (None, bearer(BOOTSTRAP), join("-"), 101),
        (None, bearer(EXPIRED), link("n1"), 401),
        (None, bearer(EXPIRED), join("n1"), 401),
        (None, bearer("abcdef.wrongwrongwrongw"), link("n1"), 401),
        (None, bearer(OTHER_GROUP), link("n1"), 403),
        (None, bearer(OTHER_GROUP), join("n1"), 403),
        (None, bearer(&service_account("n1")), link("n1"), 101),
        (None, bearer(&world.service_account("n1", ISSUER, now() - 90)), link("n1"), 401),
        (None, bearer(&world.service_account("n1", "other", now() + 600)), link("n1"), 401),
        // A header that comes twice, a name in the query, or somebody else's name.
        (None, format!("{}{}", bearer(BOOTSTRAP), bearer(BOOTSTRAP)), link("n1"), 401),
        (None, none(), format!("{}?access_token={BOOTSTRAP}", link("n1")), 401),
        (
            Some("n1"),
            "Impersonate-User: system:node:n2\r\nImpersonate-Group: system:nodes\r\n".to_owned(),
            link("n2"),
            403,
        ),
        (Some("n1"), "X-Remote-User: system:node:n2\r\n".to_owned(), link("n2"), 403),
        // Names that are not valid.
        (None, bearer(BOOTSTRAP), link("-"), 400),
        (None, bearer(BOOTSTRAP), link("N1"), 400),
        (None, bearer(BOOTSTRAP), link("127.0.0.1"), 400),
        (None, bearer(BOOTSTRAP), "/apis/master-agent/v1/nodes/../nodes/n1/link".to_owned(), 400),
    ]
    .into_iter()
    .enumerate()
    {
        let (heard, _) = world.ask(certificate, &upgrade(&path, &lines)).await;
        assert_eq!(heard.status, status, "row {i}, {certificate:?} {path}: {heard:?}");
        if status == 101 {
            assert_eq!(heard.header("upgrade"), Some("master-agent-link"), "row {i}");
        }
    }
    world.cluster.wait_connected().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_credential_and_the_ssh_identity_name_the_same_node() {
    let mut world = world(|_, _| {}).await;
    // n1's host key, admitted as n2.
    let shown = "node: n2\ncall_home_https: {ca: ../ca.crt, cert: ../n2/client.crt, key: ../n2/client.key}";
    let master = world.cluster.https_master();
    let before = world.refused("other_node").await;
    world.cluster.kill_node(0);
    world.configure(0, &master, shown);
    world.cluster.start_node(0).unwrap();
    let log = world.cluster.master.log.clone();
    eventually("the mismatch is refused", SOON, async || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.contains("the call home was admitted for node n2, but the host key belongs to node n1")
            .then_some(())
    })
    .await;
    assert!(world.refused("other_node").await > before);
    assert_ne!(world.cluster.node_status("n1").unwrap()["state"], "connected");
    let n2 = world.cluster.node_status("n2").unwrap();
    assert_eq!((n2["tunnels"].as_array().unwrap().len(), &n2["state"]), (1, &json!("connected")));
    assert!(n2["refused"].as_u64().unwrap() > 0);

    // n1's name and host key, with n2's certificate.
    let shown = "call_home_https: {ca: ../ca.crt, cert: ../n2/client.crt, key: ../n2/client.key}";
    world.fails(&master, shown, "403 Forbidden").await;
    // Admitted to join, which a node that has joined is not here for.
    let mut joined = world.cluster.nodes[0].dir.join("state");
    joined.push("host_key-cert.pub");
    assert!(joined.exists());
    world.configure(0, &master, "call_home_https: {ca: ../ca.crt, cert: client.crt, key: client.key}");
    world.cluster.start_node(0).unwrap();
    world.cluster.wait_connected().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_read_again_for_every_link() {
    let mut world = world(|options, path| {
        let token = path.join("token");
        std::fs::write(&token, "wrong.token\n").unwrap();
        options.https = Some(format!("{{ca: ../ca.crt, token_file: {}}}", token.display()));
        options.nodes.truncate(1);
        options.nodes_down = true;
    })
    .await;
    world.cluster.start_node(0).unwrap();
    world.says(0, "does not recognise this node's credential (401)").await;
    let file = world.files.path().join("token");
    let good = world.service_account("n1", ISSUER, now() + 600);
    for token in [BOOTSTRAP, &good] {
        std::fs::write(&file, format!("{token}\n")).unwrap();
        world.cluster.wait_connected().await;
        download(&world.cluster.unix, &format!("n1:{}", world.target), MB).await;
        // Without the file the link that is there goes on.
        std::fs::remove_file(&file).unwrap();
        download(&world.cluster.unix, &format!("n1:{}", world.target), MB).await;
        world.cluster.restart_master().unwrap();
        world.says(0, "can't read ").await;
    }
    std::fs::write(&file, "two words").unwrap();
    world.says(0, "holds no token").await;
    let log = std::fs::read_to_string(world.cluster.nodes[0].dir.join("log")).unwrap();
    for secret in [BOOTSTRAP, &good, "two words", "wrong.token"] {
        assert!(!log.contains(secret) && !world.cluster.master.log_text().contains(secret));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_join_over_the_same_port() {
    let mut world = world(|options, _| options.nodes_down = true).await;
    let address = world.cluster.https_master();
    let ca = world.cluster.path().join("ca.crt").display().to_string();
    let other = Authority::new("other CA").unwrap();
    let other_ca = world.cluster.path().join("other-ca.crt");
    std::fs::write(&other_ca, other.pem()).unwrap();
    let token = |world: &World, args: &[&str]| {
        let all = [&["token", "create", "--address", &address], args].concat();
        world.cluster.command(&all).unwrap().trim().to_owned()
    };
    let join = |world: &World, line: &str, args: &[&str]| {
        let dir = world.cluster.path().join("fresh");
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), Some("node-agent"));
        let mut command = Command::new(binary("node-agent"));
        let output = command.args(words).arg("--state-dir").arg(dir).args(args).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let line = token(&world, &["--node", "n1"]);
    assert!(line.starts_with(&format!("node-agent join {address} --ca-pin SHA256:")), "{line}");
    let secret = line.rsplit('.').next().unwrap().to_owned();
    let as_n2 = line.replace(" --node n1 ", " --node n2 ");
    for (line, args, part) in [
        (&line, vec!["--https-ca", other_ca.to_str().unwrap()], "no credential was sent"),
        (&line, vec![], "no credential was sent"),
        (&as_n2, vec!["--https-ca", &ca], "403 Forbidden"),
        (&line, vec!["--https-ca", "/nonexistent"], "/nonexistent"),
    ] {
        let (joined, error) = join(&world, line, &args);
        assert!(!joined && error.contains(part) && !error.contains(&secret), "{args:?}: {error}");
    }
    let pin = line.split_whitespace().nth(4).unwrap();
    let wrong_pin = line.replace(pin, "SHA256:jDvYqkuiVBuJYzQPVwlVyZTdIAbEPi9vmP4kq1pPkW8");
    let (joined, error) = join(&world, &wrong_pin, &["--https-ca", &ca]);
    assert!(!joined && error.contains("did not prove itself"), "{error}");
    // Nothing of this used the token up.
    assert_eq!(join(&world, &line, &["--https-ca", &ca]), (true, String::new()));
    // The same host may ask again, as after an answer that was lost.
    assert_eq!(join(&world, &line, &["--https-ca", &ca]), (true, String::new()));
    for (line, part) in [
        (line.replace(&secret, &secret.chars().rev().collect::<String>()), "401"),
        (token(&world, &[]), "not bound to a node"),
    ] {
        let (joined, error) = join(&world, &line, &["--https-ca", &ca]);
        assert!(!joined && error.contains(part), "{part}: {error}");
    }
    let n2 = token(&world, &[]);
    let (joined, error) = join(&world, &n2, &["--https-ca", &ca, "--node", "n2"]);
    // n2 has joined before, which takes a token bound to it.
    assert!(!joined && error.contains("has joined before"), "{error}");

    // With a credential of its own, and that one only for the node it names.
    world.configure(0, &address, "call_home_https: {ca: ../ca.crt, cert: client.crt, key: client.key}");
    world.configure(1, &address, "call_home_https: {ca: ../ca.crt, cert: client.crt, key: client.key}");
    let line = token(&world, &["--node", "n2"]);
    let as_n1 = line.replace("--node n2", "--node n1");
    let error = world.cluster.node_command(0, &as_n1).unwrap_err().to_string();
    assert!(error.contains("bound to node n2"), "{error}");
    let error = world.cluster.node_command(0, &line).unwrap_err().to_string();
    assert!(error.contains("403 Forbidden"), "{error}");
    world.cluster.node_command(1, &line).unwrap();
    world.cluster.node_command(0, &token(&world, &["--node", "n1"])).unwrap();
    for node in 0..2 {
        world.cluster.start_node(node).unwrap();
    }
    world.cluster.wait_connected().await;
    let by_token = |record: &&Value| record["authorizer"] == "join-token";
    assert_eq!(world.audited("join").iter().filter(by_token).count(), 10);
    assert!(!world.cluster.master.log_text().contains(&secret));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_http_proxy_is_gone_through_and_not_trusted() {
    let mut world = world(|options, _| options.nodes_down = true).await;
    let master = "https://front-end.test";
    let shown = |proxy: &str| {
        format!(
            "call_home_https: {{ca: ../ca.crt, cert: client.crt, key: client.key, server_name: localhost, proxy: {proxy}}}"
        )
    };
    for (answer, then, part) in [
        (
            "HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
            0,
            "wants other credentials (407)",
        ),
        ("HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", 0, "it answers 503 Service Unavailable"),
        (
            "HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
            0,
            "it answers 301 Moved Permanently",
        ),
        ("what?\r\n\r\n", 0, "does not answer in HTTP/1.1"),
        ("HTTP/1.1 200 OK\r\nA: ", 10_000_000, "answers with an endless head"),
        ("HTTP/1.1 200 OK\r\n\r\nGET", 0, "sends something of its own behind its answer"),
        ("", 0, "did not answer within 2s"),
    ] {
        let (port, heads) = fake(None, answer, then).await;
        let log = world.fails(master, &shown(&format!("'http://me:secret@127.0.0.1:{port}'")), part).await;
        assert!(!log.contains("secret") && !log.contains("bWU6c2VjcmV0"), "{log}");
        assert!(heads.lock().unwrap().contains("proxy-authorization: Basic bWU6c2VjcmV0\r\n"));
    }
    // In between it sees TLS; a front end of its own is not the one.
    let dir = world.cluster.path().to_owned();
    Authority::new("proxy CA").unwrap().server(&dir, "between", &["localhost"]).unwrap();
    let (between, heads) = fake(Some((&dir, "between")), "HTTP/1.1 200 OK\r\n\r\n", 0).await;
    let (port, _) = proxy(local(between), None).await;
    world.fails(master, &shown(&format!("'127.0.0.1:{port}'")), "no credential was sent").await;
    assert_eq!(heads.lock().unwrap().as_str(), "");

    let (port, count) = proxy(world.cluster.https, Some("bWU6c2VjcmV0")).await;
    let password = world.cluster.path().join("proxy-password");
    proto_config::secret_file::replace(&password, b"wrong\n").unwrap();
    let by_file = format!("'http://me@127.0.0.1:{port}', proxy_password_file: ../proxy-password");
    world.configure(0, master, &shown(&by_file));
    world.cluster.start_node(0).unwrap();
    let log = || world.cluster.nodes[0].process.as_ref().unwrap().log_text();
    eventually("the wrong password is refused", SOON, async || log().contains("(407)").then_some(())).await;
    // The password is read again for each link.
    proto_config::secret_file::replace(&password, b"secret\n").unwrap();
    world.cluster.wait_state("n1", "connected").await;
    assert!(!log().contains("secret") && !log().contains("wrong"), "{}", log());
    download(&world.cluster.unix, &format!("n1:{}", world.target), volume()).await;
    assert!(count.load(Ordering::Relaxed) > 0);

    // The environment names the proxy, which is not used for what the environment exempts.
    for (i, (no_proxy, proxied)) in [("other.test", true), ("front-end.test", false)].into_iter().enumerate()
    {
        world.cluster.kill_node(0);
        let before = count.load(Ordering::Relaxed);
        world.configure(0, master, &shown("environment"));
        let node = &world.cluster.nodes[0];
        let log = node.dir.join(format!("log-{i}"));
        let mut command = Command::new(binary("node-agent"));
        command.arg("--config").arg(node.dir.join("node.yaml")).arg("run").current_dir(&node.dir);
        command.env("HTTPS_PROXY", format!("http://me:secret@127.0.0.1:{port}")).env("NO_PROXY", no_proxy);
        let process = Process::start("n1", &mut command, &log).unwrap();
        if proxied {
            eventually("called home", SOON, async || {
                process.log_text().contains("called home").then_some(())
            })
            .await;
            assert!(count.load(Ordering::Relaxed) > before);
        } else {
            let part = "can't connect to front-end.test:443";
            eventually(part, SOON, async || process.log_text().contains(part).then_some(())).await;
            assert_eq!(count.load(Ordering::Relaxed), before);
        }
        assert!(!process.log_text().contains("secret"));
    }
}
