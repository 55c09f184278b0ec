//! Tokens of service accounts end with the account, pod, node or Secret that they are bound to, at the front end and
//! where nodes link and join. A node's credential is good on its own way only.

use std::{
    net::SocketAddr,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tests::{
    apiserver::{ApiServer, BoundTo, Fault, Kind, Verb},
    client::http_get,
    cluster::{self, Cluster, Options, SOON, binary},
    front_end::{Credential, FrontEnd, Http, ISSUER, Setup, hear, role},
    load::{completes, download},
    pki::client_config,
    process::{TempDir, eventually},
    target,
};
use tokio::{io::AsyncWriteExt, net::TcpStream};
use tokio_rustls::TlsConnector;

const MB: u64 = 1 << 20;
/// How much later than kube-apiserver a token may be refused.
const LAG: Duration = Duration::from_secs(15);
const ACCOUNT: &str = "apps/agent";
const LINK: &str = "/apis/master-agent/v1/nodes/n1/link";
const JOIN: &str = "/apis/master-agent/v1/nodes/n1/join";

/// The cluster that is asked: the account [`ACCOUNT`], its pod `agent-0`, a Secret, and node `n1`.
async fn api() -> ApiServer {
    let api = ApiServer::start().await.unwrap();
    api.create(Kind::ServiceAccounts, "apps", "agent");
    api.create(Kind::Pods, "apps", "agent-0");
    api.create_secret("apps", "keep");
    api.write_kubeconfig(&api.directory().join("kubeconfig")).unwrap();
    api
}

fn kubernetes(api: &ApiServer) -> String {
    format!("kubernetes: {{kubeconfig: '{}'}}\n", api.directory().join("kubeconfig").display())
}

/// Lines of the section `front_end`: tokens of the cluster's accounts, of which [`ACCOUNT`] may link and join.
fn lines(api: &ApiServer, files: &Path) -> String {
    let rule = "apiGroups: [master-agent], resources: [nodes/link, nodes/join], verbs: [create]";
    let account = "kind: ServiceAccount, name: agent, namespace: apps";
    std::fs::write(files.join("rbac.yaml"), role("call-home", rule, &[account])).unwrap();
    format!(
        "  authentication: [{{service_account: {{issuers: ['{ISSUER}'], audiences: ['{ISSUER}'], key_files: [{}]}}}}]\n  \
         authorization: [{{rbac: {{files: [{}]}}}}]\n  call_home: true\n  limits: {{failures_per_second_per_address: 1000}}\n",
        api.service_account_key().display(),
        files.join("rbac.yaml").display(),
    )
}

struct World {
    api: ApiServer,
    front_end: FrontEnd,
    _files: TempDir,
}

impl World {
    /// A front end that asks the cluster, whose watches stand.
    async fn start() -> Self {
        let world = Self::before(api().await).await;
        for kind in [Kind::Nodes, Kind::Pods, Kind::ServiceAccounts] {
            world.api.wait_watched(kind).await;
        }
        world
    }

    async fn before(api: ApiServer) -> Self {
        let files = TempDir::new("bound").unwrap();
        let setup = Setup {
            unconfigured: true,
            lines: lines(&api, files.path()),
            master_config: kubernetes(&api),
            ..Setup::default()
        };
        let front_end = completes("the front end starts", FrontEnd::start(setup)).await.unwrap();
        Self { api, front_end, _files: files }
    }

    fn issue(&self, bound: BoundTo<'_>) -> String {
        self.api.issue(ACCOUNT, bound, json!({})).unwrap()
    }

    /// The status of a request to kube-apiserver.
    async fn ask(&self, token: &str) -> StatusCode {
        let caller = self.front_end.caller_with(Credential::None, Some(token.to_owned()), Http::V1);
        let mut caller = completes("a connection", caller).await.unwrap();
        completes("an answer", caller.get("/echo")).await.unwrap().status
    }

    /// The status of a call home.
    async fn call(&self, path: &str, token: &str) -> u16 {
        let mut stream = self.front_end.connect(Credential::None, Http::V1).await.unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: master-agent-link\r\n\
             Authorization: Bearer {token}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        completes("an answer", hear(&mut stream)).await.unwrap().unwrap().status
    }

    /// At the front end, and at the two doors.
    async fn answers(&self, token: &str) -> [u16; 3] {
        [self.ask(token).await.as_u16(), self.call(LINK, token).await, self.call(JOIN, token).await]
    }
}

const GOOD: [u16; 3] = [200, 101, 101];
const REFUSED: [u16; 3] = [401, 401, 401];

/// Tokens of something are good everywhere until it is gone, also if it is made anew, and nowhere soon after.
async fn ends(what: &str, bound: BoundTo<'_>, delete: impl Fn(&ApiServer), anew: impl Fn(&ApiServer)) {
    for again in [false, true] {
        let world = World::start().await;
        let token = world.issue(bound);
        assert_eq!(world.answers(&token).await, GOOD, "{what}");
        delete(&world.api);
        if again {
            anew(&world.api);
        }
        let what = format!("the {what}'s tokens are refused, anew: {again}");
        eventually(&what, LAG, async || (world.answers(&token).await == REFUSED).then_some(())).await;
        if again {
            let token = world.issue(bound);
            assert_eq!(world.answers(&token).await, GOOD, "what is new has a good token: {what}");
        }
        let master = &world.front_end.cluster.master;
        let log = master.says(&["the API server no longer accepts the token"]).await;
        assert!(!log.contains(&token));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pods_tokens_end_with_it() {
    let pod = BoundTo::Pod("agent-0", Some("n1"));
    ends(
        "pod",
        pod,
        |api| api.delete(Kind::Pods, "apps", "agent-0"),
        |api| api.create(Kind::Pods, "apps", "agent-0"),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_accounts_tokens_end_with_it() {
    let delete = |api: &ApiServer| api.delete(Kind::ServiceAccounts, "apps", "agent");
    let anew = |api: &ApiServer| api.create(Kind::ServiceAccounts, "apps", "agent");
    ends("service account", BoundTo::Nothing, delete, anew).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nodes_tokens_end_with_it() {
    let delete = |api: &ApiServer| api.delete(Kind::Nodes, "", "n1");
    ends("node", BoundTo::Node("n1"), delete, |api| api.create(Kind::Nodes, "", "n1")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespaces_tokens_end_with_it() {
    let anew = |api: &ApiServer| {
        api.create(Kind::ServiceAccounts, "apps", "agent");
        api.create(Kind::Pods, "apps", "agent-0");
    };
    ends("namespace", BoundTo::Pod("agent-0", None), |api| api.delete_namespace("apps"), anew).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secrets_tokens_end_with_it() {
    let delete = |api: &ApiServer| api.delete_secret("apps", "keep");
    ends("Secret", BoundTo::Secret("keep"), delete, |api| api.create_secret("apps", "keep")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_kube_apiserver_accepts_is_not_refused_and_guesses_ask_it_nothing() {
    let world = World::start().await;
    let known = world.issue(BoundTo::Pod("agent-0", None));
    assert_eq!(world.ask(&known).await, 200);
    assert_eq!(world.api.reviews(), 0, "the watches say it");
    // Made a moment ago: the watch has not heard of it.
    world.api.hold(Kind::Pods);
    world.api.create(Kind::Pods, "apps", "agent-1");
    let new = world.issue(BoundTo::Pod("agent-1", None));
    assert_eq!(world.answers(&new).await, GOOD);
    assert_eq!(world.api.reviews(), 1, "asked once for all");
    world.api.release(Kind::Pods);
    // It is to be deleted, and has its last minute.
    world.api.delete_later(Kind::Pods, "apps", "agent-1", -30);
    assert_eq!(world.answers(&new).await, GOOD);
    let before = world.api.reviews();
    let forged = {
        let (head, signature) = new.rsplit_once('.').unwrap();
        format!("{head}.{}", signature.chars().rev().collect::<String>())
    };
    let late = world.api.issue(ACCOUNT, BoundTo::Secret("keep"), json!({"exp": 1_700_000_000})).unwrap();
    let other = world.api.issue(ACCOUNT, BoundTo::Secret("keep"), json!({"aud": ["vault"]})).unwrap();
    for token in [&forged, &late, &other] {
        assert_eq!(world.answers(token).await, REFUSED);
    }
    assert_eq!(world.api.reviews(), before);
    // Its last minute is over.
    world.api.delete_later(Kind::Pods, "apps", "agent-1", -70);
    eventually("it is refused", LAG, async || (world.answers(&new).await == REFUSED).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_api_is_away_only_what_was_verified_before_goes_on() {
    let world = World::start().await;
    let (pod, secret) = (world.issue(BoundTo::Pod("agent-0", None)), world.issue(BoundTo::Secret("keep")));
    for token in [&pod, &secret] {
        assert_eq!(world.answers(token).await, GOOD);
    }
    world.api.create(Kind::Pods, "apps", "agent-1");
    let unseen = world.issue(BoundTo::Pod("agent-1", None));
    let deleted = world.issue(BoundTo::Node("n1"));
    assert_eq!(world.answers(&deleted).await, GOOD);
    world.api.delete(Kind::Nodes, "", "n1");
    eventually("it is refused", LAG, async || (world.ask(&deleted).await == 401).then_some(())).await;
    world.api.refuse().await;
    // This is longer than any answer is remembered, which is 10 seconds.
    let until = Instant::now() + Duration::from_secs(12);
    while Instant::now() < until {
        for token in [&pod, &secret] {
            assert_eq!(world.answers(token).await, GOOD, "it was verified before");
        }
        // Nobody knows: the SSH identity decides whether it may link.
        assert_eq!(world.answers(&unseen).await, [503, 101, 503]);
        assert_eq!(world.answers(&deleted).await, REFUSED, "it was refused before");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let answers = async |token: &str| [world.ask(token).await.as_u16(), world.call(LINK, token).await];
    let late = world.api.issue(ACCOUNT, BoundTo::Nothing, json!({"exp": 1_700_000_000})).unwrap();
    let other = world.api.issue(ACCOUNT, BoundTo::Nothing, json!({"aud": ["vault"]})).unwrap();
    let (head, _) = unseen.rsplit_once('.').unwrap();
    for token in [late, other, format!("{head}.AAAA"), "garbage".to_owned(), "a.b.c".to_owned()] {
        assert_eq!(answers(&token).await, [401, 401], "a stranger is one at every door");
    }
    // Without the right to link, that nobody can be asked gives none.
    world.api.create(Kind::ServiceAccounts, "apps", "other");
    let nobody = world.api.issue("apps/other", BoundTo::Nothing, json!({})).unwrap();
    assert_eq!(answers(&nobody).await, [503, 403]);
    world.front_end.cluster.master.says(&["a node may link by its SSH identity alone"]).await;
    world.api.delete(Kind::Pods, "apps", "agent-0");
    world.api.accept().await.unwrap();
    eventually("what was deleted meanwhile is refused", SOON, async || {
        (world.answers(&pod).await == REFUSED && world.answers(&deleted).await == REFUSED).then_some(())
    })
    .await;
    eventually("others are good", SOON, async || {
        (world.answers(&unseen).await == GOOD && world.answers(&secret).await == GOOD).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_link_and_webhooks_work_while_the_api_is_away() {
    let api = api().await;
    let files = TempDir::new("bound").unwrap();
    let token = files.path().join("token");
    let bound = BoundTo::Pod("agent-0", None);
    std::fs::write(&token, api.issue(ACCOUNT, bound, json!({})).unwrap()).unwrap();
    let target = target::start().await;
    let mut cluster = Cluster::start(Options {
        nodes: ["n1", "n2"].map(|name| (name.to_owned(), cluster::Kind::CallHomeHttps)).to_vec(),
        ports: vec![target],
        https: Some(format!("{{ca: ../ca.crt, token_file: {}}}", token.display())),
        front_end: Some(lines(&api, files.path())),
        master_config: kubernetes(&api),
        ..Options::default()
    })
    .await
    .unwrap();
    api.refuse().await;
    // Nothing of what was verified before is left.
    cluster.restart_master().unwrap();
    eventually("the nodes link", SOON, async || {
        let connected = |node| Some(cluster.node_status(node).ok()?["state"] == "connected");
        (connected("n1")? && connected("n2")?).then_some(())
    })
    .await;
    cluster.master.says(&["a node may link by its SSH identity alone"]).await;
    // kube-apiserver's calls of webhooks in the cluster go the same way.
    for door in cluster.doors() {
        download(&door, &format!("n1:{target}"), MB).await;
    }
    // The SSH identity is still what decides which node it is.
    cluster.kill_node(1);
    cluster.wait_state("n2", "lost").await;
    let config = cluster.nodes[1].dir.join("node.yaml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("node: n1\n{text}")).unwrap();
    cluster.start_node(1).unwrap();
    let log = cluster.master.log.clone();
    eventually("the mismatch is refused", SOON, async || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.contains("the call home was admitted for node n1, but the host key belongs to node n2")
            .then_some(())
    })
    .await;
    assert_ne!(cluster.node_status("n2").unwrap()["state"], "connected");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lasts_ends_with_what_its_token_is_bound_to() {
    let world = World::start().await;
    let token = world.issue(BoundTo::Pod("agent-0", None));
    let caller = world.front_end.caller_with(Credential::None, Some(token), Http::V1);
    let mut caller = caller.await.unwrap();
    let request = Request::get("/api/v1/pods?watch=1").body(Full::default()).unwrap();
    let response = completes("a watch", caller.send(request)).await.unwrap();
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    let ended = tokio::spawn(async move { while let Some(Ok(_)) = body.frame().await {} });
    // Nothing ends while nobody can be asked. This lasts until after the next check.
    world.api.refuse().await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert!(!ended.is_finished());
    world.api.accept().await.unwrap();
    world.api.wait_watched(Kind::Pods).await;
    assert!(!ended.is_finished());
    world.api.delete(Kind::Pods, "apps", "agent-0");
    tokio::time::timeout(LAG, ended).await.expect("the watch ends").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_right_that_is_lacking_is_named_and_opens_nothing() {
    let api = api().await;
    let forbidden = Some(Fault::Status(StatusCode::FORBIDDEN));
    for verb in [Verb::List, Verb::Watch] {
        api.fail(Kind::ServiceAccounts, verb, forbidden.clone());
    }
    let world = World::before(api).await;
    let ready = async |what: &str| {
        eventually(what, SOON, async || {
            let said = http_get(world.front_end.cluster.admin, "/readyz").await.ok()?;
            said.contains(what).then_some(())
        })
        .await;
    };
    ready("serviceaccounts can't be followed, so the API server is asked about each token").await;
    let (pod, account) = (world.issue(BoundTo::Pod("agent-0", None)), world.issue(BoundTo::Nothing));
    assert_eq!(world.answers(&pod).await, GOOD);
    assert!(world.api.reviews() > 0);
    world.api.fail_reviews(forbidden);
    assert_eq!(world.answers(&account).await, [503, 101, 503]);
    let master = &world.front_end.cluster.master;
    master.says(&["allow the user of kubernetes.kubeconfig to create tokenreviews"]).await;
    for verb in [Verb::List, Verb::Watch] {
        world.api.fail(Kind::ServiceAccounts, verb, None);
    }
    eventually("the watch is enough", SOON, async || (world.answers(&account).await == GOOD).then_some(()))
        .await;
    // Whoever does without all that is told so.
    let config = world.front_end.cluster.path().join("unbound.yaml");
    let text = std::fs::read_to_string(world.front_end.cluster.path().join("master.yaml")).unwrap();
    for (text, says) in [
        (text.clone(), false),
        (text.lines().filter(|line| !line.starts_with("kubernetes")).collect::<Vec<_>>().join("\n"), true),
        (text.replace("key_files", "check_bound_objects: false, key_files"), true),
    ] {
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(binary("master-agent"));
        let output = command.arg("--config").arg(&config).arg("check-config").output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{error}");
        assert_eq!(error.contains("are accepted until they expire"), says, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nodes_credential_is_good_on_its_own_way_only() {
    let files = TempDir::new("tokens").unwrap();
    let tokens = files.path().join("tokens.csv");
    let text =
        b"of-n1,system:node:n1,1,\"system:nodes\"\nof-n2,system:node:n2,2,\"system:nodes\"\nof-jane,jane,3\n";
    proto_config::secret_file::replace(&tokens, text).unwrap();
    let kinds = [cluster::Kind::Dialled, cluster::Kind::CallHome];
    let setup = Setup {
        unconfigured: true,
        lines: format!("  authentication: [{{token_file: {}}}]\n", tokens.display()),
        nodes: ["n1", "n2"].map(str::to_owned).into_iter().zip(kinds).collect(),
        ..Setup::default()
    };
    let front_end = completes("the front end starts", FrontEnd::start(setup)).await.unwrap();
    let direct = front_end.address;
    let nodes: Vec<SocketAddr> = (0..2).map(|node| front_end.cluster.local_endpoint(node)).collect();
    for (way, token, status) in [
        (direct, "of-n1", 200),
        (direct, "of-n2", 200),
        (nodes[0], "of-n1", 200),
        (nodes[1], "of-n2", 200),
        (nodes[0], "of-n2", 403),
        (nodes[1], "of-n1", 403),
        (nodes[0], "of-jane", 200),
        (nodes[1], "of-jane", 200),
    ] {
        let found = eventually("an answer", SOON, async || ask_through(&front_end, way, token).await).await;
        assert_eq!(found, status, "{token} by {way}");
    }
    front_end.cluster.master.says(&["refused a node's credential"]).await;
    let audited: Vec<Value> = eventually("the audit records", SOON, async || {
        let text = std::fs::read_to_string(front_end.file("audit.log")).ok()?;
        let whole = text.get(..text.rfind('\n')?)?.lines().map(|line| serde_json::from_str(line).unwrap());
        let denied: Vec<Value> = whole.filter(|line: &Value| line["decision"] == "deny").collect();
        (denied.len() == 2).then_some(denied)
    })
    .await;
    for line in &audited {
        assert_eq!((&line["authorizer"], &line["rule"]), (&json!("tunnel"), &json!("not-its-own")), "{line}");
        assert_ne!(line["user"], format!("system:node:{}", line["node"].as_str().unwrap()), "{line}");
    }
}

/// The status of a request over an endpoint; `None` where nobody answers there.
async fn ask_through(front_end: &FrontEnd, way: SocketAddr, token: &str) -> Option<u16> {
    let config = client_config(&front_end.file("ca.crt"), None).unwrap();
    let socket = TcpStream::connect(way).await.ok()?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream: tests::client::Stream =
        Box::new(TlsConnector::from(config).connect(name, socket).await.ok()?);
    let head = format!("GET /echo HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    stream.flush().await.ok()?;
    Some(completes("an answer", hear(&mut stream)).await.ok()??.status)
}
