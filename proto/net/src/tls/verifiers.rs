//! What is verified of a peer's certificate in a handshake.
//!
//! The verifiers differ in what they ask of a chain. That the peer has the key of the certificate is verified in the same
//! way by all of them, and never left out.

use std::{fmt, sync::Arc};

use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::{bounds::check_chain, files::FileError};

/// What a server's chain must be.
pub trait ServerPolicy: fmt::Debug + Send + Sync + 'static {
    /// Fails unless the chain proves that the server is `name`.
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), rustls::Error>;
}

/// Verifies servers by a policy.
#[derive(Debug)]
pub struct ServerVerifier<P> {
    policy: P,
    provider: Arc<CryptoProvider>,
}

/// The chain must lead to one of the roots and be for the server's name, as on the web, and must pass [`check_chain`]:
/// whoever stands between a client and its server could make the client compute, too.
#[derive(Clone, Debug)]
pub struct WebPki(Arc<WebPkiServerVerifier>);

/// Any chain will do, as for `insecure_skip_verify`.
#[derive(Clone, Copy, Debug)]
pub struct AnyCertificate;

/// Verifies of clients only that they have the key of the certificate which they show, and that their chain passes
/// [`check_chain`]. What the certificate is worth has to be found out after the handshake. No names of CAs are sent,
/// which would tell anybody about the cluster.
#[derive(Debug)]
pub struct Possession {
    pub provider: Arc<CryptoProvider>,
    /// Whether clients without a certificate are refused.
    pub mandatory: bool,
}

impl<P: ServerPolicy> ServerVerifier<P> {
    pub fn new(policy: P, provider: Arc<CryptoProvider>) -> Self {
        Self { policy, provider }
    }
}

impl WebPki {
    pub fn new(roots: RootCertStore) -> Result<Self, FileError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map(Self)
            .map_err(|e| FileError(format!("the CA can't be used: {e}")))
    }
}

impl ServerPolicy for WebPki {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        check_chain(leaf, intermediates)?;
        self.0.verify_server_cert(leaf, intermediates, name, &[], now).map(|_| ())
    }
}

impl ServerPolicy for AnyCertificate {
    fn verify(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: UnixTime,
    ) -> Result<(), rustls::Error> {
        Ok(())
    }
}

impl<P: ServerPolicy> ServerCertVerifier for ServerVerifier<P> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.policy.verify(end_entity, intermediates, server_name, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Possession {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        check_chain(end_entity, intermediates)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

    use super::*;
    use crate::tls::bounds::ChainError;

    /// A CA, and the certificate of a server that it has issued.
    fn issue(name: &str) -> (CertificateDer<'static>, CertificateDer<'static>) {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let leaf = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let leaf = leaf.signed_by(&KeyPair::generate().unwrap(), &ca).unwrap();
        (ca.der().clone(), leaf.der().clone())
    }

    #[test]
    fn a_server_is_verified_by_its_ca_and_its_name_and_its_chain_is_bounded() {
        let ((ca, leaf), (_, foreign)) = (issue("server.test"), issue("server.test"));
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone()).unwrap();
        let policy = WebPki::new(roots).unwrap();
        let verify = |policy: &dyn ServerPolicy, leaf, intermediates, name: &'static str| {
            let name = ServerName::try_from(name).unwrap();
            policy.verify(leaf, &vec![ca.clone(); intermediates], &name, UnixTime::now())
        };
        verify(&policy, &leaf, 1, "server.test").unwrap();
        verify(&policy, &leaf, 1, "other.test").unwrap_err();
        verify(&policy, &foreign, 1, "server.test").unwrap_err();
        let error = format!("{:?}", verify(&policy, &leaf, 4, "server.test").unwrap_err());
        assert!(error.contains(&format!("{:?}", ChainError::TooMany)), "{error}");
        verify(&AnyCertificate, &foreign, 4, "other.test").unwrap();
    }
}
