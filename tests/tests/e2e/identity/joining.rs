//! Joining is secure: names, tokens and keys stay with those who own them, and secrets stay secret.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use proto::join::SUBSYSTEM;
use russh::{
    Channel, ChannelMsg, client,
    keys::{Certificate, PrivateKey, PublicKeyOrCertificate},
    server,
};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tests::{
    client::echo,
    cluster::{Cluster, Kind, Options, SOON, binary},
    openssh,
    process::{Process, eventually, free_port},
    target,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
};

/// How long the tests wait: longer than certificates live here.
pub(super) const PATIENCE: Duration = Duration::from_secs(90);

pub(super) fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// A master without any node that has joined; `n0` is there since an inventory has to list something.
pub(super) async fn master(config: &str) -> Cluster {
    let nodes = vec![("n0".to_owned(), Kind::CallHome)];
    let master_config = config.to_owned();
    Cluster::start(Options { nodes, master_config, nodes_down: true, ..Options::default() }).await.unwrap()
}

/// Puts nodes into the inventory: names, and where to dial them.
pub(super) async fn list(cluster: &Cluster, nodes: &[(&str, Option<SocketAddr>)]) {
    let mut text = "nodes:\n".to_owned();
    for (i, (name, dial)) in nodes.iter().enumerate() {
        let dial = dial.map_or_else(String::new, |address| format!(", dial: '{address}'"));
        writeln!(text, "  - {{name: {name}, addresses: [127.0.0.{}]{dial}}}", i + 1).unwrap();
    }
    std::fs::write(cluster.path().join("inventory.yaml"), text).unwrap();
    cluster.master.signal("HUP");
    eventually("the inventory is read again", SOON, async || {
        nodes.iter().all(|(name, _)| cluster.node_status(name).is_ok()).then_some(())
    })
    .await;
}

pub(super) struct Ran {
    pub(super) code: Option<i32>,
    pub(super) out: String,
    pub(super) err: String,
}

impl Ran {
    pub(super) fn refused(&self, parts: &[&str]) {
        assert_eq!((self.code, self.out.as_str()), (Some(1), ""), "{}", self.err);
        for part in parts {
            assert!(self.err.contains(part), "no {part:?} in {:?}", self.err);
        }
    }

    pub(super) fn joined(&self, node: &str) {
        assert_eq!(self.code, Some(0), "{}", self.err);
        assert!(self.out.contains(&format!("joined as node {node};")), "{}", self.out);
    }
}

/// A host that nobody knows yet.
pub(super) struct Host {
    pub(super) dir: PathBuf,
    pub(super) config: PathBuf,
    pub(super) admin: SocketAddr,
    pub(super) process: Option<Process>,
}

impl Host {
    /// `link` is `listen:` or `call_home:` of its configuration.
    pub(super) fn new(cluster: &Cluster, name: &str, link: &str) -> Self {
        let dir = cluster.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let admin = local(free_port());
        let config = dir.join("node.yaml");
        let text = format!(
            "state_dir: state\nadmin: {{listen: '{admin}', socket: admin.sock}}\n{link}\npolicy: {{allow: [{{name: all, to: 127.0.0.0/8, ports: 1-65535}}]}}\n"
        );
        std::fs::write(&config, text).unwrap();
        Self { dir, config, admin, process: None }
    }

    pub(super) fn listening(cluster: &Cluster, name: &str, port: u16) -> Self {
        Self::new(cluster, name, &format!("listen: '{}'", local(port)))
    }

    pub(super) fn calling(cluster: &Cluster, name: &str, master: SocketAddr) -> Self {
        Self::new(cluster, name, &format!("call_home: ['{master}']"))
    }

    /// A `node-agent ...` line, with these further words.
    pub(super) fn command(&self, line: &str, more: &[&str]) -> Command {
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), Some("node-agent"), "{line}");
        let mut command = Command::new(binary("node-agent"));
        command
            .args(words)
            .args(more)
            .arg("--config")
            .arg(&self.config)
            .stdin(Stdio::null())
            .env_remove("NODE_AGENT_TOKEN");
        command
    }

    pub(super) fn run(mut command: Command) -> Ran {
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    pub(super) fn join(&self, line: &str, more: &[&str]) -> Ran {
        Self::run(self.command(line, more))
    }

    pub(super) fn start(&mut self) {
        let mut command = Command::new(binary("node-agent"));
        command.arg("--config").arg(&self.config).arg("run").current_dir(&self.dir);
        self.process = None;
        self.process = Some(Process::start("node-agent", &mut command, &self.log()).unwrap());
    }

    pub(super) fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    pub(super) fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    pub(super) fn state(&self, file: &str) -> PathBuf {
        self.dir.join("state").join(file)
    }
}

pub(super) fn token(cluster: &Cluster, args: &[&str]) -> String {
    cluster.command(&[&["token", "create"], args].concat()).unwrap().trim().to_owned()
}

pub(super) fn secret(line: &str) -> &str {
    line.rsplit('.').next().unwrap()
}

pub(super) fn id(line: &str) -> &str {
    line.rsplit('.').nth(1).unwrap()
}

/// Whether a token is listed as not used by anybody.
pub(super) fn is_unused(cluster: &Cluster, line: &str) -> bool {
    let all: Vec<Value> =
        serde_json::from_str(&cluster.command(&["token", "list", "-o", "json"]).unwrap()).unwrap();
    all.iter().any(|t| t["id"] == id(line) && t["used_by"].is_null())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_has_joined_is_taken_over_only_with_a_token_bound_to_it() {
    let cluster = master("").await;
    list(&cluster, &[("n1", None), ("n2", None)]).await;
    let mut first = Host::calling(&cluster, "first", cluster.call_home);
    first.join(&token(&cluster, &[]), &["--node", "n1"]).joined("n1");
    let mut second = Host::calling(&cluster, "second", cluster.call_home);
    let unbound = token(&cluster, &[]);
    second
        .join(&unbound, &["--node", "n1"])
        .refused(&["node n1 has joined before", "master-agent token create --node n1"]);
    assert!(is_unused(&cluster, &unbound));
    first.start();
    cluster.wait_state("n1", "connected").await;
    first.process = None;

    second.join(&token(&cluster, &["--node", "n1"]), &[]).joined("n1");
    first.start();
    let superseded = "node n1 has joined with another key";
    eventually("the former key is refused", SOON, async || {
        cluster.master.log_text().contains(superseded).then_some(())
    })
    .await;
    assert_ne!(cluster.node_status("n1").unwrap()["state"], "connected");
    second.start();
    cluster.wait_state("n1", "connected").await;
}

/// Keeps what is read, of what passes.
struct Recording<S> {
    inner: S,
    read: Arc<Mutex<Vec<u8>>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Recording<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let poll = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.read.lock().unwrap().extend_from_slice(&buf.filled()[before..]);
        poll
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Recording<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// The middle man's face towards the joining host: a master that takes any host key, and keeps all it gets.
struct FalseMaster(Arc<Mutex<Vec<u8>>>);

impl client::Handler for FalseMaster {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }

    async fn data(
        &mut self,
        _: russh::ChannelId,
        data: &[u8],
        _: &mut client::Session,
    ) -> Result<(), russh::Error> {
        self.0.lock().unwrap().extend_from_slice(data);
        Ok(())
    }
}

/// The middle man's face towards the master: a host that wants to join, and keeps the master's certificate.
struct FalseHost(tokio::sync::mpsc::UnboundedSender<Certificate>);

impl server::Handler for FalseHost {
    type Error = russh::Error;

    async fn auth_openssh_certificate(
        &mut self,
        _: &str,
        certificate: &Certificate,
    ) -> Result<server::Auth, russh::Error> {
        let _ = self.0.send(certificate.clone());
        Ok(server::Auth::Accept)
    }

    async fn channel_open_session(
        &mut self,
        _: Channel<server::Msg>,
        reply: server::ChannelOpenHandle,
        _: &mut server::Session,
    ) -> Result<(), russh::Error> {
        reply.accept().await;
        Ok(())
    }
}

/// Calls the master and gives the certificate that it shows.
async fn true_certificate(master: SocketAddr, key: PrivateKey) -> Certificate {
    let socket = TcpStream::connect(master).await.unwrap();
    let config =
        server::Config { keys: vec![key], auth_rejection_time: Duration::ZERO, ..server::Config::default() };
    let (sender, mut certificates) = tokio::sync::mpsc::unbounded_channel();
    let session = server::run_stream(Arc::new(config), socket, FalseHost(sender)).await.unwrap();
    tokio::spawn(session);
    tokio::time::timeout(SOON, certificates.recv()).await.expect("the master's certificate").unwrap()
}

/// Takes a joining host's connection and tries each credential, then asks for the token. Gives whether any was
/// accepted.
async fn attack(
    listener: TcpListener,
    credentials: Vec<(PrivateKey, Option<Certificate>)>,
    seen: Arc<Mutex<Vec<u8>>>,
) -> bool {
    let (socket, _) = listener.accept().await.unwrap();
    let socket = Recording { inner: socket, read: seen.clone() };
    let Ok(mut handle) = client::connect_stream(Arc::default(), socket, FalseMaster(seen.clone())).await
    else {
        return false;
    };
    let mut accepted = false;
    for (key, certificate) in credentials {
        let key = Arc::new(key);
        let tried = match certificate {
            Some(certificate) => handle.authenticate_openssh_cert("master-agent", key, certificate).await,
            None => {
                let key = russh::keys::PrivateKeyWithHashAlg::new(key, None);
                handle.authenticate_publickey("master-agent", key).await
            }
        };
        accepted |= tried.is_ok_and(|a| a.success());
    }
    accepted |= handle.authenticate_none("master-agent").await.is_ok_and(|a| a.success());
    let ask = async {
        let mut channel = handle.channel_open_session().await.ok()?;
        channel.request_subsystem(true, SUBSYSTEM).await.ok()?;
        while let Some(message) = channel.wait().await {
            if let ChannelMsg::Data { data } = message {
                seen.lock().unwrap().extend_from_slice(&data);
            }
        }
        Some(())
    };
    let _ = tokio::time::timeout(Duration::from_secs(3), ask).await;
    accepted
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_man_in_the_middle_never_gets_the_token() {
    let cluster = master("").await;
    list(&cluster, &[("n1", None)]).await;
    let mut host = Host::calling(&cluster, "n1", cluster.call_home);
    let line = token(&cluster, &["--node", "n1"]);
    let file = |name: &str| cluster.path().join(name);
    for key in ["false_ca", "false_key"] {
        openssh::keygen(&file(key)).unwrap();
    }
    let sign = [
        "-q",
        "-s",
        "false_ca",
        "-I",
        "master-agent",
        "-n",
        "master-agent",
        "-V",
        "-1h:+1h",
        "false_key.pub",
    ];
    openssh::run(Command::new("ssh-keygen").args(sign).current_dir(cluster.path())).unwrap();
    let key = PrivateKey::read_openssh_file(file("false_key")).unwrap();
    let false_certificate = Certificate::read_file(&file("false_key-cert.pub")).unwrap();
    let true_certificate = true_certificate(cluster.call_home, key.clone()).await;
    assert!(true_certificate.valid_principals().contains(&"master-agent".to_owned()));

    let seen = Arc::new(Mutex::new(Vec::new()));
    for credentials in [
        vec![(key.clone(), Some(false_certificate.clone()))],
        vec![(key.clone(), Some(true_certificate.clone()))],
        vec![(key.clone(), None)],
        vec![
            (key.clone(), None),
            (key.clone(), Some(true_certificate.clone())),
            (key.clone(), Some(false_certificate)),
        ],
    ] {
        let listener = TcpListener::bind(local(0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let attack = tokio::spawn(attack(listener, credentials, seen.clone()));
        let misled = line.replace(&cluster.call_home.to_string(), &address.to_string());
        let ran = host.join(&misled, &[]);
        ran.refused(&[&address.to_string()]);
        assert!(!ran.err.contains(secret(&line)));
        let accepted = tokio::time::timeout(PATIENCE, attack).await.expect("the attack ends").unwrap();
        assert!(!accepted);
        assert!(is_unused(&cluster, &line));
    }

    // At last it forwards what it can't read.
    let listener = TcpListener::bind(local(0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (kept, call_home) = (seen.clone(), cluster.call_home);
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(call_home).await.unwrap();
            let mut near = Recording { inner: near, read: kept.clone() };
            let mut far = Recording { inner: far, read: kept.clone() };
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut near, &mut far).await });
        }
    });
    host.join(&line.replace(&cluster.call_home.to_string(), &address.to_string()), &[]).joined("n1");
    host.start();
    cluster.wait_state("n1", "connected").await;
    let seen = seen.lock().unwrap();
    assert!(contains(&seen, b"SSH-2.0-node-agent"));
    for part in [secret(&line), id(&line), "mat1."] {
        assert!(!contains(&seen, part.as_bytes()), "{part:?} was sent in the clear");
    }
}

fn base64(bytes: &[u8], letters: &[u8; 64]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().chain([0u8; 2].iter()).take(3).fold(0u32, |w, b| w << 8 | u32::from(*b));
        for i in 0..=chunk.len() {
            text.push(char::from(letters[(word >> (18 - 6 * i) & 63) as usize]));
        }
    }
    text
}

/// The ways in which bytes might come to be printed.
fn forms(bytes: &[u8]) -> Vec<String> {
    const STANDARD: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const URL_SAFE: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let list = format!("{:?}", &bytes[..bytes.len().min(12)]);
    vec![
        hex.to_uppercase(),
        hex,
        base64(bytes, STANDARD),
        base64(bytes, URL_SAFE),
        list.trim_matches(['[', ']']).to_owned(),
    ]
}

/// Body lines of a private key's file, and the key itself in the ways it might be printed.
fn private(file: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(file).unwrap();
    let mut secrets: Vec<String> =
        text.lines().filter(|l| !l.starts_with("-----")).map(str::to_owned).collect();
    assert!(secrets.len() >= 3 && text.contains("PRIVATE KEY"), "{}", file.display());
    if text.contains("OPENSSH") {
        let key = PrivateKey::from_openssh(&text).unwrap();
        secrets.extend(forms(&key.key_data().ed25519().unwrap().private.to_bytes()));
    }
    secrets
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_is_in_a_log_or_an_answer_or_an_error() {
    let port = target::start().await;
    let trace = "log: {level: 'trace,russh=trace'}";
    let cluster = master(trace).await;
    let node_port = free_port();
    list(&cluster, &[("n1", Some(local(node_port))), ("n2", None)]).await;
    let link = |text: String| format!("{text}\n{trace}");
    let mut hosts = [
        Host::new(&cluster, "n1", &link(format!("listen: '{}'", local(node_port)))),
        Host::new(&cluster, "n2", &link(format!("call_home: ['{}']", cluster.call_home))),
    ];
    let mut said = Vec::new();
    let mut lines = Vec::new();
    for (host, name) in hosts.iter_mut().zip(["n1", "n2"]) {
        let (good, spare) = (token(&cluster, &["--node", name]), token(&cluster, &[]));
        for bad in [
            good.replace(id(&good), id(&spare)),
            good[..good.len() - 1].to_owned(),
            format!("{good} --node other"),
            good.replace("SHA256:", "SHA256:x"),
            good.replace("mat1.", "mat2."),
            // A wrong argument is quoted nowhere, since it may be a secret.
            format!("{good} --address nonsense"),
            format!("{good} --nonsense"),
        ] {
            let ran = host.join(&bad, &[]);
            assert_ne!(ran.code, Some(0));
            said.extend([ran.out, ran.err]);
        }
        let ran = host.join(&good, &[]);
        ran.joined(name);
        let again = host.join(&good, &[]);
        // The answer might have been lost, so the same host may ask again.
        again.joined(name);
        said.extend([ran.out, ran.err, again.out, again.err]);
        host.start();
        cluster.wait_state(name, "connected").await;
        for door in cluster.doors() {
            echo(&door, &format!("{name}:{port}")).await;
        }
        lines.extend([good, spare]);
    }
    let revoke = Command::new(binary("master-agent"))
        .arg("--config")
        .arg(cluster.path().join("master.yaml"))
        .args(["token", "revoke", &format!("mat1.{}", id(&lines[0]))])
        .output()
        .unwrap();
    said.push(String::from_utf8(revoke.stderr).unwrap());
    for args in [
        &["token", "list"][..],
        &["token", "list", "-o", "json"],
        &["node", "list"],
        &["node", "list", "-o", "json"],
        &["check-config"],
    ] {
        said.push(cluster.command(args).unwrap());
    }
    for process in [&cluster.master].into_iter().chain(hosts.iter().filter_map(|h| h.process.as_ref())) {
        said.push(process.says(&["agent runs"]).await);
        for file in ["cmdline", "environ"] {
            said.push(
                String::from_utf8_lossy(&std::fs::read(format!("/proc/{}/{file}", process.pid())).unwrap())
                    .into_owned(),
            );
        }
    }

    let mut secrets = Vec::new();
    for line in &lines {
        secrets.push(secret(line).to_owned());
        secrets.extend(forms(secret(line).as_bytes()));
        secrets.extend(forms(&Sha256::digest(secret(line).as_bytes())));
    }
    for file in ["master/host_ca", "master/user_ca", "server.key", "n1/state/host_key", "n2/state/host_key"] {
        secrets.extend(private(&cluster.path().join(file)));
    }
    for (i, text) in said.iter().enumerate() {
        for secret in &secrets {
            let at = text.find(secret.as_str());
            let around = at.map(|at| text[..at].lines().last().unwrap_or_default().to_owned());
            assert!(at.is_none(), "a secret is in text {i}, behind {around:?}");
        }
    }
    // The store has hashes, and the search above would find what is there.
    let stored = |file: &str| std::fs::read(cluster.path().join("master").join(file)).unwrap();
    let store = [stored("state.sqlite"), stored("state.sqlite-wal")].concat();
    let spare = secret(&lines[1]);
    assert!(contains(&store, &Sha256::digest(spare.as_bytes())) && !contains(&store, spare.as_bytes()));
}
