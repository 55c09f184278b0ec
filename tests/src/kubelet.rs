//! A kubelet's stand-in: HTTPS, a pod's log that a test writes, and commands with a fixed behaviour.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /healthz`, `GET /pods` | `ok`, a PodList with one pod |
//! | `GET /containerLogs/NS/POD/CONTAINER` | the log; with `?follow=true` on and on, line by line |
//! | `/exec/NS/POD/CONTAINER?command=…&input=1&output=1&error=1&tty=1` | runs a command |
//! | `/attach/NS/POD/CONTAINER?…` | the same as the command `cat` |
//! | `/portForward/NS/POD` | carries streams to ports of loopback |
//!
//! The last three are upgraded, as a real kubelet's are: to SPDY/3.1 with `v4.channel.k8s.io` or
//! `portforward.k8s.io`, or to WebSocket with `v5.channel.k8s.io` or `SPDY/3.1+portforward.k8s.io`.
//!
//! | command | does |
//! | --- | --- |
//! | `cat` | sends back what comes |
//! | `sha256` | the digest of what comes, once it has ended |
//! | `echo WORDS` | prints them |
//! | `stderr WORDS` | prints them to standard error |
//! | `exit N` | ends with that code |
//! | `hold` | prints `holding`, and ends with the client |

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::{self, HeaderName, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use proto_net::tasks::Tasks;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message, Utf8Bytes,
        handshake::derive_accept_key,
        protocol::{CloseFrame, Role, frame::coding::CloseCode},
    },
};

use crate::{
    http::parameters,
    pki::{Authority, server_config},
    port_forward::forward_ports,
    process::TempDir,
    spdy::{Session, Stream, Writer},
};

const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
/// For the streams that a client opens first.
const STREAMS: Duration = Duration::from_secs(10);
/// For a client to close after the end.
const CLOSE: Duration = Duration::from_secs(5);
/// Chunks that wait.
const QUEUE: usize = 8;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// Ends the channel that follows, in `v5.channel.k8s.io`.
const END: u8 = 255;

/// A close without a code is an error to kubectl.
const DONE: CloseFrame = CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::from_static("") };

type Body = BoxBody<Bytes, Infallible>;
type Upgraded = TokioIo<hyper::upgrade::Upgraded>;
type WebSocket = WebSocketStream<Upgraded>;

/// The server. It ends with its owner.
pub struct Kubelet {
    directory: TempDir,
    address: SocketAddr,
    server: Server,
    tasks: Tasks,
}

impl Kubelet {
    /// Listens on `address`, with a certificate of its own CA for these names and addresses.
    pub async fn start(address: SocketAddr, names: &[&str]) -> anyhow::Result<Self> {
        let directory = TempDir::new("kubelet")?;
        let authority = Authority::new("kubelet CA")?;
        std::fs::write(directory.path().join("ca.crt"), authority.pem())?;
        authority.server(directory.path(), "kubelet", names)?;
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("can't listen on {address}"))?;
        let address = listener.local_addr()?;
        let acceptor = TlsAcceptor::from(server_config(directory.path(), "kubelet")?);
        let tasks = Tasks::new();
        let server = Server {
            log: watch::Sender::new(Vec::new()),
            asked: Arc::default(),
            open: Arc::default(),
            tasks: tasks.clone(),
        };
        tasks.spawn(server.clone().serve(listener, acceptor));
        Ok(Self { directory, address, server, tasks })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    pub fn ca(&self) -> PathBuf {
        self.path().join("ca.crt")
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Appends a line to the log of every container; those who follow get it at once.
    pub fn log(&self, line: &str) {
        self.server.log.send_modify(|lines| lines.push(format!("{line}\n").into()));
    }

    /// Logs that are followed, and upgraded connections.
    pub fn open(&self) -> usize {
        self.server.open.load(Ordering::SeqCst)
    }

    /// All requests so far: `METHOD /PATH?QUERY`, and the protocol behind it for an upgrade.
    pub fn asked(&self) -> Vec<String> {
        self.server.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

/// The state that all connections share.
#[derive(Clone)]
struct Server {
    log: watch::Sender<Vec<Bytes>>,
    asked: Arc<Mutex<Vec<String>>>,
    open: Arc<AtomicUsize>,
    tasks: Tasks,
}

/// Counts as open for as long as it lives.
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The protocols that connections can be upgraded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Spdy(&'static str),
    WebSocket(&'static str),
}

impl Protocol {
    const EXEC: [Self; 2] = [Self::Spdy("v4.channel.k8s.io"), Self::WebSocket("v5.channel.k8s.io")];
    const PORT_FORWARD: [Self; 2] =
        [Self::Spdy("portforward.k8s.io"), Self::WebSocket("SPDY/3.1+portforward.k8s.io")];

    /// The first of these that the client offers.
    fn negotiate(supported: [Self; 2], request: &Request<Incoming>) -> Option<Self> {
        let has = |name: &HeaderName, wanted: &str| {
            let values = request.headers().get_all(name).iter().filter_map(|value| value.to_str().ok());
            values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(wanted))
        };
        supported.into_iter().find(|protocol| match protocol {
            Self::Spdy(name) => has(&header::UPGRADE, "SPDY/3.1") && has(&STREAM_PROTOCOL, name),
            Self::WebSocket(name) => {
                has(&header::UPGRADE, "websocket") && has(&header::SEC_WEBSOCKET_PROTOCOL, name)
            }
        })
    }

    fn accept(self, request: &Request<Incoming>) -> Response<Body> {
        let mut response = text(StatusCode::SWITCHING_PROTOCOLS, "");
        let headers = response.headers_mut();
        headers.remove(header::CONTENT_TYPE);
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        match self {
            Self::Spdy(name) => {
                headers.insert(header::UPGRADE, HeaderValue::from_static("SPDY/3.1"));
                headers.insert(STREAM_PROTOCOL, HeaderValue::from_static(name));
            }
            Self::WebSocket(name) => {
                let key = request.headers().get(header::SEC_WEBSOCKET_KEY);
                let key = derive_accept_key(key.map_or(b"", HeaderValue::as_bytes));
                headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
                headers
                    .insert(header::SEC_WEBSOCKET_ACCEPT, key.parse().expect("base64 is a header's value"));
                headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
            }
        }
        response
    }
}

impl Server {
    async fn serve(self, listener: TcpListener, acceptor: TlsAcceptor) {
        loop {
            let Ok((socket, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let _ = socket.set_nodelay(true);
            let (server, acceptor) = (self.clone(), acceptor.clone());
            self.tasks.spawn(async move {
                let Ok(socket) = acceptor.accept(socket).await else { return };
                let service = service_fn(|request| {
                    let answer = server.answer(request);
                    async move { Ok::<_, Infallible>(answer) }
                });
                let connection = http1::Builder::new().serve_connection(TokioIo::new(socket), service);
                // A client that leaves is not the server's failure.
                let _ = connection.with_upgrades().await;
            });
        }
    }

    fn answer(&self, mut request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let query = parameters(request.uri().query().unwrap_or_default());
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        let supported = match (request.method(), segments.as_slice()) {
            (&Method::GET | &Method::POST, ["exec" | "attach", _, _, _]) => Protocol::EXEC,
            (&Method::GET | &Method::POST, ["portForward", _, _]) => Protocol::PORT_FORWARD,
            _ => {
                self.record(&request, None);
                return match (request.method(), segments.as_slice()) {
                    (&Method::GET, ["healthz"]) => text(StatusCode::OK, "ok"),
                    (&Method::GET, ["pods"]) => response(StatusCode::OK, "application/json", full(PODS)),
                    (&Method::GET, ["containerLogs", _, _, _]) => self.container_log(&query),
                    _ => text(StatusCode::NOT_FOUND, "no such path\n"),
                };
            }
        };
        let protocol = Protocol::negotiate(supported, &request);
        self.record(&request, protocol);
        let Some(protocol) = protocol else {
            let message = format!("unable to upgrade: one of {supported:?} is needed\n");
            return response(StatusCode::BAD_REQUEST, "text/plain", full(message));
        };
        let response = protocol.accept(&request);
        let upgrade = hyper::upgrade::on(&mut request);
        let open = self.open();
        let exec = Exec::new(segments[0], &query);
        self.tasks.spawn(async move {
            let socket = TokioIo::new(upgrade.await?);
            // A client that leaves is not the server's failure.
            let _ = match protocol {
                Protocol::Spdy("portforward.k8s.io") => forward_ports(Session::new(socket)).await,
                Protocol::Spdy(_) => exec.over_spdy(Session::new(socket)).await,
                Protocol::WebSocket("v5.channel.k8s.io") => {
                    exec.over_websocket(websocket(socket).await).await
                }
                Protocol::WebSocket(_) => forward_ports(Session::new(tunnel(websocket(socket).await))).await,
            };
            drop(open);
            Ok::<_, hyper::Error>(())
        });
        response
    }

    fn record(&self, request: &Request<Incoming>, protocol: Option<Protocol>) {
        let target = request.uri().path_and_query().map_or("", |target| target.as_str());
        let mut line = format!("{} {target}", request.method());
        match protocol {
            Some(Protocol::Spdy(name)) => line += &format!(" SPDY/3.1 {name}"),
            Some(Protocol::WebSocket(name)) => line += &format!(" websocket {name}"),
            None => {}
        }
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    fn open(&self) -> Open {
        self.open.fetch_add(1, Ordering::SeqCst);
        Open(self.open.clone())
    }

    fn container_log(&self, query: &[(String, String)]) -> Response<Body> {
        let value = |name: &str| query.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
        let mut log = self.log.subscribe();
        let all = log.borrow_and_update().clone();
        let tail = value("tailLines").and_then(|n| n.parse().ok()).unwrap_or(all.len());
        let first = all.len().saturating_sub(tail);
        if value("follow") != Some("true") {
            return response(StatusCode::OK, "text/plain", full(all[first..].concat()));
        }
        let lines =
            futures_util::stream::unfold((log, first, self.open()), |(mut log, next, open)| async move {
                let line = log.wait_for(|lines| lines.len() > next).await.ok()?[next].clone();
                Some((Ok(Frame::data(line)), (log, next + 1, open)))
            });
        response(StatusCode::OK, "text/plain", BodyExt::boxed(StreamBody::new(Box::pin(lines))))
    }
}

const PODS: &str = r#"{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[{"metadata":{"name":"web","namespace":"default"},"spec":{"nodeName":"n1","containers":[{"name":"c","image":"stand-in"}]},"status":{"phase":"Running"}}]}"#;

/// A command, and the streams that it is to have.
struct Exec {
    command: Vec<String>,
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

impl Exec {
    fn new(verb: &str, query: &[(String, String)]) -> Self {
        let is_set = |name: &str| query.iter().any(|(n, value)| n == name && value == "1");
        let command =
            query.iter().filter(|(name, _)| name == "command").map(|(_, word)| word.clone()).collect();
        Self {
            command: if verb == "attach" { vec!["cat".to_owned()] } else { command },
            stdin: is_set("input"),
            stdout: is_set("output"),
            // A terminal has no standard error of its own.
            stderr: is_set("error") && !is_set("tty"),
            tty: is_set("tty"),
        }
    }

    async fn over_spdy(self, mut session: Session) -> anyhow::Result<()> {
        let wanted = [
            ("error", true),
            ("stdin", self.stdin),
            ("stdout", self.stdout),
            ("stderr", self.stderr),
            ("resize", self.tty),
        ];
        let mut streams = Vec::<Stream>::new();
        while streams.len() < wanted.iter().filter(|(_, wanted)| *wanted).count() {
            let stream = tokio::time::timeout(STREAMS, session.accept()).await?.context("too few streams")?;
            let kind = stream.header("streamtype");
            if !wanted.contains(&(kind, true)) || streams.iter().any(|s| s.header("streamtype") == kind) {
                bail!("a stream of type {kind:?} was not asked for");
            }
            streams.push(stream);
        }
        let mut take = |kind| {
            let index = streams.iter().position(|stream| stream.header("streamtype") == kind)?;
            Some(streams.swap_remove(index))
        };
        let error = take("error").context("no error stream")?;
        let stdin = take("stdin").map_or_else(nothing, |stream| stream.reader);
        let (stdout, stderr) = (take("stdout").map(|s| s.writer), take("stderr").map(|s| s.writer));
        let mut output = Output::Spdy { stdout, stderr };
        // The session's end ends standard input, and with it every command but one that holds.
        let status = tokio::select! {
            status = self.run(stdin, &mut output) => status?,
            _ = session.accept() => bail!("the client has left"),
        };
        if let Output::Spdy { stdout, stderr } = output {
            for writer in [stdout, stderr].into_iter().flatten() {
                writer.finish().await?;
            }
        }
        error.writer.write(status.to_string().into()).await?;
        error.writer.finish().await?;
        session.close().await;
        Ok(())
    }

    async fn over_websocket(self, socket: WebSocket) -> anyhow::Result<()> {
        let (mut sink, source) = socket.split();
        // Clients may wait for the first message, which says that all is ready.
        let first = [(STDOUT, self.stdout), (STDERR, self.stderr), (ERROR, true)];
        let first = first.iter().find(|(_, wanted)| *wanted).map_or(ERROR, |(channel, _)| *channel);
        sink.send(Message::Binary(Bytes::copy_from_slice(&[first]))).await?;
        let (sender, stdin) = mpsc::channel(QUEUE);
        let reading = read_websocket(source, sender);
        tokio::pin!(reading);
        let mut output = Output::WebSocket(sink);
        let status = tokio::select! {
            status = self.run(stdin, &mut output) => status?,
            end = &mut reading => bail!("the client has left: {end:?}"),
        };
        output.write(ERROR, status.to_string().into()).await?;
        if let Output::WebSocket(mut sink) = output {
            sink.send(Message::Close(Some(DONE))).await?;
        }
        let _ = tokio::time::timeout(CLOSE, reading).await;
        Ok(())
    }

    /// Gives the Status that the client is told.
    async fn run(&self, mut stdin: mpsc::Receiver<Bytes>, output: &mut Output) -> anyhow::Result<Value> {
        let words: Vec<&str> = self.command.iter().map(String::as_str).collect();
        match words.as_slice() {
            ["cat"] => {
                while let Some(bytes) = stdin.recv().await {
                    output.write(STDOUT, bytes).await?;
                }
            }
            ["sha256"] => {
                let mut digest = Sha256::new();
                while let Some(bytes) = stdin.recv().await {
                    digest.update(&bytes);
                }
                output.write(STDOUT, format!("{}\n", hex(&digest.finalize())).into()).await?;
            }
            ["echo", words @ ..] => output.write(STDOUT, format!("{}\n", words.join(" ")).into()).await?,
            ["stderr", words @ ..] => output.write(STDERR, format!("{}\n", words.join(" ")).into()).await?,
            ["exit", code] => return Ok(exit_status(code)),
            ["hold"] => {
                output.write(STDOUT, "holding\n".into()).await?;
                std::future::pending::<()>().await;
            }
            _ => {
                let message = format!("no such command: {words:?}");
                return Ok(
                    json!({"metadata": {}, "status": "Failure", "reason": "InternalError", "message": message}),
                );
            }
        }
        Ok(json!({"metadata": {}, "status": "Success"}))
    }
}

/// Where a command writes to.
enum Output {
    Spdy { stdout: Option<Writer>, stderr: Option<Writer> },
    WebSocket(SplitSink<WebSocket, Message>),
}

impl Output {
    /// Output for a stream that was not asked for is dropped.
    async fn write(&mut self, channel: u8, bytes: Bytes) -> anyhow::Result<()> {
        match self {
            Self::Spdy { stdout, stderr } => {
                let writer = if channel == STDERR { stderr } else { stdout };
                match writer {
                    Some(writer) => writer.write(bytes).await,
                    None => Ok(()),
                }
            }
            Self::WebSocket(sink) => {
                let message = [&[channel][..], &bytes].concat();
                Ok(sink.send(Message::Binary(message.into())).await?)
            }
        }
    }
}

fn nothing() -> mpsc::Receiver<Bytes> {
    mpsc::channel(1).1
}

fn exit_status(code: &str) -> Value {
    if code == "0" {
        return json!({"metadata": {}, "status": "Success"});
    }
    json!({
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": format!("command terminated with non-zero exit code: exit status {code}"),
        "details": {"causes": [{"reason": "ExitCode", "message": code}]},
    })
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn websocket(socket: Upgraded) -> WebSocket {
    WebSocketStream::from_raw_socket(socket, Role::Server, None).await
}

/// Passes standard input on; ends with the connection.
async fn read_websocket(
    mut source: SplitStream<WebSocket>,
    stdin: mpsc::Sender<Bytes>,
) -> anyhow::Result<()> {
    let mut stdin = Some(stdin);
    while let Some(message) = source.next().await {
        let Message::Binary(mut bytes) = message? else { continue };
        if bytes.is_empty() {
            bail!("a message without a channel");
        }
        let channel = bytes.split_to(1)[0];
        match (channel, bytes.as_ref(), &stdin) {
            // Data that nobody reads any more is dropped.
            (STDIN, [_, ..], Some(sender)) => drop(sender.send(bytes).await),
            (END, [STDIN], Some(_)) => stdin = None,
            (RESIZE, ..) | (STDIN, [], Some(_)) => {}
            _ => bail!("channel {channel}, {} bytes: not expected", bytes.len()),
        }
    }
    Ok(())
}

/// The bytes that a WebSocket's binary messages carry.
fn tunnel(socket: WebSocket) -> DuplexStream {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (mut sink, mut source) = socket.split();
    let (mut read, mut write) = tokio::io::split(far);
    tokio::spawn(async move {
        let up = async {
            while let Some(Ok(message)) = source.next().await {
                if let Message::Binary(bytes) = message {
                    write.write_all(&bytes).await?;
                }
            }
            write.shutdown().await
        };
        let down = async {
            let mut buffer = BytesMut::new();
            while read.read_buf(&mut buffer).await? > 0 {
                sink.send(Message::Binary(buffer.split().freeze())).await?;
            }
            sink.send(Message::Close(Some(DONE))).await?;
            anyhow::Ok(())
        };
        tokio::join!(up, down)
    });
    near
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed()
}

fn text(status: StatusCode, text: &'static str) -> Response<Body> {
    response(status, "text/plain", full(text))
}

fn response(status: StatusCode, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
