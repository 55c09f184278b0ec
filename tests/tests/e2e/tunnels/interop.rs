//! Stock OpenSSH clients work with a node-agent.

use std::{
    io::ErrorKind, net::SocketAddr, os::unix::net::UnixListener, path::Path, process::Command, sync::Arc,
    time::Duration,
};

use russh::keys::{Certificate, PrivateKey, PublicKeyOrCertificate};
use tests::{
    cluster::{Cluster, Kind, Options, SOON},
    openssh,
    pattern::{Checker, fill},
    person::{Outcome, Person, finish},
    process::{Process, eventually, free_port},
    target,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

/// How long one exchange through a forward may take.
const PATIENCE: Duration = Duration::from_secs(120);
const FORWARDING_ONLY: &str = "this node serves port forwarding only";

/// A node-agent that allows `port`, where a target listens, and `further`; a tunnel to it is up.
async fn node(further: &[u16]) -> (Cluster, u16) {
    let port = free_port();
    target::serve(SocketAddr::from(([0u16; 8], port))).await.unwrap();
    let nodes = vec![("n1".to_owned(), Kind::Dialled)];
    let ports = [&[port], further].concat();
    (Cluster::start(Options { nodes, ports, ..Options::default() }).await.unwrap(), port)
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: no end in {PATIENCE:?}"))
}

async fn connect(port: u16) -> TcpStream {
    TcpStream::connect(("127.0.0.1", port)).await.unwrap()
}

/// Waits until a client has opened the listener of a forward.
async fn listens(client: &mut Process, port: u16) {
    eventually(&format!("{} listens on {port}", client.name), SOON, async || {
        assert!(client.is_running(), "{}", client.log_text());
        TcpStream::connect(("127.0.0.1", port)).await.ok()
    })
    .await;
}

/// Reads `bytes` bytes of the pattern, and the end.
async fn check_pattern(stream: &mut (impl AsyncRead + Unpin), bytes: u64) {
    let mut checker = Checker::default();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let n = within("a download", stream.read(&mut buffer)).await.unwrap();
        if n == 0 {
            break;
        }
        checker.check(&buffer[..n]);
    }
    assert_eq!(checker.offset(), bytes);
}

async fn download(port: u16, bytes: u64) {
    let mut stream = connect(port).await;
    stream.write_all(format!("source {bytes}\n").as_bytes()).await.unwrap();
    check_pattern(&mut stream, bytes).await;
}

/// One exchange with a target that sends back what comes.
async fn echo(stream: &mut TcpStream, text: &[u8]) {
    stream.write_all(text).await.unwrap();
    let mut answer = vec![0; text.len()];
    within("an echo", stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer, text);
}

/// The tunnel between master and node, which a person's sessions must not touch.
async fn the_masters_tunnel_carries(cluster: &Cluster, port: u16) {
    let mut stream = cluster.unix.stream(&format!("n1:{port}")).await.unwrap();
    stream.write_all(b"source 1000000\n").await.unwrap();
    check_pattern(&mut stream, 1_000_000).await;
    let status = cluster.node_status("n1").unwrap();
    assert_eq!(status["state"], "connected", "{status}");
}

fn assert_refused(outcome: &Outcome, reason: &str) {
    assert!(outcome.code.is_some_and(|code| code != 0), "{outcome:?}");
    assert!(outcome.stdout.is_empty(), "{outcome:?}");
    assert!(outcome.stderr.contains(reason), "no {reason:?} in {outcome:?}");
}

#[tokio::test]
async fn local_forwards_carry_and_refused_ones_leave_them_alone() {
    let (cluster, port) = node(&[]).await;
    let alice = Person::certified(&cluster, "alice", "").unwrap();
    let elsewhere = free_port();
    let behind_elsewhere = std::net::TcpListener::bind(("127.0.0.1", elsewhere)).unwrap();
    let socket = alice.directory.join("socket");
    let behind_socket = UnixListener::bind(&socket).unwrap();
    let ports: [u16; 5] = std::array::from_fn(|_| free_port());
    let [by_address, by_name, outside, to_socket, remote] = ports;
    let unix = alice.directory.join("forward");
    let mut client = alice
        .start(
            "forwards",
            &[
                "-N",
                "-L",
                &format!("{by_address}:127.0.0.1:{port}"),
                "-L",
                &format!("{by_name}:n1:{port}"),
                "-L",
                &format!("{}:[::1]:{port}", unix.display()),
                "-L",
                &format!("{outside}:127.0.0.1:{elsewhere}"),
                "-L",
                &format!("{to_socket}:{}", socket.display()),
                "-R",
                &format!("{remote}:127.0.0.1:{port}"),
                "node",
            ],
        )
        .unwrap();
    listens(&mut client, by_address).await;

    let mut kept = connect(by_address).await;
    kept.write_all(b"echo\n").await.unwrap();
    echo(&mut kept, b"before").await;
    let mut web = BufReader::new(connect(by_name).await);
    web.write_all(b"GET / HTTP/1.1\r\nHost: n1\r\n\r\n").await.unwrap();
    let mut line = String::new();
    within("a GET", web.read_line(&mut line)).await.unwrap();
    assert_eq!(line, "HTTP/1.1 200 OK\r\n");
    download(by_address, 20_000_000).await;

    for (forward, refusal) in [
        (outside, "administratively prohibited: refused by node policy (rule loopback): 127.0.0.1"),
        (to_socket, "administratively prohibited"),
    ] {
        let before = client.log_text().len();
        let mut stream = connect(forward).await;
        assert!(matches!(within("a refused forward", stream.read(&mut [0])).await, Ok(0) | Err(_)));
        let log = client.log.clone();
        eventually(&format!("ssh says {refusal:?}"), SOON, async || {
            let text = std::fs::read_to_string(&log).ok()?;
            text.get(before..)?
                .lines()
                .any(|l| l.contains("open failed") && l.contains(refusal))
                .then_some(())
        })
        .await;
        echo(&mut kept, b"meanwhile").await;
    }
    assert!(client.log_text().contains(&format!("remote port forwarding failed for listen port {remote}")));
    assert!(TcpStream::connect(("127.0.0.1", remote)).await.is_err());
    behind_elsewhere.set_nonblocking(true).unwrap();
    behind_socket.set_nonblocking(true).unwrap();
    assert_eq!(behind_elsewhere.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(behind_socket.accept().unwrap_err().kind(), ErrorKind::WouldBlock);

    echo(&mut kept, b"after").await;
    download(by_name, 1_000_000).await;
    let mut stream = tokio::net::UnixStream::connect(&unix).await.unwrap();
    stream.write_all(b"source 1000000\n").await.unwrap();
    check_pattern(&mut stream, 1_000_000).await;
    assert!(client.is_running());
}

#[tokio::test]
async fn standard_input_and_output_lead_to_a_target_and_end_one_by_one() {
    let (cluster, port) = node(&[]).await;
    let alice = Person::certified(&cluster, "alice", "").unwrap();
    let target = format!("127.0.0.1:{port}");

    // The target answers only after standard input has ended.
    let mut input = b"sink\n".to_vec();
    let mut pattern = vec![0; 5_000_000];
    fill(&mut pattern, 0);
    input.extend(&pattern);
    let outcome = alice.ssh(&["-W", &target, "node"], &input).await.unwrap();
    assert_eq!((outcome.code, outcome.stdout), (Some(0), b"5000000\n".to_vec()), "{}", outcome.stderr);

    // The target ends first, while standard input stays open.
    let mut client = alice.client("ssh", &["-W", &target, "node"]).spawn().unwrap();
    let mut stdin = client.stdin.take().unwrap();
    stdin.write_all(b"source 5000000\n").await.unwrap();
    check_pattern(&mut client.stdout.take().unwrap(), 5_000_000).await;
    drop(stdin);
    assert_eq!(within("ssh -W", client.wait()).await.unwrap().code(), Some(0));

    // Bytes go both ways in turn.
    let mut client = alice.client("ssh", &["-W", &format!("n1:{port}"), "node"]).spawn().unwrap();
    let (mut stdin, mut stdout) = (client.stdin.take().unwrap(), client.stdout.take().unwrap());
    stdin.write_all(b"echo\n").await.unwrap();
    for text in [&b"one"[..], &pattern[..100_000], b"three"] {
        let mut answer = vec![0; text.len()];
        let (sent, received) =
            within("an echo", async { tokio::join!(stdin.write_all(text), stdout.read_exact(&mut answer)) })
                .await;
        sent.unwrap();
        received.unwrap();
        assert_eq!(answer, text);
    }
    drop(stdin);
    assert_eq!(within("the end", stdout.read(&mut [0])).await.unwrap(), 0);
    assert_eq!(within("ssh -W", client.wait()).await.unwrap().code(), Some(0));
}

#[tokio::test]
async fn a_jump_leads_to_an_sshd_behind_the_node() {
    let ssh_port = free_port();
    let (cluster, _) = node(&[ssh_port]).await;
    let behind = cluster.path().join("behind");
    std::fs::create_dir_all(&behind).unwrap();
    openssh::keygen(&behind.join("host_key")).unwrap();
    openssh::keygen(&behind.join("key")).unwrap();
    let at = behind.display();
    let config = format!(
        "HostKey {at}/host_key\nAuthorizedKeysFile {at}/key.pub\nPermitRootLogin yes\nPasswordAuthentication no\n\
         KbdInteractiveAuthentication no"
    );
    let _sshd = openssh::sshd(&behind, ssh_port, &config).unwrap();
    let host = format!(
        "Host behind\n    HostName 127.0.0.1\n    Port {ssh_port}\n    User root\n    IdentityFile {at}/key"
    );
    let alice = Person::certified(&cluster, "alice", &host).unwrap();
    let known_hosts = alice.directory.join("known_hosts");
    let host_key = std::fs::read_to_string(behind.join("host_key.pub")).unwrap();
    let mut text = std::fs::read_to_string(&known_hosts).unwrap();
    text.push_str(&format!("[127.0.0.1]:{ssh_port} {host_key}"));
    std::fs::write(&known_hosts, text).unwrap();

    let mut pattern = vec![0; 1_000_000];
    fill(&mut pattern, 0);
    let outcome = alice.ssh(&["-J", "node", "behind", "cat; exit 7"], &pattern).await.unwrap();
    assert_eq!(outcome.code, Some(7), "{}", outcome.stderr);
    assert!(outcome.stdout == pattern, "{} other bytes came back", outcome.stdout.len());

    // The sshd behind is what runs it: without the jump's rule there is no way on.
    let port = free_port();
    let outcome = alice.ssh(&["-J", "node", "-p", &port.to_string(), "behind", "true"], b"").await.unwrap();
    assert_refused(&outcome, "administratively prohibited: refused by node policy (rule loopback)");
}

#[tokio::test]
async fn nothing_but_local_forwarding_is_served() {
    let (cluster, port) = node(&[]).await;
    let alice = Person::certified(&cluster, "alice", "").unwrap();
    let file = |name: &str| alice.directory.join(name).display().to_string();
    let touch = format!("touch {}", file("ran"));
    let agent = UnixListener::bind(file("agent")).unwrap();
    agent.set_nonblocking(true).unwrap();
    let forward_agent = format!("ForwardAgent={}", file("agent"));

    for args in [
        &["node"][..],
        &["-tt", "node"],
        &["node", &touch],
        &["-tt", "node", &touch],
        &["-s", "node", "sftp"],
        &["-s", "node", "streams-v1"],
        &["-o", &forward_agent, "node", &touch],
        &["-A", "node", &touch],
    ] {
        let outcome = alice.ssh(args, b"exit\n").await.unwrap();
        println!("ssh {args:?}: {outcome:?}");
        assert_refused(&outcome, FORWARDING_ONLY);
    }
    for option in ["-X", "-Y"] {
        let mut command = alice.client("ssh", &[option, "node", &touch]);
        command.env("DISPLAY", "127.0.0.1:99");
        assert_refused(&finish(command, b"").await.unwrap(), FORWARDING_ONLY);
    }
    let (key, there) = (file("key.pub"), format!("node:{}", file("copied")));
    let (hosts, here) = ("node:/etc/hosts", file("copied"));
    for (program, args) in [
        ("sftp", &["node"][..]),
        ("scp", &[&key, &there]),
        ("scp", &["-O", &key, &there]),
        ("scp", &[hosts, &here]),
        ("scp", &["-O", hosts, &here]),
    ] {
        let outcome = finish(alice.client(program, args), b"ls\n").await.unwrap();
        println!("{program} {args:?}: {outcome:?}");
        assert_refused(&outcome, FORWARDING_ONLY);
    }
    assert!(!Path::new(&file("ran")).exists() && !Path::new(&here).exists());
    assert_eq!(agent.accept().unwrap_err().kind(), ErrorKind::WouldBlock);

    let listen = free_port();
    let (tcp, socket) =
        (format!("{listen}:127.0.0.1:{port}"), format!("{}:127.0.0.1:{port}", file("listens")));
    let failed = "remote port forwarding failed for listen";
    for (args, reason) in [
        (&["-N", "-R", &tcp][..], failed),
        (&["-N", "-R", "0:127.0.0.1:1"], failed),
        (&["-N", "-R", &listen.to_string()], failed),
        (&["-N", "-R", &socket], failed),
        (&["-N", "-w", "any:any"], "open failed: "),
        (&["-N", "-o", "Tunnel=ethernet", "-w", "any:any"], "open failed: "),
    ] {
        let outcome =
            alice.ssh(&[&["-o", "ExitOnForwardFailure=yes"], args, &["node"]].concat(), b"").await.unwrap();
        println!("ssh {args:?}: {outcome:?}");
        assert_refused(&outcome, reason);
    }
    assert!(TcpStream::connect(("127.0.0.1", listen)).await.is_err());
    assert!(!Path::new(&file("listens")).exists());

    the_masters_tunnel_carries(&cluster, port).await;
}

#[tokio::test]
async fn other_identities_are_refused() {
    let (cluster, port) = node(&[]).await;
    let master = cluster.path().join("master");
    let (user_ca, host_ca) = (master.join("user_ca"), master.join("host_ca"));
    let other_ca = cluster.path().join("other_ca");
    openssh::keygen(&other_ca).unwrap();
    let target = format!("127.0.0.1:{port}");
    let attempt = async |person: &Person, options: &[&str]| {
        person.ssh(&[options, &["-W", &target, "node"]].concat(), b"source 8\n").await.unwrap()
    };
    let node = cluster.nodes[0].process.as_ref().unwrap();

    // All others differ from this one in a single point.
    let sound = Person::stranger(&cluster, "sound", "").unwrap();
    let sources = "source-address=127.0.0.0/8,::1/128";
    sound.sign(&user_ca, &["-I", "sound", "-n", "sound", "-V", "-1h:+1h", "-O", sources]).unwrap();
    let outcome = attempt(&sound, &[]).await;
    assert_eq!((outcome.code, outcome.stdout.len()), (Some(0), 8), "{}", outcome.stderr);

    let no_certificate = Person::stranger(&cluster, "bare", "").unwrap();
    assert_refused(&attempt(&no_certificate, &[]).await, "Permission denied (publickey)");
    node.says(&["refused a key without certificate", "user=\"bare\""]).await;

    let untrusted = &["signed by a CA that is not trusted here"][..];
    let lifetime = ["-V", "-1h:+1h"];
    for (name, ca, args, reasons) in [
        ("foreign", &other_ca, &["-n", "foreign"][..], untrusted),
        ("by-host-ca", &host_ca, &["-n", "by-host-ca"], untrusted),
        ("misnamed", &user_ca, &["-n", "somebody,else"], &["it is not for the login \"misnamed\""]),
        ("nameless", &user_ca, &[], &["it is not for the login \"nameless\""]),
        // The SSH library may be the first to see these two.
        (
            "expired",
            &user_ca,
            &["-n", "expired", "-V", "-2h:-1h"],
            &["it has expired", "expired or not yet valid"],
        ),
        (
            "early",
            &user_ca,
            &["-n", "early", "-V", "+1h:+2h"],
            &["it is not valid yet", "expired or not yet valid"],
        ),
        (
            "far",
            &user_ca,
            &["-n", "far", "-O", "source-address=10.0.0.0/8"],
            &["its source-address option does not allow 127.0.0.1"],
        ),
        (
            "forced",
            &user_ca,
            &["-n", "forced", "-O", "force-command=true"],
            &["it has the critical option \"force-command\""],
        ),
        ("bound", &user_ca, &["-n", "bound", "-O", "clear"], &["it does not permit port forwarding"]),
    ] {
        let person = Person::stranger(&cluster, name, "").unwrap();
        person.sign(ca, &[&["-I", name], &lifetime[..], args].concat()).unwrap();
        let before = node.log_text().len();
        let outcome = attempt(&person, &[]).await;
        println!("{name}: {outcome:?}");
        assert_refused(&outcome, "Permission denied (publickey)");
        eventually(&format!("{name}: one of {reasons:?} is logged"), SOON, async || {
            let log = node.log_text().split_off(before);
            reasons.iter().any(|reason| log.contains(reason)).then_some(())
        })
        .await;
    }

    // A valid certificate is used for other logins than its own.
    let alice = Person::certified(&cluster, "alice", "").unwrap();
    for login in ["master-agent", "root", "bob", "Alice", "alic"] {
        assert_refused(&attempt(&alice, &["-l", login]).await, "Permission denied (publickey)");
    }
    let key = alice.key().with_extension("pub").display().to_string();
    let error = cluster.command(&["sign-user", "master-agent", "--key", &key]).unwrap_err().to_string();
    assert!(error.contains("the master's own principal"), "{error}");
    assert_eq!(attempt(&alice, &[]).await.code, Some(0));

    the_masters_tunnel_carries(&cluster, port).await;
}

struct AnyServer;

impl russh::client::Handler for AnyServer {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _key: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

/// Stock ssh keeps a host certificate to itself, so another client offers it.
#[tokio::test]
async fn a_host_certificate_is_no_users() {
    let (cluster, port) = node(&[]).await;
    let user_ca = cluster.path().join("master/user_ca");
    let mallory = Person::stranger(&cluster, "mallory", "").unwrap();
    let attempt = async |args: &[&str]| {
        mallory
            .sign(&user_ca, &[&["-I", "mallory", "-n", "mallory", "-V", "-1h:+1h"], args].concat())
            .unwrap();
        let text = std::fs::read_to_string(mallory.directory.join("key-cert.pub")).unwrap();
        let certificate = Certificate::from_openssh(text.trim()).unwrap();
        let key = PrivateKey::from_openssh(std::fs::read(mallory.key()).unwrap()).unwrap();
        let config = Arc::new(russh::client::Config::default());
        let mut client =
            russh::client::connect(config, ("127.0.0.1", cluster.nodes[0].port), AnyServer).await.unwrap();
        within("authentication", client.authenticate_openssh_cert("mallory", Arc::new(key), certificate))
            .await
            .unwrap()
            .success()
    };
    assert!(attempt(&[]).await);
    assert!(!attempt(&["-h"]).await);
    cluster.nodes[0].process.as_ref().unwrap().says(&["it is not a user certificate"]).await;
    the_masters_tunnel_carries(&cluster, port).await;
}

/// Reads the proposals for one direction from `ssh -vv`. The first list is the client's, the second the server's.
fn proposals(stderr: &str, kind: &str) -> [Vec<String>; 2] {
    let prefix = format!("debug2: {kind}: ");
    let mut lists = stderr
        .lines()
        .filter_map(|l| l.trim().strip_prefix(&prefix))
        .map(|l| l.split(',').map(str::to_owned).collect());
    [lists.next().unwrap(), lists.next().unwrap()]
}

#[tokio::test]
async fn the_strongest_common_algorithms_are_negotiated() {
    let (cluster, port) = node(&[]).await;
    let alice = Person::certified(&cluster, "alice", "").unwrap();
    let target = format!("127.0.0.1:{port}");
    let outcome = alice.ssh(&["-vv", "-W", &target, "node"], b"source 8\n").await.unwrap();
    assert_eq!((outcome.code, outcome.stdout.len()), (Some(0), 8), "{}", outcome.stderr);

    // RFC 4253 §7.1: the first of the client's list that the server has as well.
    let negotiated = |kind: &str| {
        let [client, server] = proposals(&outcome.stderr, kind);
        client.into_iter().find(|name| server.contains(name)).unwrap()
    };
    let said = |line: &str| assert!(outcome.stderr.contains(line), "no {line:?} in {}", outcome.stderr);
    let exchange = negotiated("KEX algorithms");
    assert!(exchange == "mlkem768x25519-sha256" || exchange.starts_with("curve25519-sha256"), "{exchange}");
    said(&format!("debug1: kex: algorithm: {exchange}"));
    said("debug1: kex: host key algorithm: ssh-ed25519-cert-v01@openssh.com");
    for (kind, direction) in [("ciphers ctos", "client->server"), ("ciphers stoc", "server->client")] {
        let cipher = negotiated(kind);
        assert!(cipher.contains("-gcm@") || cipher.starts_with("chacha20-poly1305@"), "{cipher}");
        said(&format!("debug1: kex: {direction} cipher: {cipher} MAC: <implicit>"));
    }

    // The node's own order, which decides where its peer has none.
    let [_, exchanges] = proposals(&outcome.stderr, "KEX algorithms");
    assert_eq!(exchanges[..2], ["mlkem768x25519-sha256", "curve25519-sha256"]);
    assert!(exchanges.contains(&"kex-strict-s-v00@openssh.com".to_owned()), "{exchanges:?}");
    for kind in ["ciphers ctos", "ciphers stoc"] {
        let [_, ciphers] = proposals(&outcome.stderr, kind);
        assert_eq!(ciphers[..2], ["aes256-gcm@openssh.com", "aes128-gcm@openssh.com"]);
    }
    for kind in
        ["KEX algorithms", "host key algorithms", "ciphers ctos", "ciphers stoc", "MACs ctos", "MACs stoc"]
    {
        let [_, names] = proposals(&outcome.stderr, kind);
        let weak = [
            "sha1", "md5", "cbc", "arcfour", "3des", "group1-", "group14", "ssh-rsa", "ssh-dss", "umac-64",
            "none",
        ];
        let found: Vec<_> = names.iter().filter(|name| weak.iter().any(|w| name.contains(w))).collect();
        assert!(found.is_empty(), "{kind}: {found:?}");
    }
}

#[tokio::test]
async fn a_client_with_weak_algorithms_only_gets_no_connection() {
    let (cluster, port) = node(&[]).await;
    let alice = Person::certified(&cluster, "alice", "").unwrap();
    let target = format!("127.0.0.1:{port}");
    let known = |kind: &str, name: &str| {
        let output = Command::new("ssh").args(["-Q", kind]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).lines().any(|l| l == name)
    };
    for (options, missing) in [
        (&["KexAlgorithms=diffie-hellman-group14-sha1"][..], "no matching key exchange method found"),
        (&["KexAlgorithms=diffie-hellman-group1-sha1"], "no matching key exchange method found"),
        (&["Ciphers=aes128-cbc"], "no matching cipher found"),
        (&["Ciphers=3des-cbc"], "no matching cipher found"),
        (&["MACs=hmac-sha1", "Ciphers=aes128-ctr"], "no matching MAC found"),
        (&["MACs=hmac-md5", "Ciphers=aes128-ctr"], "no matching MAC found"),
        (&["HostKeyAlgorithms=ssh-rsa"], "no matching host key type found"),
    ] {
        for option in options {
            let (kind, name) = option.split_once('=').unwrap();
            let kind = match kind {
                "KexAlgorithms" => "kex",
                "Ciphers" => "cipher",
                "MACs" => "mac",
                _ => "key-sig",
            };
            assert!(known(kind, name), "this ssh has no {option}");
        }
        let args = options.iter().flat_map(|o| ["-o", o]).chain(["-W", &target, "node"]).collect::<Vec<_>>();
        let outcome = alice.ssh(&args, b"source 8\n").await.unwrap();
        assert_refused(&outcome, missing);
        assert_eq!(outcome.code, Some(255));
    }
    // The same options with a strong choice, so that it is the choice that matters.
    for option in ["KexAlgorithms=curve25519-sha256", "Ciphers=aes256-gcm@openssh.com", "Ciphers=aes256-ctr"]
    {
        let outcome = alice.ssh(&["-o", option, "-W", &target, "node"], b"source 8\n").await.unwrap();
        assert_eq!((outcome.code, outcome.stdout.len()), (Some(0), 8), "{option}: {}", outcome.stderr);
    }
    the_masters_tunnel_carries(&cluster, port).await;
}
