//! Certificates of masters and people end by time or because they are revoked, and open nothing afterwards.

use std::{
    net::SocketAddr,
    path::Path,
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use proto::{
    DialError,
    mux::{
        Version,
        frame::{Decoder, Frame},
        window,
    },
    relink::GRACE,
    revocation::{
        self, MAX_LIST, Report, SignedList,
        krl::{Entry, Krl},
    },
};
use russh::{
    ChannelMsg,
    keys::{PrivateKey, PublicKey},
};
use tests::{
    cluster::{Cluster, Kind, Options, SOON},
    load::completes,
    openssh,
    person::Person,
    process::{Process, eventually},
    rogue::{self, Identity, MasterSession},
    rogue_frames::{data, decoder, encode, reset},
    steady::Echo,
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A revocation takes effect everywhere within this time.
const CUT: Duration = Duration::from_secs(5);

fn options(nodes: &[(&str, Kind)], port: u16, master_config: &str) -> Options {
    let nodes = nodes.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect();
    Options { nodes, ports: vec![port], master_config: master_config.to_owned(), ..Options::default() }
}

fn agent(cluster: &Cluster, node: usize) -> &Process {
    cluster.nodes[node].process.as_ref().unwrap()
}

fn log(cluster: &Cluster, node: usize) -> String {
    agent(cluster, node).log_text()
}

/// What a node logs when a master has authenticated.
const AUTHENTICATED: [&str; 3] = ["authenticated", "user=\"master-agent\"", "serial="];

/// The serial numbers with which masters authenticated at a node, in order.
fn serials(log: &str) -> Vec<String> {
    let lines = log.lines().filter(|line| AUTHENTICATED.iter().all(|word| line.contains(word)));
    let serial = |l: &str| Some(l.split_once("serial=")?.1.split(' ').next()?.to_owned());
    lines.filter_map(serial).collect()
}

/// A key of a hostile master, with a certificate of the cluster's user CA.
fn hostile(cluster: &Cluster, name: &str, serial: &str, validity: &str) -> Identity {
    let args = ["-I", name, "-n", "master-agent", "-z", serial, "-V", validity];
    Identity::certified(&cluster.path().join(name), &cluster.path().join("master/user_ca"), &args).unwrap()
}

/// A hostile master's session with a node, and the multiplexer on it.
struct Rogue {
    session: MasterSession,
    channel: russh::Channel<russh::client::Msg>,
    decoder: Decoder,
}

/// An answer to OPEN, or data.
#[derive(Debug, PartialEq)]
enum Answer {
    Opened,
    Refused(DialError),
    Data(Vec<u8>),
}

async fn authenticate(cluster: &Cluster, node: usize, identity: &Identity) -> Option<MasterSession> {
    let address = SocketAddr::from(([127, 0, 0, 1], cluster.nodes[node].port));
    let link = TcpStream::connect(address).await.unwrap();
    match completes("a handshake", rogue::authenticate(link, identity, "master-agent", 1 << 24)).await {
        Ok((session, true)) => Some(session),
        Ok((_, false)) | Err(_) => None,
    }
}

impl Rogue {
    async fn start(cluster: &Cluster, node: usize, identity: &Identity) -> Self {
        let session = authenticate(cluster, node, identity).await.unwrap();
        let mut channel = session.channel_open_session().await.unwrap();
        channel.request_subsystem(true, Version::V1.subsystem()).await.unwrap();
        while !matches!(channel.wait().await.unwrap(), ChannelMsg::Success) {}
        Self { session, channel, decoder: decoder() }
    }

    async fn send(&self, frame: Frame<'_>) {
        self.channel.data_bytes(encode(&frame)).await.unwrap();
    }

    /// The next answer on a stream; `None` when the session has ended.
    async fn answer(&mut self, stream: u64) -> Option<Answer> {
        loop {
            let message = completes("an answer", self.channel.wait()).await?;
            let ChannelMsg::Data { data } = message else { continue };
            let mut bytes = &data[..];
            while let Some(frame) = self.decoder.decode(&mut bytes).unwrap() {
                match frame {
                    Frame::Opened { stream: of, .. } if of == stream => return Some(Answer::Opened),
                    Frame::Refused { stream: of, error } if of == stream => {
                        return Some(Answer::Refused(error));
                    }
                    Frame::Data { stream: of, bytes, .. } if of == stream => {
                        return Some(Answer::Data(bytes.to_vec()));
                    }
                    _ => {}
                }
            }
        }
    }

    async fn open(&mut self, stream: u64, target: &str) -> Answer {
        let (target, origin, limit) = (target.to_owned(), "rogue".to_owned(), window::INITIAL.into());
        self.send(Frame::Open { stream, timeout_ms: 5000, limit, target, origin }).await;
        self.answer(stream).await.unwrap()
    }

    /// Opens a stream that echoes.
    async fn echo(&mut self, stream: u64, target: &str) {
        assert_eq!(self.open(stream, target).await, Answer::Opened);
        self.send(data(stream, b"echo\n")).await;
        self.says(stream, b"hello").await;
    }

    async fn says(&mut self, stream: u64, words: &[u8]) {
        self.send(data(stream, words)).await;
        assert_eq!(self.answer(stream).await, Some(Answer::Data(words.to_vec())));
    }

    async fn ended(mut self) {
        while self.channel.wait().await.is_some() {}
        drop(self.session);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_are_renewed_before_the_masters_certificate_ends_and_no_dial_fails() {
    let port = target::start().await;
    let nodes = [("n1", Kind::Dialled), ("n2", Kind::CallHome)];
    let cluster = Cluster::start(options(&nodes, port, "certificates: {user_ttl: 6s}")).await.unwrap();
    let targets = ["n1", "n2"].map(|node| format!("{node}:{port}"));
    let mut old = Vec::new();
    for target in &targets {
        old.push(Echo::open(&cluster.unix, target).await.unwrap());
    }
    let begun = SystemTime::now();
    let mut first = Vec::new();
    for node in [0, 1] {
        first.push(serials(&agent(&cluster, node).says(&AUTHENTICATED).await)[0].clone());
    }
    let mut dials = 0;
    let renewed = async {
        // So long that the first certificates are no good any more, and through several renewals of each node.
        while begun.elapsed().unwrap() < Duration::from_secs(6) + 2 * GRACE
            || [0, 1].iter().any(|node| serials(&log(&cluster, *node)).len() < 4)
        {
            for target in &targets {
                let dialled = cluster.unix.connect(target).await.unwrap();
                assert!(dialled.is_ok(), "dial {dials}: {:?}\n{}", dialled.err(), cluster.master.log_text());
                dials += 1;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(120), renewed).await.unwrap();
    println!("{dials} dials");
    for echo in &mut old {
        echo.say().await.unwrap();
    }
    for (node, first) in [0, 1].into_iter().zip(first) {
        let log = log(&cluster, node);
        assert!(!serials(&log)[1..].contains(&first), "{log}");
        assert!(log.contains("key_id=\"master-agent:"), "the log says which master it is\n{log}");
        assert!(!log.contains("WARN"), "{log}");
    }
    // The first links are still there for the first streams; without these, only what is in use is left.
    drop(old);
    for node in ["n1", "n2"] {
        eventually("links that were replaced have ended", SOON, async || {
            let status = cluster.node_status(node).ok()?;
            (status["tunnels"].as_array()?.len() <= 2).then_some(())
        })
        .await;
        assert_eq!(cluster.node_status(node).unwrap()["totals"]["lost"], 0, "{}", cluster.master.log_text());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_master_opens_nothing_after_its_certificates_end() {
    let port = target::start().await;
    let cluster = Cluster::start(options(&[("n1", Kind::Dialled)], port, "")).await.unwrap();
    let mut honest = Echo::open(&cluster.unix, &format!("n1:{port}")).await.unwrap();
    let identity = hostile(&cluster, "late", "77", "-1m:+6s");
    let end = identity.certificate.as_ref().unwrap().valid_before_time().unwrap();
    let target = format!("127.0.0.1:{port}");
    let mut rogue = Rogue::start(&cluster, 0, &identity).await;
    let held = direct(&rogue.session, port).await.unwrap();
    rogue.echo(1, &target).await;
    let mut stream = 2;
    let refused = async {
        while rogue.open(stream, &target).await == Answer::Opened {
            rogue.send(reset(stream, "done")).await;
            stream += 1;
        }
    };
    completes("streams are refused", refused).await;
    assert!(SystemTime::now() >= end, "refused before its time");
    for stream in stream + 1..stream + 4 {
        let answer = rogue.open(stream, &target).await;
        assert!(matches!(&answer, Answer::Refused(DialError::TunnelLost { .. })), "{answer:?}");
        assert!(direct(&rogue.session, port).await.is_err());
    }
    rogue.says(1, b"streams that run go on").await;
    agent(&cluster, 0).says(&["key_id=\"late\"", "serial=77"]).await;
    assert!(authenticate(&cluster, 0, &identity).await.is_none(), "no new session with it");
    held.close().await.unwrap();
    rogue.send(reset(1, "done")).await;
    completes("the session ends with its last stream", rogue.ended()).await;
    honest.say().await.unwrap();
}

/// A stream as stock ssh opens it.
async fn direct(
    session: &MasterSession,
    port: u16,
) -> Result<russh::Channel<russh::client::Msg>, russh::Error> {
    let opened = session.channel_open_direct_tcpip("127.0.0.1", u32::from(port), "127.0.0.1", 1);
    completes("a channel", opened).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_its_master_does_not_replace_is_closed_and_can_be_made_again() {
    let port = target::start().await;
    let mut options = options(&[("n1", Kind::Dialled)], port, "");
    options.node_config = "shutdown_grace: 1s".to_owned();
    let cluster = Cluster::start(options).await.unwrap();
    let identity = hostile(&cluster, "old", "78", "-1m:+4s");
    // An agent that knows nothing of all this, and waits for its session to end before it makes another.
    let mut old = Rogue::start(&cluster, 0, &identity).await;
    old.echo(1, &format!("127.0.0.1:{port}")).await;
    completes("the session ends, with the stream", old.ended()).await;
    assert!(SystemTime::now() >= identity.certificate.unwrap().valid_before_time().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_master_is_cut_on_every_node_that_is_connected_to_any_master() {
    let port = target::start().await;
    let nodes = [("n1", Kind::Dialled), ("n2", Kind::Dialled), ("n3", Kind::CallHome)];
    let cluster = Cluster::start(options(&nodes, port, "")).await.unwrap();
    let mut honest = Vec::new();
    for (name, _) in nodes {
        honest.push(Echo::open(&cluster.unix, &format!("{name}:{port}")).await.unwrap());
    }
    let identity = hostile(&cluster, "turned", "4711", "-1m:+1d");
    let spared = hostile(&cluster, "spared", "4712", "-1m:+1d");
    let (mut rogues, mut others) = (Vec::new(), Vec::new());
    for node in [0, 1] {
        let target = format!("127.0.0.{}:{port}", node + 1);
        for (list, identity) in [(&mut rogues, &identity), (&mut others, &spared)] {
            let mut rogue = Rogue::start(&cluster, node, identity).await;
            rogue.echo(1, &target).await;
            list.push(rogue);
        }
    }
    let asked = Instant::now();
    cluster.command(&["revoke", "--serial", "4711"]).unwrap();
    for rogue in rogues {
        tokio::time::timeout(CUT.saturating_sub(asked.elapsed()), rogue.ended()).await.expect("cut in time");
    }
    for (node, rogue) in others.iter_mut().enumerate() {
        rogue.says(1, b"another master goes on").await;
        assert!(authenticate(&cluster, node, &identity).await.is_none(), "it comes back");
        agent(&cluster, node).says(&["cut a session whose certificate is revoked"]).await;
        agent(&cluster, node).says(&["it is revoked by its serial number"]).await;
    }
    agent(&cluster, 2).says(&["took a list of revoked certificates"]).await;
    for echo in &mut honest {
        echo.say().await.unwrap();
    }
    // A node that starts again has it before any master comes, and a master may be pardoned.
    cluster.command(&["revoke", "--remove", "--serial", "4711"]).unwrap();
    eventually("the pardoned master is let in", SOON, async || {
        authenticate(&cluster, 0, &identity).await.map(drop)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn this_masters_own_certificate_can_be_revoked_and_it_goes_on_with_another() {
    let port = target::start().await;
    let cluster = Cluster::start(options(&[("n1", Kind::Dialled)], port, "")).await.unwrap();
    let own = serials(&agent(&cluster, 0).says(&AUTHENTICATED).await)[0].clone();
    cluster.command(&["revoke", "--serial", &own]).unwrap();
    eventually("the master comes with another certificate", SOON, async || {
        (serials(&log(&cluster, 0)).last()? != &own).then_some(())
    })
    .await;
    eventually("streams pass again", SOON, async || {
        cluster.unix.connect(&format!("n1:{port}")).await.ok()?.ok()
    })
    .await;
}

/// A person's client that has a stream open; gives it and the local port.
async fn forwarding(person: &Person, port: u16) -> (Process, TcpStream) {
    let near = tests::process::free_port();
    let forward = format!("127.0.0.1:{near}:127.0.0.1:{port}");
    let client = person.start("forward", &["-N", "-L", &forward, "node"]).unwrap();
    let mut stream =
        eventually("the client listens", SOON, async || TcpStream::connect(("127.0.0.1", near)).await.ok())
            .await;
    stream.write_all(b"echo\nhello").await.unwrap();
    let mut heard = [0; 5];
    completes("an echo", stream.read_exact(&mut heard)).await.unwrap();
    (client, stream)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_whose_certificate_is_revoked_is_cut_and_refused() {
    let port = target::start().await;
    let cluster = Cluster::start(options(&[("n1", Kind::Dialled)], port, "")).await.unwrap();
    let alice = Person::certified(&cluster, "alice", "").unwrap();
    let bob = Person::certified(&cluster, "bob", "").unwrap();
    let (mut client, mut stream) = forwarding(&alice, port).await;
    let (mut other, mut untouched) = forwarding(&bob, port).await;
    let key = alice.key().with_extension("pub");
    let fingerprint = PublicKey::read_openssh_file(&key).unwrap().fingerprint(Default::default()).to_string();
    cluster.command(&["revoke", "--key", &fingerprint]).unwrap();
    tokio::time::timeout(CUT, async { while matches!(stream.read(&mut [0; 9]).await, Ok(1..)) {} })
        .await
        .unwrap();
    eventually("the client ends", SOON, async || (!client.is_running()).then_some(())).await;
    let again = alice.ssh(&["-W", &format!("127.0.0.1:{port}"), "node"], b"").await.unwrap();
    assert!(again.stderr.contains("Permission denied"), "{}", again.stderr);
    agent(&cluster, 0).says(&["it is revoked by its key"]).await;
    let signed = cluster.command(&["sign-user", "alice", "--key", key.to_str().unwrap()]).unwrap_err();
    assert!(signed.to_string().contains("revoked by its key"), "{signed}");
    untouched.write_all(b"x").await.unwrap();
    completes("an echo", untouched.read_exact(&mut [0; 1])).await.unwrap();
    assert!(other.is_running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_persons_session_opens_nothing_after_its_certificates_end_and_ends_with_its_last_stream() {
    let port = target::start().await;
    let cluster = Cluster::start(options(&[("n1", Kind::Dialled)], port, "")).await.unwrap();
    let carol = Person::stranger(&cluster, "carol", "").unwrap();
    carol
        .sign(&cluster.path().join("master/user_ca"), &["-I", "carol", "-n", "carol", "-V", "-1m:+6s"])
        .unwrap();
    let (mut client, mut stream) = forwarding(&carol, port).await;
    let refused = async {
        while !client.log_text().contains("the certificate of this session has expired") {
            let near = client_port(&client);
            let mut another = TcpStream::connect(near).await.unwrap();
            let _ = another.write_all(b"echo\nx").await;
            let _ = another.read(&mut [0; 1]).await;
        }
    };
    completes("a new channel is refused", refused).await;
    stream.write_all(b"world").await.unwrap();
    completes("an echo", stream.read_exact(&mut [0; 5])).await.unwrap();
    assert!(client.is_running());
    drop(stream);
    eventually("the session ends", SOON, async || (!client.is_running()).then_some(())).await;
}

/// Where a client that forwards listens.
fn client_port(client: &Process) -> SocketAddr {
    let arguments = std::fs::read_to_string(format!("/proc/{}/cmdline", client.pid())).unwrap();
    let forward = arguments.split('\0').find(|a| a.starts_with("127.0.0.1:")).unwrap();
    format!("127.0.0.1:{}", forward.split(':').nth(1).unwrap()).parse().unwrap()
}

/// Brings a node a list as a master does; gives what the node answers, or `None` if it ends the session.
async fn bring(session: &MasterSession, bytes: impl Into<Bytes>) -> Option<Report> {
    let mut channel = session.channel_open_session().await.ok()?;
    channel.request_subsystem(true, revocation::SUBSYSTEM).await.ok()?;
    let mut bytes = Some(bytes.into());
    let mut came = Vec::new();
    loop {
        let message = completes("a report", channel.wait()).await?;
        if let ChannelMsg::Data { data } = message {
            came.extend_from_slice(&data);
        }
        let Some((report, used)) = Report::decode(&came).unwrap() else { continue };
        came.drain(..used);
        match bytes.take() {
            Some(bytes) => channel.data_bytes(bytes).await.ok()?,
            None => {
                channel.close().await.ok()?;
                return Some(report);
            }
        }
    }
}

/// The list of this version that revokes the key id, signed.
fn list(ca: &PrivateKey, version: u64, key_id: &str) -> SignedList {
    let mut list = Krl::new(version);
    list.add(ca.public_key(), Entry::KeyId(key_id.as_bytes().to_vec())).unwrap();
    SignedList::sign(ca, list.encode().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_master_can_neither_forge_a_list_nor_bring_an_older_one_back() {
    let port = target::start().await;
    let mut cluster = Cluster::start(options(&[("n1", Kind::Dialled)], port, "")).await.unwrap();
    let identity = hostile(&cluster, "rogue", "5", "-1m:+1d");
    let user_ca = PrivateKey::read_openssh_file(cluster.path().join("master/user_ca")).unwrap();
    let fingerprint = user_ca.fingerprint(Default::default()).to_string();
    cluster.command(&["revoke", "--key-id", "mallory"]).unwrap();
    let held = eventually("the node has the list", SOON, async || {
        log(&cluster, 0).contains("took a list of revoked certificates").then_some(())?;
        let session = authenticate(&cluster, 0, &identity).await?;
        bring(&session, list(&user_ca, 6, "nobody").encode()).await?.held.get(&fingerprint).copied()
    })
    .await;
    assert!(held > 6);
    for start_again in [false, true] {
        if start_again {
            // Without the honest master, who would bring its own.
            cluster.master.kill();
            cluster.kill_node(0);
            cluster.start_node(0).unwrap();
            openssh::wait_for_port(cluster.nodes[0].port).unwrap();
        }
        let session = authenticate(&cluster, 0, &identity).await.unwrap();
        let refusal = async |signed: &SignedList| {
            let report = bring(&session, signed.encode()).await.unwrap();
            assert_eq!(report.held[&fingerprint], held);
            report.refused.unwrap()
        };
        let older = refusal(&list(&user_ca, held - 1, "nobody")).await;
        assert!(older.contains(&format!("this node holds version {held}")), "{older}");
        let same = refusal(&list(&user_ca, held, "nobody")).await;
        assert!(same.contains("other content"), "{same}");
        let own = refusal(&list(&identity.key, held + 1, "nobody")).await;
        assert!(own.contains("not signed by a user CA"), "{own}");
        let good = list(&user_ca, held, "mallory");
        let forged = SignedList { list: list(&user_ca, held + 1, "nobody").list, ..good };
        let forged = refusal(&forged).await;
        assert!(forged.contains("its signature is wrong"), "{forged}");
        let nonsense = SignedList::sign(&user_ca, vec![7; MAX_LIST]).unwrap();
        let nonsense = refusal(&nonsense).await;
        assert!(nonsense.contains("can't be read"), "{nonsense}");
        let too_large = [&[0, 0, 0, 0][..], &u32::MAX.to_be_bytes()].concat();
        assert_eq!(bring(&session, too_large).await, None, "who sends too much is cut off");
    }
    let state = cluster.nodes[0].dir.join("state");
    let kept = std::fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().path());
    let kept = kept.filter(|path| path.to_str().unwrap().contains("/revoked-")).collect::<Vec<_>>();
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&kept[0]).unwrap()) & 0o777;
    assert_eq!((kept.len(), mode), (1, 0o600), "{kept:?}");
    let process = cluster.nodes[0].process.as_ref().unwrap();
    assert!(!process.log_text().contains("panicked"));
}

fn keygen(args: &[&str]) -> Result<(), String> {
    openssh::run(Command::new("ssh-keygen").args(args)).map_err(|e| e.to_string())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_are_exchanged_with_openssh() {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let bad = hostile(&cluster, "bad", "1001", "-1m:+1d");
    let good = hostile(&cluster, "good", "1002", "-1m:+1d");
    let named = hostile(&cluster, "named", "1003", "-1m:+1d");
    // A list that ssh-keygen made is imported.
    let (specification, theirs) = (cluster.path().join("specification"), cluster.path().join("theirs.krl"));
    std::fs::write(&specification, "serial: 1001\nserial: 5000-6000\nid: named\n").unwrap();
    let ca = cluster.path().join("master/user_ca.pub");
    keygen(&["-q", "-k", "-s", text(&ca), "-f", text(&theirs), text(&specification)]).unwrap();
    cluster.command(&["revoke", "--import", text(&theirs)]).unwrap();
    let shown = cluster.command(&["revoke", "--list"]).unwrap();
    let rows: Vec<Vec<&str>> = shown.lines().map(|l| l.split_whitespace().collect()).collect();
    let want = [["KIND", "VALUE"], ["serial", "1001"], ["serial", "5000-6000"], ["key-id", "named"]];
    assert_eq!(rows, want, "{shown}");
    // ssh-keygen understands and verifies the exported list.
    let ours = cluster.path().join("ours.krl");
    cluster.command(&["revoke", "--export", text(&ours)]).unwrap();
    for (identity, revoked) in [(&bad, true), (&good, false), (&named, true)] {
        let certificate = rogue::certificate_file(&identity.file);
        let query = keygen(&["-Q", "-f", text(&ours), text(&certificate)]);
        assert_eq!(query.is_err(), revoked, "{query:?}");
    }
    let allowed = cluster.path().join("allowed");
    std::fs::write(&allowed, format!("user-ca {}", std::fs::read_to_string(&ca).unwrap())).unwrap();
    let mut verify = Command::new("ssh-keygen");
    verify.args(["-Y", "verify", "-I", "user-ca", "-n", revocation::NAMESPACE, "-f"]).arg(&allowed);
    verify.arg("-s").arg(cluster.path().join("ours.krl.sig")).stdin(std::fs::File::open(&ours).unwrap());
    openssh::run(&mut verify).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_sshd_refuses_what_was_revoked_when_its_configuration_was_made() {
    let port = target::start().await;
    let mut options = options(&[("n1", Kind::Sshd)], port, "");
    options.nodes_down = true;
    let mut cluster = Cluster::start(options).await.unwrap();
    let bad = hostile(&cluster, "bad", "1001", "-1m:+1d");
    let good = hostile(&cluster, "good", "1002", "-1m:+1d");
    cluster.command(&["revoke", "--serial", "1001"]).unwrap();
    cluster.start_node(0).unwrap();
    cluster.wait_connected().await;
    assert!(authenticate(&cluster, 0, &good).await.is_some());
    assert!(authenticate(&cluster, 0, &bad).await.is_none());
}
