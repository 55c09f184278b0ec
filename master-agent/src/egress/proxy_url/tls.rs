//! TLS towards targets. kube-apiserver encrypts and believes any certificate; here certificates are verified,
//! unless the configuration says that they need not be.
//!
//! A kubelet's certificate must be signed by `kubelet_ca` and be for the node's name or one of its addresses: the
//! kubelet is reached through a tunnel to that very node, and its CA vouches for either. A pod's must be for
//! `NAME.NAMESPACE.pod` or its address, a service's for `NAME.NAMESPACE.svc`, signed by `target_ca`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Context;
use proto::Target;
use proto_net::tls::{check_chain, private_key};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    egress::config::{ProxyUrlsConfig, Unverified},
    http::status::Failure,
    stream::{caller::Caller, target_socket::TargetSocket},
};

/// For the handshake with a target.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Names of a certificate that an error shows.
const SHOWN: usize = 10;

/// Whose certificates are verified, and against what.
pub struct TargetTls {
    kubelets: Trust,
    targets: Trust,
}

/// What a target's certificate must be.
#[derive(Clone, Debug)]
pub struct Expected {
    pub kubelet: bool,
    /// Any of these names will do; the first is sent as the server name.
    pub names: Vec<ServerName<'static>>,
}

enum Trust {
    Verify(ClientConfig, Arc<WebPkiServerVerifier>),
    Believe(ClientConfig),
    /// There is no CA to verify it against.
    Nothing,
}

impl TargetTls {
    /// Reads the files that the configuration names.
    pub fn load(config: &ProxyUrlsConfig) -> anyhow::Result<Self> {
        let believe = |kind| config.insecure_skip_verify.contains(&kind);
        let client = config.kubelet_client.as_ref().map(|(cert, key)| (cert.as_path(), key.as_path()));
        let tls = Self {
            kubelets: Trust::load(config.kubelet_ca.as_deref(), believe(Unverified::Kubelet), client)?,
            targets: Trust::load(config.target_ca.as_deref(), believe(Unverified::Targets), None)?,
        };
        for (trust, what) in [(&tls.kubelets, "kubelets"), (&tls.targets, "pods and services")] {
            if let Trust::Believe(_) = trust {
                tracing::warn!("insecure_skip_verify: proxy URLs believe any certificate of {what}");
            }
        }
        Ok(tls)
    }

    /// Makes the handshake. The error names the certificate's names and those that were expected.
    pub async fn connect(
        &self,
        expected: &Expected,
        who: &str,
        target: &Target,
        caller: &Caller,
        socket: TargetSocket,
    ) -> Result<TlsStream<TargetSocket>, Failure> {
        let trust = if expected.kubelet { &self.kubelets } else { &self.targets };
        let verdict = Arc::<OnceLock<String>>::default();
        let config = match trust {
            Trust::Verify(config, verifier) => {
                let mut config = config.clone();
                config.dangerous().set_certificate_verifier(Arc::new(OneOfNames {
                    verifier: verifier.clone(),
                    names: expected.names.clone(),
                    verdict: verdict.clone(),
                }));
                config
            }
            Trust::Believe(config) => {
                let Caller { door: egress, origin, .. } = caller;
                tracing::warn!(egress, %origin, %target, "the certificate of {who} is not verified");
                config.clone()
            }
            Trust::Nothing => {
                let (ca, kind) =
                    if expected.kubelet { ("kubelet_ca", "kubelet") } else { ("target_ca", "targets") };
                return Err(Failure::bad_gateway(format!(
                    "nothing to verify the certificate of {who} against: set proxy_urls.{ca}, or insecure_skip_verify: [{kind}]"
                )));
            }
        };
        let Some(name) = expected.names.first().cloned() else {
            return Err(Failure::bad_gateway(format!("{who} has no name that a certificate could be for")));
        };
        let handshake = TlsConnector::from(Arc::new(config)).connect(name, socket);
        let error = match tokio::time::timeout(HANDSHAKE, handshake).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {}", humantime::format_duration(HANDSHAKE)),
        };
        let error = verdict.get().cloned().unwrap_or(error);
        Err(Failure::bad_gateway(format!("TLS with {who} at {target}: {error}")))
    }
}

impl Trust {
    fn load(ca: Option<&Path>, believe: bool, client: Option<(&Path, &Path)>) -> anyhow::Result<Self> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = match (ca, believe) {
            (_, true) => None,
            (None, false) => return Ok(Self::Nothing),
            (Some(ca), false) => {
                let verifier =
                    WebPkiServerVerifier::builder_with_provider(Arc::new(roots(ca)?), provider.clone())
                        .build()
                        .with_context(|| format!("no usable CA in {}", ca.display()))?;
                Some(verifier)
            }
        };
        let placeholder = Arc::new(AnyCertificate(provider.clone()));
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .dangerous()
            .with_custom_certificate_verifier(placeholder);
        let mut config = match client {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = CertificateDer::pem_file_iter(cert)
                    .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                    .with_context(|| format!("can't read the certificate in {}", cert.display()))?;
                builder
                    .with_client_auth_cert(chain, private_key(key)?)
                    .with_context(|| format!("{} and {} don't go together", cert.display(), key.display()))?
            }
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A resumed session would not be verified again.
        config.resumption = Resumption::disabled();
        Ok(match verifier {
            Some(verifier) => Self::Verify(config, verifier),
            None => Self::Believe(config),
        })
    }
}

fn roots(path: &Path) -> anyhow::Result<RootCertStore> {
    let context = || format!("can't read the CA in {}", path.display());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).with_context(context)? {
        roots.add(certificate.with_context(context)?).with_context(context)?;
    }
    Ok(roots)
}

/// As the web verifies, for any of several names.
#[derive(Debug)]
struct OneOfNames {
    verifier: Arc<WebPkiServerVerifier>,
    names: Vec<ServerName<'static>>,
    verdict: Arc<OnceLock<String>>,
}

impl ServerCertVerifier for OneOfNames {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        check_chain(end_entity, intermediates)
            .inspect_err(|error| drop(self.verdict.set(format!("its certificate can't be used: {error}"))))?;
        let error = match self.verifier.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        ) {
            Ok(verified) => return Ok(verified),
            Err(error) => error,
        };
        let presented = || Names(names(end_entity));
        // The name is looked at last: where it alone is wrong, the rest of the certificate is good.
        let message = if let rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) = &error
        {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            if self.names.iter().any(|name| verify_server_name(&certificate, name).is_ok()) {
                return Ok(ServerCertVerified::assertion());
            }
            let expected = Names(self.names.iter().map(|n| n.to_str().into_owned()).collect());
            format!("its certificate is for {}, and must be for {expected}", presented())
        } else {
            let expected = server_name.to_str();
            format!("its certificate, for {}, does not prove that it is {expected}: {error}", presented())
        };
        let _ = self.verdict.set(message);
        Err(error)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// Makes `config` believe any certificate.
pub fn believe_any(config: &mut ClientConfig) {
    let provider = config.crypto_provider().clone();
    config.dangerous().set_certificate_verifier(Arc::new(AnyCertificate(provider)));
}

/// For `insecure_skip_verify`: whoever has the certificate's key is believed.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Names as an error shows them.
struct Names(Vec<String>);

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no name at all");
        }
        let shown: Vec<_> = self.0.iter().take(SHOWN).map(String::as_str).collect();
        f.write_str(&shown.join(" or "))?;
        if self.0.len() > SHOWN { write!(f, " and {} more", self.0.len() - SHOWN) } else { Ok(()) }
    }
}

/// The names that a certificate is for; without any, its common name, marked as such since it does not count.
fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let mut names = Vec::new();
    if let Ok(Some(alternatives)) = certificate.subject_alternative_name() {
        for name in &alternatives.value.general_names {
            if let GeneralName::DNSName(name) = name {
                names.push(printable(name));
            } else if let GeneralName::IPAddress(bytes) = name {
                names.extend(address(bytes).map(|a| a.to_string()));
            }
        }
    }
    if names.is_empty() {
        let common = certificate.subject().iter_common_name().filter_map(|cn| cn.as_str().ok());
        names.extend(
            common.map(|name| format!("{} (its common name, which does not count)", printable(name))),
        );
    }
    names
}

fn printable(name: &str) -> String {
    name.chars().take(253).map(|c| if c.is_ascii_graphic() { c } else { '?' }).collect()
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(|b| IpAddr::V4(Ipv4Addr::from(b)));
    v4().or_else(|| <[u8; 16]>::try_from(bytes).ok().map(|b| IpAddr::V6(Ipv6Addr::from(b))))
}
