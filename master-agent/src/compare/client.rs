//! An HTTP/1.1 client for measurements over a path.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context as Cx, Poll},
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Either, Empty};
use hyper::{
    Request, StatusCode,
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::http1::SendRequest,
    header,
};
use hyper_util::rt::TokioIo;
use proto::Target;
use proto_net::tasks::Tasks;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use super::{
    path::{Path, Stream},
    target::{Scheme, Url},
};

/// The number of bytes in one frame of a body.
const BLOCK: usize = 64 * 1024;

type Outgoing = Either<Empty<Bytes>, Block>;

/// A client of one target, the same on every path.
pub(super) struct Client {
    pub url: Url,
    /// The target's address on the direct path.
    pub direct: Target,
    /// The configuration for `https`.
    pub tls: Arc<ClientConfig>,
    /// The header with the bearer token.
    pub authorization: Option<header::HeaderValue>,
    block: Bytes,
}

/// A kept connection.
pub(super) struct Connection {
    sender: SendRequest<Outgoing>,
    _driver: Tasks,
}

/// A new connection with one request.
pub(super) struct First {
    pub connection: Connection,
    pub connected: Duration,
    pub first_byte: Duration,
    pub status: StatusCode,
}

impl Client {
    pub(super) fn new(
        url: Url,
        direct: Target,
        tls: Arc<ClientConfig>,
        authorization: Option<header::HeaderValue>,
    ) -> Self {
        let mut block = vec![0; BLOCK];
        // The bytes are random, so that nothing on the path can compress them.
        rand::fill(block.as_mut_slice());
        Self { url, direct, tls, authorization, block: block.into() }
    }

    /// Connects until the target has accepted. Returns the time that it took.
    pub(super) async fn connect(&self, path: &Path) -> anyhow::Result<Duration> {
        Ok(path.open(&self.url.target, &self.direct).await?.1)
    }

    /// Connects and makes the first request.
    pub(super) async fn first(&self, path: &Path) -> anyhow::Result<First> {
        let began = Instant::now();
        let (mut connection, connected) = self.open(path).await?;
        let request = self.request(&self.url.path, None)?;
        let response = connection.sender.send_request(request).await.context("no response")?;
        let first_byte = began.elapsed();
        let status = response.status();
        drain(response.into_body(), None).await?;
        Ok(First { connection, connected, first_byte, status })
    }

    /// Opens a connection for requests. Also returns how long the path took.
    pub(super) async fn open(&self, path: &Path) -> anyhow::Result<(Connection, Duration)> {
        let (stream, connected) = path.open(&self.url.target, &self.direct).await?;
        let stream: Stream = match self.url.scheme {
            Scheme::Http | Scheme::Tcp => stream,
            Scheme::Https => {
                let name = ServerName::try_from(self.url.target.host.to_string())?;
                let tls = TlsConnector::from(self.tls.clone()).connect(name, stream).await;
                Box::new(tls.context("TLS with the target")?)
            }
        };
        let (sender, driver) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let tasks = Tasks::new();
        tasks.spawn(driver);
        Ok((Connection { sender, _driver: tasks }, connected))
    }

    fn request(&self, path: &str, body: Option<u64>) -> anyhow::Result<Request<Outgoing>> {
        let mut request = Request::builder()
            .method(if body.is_some() { hyper::Method::POST } else { hyper::Method::GET })
            .uri(path)
            .header(header::HOST, self.url.target.to_string())
            .header(header::USER_AGENT, "master-agent-compare");
        if let Some(value) = &self.authorization {
            request = request.header(header::AUTHORIZATION, value);
        }
        Ok(request.body(match body {
            None => Either::Left(Empty::new()),
            Some(left) => Either::Right(Block { block: self.block.clone(), left }),
        })?)
    }

    /// Makes a request on a kept connection. Returns the time until the end of the response.
    pub(super) async fn get(&self, connection: &mut Connection) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let request = self.request(&self.url.path, None)?;
        let response = connection.sender.send_request(request).await.context("no response")?;
        drain(response.into_body(), None).await?;
        connection.sender.ready().await?;
        Ok(began.elapsed())
    }

    /// Requests `path` repeatedly and counts the received bytes, until the future is dropped or a request fails.
    pub(super) async fn download(
        &self,
        connection: &mut Connection,
        path: &str,
        count: &AtomicU64,
    ) -> anyhow::Result<Infallible> {
        loop {
            let request = self.request(path, None)?;
            let response = connection.sender.send_request(request).await.context("no response")?;
            expect_success(response.status(), path)?;
            let bytes = drain(response.into_body(), Some(count)).await?;
            anyhow::ensure!(bytes > 0, "{path} has no body");
            connection.sender.ready().await?;
        }
    }

    /// Sends this number of bytes to `path`, and waits for the response.
    pub(super) async fn upload(
        &self,
        connection: &mut Connection,
        path: &str,
        bytes: u64,
    ) -> anyhow::Result<()> {
        let request = self.request(path, Some(bytes))?;
        let response = connection.sender.send_request(request).await.context("no response")?;
        expect_success(response.status(), path)?;
        drain(response.into_body(), None).await?;
        Ok(connection.sender.ready().await?)
    }
}

fn expect_success(status: StatusCode, path: &str) -> anyhow::Result<()> {
    anyhow::ensure!(status.is_success(), "{path} is answered with {status}");
    Ok(())
}

async fn drain(mut body: Incoming, count: Option<&AtomicU64>) -> anyhow::Result<u64> {
    let mut all = 0;
    while let Some(frame) = body.frame().await {
        let bytes = frame.context("the response was truncated")?.data_ref().map_or(0, Bytes::len) as u64;
        all += bytes;
        if let Some(count) = count {
            count.fetch_add(bytes, Relaxed);
        }
    }
    Ok(all)
}

/// A body that repeats one block up to a number of bytes.
pub(super) struct Block {
    block: Bytes,
    left: u64,
}

impl Body for Block {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Cx<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let bytes = self.left.min(self.block.len() as u64);
        self.left -= bytes;
        let frame = |bytes| Frame::data(self.block.slice(..bytes as usize));
        Poll::Ready((bytes > 0).then(|| Ok(frame(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
