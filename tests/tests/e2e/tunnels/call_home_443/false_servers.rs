//! Servers that nodes meet on the way to the front end: an HTTP proxy, and one that answers as a test says.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tests::{client::Stream, pki::server_config};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use super::local;

/// Answers every connection, over TLS if there is a certificate, with the same bytes once a head has come. Nothing
/// means that it never answers. Keeps the heads.
pub(crate) async fn fake(
    certificate: Option<(&Path, &str)>,
    answer: &'static str,
    then: usize,
) -> (u16, Arc<Mutex<String>>) {
    let listener = TcpListener::bind(local(0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let heads = Arc::new(Mutex::new(String::new()));
    let kept = heads.clone();
    let tls = certificate.map(|(dir, name)| TlsAcceptor::from(server_config(dir, name).unwrap()));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (kept, tls) = (kept.clone(), tls.clone());
            tokio::spawn(async move {
                let mut stream: Stream = match tls {
                    Some(tls) => match tls.accept(socket).await {
                        Ok(tls) => Box::new(tls),
                        Err(_) => return,
                    },
                    None => Box::new(socket),
                };
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => return,
                    }
                }
                kept.lock().unwrap().push_str(&String::from_utf8_lossy(&head));
                if answer.is_empty() {
                    std::future::pending::<()>().await;
                }
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.write_all(&vec![b'x'; then]).await;
                let _ = stream.flush().await;
                let _ = stream.read_to_end(&mut Vec::new()).await;
            });
        }
    });
    (port, heads)
}

/// An HTTP proxy that does as it should: it resolves every name to `to`. Counts.
pub(crate) async fn proxy(to: SocketAddr, credentials: Option<&'static str>) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind(local(0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let counted = counted.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(near.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                assert!(head.starts_with("CONNECT front-end.test:443 HTTP/1.1\r\n"), "{head}");
                let wanted = credentials.map(|c| format!("proxy-authorization: Basic {c}\r\n"));
                if wanted.is_some_and(|wanted| !head.contains(&wanted)) {
                    near.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n").await.unwrap();
                    return;
                }
                counted.fetch_add(1, Ordering::Relaxed);
                let mut far = TcpStream::connect(to).await.unwrap();
                near.write_all(b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n").await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    (port, count)
}
