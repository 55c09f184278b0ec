//! TLS as a client: whom it trusts and what it shows, read from PEM files.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

/// How a server is verified and what it is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// The CA of its certificate; `None` is those of the system.
    pub ca: Option<PathBuf>,
    /// A certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A file can't be used; the text names it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct FileError(String);

impl FileError {
    fn at(what: &str, path: &Path, error: impl Display) -> Self {
        Self(format!("{what} {}: {error}", path.display()))
    }
}

impl ClientTls {
    /// Reads the files. Without protocols for ALPN.
    pub fn config(&self) -> Result<ClientConfig, FileError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| FileError(e.to_string()))?;
        let builder = match &self.ca {
            Some(ca) => builder.with_root_certificates(roots(ca)?),
            None => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                builder.with_root_certificates(roots)
            }
        };
        Ok(match &self.identity {
            Some((cert, key)) => {
                builder.with_client_auth_cert(chain(cert)?, private_key(key)?).map_err(|e| {
                    FileError(format!("{} and {} don't go together: {e}", cert.display(), key.display()))
                })?
            }
            None => builder.with_no_client_auth(),
        })
    }

    /// The files that it is read from.
    pub fn files(&self) -> Vec<PathBuf> {
        let identity = self.identity.iter().flat_map(|(cert, key)| [cert.clone(), key.clone()]);
        self.ca.iter().cloned().chain(identity).collect()
    }
}

/// The certificates of a CA file.
pub fn roots(ca: &Path) -> Result<RootCertStore, FileError> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(ca)? {
        roots.add(certificate).map_err(|e| FileError::at("a certificate is no CA in", ca, e))?;
    }
    Ok(roots)
}

/// At least one certificate.
pub fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let chain = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| FileError::at("can't read certificates in", path, e))?;
    if chain.is_empty() {
        return Err(FileError(format!("{} has no certificate in PEM", path.display())));
    }
    Ok(chain)
}

pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, FileError> {
    PrivateKeyDer::from_pem_file(path).map_err(|e| FileError::at("can't read a private key in", path, e))
}
