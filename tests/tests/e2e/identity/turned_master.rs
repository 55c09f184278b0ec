//! A hostile master that holds all of its keys cannot widen what a node allows, even if the node's addresses are in its
//! certificate alone.

use std::{net::SocketAddr, path::Path};

use proto::{
    DialError,
    mux::{Version, frame::Frame, window},
};
use russh::keys::{Certificate, PrivateKey};
use tests::{
    client::Refused,
    cluster::{Cluster, Kind, Options, SOON, binary},
    load::completes,
    netns::Namespace,
    openssh::run,
    process::{Process, eventually, free_port},
    rogue::{self, Identity, certificate_file, certify},
    rogue_frames::{decoder, encode},
};
use tokio::net::TcpStream;

const KUBELET: u16 = 10250;
/// In the node's certificate, and on none of its interfaces.
const ELSEWHERE: &str = "198.51.100.7";
const METADATA: &str = "169.254.169.254";

/// For each answer, the rule that refused the target.
fn rules(answers: &[Result<(), DialError>]) -> Vec<&str> {
    answers
        .iter()
        .map(|answer| match answer {
            Err(DialError::Policy { rule, .. }) => rule.as_str(),
            Err(_) => "dialled",
            Ok(()) => "reached",
        })
        .collect()
}

/// A node on a host of its own, with a kubelet's port on all of the host's addresses.
struct Site {
    cluster: Cluster,
    _kubelet: Process,
    namespace: Namespace,
    node: SocketAddr,
}

impl Site {
    async fn start() -> Self {
        let namespace = Namespace::new().unwrap();
        let node = SocketAddr::from((namespace.inside, free_port()));
        let options = Options {
            nodes: vec![("n1".to_owned(), Kind::Dialled)],
            node_ports: vec![node.port()],
            node_config: "# addresses: those of the certificate".to_owned(),
            nodes_down: true,
            ..Options::default()
        };
        let mut cluster = Cluster::start(options).await.unwrap();
        let inventory = format!(
            "nodes:\n  - {{name: n1, dial: '{node}', addresses: [{}, {ELSEWHERE}], default_route: true}}\n",
            node.ip()
        );
        std::fs::write(cluster.path().join("inventory.yaml"), inventory).unwrap();
        cluster.restart_master().unwrap();
        eventually("the master-agent runs", SOON, async || cluster.node_status("n1").ok()).await;
        // The node has joined as the support's inventory has it; it joins again, as this one does.
        let file = cluster.nodes[0].dir.join("node.yaml");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace("\nlisten: '127.0.0.1:", "\nlisten: '0.0.0.0:")).unwrap();
        let line = cluster.command(&["token", "create", "--node", "n1"]).unwrap();
        cluster.node_command(0, line.trim()).unwrap();
        let mut command = namespace.command(env!("CARGO_BIN_EXE_target"));
        command.arg(format!("0.0.0.0:{KUBELET}"));
        let kubelet = Process::start("target", &mut command, &cluster.path().join("target.log")).unwrap();
        let dir = cluster.nodes[0].dir.clone();
        let mut command = namespace.command(binary("node-agent"));
        command.arg("--config").arg(file).arg("run").current_dir(&dir);
        cluster.nodes[0].process = Some(Process::start("n1", &mut command, &dir.join("log")).unwrap());
        cluster.wait_connected().await;
        Self { cluster, _kubelet: kubelet, namespace, node }
    }

    /// Whether the kubelet's port is reached at an address; else why not.
    async fn reached(&self, address: &str) -> Result<(), String> {
        match self.cluster.unix.connect(&format!("{address}:{KUBELET}")).await.unwrap() {
            Ok(_) => Ok(()),
            Err(Refused { reason, .. }) => Err(reason),
        }
    }

    fn ip(&self, args: &[&str]) {
        run(self.namespace.command("ip").args(args)).unwrap();
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.cluster.path().join(name)
    }

    fn log(&self) -> String {
        self.cluster.nodes[0].process.as_ref().unwrap().log_text()
    }

    fn certificate(&self) -> Certificate {
        Certificate::read_file(&self.cluster.nodes[0].dir.join("state/host_key-cert.pub")).unwrap()
    }

    /// A certificate of the node's own key by its own host CA, as only a master can make it.
    fn forge(&self, principals: &str, valid: &str) -> String {
        let file = self.file("forged");
        let key = PrivateKey::read_openssh_file(self.cluster.nodes[0].dir.join("state/host_key")).unwrap();
        std::fs::write(file.with_extension("pub"), key.public_key().to_openssh().unwrap()).unwrap();
        let args = ["-h", "-I", "node:n1", "-n", principals, "-V", valid];
        certify(&file, &self.file("master/host_ca"), &args).unwrap();
        std::fs::read_to_string(certificate_file(&file)).unwrap().trim().to_owned()
    }
}

/// Sends frames to a node as its master, then asks for targets; gives an error for each that the node refuses.
async fn attack(
    node: SocketAddr,
    identity: &Identity,
    certificates: &[String],
    targets: &[String],
) -> Vec<Result<(), DialError>> {
    let link = TcpStream::connect(node).await.unwrap();
    let (session, accepted) = rogue::authenticate(link, identity, "master-agent", 1 << 20).await.unwrap();
    assert!(accepted);
    let (mut read, write) = session.channel_open_session().await.unwrap().split();
    write.request_subsystem(true, Version::V1.subsystem()).await.unwrap();
    for text in certificates {
        write.data_bytes(encode(&Frame::Certificate { text: text.clone() })).await.unwrap();
    }
    let mut answers: Vec<Option<Result<(), DialError>>> = vec![None; targets.len()];
    let mut decoder = decoder();
    for (stream, target) in (1..).zip(targets) {
        let (target, origin, limit) = (target.clone(), "turned".to_owned(), window::INITIAL.into());
        let open = Frame::Open { stream, timeout_ms: 2_000, limit, target, origin };
        write.data_bytes(encode(&open)).await.unwrap();
    }
    while answers.iter().any(Option::is_none) {
        let message = completes("answers", read.wait()).await.expect("the session has ended");
        let russh::ChannelMsg::Data { data } = message else { continue };
        let mut bytes = &data[..];
        while let Some(frame) = decoder.decode(&mut bytes).unwrap() {
            match frame {
                Frame::Opened { stream, .. } => answers[stream as usize - 1] = Some(Ok(())),
                Frame::Refused { stream, error } => answers[stream as usize - 1] = Some(Err(error)),
                _ => {}
            }
        }
    }
    answers.into_iter().flatten().collect()
}

fn master(directory: &Path) -> Identity {
    let args = [
        "-I",
        "turned",
        "-n",
        "master-agent",
        "-V",
        "-1h:+1d",
        "-O",
        "clear",
        "-O",
        "permit-port-forwarding",
    ];
    Identity::certified(&directory.join("turned"), &directory.join("master/user_ca"), &args).unwrap()
}

/// An address of the certificate is the node's while an interface of its host has it: it needs no restart to come or go.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn addresses_of_the_certificate_count_while_the_host_has_them() {
    let site = Site::start().await;
    let own = site.node.ip().to_string();
    eventually("the kubelet's port is reached", SOON, async || site.reached(&own).await.ok()).await;
    site.reached("n1").await.unwrap();
    let refused = site.reached(ELSEWHERE).await.unwrap_err();
    assert!(refused.contains("(rule default-deny)") && refused.contains("`addresses:`"), "{refused}");
    let with_prefix = format!("{ELSEWHERE}/32");
    site.ip(&["address", "add", &with_prefix, "dev", "lo"]);
    site.reached(ELSEWHERE).await.unwrap();
    site.ip(&["address", "delete", &with_prefix, "dev", "lo"]);
    assert!(site.reached(ELSEWHERE).await.is_err());
    // This address is on an interface, and in no certificate.
    site.ip(&["address", "add", "198.51.100.8/32", "dev", "lo"]);
    assert!(site.reached("198.51.100.8").await.unwrap_err().contains("(rule default-deny)"));
    site.reached(&own).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_hostile_master_can_not_widen_a_nodes_addresses() {
    let site = Site::start().await;
    let own = site.node.ip().to_string();
    eventually("the kubelet's port is reached", SOON, async || site.reached(&own).await.ok()).await;
    // Both are the host's, so that nothing but the certificate keeps them closed.
    site.ip(&["address", "add", &format!("{METADATA}/32"), "dev", "lo"]);
    site.ip(&["address", "add", "198.51.100.8/32", "dev", "lo"]);
    let before = site.certificate();
    let principals = before.valid_principals().join(",");
    let added = [METADATA, "127.0.0.1", "198.51.100.8", "203.0.113.9", "n2", "kubernetes.default.svc"];
    let mut forged: Vec<String> =
        added.iter().map(|more| site.forge(&format!("{principals},{more}"), "-1h:+60d")).collect();
    forged.push(site.forge(&format!("n1,{METADATA}"), "-1h:+60d"));
    forged.push(site.forge("n1,198.51.100.8", "-1h:+60d"));
    let hosts = [METADATA, "127.0.0.1", "198.51.100.8", "203.0.113.9", "::ffff:169.254.169.254", "n1"];
    let targets = hosts.map(|host| match host.contains(':') {
        true => format!("[{host}]:{KUBELET}"),
        false => format!("{host}:{KUBELET}"),
    });
    let closed = ["link-local", "loopback", "default-deny", "default-deny", "link-local", "reached"];
    let answers = attack(site.node, &master(site.cluster.path()), &forged, &targets).await;
    assert_eq!(rules(&answers), closed, "{answers:?}");
    // Certificates are taken one after the other, and each is written before the next.
    eventually("every certificate is refused", SOON, async || {
        let refused = site.log().matches("refused a renewed host certificate").count();
        (refused == forged.len()).then_some(())
    })
    .await;
    let answers = attack(site.node, &master_again(&site), &[], &targets).await;
    assert_eq!(rules(&answers), closed, "once all are refused: {answers:?}");
    assert_eq!(site.certificate(), before, "the present certificate stays");
    let log = site.log();
    for more in added {
        assert!(
            log.contains(&format!("it adds the principal \\\"{more}\\\""))
                || log.contains(&format!("it adds the principal \"{more}\"")),
            "{more}: {log}"
        );
    }

    // A renewal with fewer addresses is taken, and what it leaves out does not come back.
    let fewer = [site.forge(&format!("n1,{own}"), "-1h:+60d"), site.forge(&principals, "-1h:+90d")];
    let answers = attack(site.node, &master_again(&site), &fewer, &[format!("{own}:{KUBELET}")]).await;
    assert_eq!(answers, [Ok(())]);
    let refused = forged.len() + 1;
    eventually("the second is refused", SOON, async || {
        (site.log().matches("refused a renewed host certificate").count() == refused).then_some(())
    })
    .await;
    assert_eq!(site.certificate().valid_principals(), ["n1".to_owned(), own]);
}

fn master_again(site: &Site) -> Identity {
    Identity::read(&site.file("turned")).unwrap()
}
