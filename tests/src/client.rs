//! Clients of the CONNECT egress listener.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::{Context, bail};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpStream, UnixStream},
};

use crate::load::completes;

/// A stream of either kind.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}
pub type Stream = Box<dyn Io>;

/// Room for a response's head, so that it is read at once.
const HEAD: usize = 1024;

/// An egress listener, and how to enter it.
#[derive(Clone, Debug)]
pub enum Door {
    Unix(PathBuf),
    Tls(SocketAddr, Arc<ClientConfig>),
}

/// An answer other than 200.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub status: u16,
    pub reason: String,
}

impl Door {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unix(_) => "unix",
            Self::Tls(..) => "tls",
        }
    }

    pub async fn enter(&self) -> anyhow::Result<Stream> {
        Ok(match self {
            Self::Unix(path) => Box::new(BufReader::with_capacity(HEAD, UnixStream::connect(path).await?)),
            Self::Tls(address, config) => {
                let socket = TcpStream::connect(address).await?;
                socket.set_nodelay(true)?;
                let name = ServerName::try_from("localhost")?;
                let tls = tokio_rustls::TlsConnector::from(config.clone()).connect(name, socket).await?;
                Box::new(BufReader::with_capacity(HEAD, tls))
            }
        })
    }

    /// Sends CONNECT; an answer other than 200 is the inner error.
    pub async fn connect(&self, target: &str) -> anyhow::Result<Result<Stream, Refused>> {
        let mut stream = self.enter().await?;
        stream.write_all(format!("CONNECT {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").as_bytes()).await?;
        let (status, reason) = read_head(&mut stream).await?;
        Ok(if status == 200 { Ok(stream) } else { Err(Refused { status, reason }) })
    }

    /// Like [`Self::connect`], where anything but 200 is a failure.
    pub async fn stream(&self, target: &str) -> anyhow::Result<Stream> {
        match self.connect(target).await? {
            Ok(stream) => Ok(stream),
            Err(refused) => bail!("CONNECT {target}: {} {}", refused.status, refused.reason),
        }
    }
}

/// Opens a stream to an echo server and proves that it works.
pub async fn echo(door: &Door, target: &str) -> Stream {
    let mut stream = door.stream(target).await.expect("a stream");
    stream.write_all(b"echo\n").await.expect("an open stream");
    still_echoes(&mut stream).await;
    stream
}

/// Proves that a stream of [`echo`] still works.
pub async fn still_echoes(stream: &mut Stream) {
    let sent: [u8; 16] = rand::random();
    stream.write_all(&sent).await.expect("an open stream");
    let mut got = [0; 16];
    completes("an echo", stream.read_exact(&mut got)).await.expect("an open stream");
    assert_eq!(got, sent);
}

/// The body of an answer to a plain GET; any status but 200 is an error.
pub async fn http_get(server: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut socket = TcpStream::connect(server).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let (status, reason) = read_head(&mut socket).await?;
    let mut body = String::new();
    socket.read_to_string(&mut body).await?;
    if status != 200 {
        bail!("GET {path}: {status} {reason}: {body}");
    }
    Ok(body)
}

/// Reads a response's head, byte for byte so that nothing of what follows is taken.
pub async fn read_head(stream: &mut (impl AsyncRead + Unpin + ?Sized)) -> anyhow::Result<(u16, String)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.context("no answer")?);
        if head.len() > 64 * 1024 {
            bail!("an endless head");
        }
    }
    let text = String::from_utf8_lossy(&head);
    let line = text.lines().next().unwrap_or_default();
    let mut words = line.splitn(3, ' ');
    if words.next() != Some("HTTP/1.1") {
        bail!("not HTTP/1.1: {line:?}");
    }
    let status = words.next().unwrap_or_default().parse().with_context(|| format!("no status: {line:?}"))?;
    Ok((status, words.next().unwrap_or_default().to_owned()))
}
