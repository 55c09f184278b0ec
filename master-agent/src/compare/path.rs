//! The paths to a target: through a tunnel, directly, and through other proxies.

use std::{
    fmt, io,
    path::PathBuf,
    pin::Pin,
    str::FromStr,
    sync::Arc,
    task::{self, Poll},
    time::Duration,
};

use anyhow::{Context, bail};
use bytes::BytesMut;
use proto::Target;
use proto_net::socket;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpStream, UnixStream},
    time::Instant,
};
use tokio_rustls::TlsConnector;

/// The longest head of a proxy's response to CONNECT, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// The end of a head.
const END: &[u8] = b"\r\n\r\n";

/// Any kind of connection.
pub(super) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Io for S {}
pub(super) type Stream = Box<dyn Io>;

/// One way to reach targets.
#[derive(Clone, Debug)]
pub(super) struct Path {
    /// The name in reports: `tunnel`, `direct`, or the one that `--via` gives.
    pub name: String,
    pub way: Way,
}

#[derive(Clone)]
pub(super) enum Way {
    Direct,
    /// A proxy with HTTP CONNECT, such as the agent's own egress listener.
    Connect(Proxy),
    /// A port that leads to a single target, as that of `ssh -L`.
    Forward(Target),
}

/// How a proxy is reached.
#[derive(Clone)]
pub(super) enum Proxy {
    Unix(PathBuf),
    Tcp(Target),
    Tls(Target, Arc<ClientConfig>),
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => f.write_str("straight"),
            Self::Connect(Proxy::Unix(path)) => write!(f, "CONNECT at unix:{}", path.display()),
            Self::Connect(Proxy::Tcp(proxy)) => write!(f, "CONNECT at http://{proxy}"),
            Self::Connect(Proxy::Tls(proxy, _)) => write!(f, "CONNECT at https://{proxy}"),
            Self::Forward(port) => write!(f, "forwarded at {port}"),
        }
    }
}

/// The argument of `--via`, before the files for TLS are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Via {
    pub name: String,
    pub address: ProxyAddress,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ProxyAddress {
    Unix(PathBuf),
    Http(Target),
    Https(Target),
    Forward(Target),
}

impl FromStr for ProxyAddress {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let target = |s: &str| s.trim_end_matches('/').parse::<Target>().map_err(|e| e.to_string());
        let (scheme, rest) = s.split_once(':').unwrap_or((s, ""));
        match (scheme, rest.strip_prefix("//")) {
            ("unix", _) if !rest.is_empty() => Ok(Self::Unix(rest.into())),
            ("http", Some(proxy)) => Ok(Self::Http(target(proxy)?)),
            ("https", Some(proxy)) => Ok(Self::Https(target(proxy)?)),
            ("tcp", port) => Ok(Self::Forward(target(port.unwrap_or(rest))?)),
            _ => {
                Err("write unix:PATH, http://HOST:PORT or https://HOST:PORT for a proxy, tcp:HOST:PORT for \
                      a port that is forwarded to the target"
                    .to_owned())
            }
        }
    }
}

impl FromStr for Via {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let (name, address) = s.split_once('=').ok_or("write NAME=WHERE")?;
        let good = !name.is_empty()
            && name.len() <= 32
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !good || ["tunnel", "direct"].contains(&name) {
            return Err(format!(
                "{name:?} can't be a name here: letters, digits, '-', '_' and '.', not \"tunnel\" and not \"direct\""
            ));
        }
        Ok(Self { name: name.to_owned(), address: address.parse()? })
    }
}

impl ProxyAddress {
    /// Returns the way through the proxy. `tls` creates the configuration for an https proxy.
    pub(super) fn way(&self, tls: impl FnOnce() -> anyhow::Result<Arc<ClientConfig>>) -> anyhow::Result<Way> {
        Ok(match self {
            Self::Unix(path) => Way::Connect(Proxy::Unix(path.clone())),
            Self::Http(proxy) => Way::Connect(Proxy::Tcp(proxy.clone())),
            Self::Https(proxy) => Way::Connect(Proxy::Tls(proxy.clone(), tls()?)),
            Self::Forward(port) => Way::Forward(port.clone()),
        })
    }
}

impl Path {
    /// Connects to `target`, whose address on the direct path is `direct`. Also returns how long that took.
    pub(super) async fn open(&self, target: &Target, direct: &Target) -> anyhow::Result<(Stream, Duration)> {
        let began = Instant::now();
        let stream: Stream = match &self.way {
            Way::Direct => Box::new(tcp(direct).await?),
            Way::Forward(port) => Box::new(tcp(port).await?),
            Way::Connect(proxy) => {
                let mut stream: Stream = match proxy {
                    Proxy::Unix(path) => {
                        let socket = UnixStream::connect(path).await;
                        Box::new(socket.with_context(|| format!("can't connect to {}", path.display()))?)
                    }
                    Proxy::Tcp(proxy) => Box::new(tcp(proxy).await?),
                    Proxy::Tls(proxy, config) => {
                        let name = ServerName::try_from(proxy.host.to_string())?;
                        let tls = TlsConnector::from(config.clone()).connect(name, tcp(proxy).await?).await;
                        Box::new(tls.with_context(|| format!("TLS with the proxy {proxy}"))?)
                    }
                };
                let begun = connect(&mut stream, target).await?;
                if begun.is_empty() { stream } else { Box::new(Begun { begun, stream }) }
            }
        };
        Ok((stream, began.elapsed()))
    }
}

async fn tcp(address: &Target) -> anyhow::Result<TcpStream> {
    let socket = TcpStream::connect((address.host.to_string(), address.port)).await;
    let socket = socket.with_context(|| format!("can't connect to {address}"))?;
    socket::tune(&socket);
    Ok(socket)
}

/// A connection whose first bytes have been read already.
struct Begun {
    begun: BytesMut,
    stream: Stream,
}

impl AsyncRead for Begun {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.begun.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let length = self.begun.len().min(buf.remaining());
        buf.put_slice(&self.begun.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Begun {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Asks a proxy for `target`. Returns the bytes of the target that have been read with the proxy's response.
async fn connect(stream: &mut Stream, target: &Target) -> anyhow::Result<BytesMut> {
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.context("the proxy closed the connection")?;
    stream.flush().await?;
    let mut head = BytesMut::with_capacity(1024);
    let length = loop {
        // Bytes that were searched before are searched again, which is cheap, as a proxy sends its head at once.
        if let Some(end) = head.windows(END.len()).position(|bytes| bytes == END) {
            break end + END.len();
        }
        if head.len() > MAX_HEAD {
            bail!("the proxy's response has no end");
        }
        let read = stream.read_buf(&mut head).await;
        if read.context("the proxy closed the connection without a response")? == 0 {
            bail!("the proxy closed the connection without a response");
        }
    };
    let begun = head.split_off(length);
    let head = String::from_utf8_lossy(&head);
    let line = head.lines().next().unwrap_or_default();
    let mut words = line.splitn(3, ' ');
    let (version, status, reason) = (words.next(), words.next(), words.next().unwrap_or_default());
    if !version.is_some_and(|v| v.starts_with("HTTP/1.")) {
        bail!("the proxy does not speak HTTP: {:?}", line.chars().take(100).collect::<String>());
    }
    match status {
        Some("200") => Ok(begun),
        status => bail!("the proxy answers {} {reason}", status.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn via_arguments_are_parsed() {
        let address = |s: &str| s.parse::<Via>().map(|via| via.address);
        let target = |s: &str| s.parse::<Target>().unwrap();
        assert_eq!(address("k=unix:/run/k.sock"), Ok(ProxyAddress::Unix("/run/k.sock".into())));
        assert_eq!(address("k=http://127.0.0.1:8131"), Ok(ProxyAddress::Http(target("127.0.0.1:8131"))));
        assert_eq!(address("k=https://[::1]:8131/"), Ok(ProxyAddress::Https(target("[::1]:8131"))));
        assert_eq!(address("ssh-L=tcp:localhost:9000"), Ok(ProxyAddress::Forward(target("localhost:9000"))));
        for text in [
            "",
            "k",
            "k=",
            "=unix:/x",
            "k=unix:",
            "k=http:127.0.0.1:1",
            "direct=unix:/x",
            "a b=unix:/x",
            "k=tcp:1",
        ] {
            assert!(text.parse::<Via>().is_err(), "{text:?}");
        }
    }

    /// Asks a proxy that responds with the parts of `answer` one after another. Returns what follows the response.
    async fn asked(answer: &[&'static [u8]]) -> Result<Vec<u8>, String> {
        let (near, mut far) = tokio::io::duplex(64 * 1024);
        let proxy = async {
            far.read_exact(&mut [0; 10]).await.unwrap();
            for part in answer {
                let _ = far.write_all(part).await;
                tokio::task::yield_now().await;
            }
            let mut rest = Vec::new();
            tokio::time::timeout(Duration::from_millis(200), far.read_to_end(&mut rest)).await.ok();
            drop(far);
        };
        let client = async {
            let mut stream: Stream = Box::new(near);
            let begun = connect(&mut stream, &"n1:1".parse().unwrap()).await.map_err(|e| format!("{e:#}"))?;
            let mut stream = Begun { begun, stream };
            let mut rest = vec![0; 4];
            stream.read_exact(&mut rest).await.unwrap();
            Ok(rest)
        };
        tokio::join!(proxy, client).1
    }

    #[tokio::test]
    async fn responses_of_proxies_are_understood() {
        let answers: [&[&'static [u8]]; 3] = [
            &[b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nrest"],
            &[b"HTTP/1.1 200 OK\r\nX: y\r\n\r", b"\nre", b"st"],
            &[b"HTTP/1.1 200 OK\r\n\r\n", b"rest"],
        ];
        for answer in answers {
            assert_eq!(asked(answer).await.unwrap(), b"rest", "{answer:?}");
        }
        for (answer, error) in [
            (&b"HTTP/1.1 403 policy\r\n\r\n"[..], "the proxy answers 403 policy"),
            (b"SSH-2.0-x\r\n\r\n", "the proxy does not speak HTTP: \"SSH-2.0-x\""),
            (b"HTTP/1.1 200 OK\r\n", "without a response"),
            (&[b'x'; 40_000], "has no end"),
        ] {
            let said = asked(&[answer]).await.unwrap_err();
            assert!(said.contains(error), "{said}");
        }
    }
}
