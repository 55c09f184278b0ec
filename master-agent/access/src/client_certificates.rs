//! The verification of client certificates.
//!
//! In the TLS handshake, a caller only proves possession of its certificate's key ([`proto_net::tls::Possession`]). The
//! chain is verified afterwards ([`ClientVerifier`]), also when a TLS session is resumed. An expensive chain is not
//! verified on the threads that serve callers.

use std::{
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use proto_net::{
    file_watcher::FileWatcher,
    tls::{check_chain, roots},
};
use rustls::{
    pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime, pem::PemObject},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use tokio::sync::Semaphore;

use crate::x509_expiry::X509Expiry;

/// The CAs whose client certificates are accepted.
#[derive(Debug)]
pub struct ClientCa {
    verifier: Arc<dyn ClientCertVerifier>,
    has_crls: bool,
    pub expiry: X509Expiry,
}

impl ClientCa {
    /// Reads the files. With CRLs, each certificate of a chain must be covered by one of them. A CRL remains in force
    /// after the time of its next update.
    pub fn read(ca: &std::path::Path, crls: &[PathBuf]) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut builder = WebPkiClientVerifier::builder_with_provider(roots(ca)?.into(), provider);
        for path in crls {
            let lists = CertificateRevocationListDer::pem_file_iter(path)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .with_context(|| format!("can't read CRLs in {}", path.display()))?;
            if lists.is_empty() {
                bail!("{} has no CRL in PEM", path.display());
            }
            builder = builder.with_crls(lists);
        }
        let verifier = builder.build().with_context(|| format!("no usable client CA in {}", ca.display()))?;
        Ok(Self { verifier, has_crls: !crls.is_empty(), expiry: X509Expiry::read(ca)? })
    }

    fn verify(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), rustls::Error> {
        let Some((leaf, intermediates)) = chain.split_first() else {
            return Err(rustls::Error::NoCertificatesPresented);
        };
        check_chain(leaf, intermediates)?;
        self.verifier.verify_client_cert(leaf, intermediates, now).map(|_| ())
    }
}

/// Verifies chains against a CA that follows its files. A chain that takes more than a signature or two is verified on
/// a thread for blocking work, and few of them at a time.
pub struct ClientVerifier {
    pub ca: Arc<FileWatcher<ClientCa>>,
    permits: Arc<Semaphore>,
}

impl ClientVerifier {
    pub fn new(ca: Arc<FileWatcher<ClientCa>>) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self { ca, permits: Arc::new(Semaphore::new((cores / 2).max(1))) }
    }

    /// Whether a chain is cheap enough to be verified on the calling thread.
    pub fn is_cheap(&self, chain: &[CertificateDer<'_>]) -> bool {
        chain.len() <= 1 && !self.ca.get().has_crls
    }

    /// Verifies a chain, the leaf first. Dropping the future cancels a verification that has not begun.
    pub async fn verify(
        &self,
        chain: &Arc<[CertificateDer<'static>]>,
        now: SystemTime,
    ) -> Result<(), rustls::Error> {
        let now =
            UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO));
        let ca = self.ca.get();
        if self.is_cheap(chain) {
            return ca.verify(chain, now);
        }
        let failed = |error: &dyn std::fmt::Display| rustls::Error::General(error.to_string());
        let permit = self.permits.clone().acquire_owned().await.map_err(|error| failed(&error))?;
        let chain = chain.clone();
        let verified = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            ca.verify(&chain, now)
        });
        verified.await.map_err(|error| failed(&error))?
    }
}
