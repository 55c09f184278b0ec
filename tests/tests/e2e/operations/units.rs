//! The systemd units: little is open to the agents under them, every sample starts under its unit's restrictions and
//! answers the watchdog, and who is given one directory of sockets finds no other's.
//!
//! `data/units/start.py` does of a unit what needs no systemd: the directories, a read-only root, the user, capabilities,
//! limits, and the filter of system calls. How systemd itself supervises the agents is another test (`alone/systemd.rs`).

use std::{
    fs::{self, Permissions},
    net::Ipv4Addr,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use tests::{
    cluster::binary,
    front_end::{SAM, role},
    netns::Namespace,
    openssh::keygen,
    pki::Authority,
    process::{Process, TempDir, eventually},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixDatagram},
};

const SOON: Duration = Duration::from_secs(30);
const EX_CONFIG: i32 = 78;

/// Users and groups of the hosts under test. The agents' have their names.
const MASTER: u32 = 64001;
const NODE: u32 = 64002;
const APISERVER: u32 = 64010;
const STRANGER: u32 = 64011;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn unit(name: &str) -> PathBuf {
    deploy().join("systemd").join(name)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).permissions().mode() & 0o7777
}

/// A host with one agent: a root directory in a network of its own.
struct Host<'a> {
    agent: &'static str,
    dir: TempDir,
    network: &'a Namespace,
    /// The unit, and drop-ins.
    unit: Vec<PathBuf>,
    systemd: UnixDatagram,
}

impl<'a> Host<'a> {
    fn new(agent: &'static str, network: &'a Namespace, drop_ins: &[&str]) -> Self {
        let dir = TempDir::new("unit").unwrap();
        let root = dir.path().join("root");
        skeleton(&root);
        let config = root.join("etc").join(agent);
        fs::create_dir(&config).unwrap();
        fs::copy(binary(agent), root.join("usr/bin").join(agent)).unwrap();
        let socket = root.join("run/notify");
        let systemd = UnixDatagram::bind(&socket).unwrap();
        fs::set_permissions(&socket, Permissions::from_mode(0o777)).unwrap();
        let unit =
            [format!("{agent}.service").as_str()].iter().chain(drop_ins).map(|name| unit(name)).collect();
        Self { agent, dir, network, unit, systemd }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Writes a file of the agent's configuration directory, for the agent alone.
    fn configure(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.config(name), text).unwrap();
        self.own();
    }

    fn config(&self, name: &str) -> PathBuf {
        self.root().join("etc").join(self.agent).join(name)
    }

    fn own(&self) {
        let user = if self.agent == "master-agent" { MASTER } else { NODE };
        for file in fs::read_dir(self.config("")).unwrap() {
            let path = file.unwrap().path();
            chown(&path, Some(user), Some(user)).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/units/start.py");
        let unit: Vec<_> = self.unit.iter().map(|file| file.to_str().unwrap()).collect();
        let mut command = self.network.command("unshare");
        command.args(["--mount", "python3"]).arg(script).arg(self.root()).arg(unit.join(","));
        command.arg(format!("/usr/bin/{}", self.agent)).args(args);
        command.env("NOTIFY_SOCKET", "/run/notify").env("WATCHDOG_USEC", "1000000");
        command
    }

    fn start(&self) -> Process {
        Process::start(self.agent, &mut self.command(&["run"]), &self.dir.path().join("log")).unwrap()
    }

    fn run(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits until systemd was told that the agent is ready, and its watchdog was answered three times.
    async fn ready(&self, process: &mut Process) {
        let (mut ready, mut answers) = (false, 0);
        let mut buffer = [0; 1024];
        while !ready || answers < 3 {
            let told = tokio::time::timeout(SOON, self.systemd.recv(&mut buffer)).await;
            let running = process.is_running();
            assert!(told.is_ok() && running, "ready: {ready}, answers: {answers}: {}", process.log_text());
            match buffer[..told.unwrap().unwrap()].trim_ascii() {
                b"READY=1" => ready = true,
                b"WATCHDOG=1" if ready => answers += 1,
                socket if socket.starts_with(b"FDSTORE") && !ready => {}
                // It comes from an earlier process, or is the first answer of this one.
                b"WATCHDOG=1" | b"STOPPING=1" if !ready => {}
                other => panic!("{}", String::from_utf8_lossy(other)),
            }
        }
    }

    /// Starts the agent with what is configured, and lets it go again.
    async fn starts(&self, what: &str) {
        let mut process = self.start();
        self.ready(&mut process).await;
        process.signal("TERM");
        assert_eq!(process.wait(SOON).unwrap(), Some(0), "{what}: {}", process.log_text());
    }

    /// Fails to start; gives the exit code and what it said.
    fn fails(&self) -> (Option<i32>, String) {
        let mut process = self.start();
        (process.wait(SOON).unwrap(), process.log_text())
    }
}

/// The files and directories of a host, into which the libraries are mounted.
fn skeleton(root: &Path) {
    for directory in
        ["usr/bin", "usr/lib", "usr/lib64", "dev", "etc/ssl", "proc", "run", "tmp", "var/lib", "var/log"]
    {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    for library in ["lib", "lib64"] {
        match fs::read_link(Path::new("/").join(library)) {
            Ok(target) => symlink(target, root.join(library)).unwrap(),
            Err(_) => fs::create_dir(root.join(library)).unwrap(),
        }
    }
    for device in ["null", "urandom"] {
        fs::write(root.join("dev").join(device), "").unwrap();
    }
    let accounts = [
        ("root", 0),
        ("master-agent", MASTER),
        ("node-agent", NODE),
        ("kube-apiserver", APISERVER),
        ("stranger", STRANGER),
    ];
    let table = |line: fn(&str, u32) -> String| accounts.map(|(name, id)| line(name, id)).concat();
    let etc = root.join("etc");
    let passwd = table(|name, id| format!("{name}:x:{id}:{id}::/nonexistent:/usr/sbin/nologin\n"));
    fs::write(etc.join("passwd"), passwd).unwrap();
    fs::write(etc.join("group"), table(|name, id| format!("{name}:x:{id}:\n"))).unwrap();
    fs::write(etc.join("hosts"), "127.0.0.1 localhost\n").unwrap();
    fs::write(etc.join("resolv.conf"), "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n").unwrap();
}

/// The block of YAML that follows a text in a page of the guide.
fn guide(page: &str, before: &str) -> String {
    let text = fs::read_to_string(deploy().join("guide").join(page)).unwrap();
    let rest = text.split_once(before).unwrap_or_else(|| panic!("{before} is not in {page}")).1;
    let block = rest.split_once("```yaml\n").unwrap().1;
    block.split_once("```").unwrap().0.to_owned()
}

/// Every file that the samples for the master name.
fn write_named_files(host: &Host<'_>) {
    let directory = host.config("");
    let ca = Authority::new("CA").unwrap();
    for name in
        ["client-ca", "apiserver-ca", "oidc-ca", "webhook-ca", "kubelet-ca", "target-ca", "collector-ca"]
    {
        fs::write(directory.join(format!("{name}.crt")), ca.pem()).unwrap();
    }
    ca.server(&directory, "tls", &["localhost"]).unwrap();
    for name in ["kubelet-client", "front-proxy-client", "collector-client"] {
        ca.client(&directory, name).unwrap();
    }
    let service_accounts = rcgen::KeyPair::generate().unwrap();
    let kubeconfig = "{apiVersion: v1, kind: Config, current-context: c,\n\
         clusters: [{name: c, cluster: {server: 'https://127.0.0.1:6444', certificate-authority: apiserver-ca.crt}}],\n\
         contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u, user: {token: t}}]}\n";
    let hash =
        "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    for (name, text) in [
        ("service-account.pub", service_accounts.public_key_pem()),
        ("bootstrap-tokens.csv", "abcdef.0123456789abcdef,,\"system:bootstrappers:workers\"\n".to_owned()),
        ("tokens.csv", "0123456789abcdef,sam,uid-7,\"group1,group2\"\n".to_owned()),
        ("rbac.yaml", role("page", "nonResourceURLs: [/agent/page], verbs: [get]", &[SAM])),
        ("socks5-users", format!("alice:{hash}\n")),
        ("collector-headers", "authorization: Bearer x\n".to_owned()),
        ("kubeconfig", kubeconfig.to_owned()),
    ] {
        fs::write(directory.join(name), text).unwrap();
    }
    keygen(&directory.join("id_ed25519")).unwrap();
    fs::copy(deploy().join("config/inventory.yaml"), directory.join("inventory.yaml")).unwrap();
    host.own();
}

#[test]
fn little_is_open_to_the_agents_and_the_units_verify() {
    for agent in ["master-agent", "node-agent"] {
        let file = unit(&format!("{agent}.service"));
        let output = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager"])
            .arg(&file)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let level = said.split_once("Overall exposure level for ").expect("a level").1;
        let level: f64 = level.split_whitespace().nth(1).unwrap().parse().unwrap();
        // NotifyAccess=all, which only processes of the agent itself can use, counts 0.2.
        assert!(level <= 1.4, "{said}");

        // With every drop-in that is for it.
        let dir = TempDir::new("units").unwrap();
        let text = fs::read_to_string(&file).unwrap();
        let here = text.replace(&format!("/usr/bin/{agent}"), &binary(agent).display().to_string());
        let copy = dir.path().join(file.file_name().unwrap());
        fs::write(&copy, here).unwrap();
        let drop_ins = dir.path().join(format!("{agent}.service.d"));
        fs::create_dir(&drop_ins).unwrap();
        for name in ["privileged-port.conf", "socket-group.conf"] {
            fs::copy(unit(name), drop_ins.join(name)).unwrap();
        }
        let output =
            Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&copy).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let ours: Vec<_> = said.lines().filter(|l| l.contains(agent) || l.contains(".conf")).collect();
        assert!(ours.is_empty() && output.status.success(), "{said}");

        // A check before the start would hide the exit code that is not to be tried again.
        for (setting, expected) in [
            ("ExecStartPre", None),
            ("Restart", Some("always")),
            ("RestartPreventExitStatus", Some("78")),
            ("StartLimitIntervalSec", Some("0")),
            ("WatchdogSec", Some("30s")),
            ("LimitCORE", Some("0")),
            ("CapabilityBoundingSet", Some("")),
            ("AmbientCapabilities", Some("")),
            ("PrivateUsers", None),
        ] {
            let found = text.lines().find_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
            assert_eq!(found, expected, "{setting} of {agent}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_sample_for_the_master_starts_under_its_unit() {
    let network = Namespace::new().unwrap();
    let host = Host::new("master-agent", &network, &[]);
    write_named_files(&host);
    let sample = fs::read_to_string(deploy().join("config/master-agent.yaml")).unwrap();
    let samples = [
        sample.clone(),
        guide("install.md", "Write `/etc/master-agent/master-agent.yaml`."),
        guide("front-end.md", "## Configure the front end"),
        guide("egress.md", "## Configure SOCKS5 and proxy URLs"),
        "http_connect:\n  unix: {path: /run/master-agent-egress/connect.sock}\n".to_owned(),
        "konnectivity:\n  unix: {path: /run/master-agent-egress/konnectivity.sock}\n".to_owned(),
    ];
    for text in &samples {
        host.configure("master-agent.yaml", text);
        host.starts(text).await;
    }

    host.configure("master-agent.yaml", sample);
    let mut process = host.start();
    host.ready(&mut process).await;
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    for line in ["CapPrm:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.lines().any(|l| l == line), "{line}: {status}");
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", process.pid())).unwrap();
    let core = limits.lines().find(|l| l.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
    // A caller without credentials leaves its line in the audit log, where the sample says.
    let asked = network
        .command("curl")
        .args(["-sk", "-o", "/dev/null", "-w", "%{http_code}", "https://127.0.0.1:6443/api/v1/pods"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&asked.stdout), "401");
    let audit = host.root().join("var/log/master-agent/audit.log");
    eventually("the audit log has the request", SOON, async || {
        fs::read_to_string(&audit).ok()?.contains("/api/v1/pods").then_some(())
    })
    .await;
    assert_eq!((mode(&audit), mode(audit.parent().unwrap())), (0o600, 0o700));

    // Each kind of caller has a directory, in which are its sockets and no others.
    for (directory, sockets) in [
        ("master-agent", &["admin.sock"][..]),
        ("master-agent-egress", &["connect.sock", "konnectivity.sock"]),
        ("master-agent-local", &["apiserver.sock"]),
        ("master-agent-people", &["proxy-urls.sock", "socks5.sock"]),
    ] {
        let directory = host.root().join("run").join(directory);
        assert_eq!(mode(&directory), 0o711, "{}", directory.display());
        let mut found: Vec<_> = fs::read_dir(&directory)
            .unwrap()
            .map(|f| f.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort();
        assert_eq!(found, sockets);
        for socket in sockets {
            let expected = if *socket == "admin.sock" { 0o600 } else { 0o660 };
            assert_eq!(mode(&directory.join(socket)), expected, "{socket}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_sample_for_a_node_starts_under_its_unit() {
    let network = Namespace::new().unwrap();
    // In a new network namespace the ports below 1024 are as on a host.
    let host = Host::new("node-agent", &network, &["privileged-port.conf"]);
    let sample = fs::read_to_string(deploy().join("config/node-agent.yaml")).unwrap();
    let short = guide("install.md", "Write `/etc/node-agent/node-agent.yaml`");
    let ca = Authority::new("CA").unwrap();
    fs::write(host.config("front-end-ca.crt"), ca.pem()).unwrap();
    ca.client(&host.config(""), "client").unwrap();
    host.configure("token", "abcdef.0123456789abcdef");
    host.configure("proxy-password", "secret\n");
    for text in [&sample, &short] {
        // It shows a certificate and a token, of which one is enough and both are a mistake.
        host.configure("node-agent.yaml", text.replace("  token_file: token", "  # token_file: token"));
        host.starts(text).await;
    }
    let socket = host.root().join("run/node-agent-local/front-end.sock");
    assert_eq!((mode(&socket), mode(socket.parent().unwrap())), (0o660, 0o711));

    // One that only calls home has no capability.
    let host = Host::new("node-agent", &network, &[]);
    let home = short.replace("listen: 0.0.0.0:22 ", "# listen").replace("# call_home", "call_home");
    host.configure("node-agent.yaml", &home);
    let mut process = host.start();
    host.ready(&mut process).await;
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(status.lines().any(|l| l == format!("{set}:\t0000000000000000")), "{status}");
    }
    drop(process);

    // It can't listen on port 22, and is told what is missing.
    host.configure("node-agent.yaml", &short);
    let (code, said) = host.fails();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("0.0.0.0:22") && said.contains("privileged-port.conf"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_exit_code_tells_mistakes_in_the_configuration_from_other_failures() {
    let network = Namespace::new().unwrap();
    for (agent, good) in [("master-agent", ""), ("node-agent", "call_home: ['127.0.0.1:2222']\n")] {
        let host = Host::new(agent, &network, &[]);
        let file = format!("{agent}.yaml");
        host.configure(&file, format!("{good}no_such_field: 1\n"));
        let (code, said) = host.fails();
        assert_eq!(code, Some(EX_CONFIG), "{said}");
        // A port that is taken may be free at the next start.
        let taken = network.command("python3").args(["-c", LISTEN, "9099"]).spawn().unwrap();
        let mut taken = Listener(taken);
        host.configure(&file, format!("{good}admin: {{listen: '127.0.0.1:9099'}}\n"));
        eventually("the port is taken", SOON, async || {
            let listening = network.command("ss").args(["-Hltn", "sport = 9099"]).output().unwrap();
            (!listening.stdout.is_empty()).then_some(())
        })
        .await;
        let (code, said) = host.fails();
        assert_eq!(code, Some(1), "{said}");
        taken.end();
    }
}

const LISTEN: &str = "import socket, sys, signal\n\
    taken = socket.create_server(('127.0.0.1', int(sys.argv[1])))\nsignal.pause()";

struct Listener(std::process::Child);

impl Listener {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.end();
    }
}

/// Sends a line to whoever comes.
async fn greet(address: Ipv4Addr) -> u16 {
    let listener = TcpListener::bind((address, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = socket.write_all(b"hello\n").await;
                let _ = socket.read_to_end(&mut Vec::new()).await;
            });
        }
    });
    port
}

/// Calls a socket with CONNECT as a user in groups, on the host or in a container that has one directory of it. Gives
/// the status and the first line behind it, or the error, and the files that the container has.
fn call(
    socket: &Path,
    target: &str,
    user: u32,
    groups: &str,
    container: Option<(&Path, &Path)>,
) -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/units/caller.py");
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "python3"])
        .arg(script)
        .args([&user.to_string(), groups])
        .arg(socket)
        .arg(target);
    if let Some((root, directory)) = container {
        command.arg(root).arg(directory);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// Both agents run under their units, with the layout of the defaults.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_given_the_sockets_for_egress_finds_no_others() {
    let network = Namespace::new().unwrap();
    let master = Host::new("master-agent", &network, &["socket-group.conf"]);
    let node = Host::new("node-agent", &network, &[]);
    let port = greet(network.outside).await;
    master.configure(
        "master-agent.yaml",
        "http_connect: {unix: {group: kube-apiserver}}\nkonnectivity: {unix: {}}\nsocks5: {unix: {}}\n\
         call_home: {listen: '127.0.0.1:2222'}\ninventory: inventory.yaml\n",
    );
    let inventory = format!("nodes: [{{name: n1, cidrs: [{}/32]}}]\n", network.outside);
    master.configure("inventory.yaml", inventory);
    let policy = format!("policy: {{allow: [{{name: target, to: {}, ports: {port}}}]}}\n", network.outside);
    node.configure("node-agent.yaml", format!("call_home: ['127.0.0.1:2222']\n{policy}"));

    let mut agent = master.start();
    master.ready(&mut agent).await;
    let line = master.run(&["token", "create", "--node", "n1", "--address", "127.0.0.1:2222"]);
    let words: Vec<_> = line.split_whitespace().skip(1).collect();
    node.run(&words);
    let mut node_agent = node.start();
    node.ready(&mut node_agent).await;
    eventually("the node is connected", SOON, async || {
        master.run(&["node", "list", "-o", "json"]).contains("\"state\":\"connected\"").then_some(())
    })
    .await;

    let target = format!("{}:{port}", network.outside);
    let run = master.root().join("run");
    let egress = run.join("master-agent-egress");
    let container = TempDir::new("container").unwrap();
    let inside = Path::new("/run/master-agent-egress/connect.sock");
    for (user, groups) in [(0, ""), (APISERVER, ""), (STRANGER, &APISERVER.to_string())] {
        let root = container.path().join(format!("{user}"));
        let said = call(inside, &target, user, groups, Some((&root, &egress)));
        let found = ["connect", "konnectivity"].map(|s| format!("found /run/master-agent-egress/{s}.sock"));
        let (answer, mut files) = (&said[..2], said[2..].to_vec());
        files.sort();
        assert_eq!(answer, ["200", "hello"], "as {user} of {groups}");
        // Only root lists the directory.
        assert_eq!(files, if user == 0 { found.to_vec() } else { Vec::new() }, "as {user}");
    }

    // On the host, the group of the egress sockets opens these and nothing else.
    let group = APISERVER.to_string();
    for (socket, expected) in [
        ("master-agent-egress/connect.sock", &["200", "hello"][..]),
        ("master-agent-egress/konnectivity.sock", &["EACCES"]),
        ("master-agent-people/socks5.sock", &["EACCES"]),
        ("master-agent/admin.sock", &["EACCES"]),
    ] {
        assert_eq!(call(&run.join(socket), &target, STRANGER, &group, None), expected, "{socket}");
    }
    // The agent's own group does not open the admin socket either, and a stranger nothing.
    let own = MASTER.to_string();
    assert_eq!(call(&run.join("master-agent/admin.sock"), &target, STRANGER, &own, None), ["EACCES"]);
    assert_eq!(call(&egress.join("connect.sock"), &target, STRANGER, "", None), ["EACCES"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_with_a_group_says_what_the_unit_lacks_for_it() {
    let network = Namespace::new().unwrap();
    let host = Host::new("master-agent", &network, &[]);
    host.configure("master-agent.yaml", "http_connect: {unix: {group: kube-apiserver}}\n");
    let (code, said) = host.fails();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("connect.sock") && said.contains("socket-group.conf"), "{said}");
}
