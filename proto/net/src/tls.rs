//! TLS: whom a client trusts and what it shows, read from PEM files, and how large a peer's chain may be.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use webpki::EndEntityCert;

use proto_config::secret_file;

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
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| FileError(e.to_string()))?;
        let roots = match &self.ca {
            Some(ca) => roots(ca)?,
            None => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                if roots.is_empty() {
                    let hint =
                        "install the system's CA certificates (ca-certificates), or name the server's CA";
                    return Err(FileError(format!("this host trusts no CA: {hint}")));
                }
                roots
            }
        };
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|e| FileError(format!("the CA can't be used: {e}")))?;
        let builder =
            builder.dangerous().with_custom_certificate_verifier(Arc::new(BoundedVerifier(verifier)));
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

/// Verifies a server as the web does, unless its chain fails [`check_chain`]: whoever stands between a client and its
/// server could make the client compute, too.
#[derive(Debug)]
struct BoundedVerifier(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for BoundedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        check_chain(end_entity, intermediates)?;
        self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// Certificates that a peer may send beside its own.
pub const MAX_INTERMEDIATES: usize = 3;
/// Bytes of a peer's certificates together.
pub const MAX_CHAIN: usize = 16 * 1024;

/// A chain is not worth verifying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("the chain has more than {MAX_INTERMEDIATES} intermediate certificates")]
    TooMany,
    #[error("the chain has more than {MAX_CHAIN} bytes")]
    TooLarge,
    #[error("the chain has several intermediate certificates of one subject")]
    SameSubject,
    #[error("an intermediate certificate is not X.509")]
    Malformed,
}

impl From<ChainError> for rustls::Error {
    fn from(error: ChainError) -> Self {
        CertificateError::Other(OtherError(Arc::new(error))).into()
    }
}

/// Refuses chains whose verification costs more than that of any honest one.
///
/// A verifier that builds paths tries every certificate that has the issuer's name, and those of one name multiply: ten
/// intermediate certificates of one subject make webpki try 200,000 paths, which takes seconds if they are large. With one
/// certificate of each name there is one path, and the limit on bytes bounds what is parsed on the way.
pub fn check_chain(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
) -> Result<(), ChainError> {
    if intermediates.len() > MAX_INTERMEDIATES {
        return Err(ChainError::TooMany);
    }
    if leaf.len() + intermediates.iter().map(|der| der.len()).sum::<usize>() > MAX_CHAIN {
        return Err(ChainError::TooLarge);
    }
    let mut subjects = Vec::with_capacity(intermediates.len());
    for der in intermediates {
        let certificate = EndEntityCert::try_from(der).map_err(|_| ChainError::Malformed)?;
        let subject = certificate.subject().to_vec();
        if subjects.contains(&subject) {
            return Err(ChainError::SameSubject);
        }
        subjects.push(subject);
    }
    Ok(())
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

/// Fails, too, when the file is open to others ([`secret_file::read_given`]).
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, FileError> {
    let pem = secret_file::read_given(path).map_err(|e| FileError(e.to_string()))?;
    PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| FileError::at("can't read a private key in", path, e))
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

    use super::*;

    fn ca(name: &str, size: usize) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let unknown = rcgen::CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![0; size]);
        params.custom_extensions.push(unknown);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        issuer.der().clone()
    }

    #[test]
    fn chains_are_bounded_before_they_are_verified() {
        let leaf = ca("leaf", 1);
        let chain = |names: &[&str]| names.iter().map(|name| ca(name, 1)).collect::<Vec<_>>();
        for (intermediates, expected) in [
            (chain(&[]), Ok(())),
            (chain(&["a", "b", "c"]), Ok(())),
            (chain(&["a", "b", "c", "d"]), Err(ChainError::TooMany)),
            (chain(&["a", "b", "a"]), Err(ChainError::SameSubject)),
            (vec![ca("a", MAX_CHAIN / 2), ca("b", MAX_CHAIN / 2)], Err(ChainError::TooLarge)),
            (vec![CertificateDer::from(vec![0x30, 0x80])], Err(ChainError::Malformed)),
        ] {
            assert_eq!(check_chain(&leaf, &intermediates), expected);
        }
        assert_eq!(check_chain(&ca("leaf", MAX_CHAIN), &[]), Err(ChainError::TooLarge));
    }
}
