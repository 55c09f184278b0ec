//! A node refuses what its policy does not allow, whoever asks and however the target is spelled.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use proto::Target;
use tests::{
    client::{Door, Refused},
    cluster::{Cluster, Kind, Options, SOON, binary},
    dns::{Server, Zone},
    person::Person,
    process::{Process, eventually, free_port},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

const PATIENCE: Duration = Duration::from_secs(120);
/// The node's own address, as far as its policy goes, that is not on loopback. Nothing is sent there.
const OWN: &str = "198.51.100.7";
/// Outside of all that the node allows. Nothing is sent there.
const OUTSIDE: &str = "203.0.113.9";
const METADATA: &str = "169.254.169.254";
/// On loopback as the allowed address is, and not allowed.
const FORBIDDEN: &str = "127.9.9.9";

/// A listener that greets with its name, and counts who came.
#[derive(Clone, Default)]
struct Greeter(Arc<AtomicUsize>);

impl Greeter {
    async fn listen(&self, host: &str, port: u16, name: &'static str) {
        let listener = TcpListener::bind(SocketAddr::new(host.parse().unwrap(), port)).await.unwrap();
        let count = self.0.clone();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                // A caller that leaves early is not the greeter's failure.
                let _ = socket.write_all(name.as_bytes()).await;
            }
        });
    }

    fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    /// Shows that it counts; what it counts from then on is somebody else.
    async fn prove(&self, host: &str, port: u16) {
        let before = self.count();
        let mut stream = TcpStream::connect(SocketAddr::new(host.parse().unwrap(), port)).await.unwrap();
        greeting(&mut stream).await;
        assert_eq!(self.count(), before + 1);
        self.0.store(before, Ordering::SeqCst);
    }
}

/// The bytes of a target until it closes; none from one that was never reached.
async fn greeting(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await;
    assert!(read.is_ok(), "the stream does not end");
    String::from_utf8(bytes).unwrap()
}

/// A node `n1` through which everything is routed, an allowed port, and one that is not allowed.
struct Site {
    cluster: Cluster,
    port: u16,
    other: u16,
    allowed: Greeter,
    forbidden: Greeter,
    dns: Option<Server>,
}

impl Site {
    /// `policy` are entries of the allow list, before the one for `port`.
    async fn start(kind: Kind, policy: &str) -> Self {
        let (port, other) = (free_port(), free_port());
        let (allowed, forbidden) = (Greeter::default(), Greeter::default());
        for host in ["127.0.0.1", "::1"] {
            allowed.listen(host, port, "allowed").await;
            forbidden.listen(host, other, "forbidden").await;
            forbidden.prove(host, other).await;
        }
        for port in [port, other] {
            forbidden.listen(FORBIDDEN, port, "forbidden").await;
            forbidden.prove(FORBIDDEN, port).await;
        }
        let mut options = Options {
            nodes: vec![("n1".to_owned(), kind)],
            ports: vec![port],
            inventory: "default_route: true".to_owned(),
            ..Options::default()
        };
        let mut dns = None;
        let cluster = if kind == Kind::Sshd {
            Cluster::start(options).await.unwrap()
        } else {
            options.node_config = format!("addresses: ['127.0.0.1', '::1', '{OWN}']");
            options.nodes_down = true;
            let mut cluster = Cluster::start(options).await.unwrap();
            let server = Server::start(zone()).await.unwrap();
            allow(&cluster, policy);
            cluster.nodes[0].process = Some(start_with_dns(&cluster, server.address.ip()));
            cluster.wait_connected().await;
            dns = Some(server);
            cluster
        };
        Self { cluster, port, other, allowed, forbidden, dns }
    }

    /// The node's count of refusals by rule.
    async fn refusals(&self, rule: &str) -> f64 {
        let prefix = format!("node_agent_policy_refusals_total{{rule=\"{rule}\"}}");
        match self.cluster.metric(self.cluster.nodes[0].admin, &prefix).await {
            Ok(value) => value,
            Err(error) => {
                assert!(error.to_string().contains("no metric"), "{error}");
                0.0
            }
        }
    }

    async fn all_refusals(&self) -> BTreeMap<&'static str, f64> {
        let mut all = BTreeMap::new();
        for rule in proto::policy::REFUSALS {
            all.insert(rule, self.refusals(rule).await);
        }
        all
    }

    /// Each target is refused by its rule, at both egress listeners; counted and logged so.
    async fn refuses(&self, table: &[(String, &'static str)]) {
        let mut expected = self.all_refusals().await;
        for door in self.cluster.doors() {
            for (target, rule) in table {
                refused(&door, target, rule).await;
                *expected.get_mut(rule).unwrap() += 1.0;
            }
        }
        assert_eq!(self.all_refusals().await, expected);
        self.logged(table).await;
        assert_eq!(self.forbidden.count(), 0);
    }

    async fn logged(&self, table: &[(String, &'static str)]) {
        let node = self.cluster.nodes[0].process.as_ref().unwrap();
        for (target, rule) in table {
            let target: Target = target.parse().unwrap();
            node.says(&[&format!("target={target} "), &format!("(rule {rule})")]).await;
        }
    }

    /// Allowed targets are reached under each of their names.
    async fn allows(&self) {
        let port = self.port;
        let mut came = self.allowed.count();
        for door in self.cluster.doors() {
            for host in ["127.0.0.1", "[::1]", "n1", "[::ffff:127.0.0.1]", "fine.test", "FINE.test."] {
                let mut stream = door.stream(&format!("{host}:{port}")).await.unwrap();
                assert_eq!(greeting(&mut stream).await, "allowed", "{host}");
                came += 1;
                assert_eq!(self.allowed.count(), came, "{host}");
            }
        }
    }

    /// Targets that no rule names, and the rule that refuses each.
    fn table(&self) -> Vec<(String, &'static str)> {
        let Self { port, other, .. } = self;
        let mut table = self.closed_ranges();
        let rows = [
            // The first of the node's addresses decides what is said.
            (format!("n1:{other}"), "loopback"),
            (format!("{OUTSIDE}:80"), "default-deny"),
            (format!("{OUTSIDE}:{port}"), "default-deny"),
            (format!("[::ffff:{OUTSIDE}]:80"), "default-deny"),
            ("[2001:db8::9]:80".to_owned(), "default-deny"),
            (format!("{OWN}:22"), "default-deny"),
            (format!("{OWN}:{port}"), "default-deny"),
            (format!("[::ffff:{OWN}]:22"), "default-deny"),
            (format!("far.test:{port}"), "default-deny"),
            (format!("own.test:{other}"), "default-deny"),
        ];
        table.extend(rows);
        table
    }

    /// Targets that stay closed under a rule for all addresses.
    fn closed_ranges(&self) -> Vec<(String, &'static str)> {
        let Self { port, other, .. } = self;
        vec![
            (format!("{METADATA}:80"), "link-local"),
            (format!("{METADATA}:{port}"), "link-local"),
            (format!("[::ffff:{METADATA}]:80"), "link-local"),
            ("[::ffff:a9fe:a9fe]:80".to_owned(), "link-local"),
            ("[0:0:0:0:0:FFFF:A9FE:A9FE]:80".to_owned(), "link-local"),
            ("[fe80::1]:80".to_owned(), "link-local"),
            (format!("[febf::1]:{port}"), "link-local"),
            ("metadata.test:80".to_owned(), "link-local"),
            ("metadata6.test:80".to_owned(), "link-local"),
            ("mapped.test:80".to_owned(), "link-local"),
            (format!("127.0.0.1:{other}"), "loopback"),
            (format!("[::1]:{other}"), "loopback"),
            (format!("localhost:{other}"), "loopback"),
            (format!("LOCALHOST.:{other}"), "loopback"),
            (format!("fine.test:{other}"), "loopback"),
            (format!("{FORBIDDEN}:{port}"), "loopback"),
            (format!("[::ffff:{FORBIDDEN}]:{port}"), "loopback"),
            (format!("[::ffff:127.0.0.1]:{other}"), "loopback"),
            (format!("[::ffff:7f00:1]:{other}"), "loopback"),
            (format!("forbidden.test:{port}"), "loopback"),
            (format!("mapped-loopback.test:{port}"), "loopback"),
            (format!("0.0.0.0:{other}"), "unspecified"),
            (format!("[::]:{other}"), "unspecified"),
            (format!("[::]:{port}"), "unspecified"),
            (format!("[::ffff:0.0.0.0]:{other}"), "unspecified"),
            (format!("unspecified.test:{other}"), "unspecified"),
            ("224.0.0.1:80".to_owned(), "multicast"),
            ("255.255.255.255:80".to_owned(), "multicast"),
            ("[ff02::1]:80".to_owned(), "multicast"),
            ("168.63.129.16:80".to_owned(), "metadata"),
            (format!("100.100.100.200:{port}"), "metadata"),
            ("[fd00:ec2::254]:80".to_owned(), "metadata"),
            ("[64:ff9b::a9fe:a9fe]:80".to_owned(), "link-local"),
            (format!("[64:ff9b::7f00:1]:{other}"), "loopback"),
            ("[64:ff9b::a83f:8110]:80".to_owned(), "metadata"),
            ("[64:ff9b:1::1]:80".to_owned(), "nat64"),
        ]
    }
}

fn zone() -> Zone {
    let address = |text: &&str| text.parse::<IpAddr>().unwrap();
    let answers = |name: &str, answers: &[&[&str]]| {
        (name.to_owned(), answers.iter().map(|a| a.iter().map(address).collect()).collect())
    };
    HashMap::from([
        answers("fine.test", &[&["127.0.0.1"]]),
        answers("far.test", &[&[OUTSIDE]]),
        answers("own.test", &[&[OWN]]),
        answers("metadata.test", &[&[METADATA]]),
        answers("metadata6.test", &[&["fe80::a9fe:a9fe"]]),
        answers("mapped.test", &[&["::ffff:169.254.169.254"]]),
        answers("forbidden.test", &[&[FORBIDDEN]]),
        answers("mapped-loopback.test", &[&["::ffff:127.9.9.9"]]),
        answers("unspecified.test", &[&["0.0.0.0", "::"]]),
        answers("rebound.test", &[&["127.0.0.1"], &[FORBIDDEN]]),
        answers("mixed.test", &[&[FORBIDDEN, "127.0.0.1"], &["127.0.0.1", FORBIDDEN]]),
        answers("n1", &[&[FORBIDDEN]]),
    ])
}

/// Puts further entries first in the node's allow list.
fn allow(cluster: &Cluster, policy: &str) {
    let file = cluster.nodes[0].dir.join("node.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    let changed = text.replacen("allow: [", &format!("allow: [{policy}"), 1);
    assert_eq!(changed.len(), text.len() + policy.len(), "no allow list in {text}");
    std::fs::write(file, changed).unwrap();
}

/// The node-agent, in a mount namespace in which resolvers ask this server.
fn start_with_dns(cluster: &Cluster, server: IpAddr) -> Process {
    let node = &cluster.nodes[0];
    std::fs::write(node.dir.join("resolv.conf"), format!("nameserver {server}\n")).unwrap();
    std::fs::write(node.dir.join("nsswitch.conf"), "hosts: files dns\n").unwrap();
    let script = "mount --bind resolv.conf /etc/resolv.conf && mount --bind nsswitch.conf /etc/nsswitch.conf && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(binary("node-agent"));
    command.args(["--config", "node.yaml", "run"]).current_dir(&node.dir);
    Process::start("n1", &mut command, &node.dir.join("log")).unwrap()
}

async fn refused(door: &Door, target: &str, rule: &str) {
    match door.connect(target).await.unwrap() {
        Ok(_) => panic!("{}: {target} is reached", door.name()),
        Err(Refused { status, reason }) => {
            assert_eq!(status, 403, "{}: {target}: {reason}", door.name());
            assert!(reason.contains(&format!("(rule {rule})")), "{}: {target}: {reason}", door.name());
        }
    }
}

async fn refuses_what_no_rule_names(kind: Kind) {
    let site = Site::start(kind, "").await;
    site.refuses(&site.table()).await;
    site.allows().await;
}

#[tokio::test]
async fn a_dialled_node_refuses_what_no_rule_names() {
    refuses_what_no_rule_names(Kind::Dialled).await;
}

#[tokio::test]
async fn a_node_that_calls_home_refuses_what_no_rule_names() {
    refuses_what_no_rule_names(Kind::CallHome).await;
}

#[tokio::test]
async fn a_plain_sshd_refuses_what_no_rule_names() {
    let site = Site::start(Kind::Sshd, "").await;
    let dials = async |door: &str| {
        let prefix =
            format!("master_agent_dials_total{{egress=\"{door}\",result=\"policy\",fault=\"policy\"}}");
        site.cluster.metric(site.cluster.admin, &prefix).await.unwrap_or(0.0)
    };
    let table = site.table();
    for door in site.cluster.doors() {
        for (target, _) in &table {
            refused(&door, target, "sshd").await;
        }
        let mut stream = door.stream(&format!("n1:{}", site.port)).await.unwrap();
        assert_eq!(greeting(&mut stream).await, "allowed");
    }
    for door in ["connect-unix", "connect-tls"] {
        assert_eq!(dials(door).await, table.len() as f64, "{door}");
    }
    for (target, _) in &table {
        // The node's name stands for its first address there.
        let target = target.parse::<Target>().unwrap().to_string();
        site.cluster.master.says(&[&target, "(rule sshd)"]).await;
    }
    assert_eq!(site.forbidden.count(), 0);
}

#[tokio::test]
async fn ranges_stay_closed_under_rules_for_all_addresses() {
    let policy =
        "{name: all-v4, to: '0.0.0.0/0', ports: '1-65535'}, {name: all-v6, to: '::/0', ports: '1-65535'}, ";
    let site = Site::start(Kind::Dialled, policy).await;
    site.refuses(&site.closed_ranges()).await;
    site.allows().await;
}

#[tokio::test]
async fn spellings_that_some_resolvers_take_for_addresses_are_no_targets() {
    let site = Site::start(Kind::Dialled, "").await;
    let other = site.other;
    for host in [
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "017700000001",
        "0177.0.0.1",
        "127.0.0.1.",
        "[fe80::1%lo]",
        "[fe80::1%25lo]",
        "[::1%1]",
        "[127.0.0.1]",
        "::1",
    ] {
        for door in site.cluster.doors() {
            let Err(answer) = door.connect(&format!("{host}:{other}")).await.unwrap() else {
                panic!("{host} is reached");
            };
            assert_eq!(answer.status, 400, "{host}: {}", answer.reason);
        }
    }
    assert_eq!(site.forbidden.count(), 0);
    site.allows().await;
}

#[tokio::test]
async fn a_person_is_refused_as_the_master_is() {
    let site = Site::start(Kind::Dialled, "").await;
    let alice = Person::certified(&site.cluster, "alice", "").unwrap();
    let (port, other) = (site.port, site.other);
    let table = [
        (format!("{METADATA}:80"), "link-local"),
        (format!("[::ffff:{METADATA}]:80"), "link-local"),
        ("[fe80::1]:80".to_owned(), "link-local"),
        ("metadata.test:80".to_owned(), "link-local"),
        ("mapped.test:80".to_owned(), "link-local"),
        (format!("127.0.0.1:{other}"), "loopback"),
        (format!("[::1]:{other}"), "loopback"),
        (format!("[::ffff:127.0.0.1]:{other}"), "loopback"),
        (format!("n1:{other}"), "loopback"),
        (format!("localhost:{other}"), "loopback"),
        (format!("forbidden.test:{port}"), "loopback"),
        (format!("0.0.0.0:{other}"), "unspecified"),
        (format!("{OUTSIDE}:80"), "default-deny"),
        (format!("{OWN}:22"), "default-deny"),
        (format!("far.test:{port}"), "default-deny"),
    ];
    let mut expected = site.all_refusals().await;
    for (target, rule) in &table {
        let outcome = alice.ssh(&["-W", target, "node"], b"").await.unwrap();
        assert_eq!((outcome.code, outcome.stdout.len()), (Some(255), 0), "{target}: {outcome:?}");
        let reason = format!("administratively prohibited: refused by node policy (rule {rule}): ");
        assert!(outcome.stderr.contains(&reason), "{target}: no {reason:?} in {outcome:?}");
        *expected.get_mut(rule).unwrap() += 1.0;
    }
    assert_eq!(site.all_refusals().await, expected);
    site.logged(&table).await;

    for host in ["127.1", "2130706433", "0x7f000001", "0177.0.0.1"] {
        let outcome = alice.ssh(&["-W", &format!("{host}:{other}"), "node"], b"").await.unwrap();
        assert_eq!((outcome.code, outcome.stdout.len()), (Some(255), 0), "{host}: {outcome:?}");
        assert!(outcome.stderr.contains("administratively prohibited"), "{host}: {outcome:?}");
    }
    assert_eq!(site.forbidden.count(), 0);
    let outcome = alice.ssh(&["-W", &format!("fine.test:{port}"), "node"], b"").await.unwrap();
    assert_eq!(outcome.stdout, b"allowed", "{outcome:?}");
}

/// How dials of a name ended whose answers differ.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    reached: usize,
    refused: usize,
}

impl Tally {
    async fn take(&mut self, answer: anyhow::Result<Result<tests::client::Stream, Refused>>) {
        match answer.unwrap() {
            Ok(mut stream) => {
                assert_eq!(greeting(&mut stream).await, "allowed");
                self.reached += 1;
            }
            Err(Refused { status, reason }) => {
                assert_eq!(status, 403, "{reason}");
                assert!(reason.contains("(rule loopback)"), "{reason}");
                self.refused += 1;
            }
        }
    }
}

/// One after the other, then twenty at a time, at both doors.
async fn dial_often(site: &Site, target: &str) -> Tally {
    let mut tally = Tally::default();
    for _ in 0..100 {
        for door in site.cluster.doors() {
            tally.take(door.connect(target).await).await;
        }
    }
    for _ in 0..5 {
        let mut dials = JoinSet::new();
        for door in site.cluster.doors().into_iter().cycle().take(20) {
            let target = target.to_owned();
            dials.spawn(async move { door.connect(&target).await });
        }
        while let Some(answer) = dials.join_next().await {
            tally.take(answer.unwrap()).await;
        }
    }
    tally
}

/// A node that resolved a name again between check and dial would go to the forbidden address, since answers
/// take turns.
async fn a_name_is_resolved_once(kind: Kind) {
    let site = Site::start(kind, "").await;
    let dns = site.dns.as_ref().unwrap();
    let port = site.port;
    let loopback = site.refusals("loopback").await;

    let tally = dial_often(&site, &format!("rebound.test:{port}")).await;
    println!("{tally:?}, {} queries", dns.asked("rebound.test"));
    assert_eq!(tally.reached + tally.refused, 300);
    assert!(tally.reached > 0 && tally.refused > 0, "{tally:?}");
    assert_eq!((site.forbidden.count(), site.allowed.count()), (0, tally.reached));
    assert_eq!(site.refusals("loopback").await - loopback, tally.refused as f64);
    // A resolver repeats a query that was not answered in seconds, so this is not exact.
    assert!((300..450).contains(&dns.asked("rebound.test")), "{} queries", dns.asked("rebound.test"));

    // An answer with both addresses leads to the allowed one, whichever comes first.
    let before = site.allowed.count();
    let tally = dial_often(&site, &format!("mixed.test:{port}")).await;
    assert_eq!(tally, Tally { reached: 300, refused: 0 });
    assert_eq!((site.forbidden.count(), site.allowed.count()), (0, before + 300));

    // A name that does not exist is the node's to report.
    let refused = site.cluster.unix.connect(&format!("missing.test:{port}")).await.unwrap().err().unwrap();
    assert_eq!((refused.status, refused.reason.as_str()), (502, "lookup missing.test: no such host"));

    // The node's own name is not asked for.
    let mut stream = site.cluster.unix.stream(&format!("n1:{port}")).await.unwrap();
    assert_eq!((greeting(&mut stream).await.as_str(), dns.asked("n1")), ("allowed", 0));
    assert_eq!(site.forbidden.count(), 0);
}

#[tokio::test]
async fn a_dialled_node_resolves_a_name_once() {
    a_name_is_resolved_once(Kind::Dialled).await;
}

#[tokio::test]
async fn a_node_that_calls_home_resolves_a_name_once() {
    a_name_is_resolved_once(Kind::CallHome).await;
}

#[tokio::test]
async fn a_persons_forward_to_a_name_resolves_it_once() {
    let site = Site::start(Kind::Dialled, "").await;
    let alice = Person::certified(&site.cluster, "alice", "").unwrap();
    let local = free_port();
    let forward = format!("{local}:rebound.test:{}", site.port);
    let mut client = alice.start("forward", &["-N", "-L", &forward, "node"]).unwrap();
    // The first connection shows that ssh listens, and is a dial like the others.
    let mut waiting = Some(
        eventually("ssh listens", SOON, async || {
            assert!(client.is_running(), "{}", client.log_text());
            TcpStream::connect(("127.0.0.1", local)).await.ok()
        })
        .await,
    );
    let mut tally = Tally::default();
    for _ in 0..200 {
        let mut stream = match waiting.take() {
            Some(stream) => stream,
            None => TcpStream::connect(("127.0.0.1", local)).await.unwrap(),
        };
        match greeting(&mut stream).await.as_str() {
            "allowed" => tally.reached += 1,
            "" => tally.refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(tally.reached > 0 && tally.refused > 0, "{tally:?}");
    assert_eq!((site.forbidden.count(), site.allowed.count()), (0, tally.reached));
    assert_eq!(site.refusals("loopback").await, tally.refused as f64);
    assert!(client.is_running(), "{}", client.log_text());
}

#[tokio::test]
async fn where_the_allowed_address_refuses_the_forbidden_one_is_not_tried() {
    let (port, forbidden) = (free_port(), Greeter::default());
    forbidden.listen(FORBIDDEN, port, "forbidden").await;
    forbidden.prove(FORBIDDEN, port).await;
    let mut cluster = Cluster::start(Options {
        nodes: vec![("n1".to_owned(), Kind::Dialled)],
        ports: vec![port],
        inventory: "default_route: true".to_owned(),
        nodes_down: true,
        ..Options::default()
    })
    .await
    .unwrap();
    let dns = Server::start(zone()).await.unwrap();
    cluster.nodes[0].process = Some(start_with_dns(&cluster, dns.address.ip()));
    cluster.wait_connected().await;
    for _ in 0..20 {
        for door in cluster.doors() {
            let Err(answer) = door.connect(&format!("mixed.test:{port}")).await.unwrap() else {
                panic!("something answered");
            };
            assert_eq!(answer.status, 502, "{}", answer.reason);
            assert!(answer.reason.contains("connection refused"), "{}", answer.reason);
        }
    }
    assert!(dns.asked("mixed.test") >= 40);
    assert_eq!(forbidden.count(), 0);
}
