//! Certificates, private keys and revocation lists in PEM files.

use std::{fmt::Display, path::Path};

use proto_config::secret_file;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject},
};

/// A file cannot be used; the text names it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct FileError(pub(super) String);

impl FileError {
    fn at(what: &str, path: &Path, error: impl Display) -> Self {
        Self(format!("{what} {}: {error}", path.display()))
    }
}

/// Reads the certificates of a CA file.
pub fn roots(ca: &Path) -> Result<RootCertStore, FileError> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(ca)? {
        roots.add(certificate).map_err(|e| FileError::at("can't use a certificate as a CA in", ca, e))?;
    }
    Ok(roots)
}

/// Reads a chain of at least one certificate.
pub fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let chain = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| FileError::at("can't read certificates in", path, e))?;
    if chain.is_empty() {
        return Err(FileError(format!("{} has no certificate in PEM", path.display())));
    }
    Ok(chain)
}

/// Reads at least one list of revoked certificates (CRL, RFC 5280).
pub fn revocation_lists(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, FileError> {
    let lists = CertificateRevocationListDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| FileError::at("can't read CRLs in", path, e))?;
    if lists.is_empty() {
        return Err(FileError(format!("{} has no CRL in PEM", path.display())));
    }
    Ok(lists)
}

/// Reads a private key. Fails, too, if others can read or change the file ([`secret_file::read_given`]).
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, FileError> {
    let pem = secret_file::read_given(path).map_err(|e| FileError(e.to_string()))?;
    PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| FileError::at("can't read a private key in", path, e))
}
