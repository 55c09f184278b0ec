//! What runs on a node in place of a kubelet and of pods: a small HTTP/1.1 server, plain or over TLS.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /` | `hello from NAME` |
//! | `GET /healthz` | `ok` |
//! | `GET /pods` | a PodList with one pod |
//! | `GET /bytes/N` | N bytes of [`Pattern`] |
//! | `POST /upload` | `{"bytes": N, "sha256": "HEX"}` of the request's body |

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use anyhow::Context as _;
use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Frame, Incoming, SizeHint},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use proto_net::tasks::Tasks;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

/// Bytes of a frame of [`Pattern`].
pub const BLOCK: usize = 64 * 1024;

/// A server; cheap to clone.
#[derive(Clone)]
pub struct Standin {
    name: Arc<str>,
    block: Bytes,
    tasks: Tasks,
}

impl Standin {
    /// `name` shows in the answers. Connections end when `tasks` is cancelled.
    pub fn new(name: &str, tasks: Tasks) -> Self {
        Self { name: name.into(), block: block(), tasks }
    }

    /// Serves plain connections, or TLS ones with an acceptor, for ever.
    pub async fn serve(self, listener: TcpListener, tls: Option<TlsAcceptor>) {
        loop {
            let Ok((socket, _)) = listener.accept().await else {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            };
            let _ = socket.set_nodelay(true);
            let (standin, tls) = (self.clone(), tls.clone());
            self.tasks.spawn(async move {
                match tls {
                    None => standin.connection(socket).await,
                    Some(tls) => {
                        if let Ok(socket) = tls.accept(socket).await {
                            standin.connection(socket).await;
                        }
                    }
                }
            });
        }
    }

    async fn connection<S: AsyncRead + AsyncWrite + Unpin>(self, socket: S) {
        let service = service_fn(|request| {
            let standin = self.clone();
            async move { Ok::<_, Infallible>(standin.answer(request).await) }
        });
        // A client that ends its half after the request still gets the answer.
        let _ = http1::Builder::new().half_close(true).serve_connection(TokioIo::new(socket), service).await;
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<BoxBody<Bytes, Infallible>> {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        match (&method, path.as_str()) {
            (&Method::GET | &Method::HEAD, "/") => {
                text(StatusCode::OK, format!("hello from {}\n", self.name))
            }
            (&Method::GET | &Method::HEAD, "/healthz") => text(StatusCode::OK, "ok".to_owned()),
            (&Method::GET, "/pods") => json_body(&self.pods()),
            (&Method::POST | &Method::PUT, "/upload") => upload(request.into_body()).await,
            (&Method::GET, path) => match path.strip_prefix("/bytes/").map(str::parse) {
                Some(Ok(length)) => response(
                    StatusCode::OK,
                    "application/octet-stream",
                    Pattern::new(self.block.clone(), length),
                ),
                Some(Err(_)) => text(StatusCode::BAD_REQUEST, "how many bytes?\n".to_owned()),
                None => text(StatusCode::NOT_FOUND, "no such path\n".to_owned()),
            },
            _ => text(StatusCode::NOT_FOUND, "no such path\n".to_owned()),
        }
    }

    fn pods(&self) -> serde_json::Value {
        json!({
            "kind": "PodList",
            "apiVersion": "v1",
            "metadata": {},
            "items": [{
                "metadata": {"name": format!("web-{}", self.name), "namespace": "default"},
                "spec": {"nodeName": &*self.name, "containers": [{"name": "web", "image": "stand-in"}]},
                "status": {"phase": "Running"}
            }]
        })
    }
}

/// The TLS side of a server, from PEM files.
pub fn acceptor(certificate: &std::path::Path, key: &std::path::Path) -> anyhow::Result<TlsAcceptor> {
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("can't read the certificate in {}", certificate.display()))?;
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("can't read the key in {}", key.display()))?;
    let mut config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // The random generator takes tens of milliseconds to start: not in the first handshake.
    let _ = config.crypto_provider().secure_random.fill(&mut [0; 32]);
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Listens, with an error that names the address.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("can't listen on {address}"))
}

fn response<B>(status: StatusCode, kind: &'static str, body: B) -> Response<BoxBody<Bytes, Infallible>>
where
    B: Body<Data = Bytes, Error = Infallible> + Send + Sync + 'static,
{
    let mut response = Response::new(BoxBody::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

fn text(status: StatusCode, text: String) -> Response<BoxBody<Bytes, Infallible>> {
    response(status, "text/plain", Full::new(text.into()))
}

fn json_body(value: &serde_json::Value) -> Response<BoxBody<Bytes, Infallible>> {
    response(StatusCode::OK, "application/json", Full::new(value.to_string().into()))
}

async fn upload(mut body: Incoming) -> Response<BoxBody<Bytes, Infallible>> {
    let (mut bytes, mut hash) = (0u64, Sha256::new());
    while let Some(frame) = body.frame().await {
        match frame.map(Frame::into_data) {
            Ok(Ok(data)) => {
                bytes += data.len() as u64;
                hash.update(&data);
            }
            Ok(Err(_)) => {}
            Err(e) => return text(StatusCode::BAD_REQUEST, format!("{e}\n")),
        }
    }
    let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    json_body(&json!({"bytes": bytes, "sha256": hex}))
}

/// Bytes that look random and of which each block of [`BLOCK`] begins with its offset (u64, big endian), so that
/// what is lost, doubled or moved on the way shows.
pub struct Pattern {
    block: Bytes,
    offset: u64,
    left: u64,
}

impl Pattern {
    /// The first `length` bytes. `block` is that of [`block`].
    pub fn new(block: Bytes, length: u64) -> Self {
        Self { block, offset: 0, left: length }
    }

    /// The next bytes, `None` at the end.
    pub fn next_block(&mut self) -> Option<Bytes> {
        if self.left == 0 {
            return None;
        }
        let length = usize::try_from(self.left).unwrap_or(BLOCK).min(BLOCK);
        let mut bytes = BytesMut::with_capacity(BLOCK);
        bytes.put_u64(self.offset);
        bytes.put_slice(&self.block[8..]);
        bytes.truncate(length);
        self.offset += length as u64;
        self.left -= length as u64;
        Some(bytes.freeze())
    }
}

/// The filling of a block behind its offset: a splitmix64 sequence.
pub fn block() -> Bytes {
    let mut state = 0u64;
    let mut bytes = BytesMut::with_capacity(BLOCK);
    while bytes.len() < BLOCK {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.put_u64(z ^ (z >> 31));
    }
    bytes.freeze()
}

impl Body for Pattern {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.next_block().map(|block| Ok(Frame::data(block))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
