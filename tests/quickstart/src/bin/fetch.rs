//! A small client for the HTTP CONNECT egress listeners. It sends one GET through one of them and prints one line of
//! JSON about it.

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use proto::Target;
use proto_net::tasks::Tasks;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::TlsConnector;

/// Bytes of a body that `--expect` looks at.
const BEGINNING: usize = 64 * 1024;

/// Sends CONNECT to an egress listener, then GET over HTTP or verified HTTPS; exits with 0 only on status 200.
///
/// Prints one line of JSON: "status" (of the target, or of the egress listener where that refused), "bytes" of the
/// body, "connect_ms" until the egress listener's answer, "total_ms", and "error", null if there is none.
#[derive(Parser)]
#[command(name = "fetch", version)]
struct Args {
    /// The egress listener: unix:PATH or tls:HOST:PORT.
    #[arg(long, value_name = "LISTENER")]
    via: String,
    /// The CA of the egress listener's certificate, PEM.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The client certificate to show the egress listener, PEM.
    #[arg(long, value_name = "FILE")]
    cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The CA of the target's certificate, PEM; needed for https.
    #[arg(long, value_name = "FILE")]
    target_ca: Option<PathBuf>,
    /// Fail unless the body has this text in its first 64 KiB.
    #[arg(long, value_name = "TEXT")]
    expect: Option<String>,
    /// How long everything may take, in seconds.
    #[arg(long, default_value_t = 20.0)]
    timeout: f64,
    /// http://HOST:PORT/PATH or https://HOST:PORT/PATH.
    url: hyper::Uri,
}

/// The facts so far, however the request ends.
#[derive(Default)]
struct Report {
    status: Option<u16>,
    bytes: u64,
    connected: Option<Duration>,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    // The random generator takes tens of milliseconds to start, once in a process: no part of the fetch.
    let _ = rustls::crypto::aws_lc_rs::default_provider().secure_random.fill(&mut [0; 32]);
    let (began, mut report) = (Instant::now(), Report::default());
    let limit = Duration::from_secs_f64(args.timeout.clamp(0.001, 86400.0));
    let result = match tokio::time::timeout(limit, fetch(&args, began, &mut report)).await {
        Ok(result) => result,
        Err(_) => Err(anyhow::anyhow!("not done within {}s", limit.as_secs_f64())),
    };
    let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
    println!(
        "{}",
        json!({
            "status": report.status,
            "bytes": report.bytes,
            "connect_ms": report.connected.map(ms),
            "total_ms": ms(began.elapsed()),
            "error": result.as_ref().err().map(|e| format!("{e:#}")),
        })
    );
    if result.is_ok() && report.status == Some(200) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn fetch(args: &Args, began: Instant, report: &mut Report) -> anyhow::Result<()> {
    let https = match args.url.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => bail!("{} is neither http://... nor https://...", args.url),
    };
    let host = args.url.host().context("the URL has no host")?;
    let port = args.url.port_u16().unwrap_or(if https { 443 } else { 80 });
    let mut socket = open(args).await?;
    let (status, reason) = connect(&mut socket, &format!("{host}:{port}")).await?;
    report.connected = Some(began.elapsed());
    if status != 200 {
        report.status = Some(status);
        bail!("the egress listener answered {status} {reason}");
    }
    let stream: Box<dyn Stream> = if https {
        let ca = args.target_ca.as_ref().context("https needs --target-ca")?;
        let config = tls(ca)?.with_no_client_auth();
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
        let tls = TlsConnector::from(Arc::new(config)).connect(name, socket).await;
        Box::new(tls.context("TLS with the target")?)
    } else {
        socket
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let tasks = Tasks::new();
    tasks.spawn(connection);
    let path = args.url.path_and_query().map_or("/", |p| p.as_str());
    let request =
        hyper::Request::get(path).header("host", format!("{host}:{port}")).body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await.context("no answer from the target")?;
    report.status = Some(response.status().as_u16());
    let mut body = response.into_body();
    let mut beginning = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.context("the answer was cut short")?;
        let data = frame.data_ref().map_or(&[][..], |data| data);
        report.bytes += data.len() as u64;
        beginning.extend(&data[..data.len().min(BEGINNING - beginning.len())]);
    }
    if report.status != Some(200) {
        bail!("the target answered {}", report.status.unwrap_or_default());
    }
    if let Some(text) = &args.expect
        && !String::from_utf8_lossy(&beginning).contains(text)
    {
        bail!("the answer does not have {text:?}");
    }
    Ok(())
}

async fn open(args: &Args) -> anyhow::Result<Box<dyn Stream>> {
    if let Some(path) = args.via.strip_prefix("unix:") {
        let socket = UnixStream::connect(path).await.with_context(|| format!("can't connect to {path}"))?;
        return Ok(Box::new(socket));
    }
    let Some(address) = args.via.strip_prefix("tls:") else {
        bail!("--via is unix:PATH or tls:HOST:PORT");
    };
    let address: Target = address.parse().with_context(|| format!("{address} is not HOST:PORT"))?;
    let need = "tls: needs --ca, --cert and --key";
    let chain = CertificateDer::pem_file_iter(args.cert.as_ref().context(need)?)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .context("--cert")?;
    let key = PrivateKeyDer::from_pem_file(args.key.as_ref().context(need)?).context("--key")?;
    let config = tls(args.ca.as_ref().context(need)?)?.with_client_auth_cert(chain, key)?;
    let socket = TcpStream::connect((address.host.to_string(), address.port))
        .await
        .with_context(|| format!("can't connect to {address}"))?;
    socket.set_nodelay(true)?;
    let name = ServerName::try_from(address.host.to_string())?;
    let tls = TlsConnector::from(Arc::new(config)).connect(name, socket).await;
    Ok(Box::new(tls.context("TLS with the egress listener")?))
}

type WantsClientCert = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;

fn tls(ca: &PathBuf) -> anyhow::Result<WantsClientCert> {
    let mut roots = RootCertStore::empty();
    for certificate in
        CertificateDer::pem_file_iter(ca).with_context(|| format!("can't read {}", ca.display()))?
    {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots))
}

/// Gives the status and its reason.
async fn connect(socket: &mut dyn Stream, target: &str) -> anyhow::Result<(u16, String)> {
    socket.write_all(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes()).await?;
    socket.flush().await?;
    // A byte at a time, so that nothing of what follows the head is taken.
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > 64 * 1024 {
            bail!("the egress listener's answer has no end");
        }
        head.push(socket.read_u8().await.context("the egress listener closed the connection")?);
    }
    let head = String::from_utf8_lossy(&head);
    let mut words = head.lines().next().unwrap_or_default().splitn(3, ' ');
    let (_version, status, reason) = (words.next(), words.next(), words.next());
    let status = status.and_then(|s| s.parse().ok()).context("the egress listener's answer is not HTTP")?;
    Ok((status, reason.unwrap_or_default().to_owned()))
}
