//! What streams lead to. Whatever is wrong with the bytes that come is a broken promise, even if the caller has gone.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tests::{
    pattern::{Checker, fill},
    process::free_port,
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::ledger::Ledger;

/// Ports on all addresses of this host.
#[derive(Clone, Copy, Debug)]
pub struct Targets {
    /// [`target`], which sends the pattern and echoes.
    pub source: u16,
    /// Takes the pattern to its end, and answers with the number of bytes.
    pub sink: u16,
    /// `GET /bytes/N` gives the pattern, which `POST /sink` takes.
    pub http: u16,
    /// No policy allows it.
    pub forbidden: u16,
}

impl Targets {
    pub async fn start(ledger: &Arc<Ledger>) -> anyhow::Result<Self> {
        let forbidden = |_: TcpStream, ledger: Arc<Ledger>| async move {
            ledger.broken("a stream has reached a target that no policy allows");
        };
        Ok(Self {
            source: target::start().await,
            sink: listen(ledger, sink).await?,
            http: listen(ledger, http).await?,
            forbidden: listen(ledger, forbidden).await?,
        })
    }

    pub fn allowed(self) -> Vec<u16> {
        vec![self.source, self.sink, self.http]
    }
}

async fn listen<S>(
    ledger: &Arc<Ledger>,
    serve: impl Fn(TcpStream, Arc<Ledger>) -> S + Send + 'static,
) -> anyhow::Result<u16>
where
    S: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(SocketAddr::from(([0_u16; 8], free_port()))).await?;
    let (port, ledger) = (listener.local_addr()?.port(), ledger.clone());
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let _ = socket.set_nodelay(true);
            tokio::spawn(serve(socket, ledger.clone()));
        }
    });
    Ok(port)
}

async fn sink(mut socket: TcpStream, ledger: Arc<Ledger>) {
    let (mut checker, mut buffer) = (Checker::default(), vec![0; 64 * 1024]);
    loop {
        match socket.read(&mut buffer).await {
            Ok(0) => break,
            Ok(n) if checker.matches(&buffer[..n]) => {}
            Ok(_) => {
                return ledger.broken(&format!("a target got wrong bytes at offset {}", checker.offset()));
            }
            Err(_) => return,
        }
    }
    // A caller that leaves is not the target's failure.
    let _ = socket.write_all(format!("{}\n", checker.offset()).as_bytes()).await;
    let _ = socket.shutdown().await;
}

async fn http(socket: TcpStream, ledger: Arc<Ledger>) {
    let service = service_fn(|request| {
        let ledger = ledger.clone();
        async move { Ok::<_, Infallible>(answer(request, &ledger).await) }
    });
    let _ = http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
}

async fn answer(request: Request<Incoming>, ledger: &Ledger) -> Response<Full<Bytes>> {
    if let Some(bytes) = request.uri().path().strip_prefix("/bytes/") {
        return Response::new(Full::new(pattern(bytes.parse().unwrap_or_default())));
    }
    let (mut checker, mut body) = (Checker::default(), request.into_body());
    while let Some(Ok(frame)) = body.frame().await {
        if frame.data_ref().is_some_and(|data| !checker.matches(data)) {
            ledger.broken(&format!("a target got wrong bytes of a body at offset {}", checker.offset()));
        }
    }
    Response::new(Full::new(checker.offset().to_string().into()))
}

/// The first bytes of the pattern.
pub fn pattern(bytes: u64) -> Bytes {
    let mut all = vec![0; bytes as usize];
    fill(&mut all, 0);
    all.into()
}
