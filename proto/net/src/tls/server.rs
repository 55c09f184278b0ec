//! The handshake of TLS servers.

use std::{io, sync::Arc};

use rustls::{ServerConfig, server::Acceptor};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};

/// Performs the handshake. `begun` is called once the whole ClientHello has arrived: until then, the peer has done no more
/// than connect, whatever bytes it sends.
pub async fn accept<S>(socket: S, config: Arc<ServerConfig>, begun: impl FnOnce()) -> io::Result<TlsStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let hello = LazyConfigAcceptor::new(Acceptor::default(), socket).await?;
    begun();
    hello.into_stream(config).await
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustls::{ClientConfig, RootCertStore, pki_types::PrivateKeyDer};
    use tokio::io::AsyncWriteExt;
    use tokio_rustls::TlsConnector;

    use super::*;

    fn configs() -> (Arc<ServerConfig>, Arc<ClientConfig>) {
        let issued = rcgen::generate_simple_self_signed(vec!["master.example".to_owned()]).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let key = PrivateKeyDer::Pkcs8(issued.signing_key.serialize_der().into());
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![issued.cert.der().clone()], key)
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(issued.cert.der().clone()).unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        (Arc::new(server), Arc::new(client))
    }

    #[tokio::test]
    async fn a_peer_has_begun_once_its_client_hello_is_whole() {
        let (server, client) = configs();
        let mut hello = Vec::new();
        let name = || "master.example".try_into().unwrap();
        rustls::ClientConnection::new(client.clone(), name()).unwrap().write_tls(&mut hello).unwrap();
        for (sent, begins) in [(0, false), (1, false), (hello.len() - 1, false), (hello.len(), true)] {
            let (mut near, far) = tokio::io::duplex(64 * 1024);
            near.write_all(&hello[..sent]).await.unwrap();
            near.shutdown().await.unwrap();
            let begun = AtomicBool::new(false);
            let accepted = accept(far, server.clone(), || begun.store(true, Ordering::Relaxed)).await;
            assert_eq!((accepted.is_ok(), begun.into_inner()), (false, begins), "{sent} bytes");
        }
        let (near, far) = tokio::io::duplex(64 * 1024);
        let connect = TlsConnector::from(client).connect(name(), near);
        let (connected, accepted) = tokio::join!(connect, accept(far, server, || ()));
        assert!(connected.is_ok() && accepted.is_ok());
    }
}
