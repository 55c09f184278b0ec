//! `master-agent compare` reports the differences that exist, and none that do not.

use std::{net::SocketAddr, path::Path, process::Command, time::Duration};

use master_agent::compare::report::{Figure, Name, Ratio, Report, TargetReport};
use tests::{
    client::read_head,
    cluster::{Cluster, Kind, Options, SOON, binary},
    process::{Process, eventually, free_port},
    relay::Relay,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};

/// The delay that a relay adds, both directions together, and the bytes that it passes in a second.
const DELAY: Duration = Duration::from_millis(20);
const RATE: f64 = 50e6;

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

async fn relay(to: u16) -> Relay {
    Relay::start(local(0), local(to), DELAY / 2, Some(RATE)).await.unwrap()
}

/// Something to ask on every node, and the nodes.
async fn world(nodes: &[(&str, Kind)], change: impl FnOnce(&mut Options)) -> (Cluster, u16, Process) {
    let port = free_port();
    let log = std::env::temp_dir().join(format!("compare-{}-{port}.log", std::process::id()));
    let mut command = Command::new(binary("standin"));
    command.arg("--pod").arg(format!("127.0.0.1:{port}"));
    let target = Process::start("standin", &mut command, &log).unwrap();
    eventually("the target listens", SOON, async || TcpStream::connect(local(port)).await.ok()).await;
    std::fs::remove_file(log).unwrap();
    let mut options = Options {
        nodes: nodes.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect(),
        targets: vec![local(port)],
        ..Options::default()
    };
    change(&mut options);
    (Cluster::start(options).await.unwrap(), port, target)
}

/// Runs it; gives whether it succeeded, its output and its errors.
async fn compare(cluster: &Cluster, args: &[&str]) -> (bool, String, String) {
    let mut command = tokio::process::Command::new(binary("master-agent"));
    command.arg("--config").arg(cluster.path().join("master.yaml")).arg("compare").args(args);
    let output = command.current_dir(cluster.path()).kill_on_drop(true).output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

async fn report(cluster: &Cluster, args: &[&str]) -> Report {
    let (ok, out, errors) = compare(cluster, &[args, &["-o", "json"]].concat()).await;
    assert!(ok, "{errors}\n{out}");
    serde_json::from_str(&out).unwrap()
}

fn figure(target: &TargetReport, name: Name, connections: usize) -> &Figure {
    let found = target.figures.iter().find(|f| f.name == name && f.connections == connections);
    found.unwrap_or_else(|| panic!("no {name:?} x{connections} in {target:?}"))
}

fn median(target: &TargetReport, name: Name, path: usize) -> f64 {
    figure(target, name, 1).paths[path].as_ref().unwrap().p50
}

/// Measures a relay's delay and throughput by other means than `compare`'s own.
async fn seen(relay: &Relay, straight: u16) -> (Duration, f64) {
    let mut times = [Vec::new(), Vec::new()];
    for (at, address) in [local(straight), relay.address].into_iter().enumerate() {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        for _ in 0..100 {
            let began = Instant::now();
            socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            read_head(&mut socket).await.unwrap();
            socket.read_exact(&mut [0; 2]).await.unwrap();
            times[at].push(began.elapsed());
        }
        times[at].sort();
    }
    let mut socket = TcpStream::connect(relay.address).await.unwrap();
    socket.write_all(b"GET /bytes/60000000 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    read_head(&mut socket).await.unwrap();
    let (began, mut buffer, mut bytes) = (Instant::now(), vec![0; 1 << 20], 0);
    while bytes < 60_000_000 {
        bytes += socket.read(&mut buffer).await.unwrap();
    }
    (times[1][50] - times[0][50], bytes as f64 / began.elapsed().as_secs_f64())
}

fn within(found: f64, expected: f64, what: &str) {
    assert!((found / expected - 1.0).abs() <= 0.1, "{what}: {found} is not within 10 % of {expected}");
}

/// On the direct path alone, and on the tunnel's alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_relay_adds_to_one_path_is_reported() {
    let home = free_port();
    let slow_home = relay(home).await;
    let (cluster, port, _target) = world(&[("n1", Kind::Dialled), ("n2", Kind::CallHome)], |options| {
        options.call_home_port = Some(home);
        options.call_home = Some(slow_home.address);
    })
    .await;
    let slow = relay(port).await;
    let (added, rate) = seen(&slow, port).await;
    // Its timers are of whole milliseconds, and rounded up.
    assert!(added >= DELAY && added < DELAY + Duration::from_millis(10), "{added:?}");
    let target = format!("http://127.0.0.1:{port}/healthz");
    let direct = format!("127.0.0.1:{port}=127.0.0.1:{}", slow.address.port());
    let args =
        ["--download", "/bytes/1000000000", "--upload", "/upload", "--rounds", "4", "--requests", "25"];
    let on_direct =
        report(&cluster, &[&["--target", &target, "--direct", &direct][..], &args].concat()).await;

    let [on_direct] = &on_direct.targets[..] else { panic!("{on_direct:?}") };
    assert_eq!([&*on_direct.paths[0].name, &*on_direct.paths[1].name], ["direct", "tunnel"]);
    let request = |target: &TargetReport, path| median(target, Name::Request, path) / 1e6;
    within(request(on_direct, 0) - request(on_direct, 1), added.as_secs_f64(), "a request");
    within(median(on_direct, Name::Download, 0) * 1e6, rate, "a download");
    within(median(on_direct, Name::Upload, 0) * 1e6, rate, "an upload");
    let ratio = figure(on_direct, Name::Download, 1).ratios[1].unwrap();
    within(
        ratio.median,
        median(on_direct, Name::Download, 1) / median(on_direct, Name::Download, 0),
        "the ratio",
    );
    assert!(
        on_direct.paths.iter().all(|path| path.failures.is_empty() && path.status == Some(200)),
        "{on_direct:?}"
    );

    // 127.0.0.2 is n2's, whose tunnel is slow; nothing listens there, so its own policy's address is not enough.
    let target = format!("http://n2:{port}/healthz");
    let (ok, out, errors) = compare(&cluster, &["--target", &target, "--rounds", "1"]).await;
    assert!(!ok && errors.contains("nothing could be measured"), "{out}{errors}");
    assert!(out.contains("tunnel: CONNECT at unix:") && out.contains("CLOSED: "), "{out}");
}

/// Two ways that are one: there is no difference, and none is seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paths_that_are_the_same_are_reported_as_the_same() {
    let (cluster, port, _target) = world(&[("n1", Kind::Dialled)], |_| {}).await;
    let same = relay(port).await;
    let target = format!("http://127.0.0.1:{port}/healthz");
    let direct = format!("127.0.0.1:{port}=127.0.0.1:{}", same.address.port());
    let via = format!("ssh-L=tcp:127.0.0.1:{}", same.address.port());
    let page = cluster.path().join("page.html");
    let args = ["--target", &target, "--direct", &direct, "--via", &via, "--html", page.to_str().unwrap()];
    let work =
        ["--download", "/bytes/1000000000", "--upload", "/upload", "--rounds", "6", "--connections", "2"];
    let report = report(&cluster, &[&args[..], &work].concat()).await;
    let [target] = &report.targets[..] else { panic!("{report:?}") };
    for figure in &target.figures {
        // Two sockets of loopback are no path worth measuring.
        if figure.name != Name::Connect {
            let Ratio { median, .. } = figure.ratios[2].unwrap();
            within(median, 1.0, &format!("{:?} x{}", figure.name, figure.connections));
        }
    }
    assert_eq!(target.figures.len(), 9, "{target:?}");
    assert_eq!(target.node.as_ref().unwrap().as_str(), "n1");
    page_has(&page, &report);
}

/// Every value that the table would show.
fn page_has(page: &Path, report: &Report) {
    let page = std::fs::read_to_string(page).unwrap();
    for figure in report.targets.iter().flat_map(|target| &target.figures) {
        for summary in figure.paths.iter().flatten() {
            assert!(page.contains(&figure.unit.show(summary.p50)), "{summary:?}");
        }
        for ratio in figure.ratios.iter().flatten() {
            assert!(page.contains(&ratio.show()), "{ratio:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closed_paths_wrong_arguments_and_other_proxies() {
    let (cluster, port, _target) = world(&[("n1", Kind::Dialled), ("n2", Kind::Sshd)], |_| {}).await;
    let target = format!("http://127.0.0.1:{port}/healthz");
    let closed = free_port();
    let direct = format!("127.0.0.1:{port}=127.0.0.1:{closed}");
    let quick = ["--rounds", "2", "--requests", "5", "--slice", "50ms"];
    let connect = format!("unix=unix:{}", cluster.path().join("connect.sock").display());
    let args = ["--target", &target, "--direct", &direct, "--via", &connect];
    let found = report(&cluster, &[&args[..], &quick].concat()).await;
    let [found] = &found.targets[..] else { panic!("{found:?}") };
    assert!(found.paths[0].closed.as_ref().unwrap().contains("can't connect to 127.0.0.1:"), "{found:?}");
    assert_eq!((found.paths[1].closed.as_ref(), found.paths[2].closed.as_ref()), (None, None));
    // Without the direct path, the tunnel is what others are compared with.
    let request = figure(found, Name::Request, 1);
    assert_eq!((request.paths[0].as_ref(), request.ratios[0], request.ratios[1]), (None, None, None));
    assert!(request.ratios[2].is_some());
    assert_eq!(found.not_measured.len(), 2, "{found:?}");

    let (ok, csv, errors) = compare(&cluster, &[&args[..], &quick, &["-o", "csv"]].concat()).await;
    assert!(ok, "{errors}");
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 1 + 1 + 2 * 5, "{csv}");
    let columns = lines[0].split(',').count();
    assert!(lines.iter().all(|line| line.split(',').count() == columns), "{csv}");
    let (ok, table, errors) = compare(&cluster, &[&args[..], &quick].concat()).await;
    assert!(
        ok && table.contains("direct: 127.0.0.1:") && table.contains("CLOSED: can't connect"),
        "{errors}{table}"
    );
    assert!(table.contains("request x16") && table.contains("/ tunnel"), "{table}");

    // A `tcp://` target is measured by its connections alone.
    let tcp = format!("tcp://127.0.0.1:{port}");
    let found = report(&cluster, &[&["--target", &tcp][..], &quick].concat()).await;
    let names: Vec<Name> = found.targets[0].figures.iter().map(|figure| figure.name).collect();
    assert_eq!(names, [Name::Connect]);

    for (args, said) in [
        (&["n9"][..], "the agent knows no node n9; it knows n1, n2"),
        (&["n1", "--target", &target], "no --target contains {node}"),
        (&["--target", "n1:1"], "write http://HOST:PORT/PATH"),
        (&["--direct", "n1"], "--direct n1: write HOST=HOST"),
        (&["--via", "x=ftp://a:1"], "write unix:PATH"),
        (&["--via", "tunnel=unix:/x"], "can't be a name"),
        (&["--via", "a=tcp:a:1"], "a forwarded port leads to one target, and there are 2"),
        (&["--download", "x y"], "is not a path"),
        (&["--rounds", "0"], "0 is not in 1..=1000"),
        (&["--ca", "/no/such/file"], "/no/such/file"),
        (&["--token-file", "/no/such/file"], "/no/such/file"),
    ] {
        let (ok, _, errors) = compare(&cluster, args).await;
        assert!(!ok && errors.contains(said), "{args:?}: {errors}");
    }
}
