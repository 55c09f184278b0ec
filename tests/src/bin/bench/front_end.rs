//! Measures the front end beside nginx. Both are TLS proxies that ask for client certificates.

use std::{
    cell::Cell,
    collections::BTreeMap,
    net::SocketAddr,
    os::unix::process::CommandExt,
    path::Path as File,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustls::{ClientConfig, pki_types::ServerName};
use tests::{
    client::Stream,
    cluster::{Cluster, Options},
    openssh,
    pki::client_config,
    process::{Process, free_port},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::{
    paths::target_process,
    report::{Figure, Figures, by, median},
    work::try_all,
};

const CONNECTIONS: usize = 32;

/// A way to the upstream.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Way {
    Plain,
    Nginx,
    Ours,
    /// Ours, for a path that needs no authentication, without a certificate.
    Anonymous,
}

struct Site {
    upstream: SocketAddr,
    ours: SocketAddr,
    nginx: SocketAddr,
    with: Arc<ClientConfig>,
    without: Arc<ClientConfig>,
    cluster: Cluster,
    server: Nginx,
    _target: Process,
}

/// Requests a second on kept connections, what one costs, and the time of one on `connections` connections, of all ways
/// in turn.
pub async fn figures(n: usize, time: Duration, connections: usize) -> anyhow::Result<Figures> {
    let site = Site::start().await?;
    let ways = [Way::Plain, Way::Nginx, Way::Ours, Way::Anonymous];
    let mut rates: BTreeMap<Way, Vec<f64>> = BTreeMap::new();
    let mut costs: BTreeMap<Way, Vec<f64>> = BTreeMap::new();
    let mut times: BTreeMap<Way, Vec<f64>> = BTreeMap::new();
    for _ in 0..n {
        for way in ways {
            let (rate, cost) = site.rate(way, time).await?;
            rates.entry(way).or_default().push(rate);
            costs.entry(way).or_default().push(cost);
            // Where the kernel puts the processes differs from one connection to the next, and is half of the time.
            for _ in 0..connections {
                times.entry(way).or_default().push(site.one_by_one(way, 1000).await?);
            }
        }
    }
    let get = |values: &BTreeMap<Way, Vec<f64>>, way| median(values.get(&way).cloned().unwrap_or_default());
    let figure = |unit, direct, ours, ratio| Figure { unit, direct, ours, ratio, ..Figure::default() };
    let (plain, nginx, ours) = (get(&rates, Way::Plain), get(&rates, Way::Nginx), get(&rates, Way::Ours));
    let (anonymous, p50) = (get(&rates, Way::Anonymous), |way| get(&times, way));
    let cost = |way| get(&costs, way);
    let added = |way| p50(way).zip(p50(Way::Plain)).map(|(through, plain)| through - plain);
    Ok(Figures::from([
        ("front_end_rate_32_by_nginx", figure("1/s", plain, ours, by(ours, nginx))),
        (
            "front_end_added_p50_by_nginx",
            figure("us", None, added(Way::Ours), by(added(Way::Ours), added(Way::Nginx))),
        ),
        (
            "front_end_cpu_by_nginx",
            figure("us", None, cost(Way::Ours), by(cost(Way::Ours), cost(Way::Nginx))),
        ),
        ("front_end_rate_32_by_anonymous", figure("1/s", plain, ours, by(ours, anonymous))),
    ]))
}

impl Site {
    async fn start() -> anyhow::Result<Self> {
        let (port, ours, nginx) = (free_port(), free_port(), free_port());
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let master_config = format!(
            "log: {{level: warn}}\nfront_end:\n  listen: 127.0.0.1:{ours}\n  \
             certificates: [{{cert: server.crt, key: server.key}}]\n  \
             authentication: [{{x509: {{ca: ca.crt}}}}, {{anonymous: {{paths: [/]}}}}]\n  \
             upstream: {{servers: ['http://127.0.0.1:{port}']}}\n  \
             limits: {{requests_per_second_per_user: 1000000, requests_per_second_per_address: 1000000}}\n  \
             audit: {{file: audit.log}}\n"
        );
        let cluster = Cluster::start(Options { master_config, ..Options::default() }).await?;
        let path = cluster.path();
        let target = target_process(port, &path.join("target.log"))?;
        let server = start_nginx(path, nginx, port)?;
        openssh::wait_for_port(ours)?;
        let ca = path.join("ca.crt");
        Ok(Self {
            upstream: local(port),
            ours: local(ours),
            nginx: local(nginx),
            with: client_config(&ca, Some((path, "kube-apiserver")))?,
            without: client_config(&ca, None)?,
            server,
            _target: target,
            cluster,
        })
    }

    async fn connect(&self, way: Way) -> anyhow::Result<BufReader<Stream>> {
        let (address, config) = match way {
            Way::Plain => (self.upstream, None),
            Way::Nginx => (self.nginx, Some(&self.with)),
            Way::Ours => (self.ours, Some(&self.with)),
            Way::Anonymous => (self.ours, Some(&self.without)),
        };
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let Some(config) = config else { return Ok(BufReader::new(Box::new(socket))) };
        let tls =
            TlsConnector::from(config.clone()).connect(ServerName::try_from("localhost")?, socket).await?;
        Ok(BufReader::new(Box::new(tls)))
    }

    /// Seconds of user and system time that the proxies have had.
    fn cpu(&self, way: Way) -> f64 {
        match way {
            Way::Plain => 0.0,
            Way::Nginx => self.server.0.usage().cpu,
            Way::Ours | Way::Anonymous => self.cluster.master.usage().cpu,
        }
    }

    /// Requests a second, and microseconds of the proxy's user and system time for each.
    async fn rate(&self, way: Way, time: Duration) -> anyhow::Result<(f64, f64)> {
        let mut streams = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut stream = self.connect(way).await?;
            get(&mut stream).await?;
            streams.push(stream);
        }
        let (began, before) = (Instant::now(), self.cpu(way));
        let done = Cell::new(0u64);
        try_all(streams.into_iter().map(|mut stream| {
            let done = &done;
            async move {
                while began.elapsed() < time {
                    get(&mut stream).await?;
                    done.set(done.get() + 1);
                }
                anyhow::Ok(())
            }
        }))
        .await?;
        let done = done.get() as f64;
        Ok((done / began.elapsed().as_secs_f64(), (self.cpu(way) - before) * 1e6 / done))
    }

    /// Microseconds, the median.
    async fn one_by_one(&self, way: Way, count: usize) -> anyhow::Result<f64> {
        let mut stream = self.connect(way).await?;
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let began = Instant::now();
            get(&mut stream).await?;
            times.push(began.elapsed().as_secs_f64() * 1e6);
        }
        median(times).context("no times")
    }
}

async fn get(stream: &mut BufReader<Stream>) -> anyhow::Result<()> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n").await?;
    let (mut head, mut length) = (String::new(), None);
    loop {
        let begin = head.len();
        if stream.read_line(&mut head).await? == 0 {
            bail!("the connection ended after {head:?}");
        }
        let line = head[begin..].to_ascii_lowercase();
        match line.trim().strip_prefix("content-length:") {
            Some(value) => length = Some(value.trim().parse()?),
            None if line.trim().is_empty() => break,
            None => {}
        }
    }
    let mut body = vec![0; length.context("no Content-Length")?];
    stream.read_exact(&mut body).await?;
    if !head.starts_with("HTTP/1.1 200") || body != b"ok" {
        bail!("{head}");
    }
    Ok(())
}

/// Its first process must end the others, which would outlive it if it were killed.
struct Nginx(Process);

impl Drop for Nginx {
    fn drop(&mut self) {
        self.0.signal("TERM");
        if self.0.wait(Duration::from_secs(5)).is_err() {
            let group = format!("-{}", self.0.pid());
            let _ = Command::new("kill").args(["-s", "KILL", "--", &group]).status();
        }
    }
}

/// As many workers as there are cores, an access log, and connections to the upstream that are kept.
fn start_nginx(directory: &File, port: u16, upstream: u16) -> anyhow::Result<Nginx> {
    let at = |name: &str| directory.join(name).display().to_string();
    let config = format!(
        "daemon off; user root; pid {pid}; worker_processes auto; error_log {error};\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n  access_log {access};\n  keepalive_requests 100000000;\n  \
         upstream api {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 100000000; }}\n  \
         server {{\n    listen 127.0.0.1:{port} ssl; ssl_protocols TLSv1.2 TLSv1.3;\n    \
         ssl_certificate {cert}; ssl_certificate_key {key};\n    \
         ssl_client_certificate {ca}; ssl_verify_client on;\n    \
         location / {{\n      proxy_pass http://api; proxy_http_version 1.1; proxy_set_header Connection \"\";\n      \
         proxy_set_header X-Remote-User $ssl_client_s_dn; proxy_buffering off;\n    }}\n  }}\n}}\n",
        pid = at("nginx.pid"),
        error = at("nginx-error.log"),
        access = at("nginx-access.log"),
        cert = at("server.crt"),
        key = at("server.key"),
        ca = at("ca.crt"),
    );
    let file = directory.join("nginx.conf");
    std::fs::write(&file, config)?;
    // It ends with whoever started it, also when that is killed.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "nginx"]).process_group(0);
    command.arg("-c").arg(&file).arg("-e").arg(at("nginx-error.log"));
    let process = Nginx(Process::start("nginx", &mut command, &directory.join("nginx.log"))?);
    openssh::wait_for_port(port).context("nginx did not start")?;
    Ok(process)
}
