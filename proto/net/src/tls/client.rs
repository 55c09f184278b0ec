//! The configuration of TLS clients.

use std::{path::PathBuf, sync::Arc};

use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};

use super::{
    files::{FileError, chain, private_key, roots},
    verifiers::{AnyCertificate, ServerPolicy, ServerVerifier, WebPki},
};

/// How a server is verified, and what it is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// The file with the CAs of its certificate; `None` stands for those of the system.
    pub ca: Option<PathBuf>,
    /// The files of the client's own certificate and key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl ClientTls {
    /// Reads the files. No protocols are set for ALPN.
    pub fn config(&self) -> Result<ClientConfig, FileError> {
        let roots = match &self.ca {
            Some(ca) => roots(ca)?,
            None => system_roots()?,
        };
        client_config(WebPki::new(roots)?, self.identity.as_ref())
    }

    /// The files that the configuration is read from.
    pub fn files(&self) -> Vec<PathBuf> {
        let identity = self.identity.iter().flat_map(|(cert, key)| [cert.clone(), key.clone()]);
        self.ca.iter().cloned().chain(identity).collect()
    }
}

/// A client that verifies servers by `policy` and shows the certificate in the files of `identity`. No protocols are set
/// for ALPN.
pub fn client_config(
    policy: impl ServerPolicy,
    identity: Option<&(PathBuf, PathBuf)>,
) -> Result<ClientConfig, FileError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| FileError(e.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier::new(policy, provider)));
    let Some((cert, key)) = identity else { return Ok(builder.with_no_client_auth()) };
    builder
        .with_client_auth_cert(chain(cert)?, private_key(key)?)
        .map_err(|e| FileError(format!("{} and {} don't go together: {e}", cert.display(), key.display())))
}

/// Replaces the verifier of `config` by one that verifies servers by `policy`.
pub fn verify_by(config: &mut ClientConfig, policy: impl ServerPolicy) {
    let provider = config.crypto_provider().clone();
    config.dangerous().set_certificate_verifier(Arc::new(ServerVerifier::new(policy, provider)));
}

/// Makes `config` believe any certificate.
pub fn believe_any(config: &mut ClientConfig) {
    verify_by(config, AnyCertificate);
}

fn system_roots() -> Result<RootCertStore, FileError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        let hint = "install the system's CA certificates (ca-certificates), or name the server's CA";
        return Err(FileError(format!("this host trusts no CA: {hint}")));
    }
    Ok(roots)
}
