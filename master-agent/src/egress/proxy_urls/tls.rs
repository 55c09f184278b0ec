//! TLS towards targets. kube-apiserver encrypts and accepts any certificate; here certificates are verified, unless the
//! configuration says otherwise.
//!
//! A kubelet's certificate must be signed by `kubelet_ca` and be for the node's name or one of its addresses: the kubelet is
//! reached through a tunnel to that very node, and its CA vouches for both. A pod's must be for `NAME.NAMESPACE.pod` or the
//! pod's address, a service's for `NAME.NAMESPACE.svc`, both signed by `target_ca`.
//!
//! CAs and the client certificate follow their files, as the certificates of listeners do.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Context;
use proto::Target;
use proto_net::tls::{AnyCertificate, ServerPolicy, WebPki, check_chain, client_config, roots, verify_by};
use rustls::{
    CertificateError, ClientConfig,
    client::{Resumption, verify_server_name},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    egress::config::{ProxyUrlsConfig, Unverified},
    http::status::StatusError,
    metrics::Expiry,
    stream::{caller::Caller, target_socket::TargetSocket},
};
use proto_net::file_watcher::{FileWatcher, Watcher};

/// How long the handshake with a target may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// The number of a certificate's names that an error shows.
const SHOWN: usize = 10;

/// How the certificates of targets are verified.
pub struct TargetTls {
    kubelets: Arc<FileWatcher<Trust>>,
    targets: Arc<FileWatcher<Trust>>,
}

/// What a target's certificate must be.
#[derive(Clone, Debug)]
pub struct Expected {
    pub kubelet: bool,
    /// The certificate must be for any of these names; the first is sent as the server name.
    pub names: Vec<ServerName<'static>>,
}

/// A target with which a connection is to be encrypted, and the caller that it is for.
pub(super) struct Server<'a> {
    pub expected: &'a Expected,
    /// A description for errors and logs.
    pub who: &'a str,
    pub target: &'a Target,
    pub caller: &'a Caller,
}

impl TargetTls {
    /// Reads the files that the configuration names.
    pub fn load(config: &ProxyUrlsConfig) -> anyhow::Result<Self> {
        let skips = |kind| config.insecure_skip_verify.contains(&kind);
        for (kind, servers) in [(Unverified::Kubelet, "kubelets"), (Unverified::Targets, "pods and services")]
        {
            if skips(kind) {
                tracing::warn!(servers, "insecure_skip_verify: proxy URLs accept any certificate");
            }
        }
        let kubelets = TrustFiles {
            ca: config.kubelet_ca.clone().map(|ca| ("kubelet_ca", ca)),
            client: config.kubelet_client.clone(),
            skip_verify: skips(Unverified::Kubelet),
        };
        let targets = TrustFiles {
            ca: config.target_ca.clone().map(|ca| ("target_ca", ca)),
            client: None,
            skip_verify: skips(Unverified::Targets),
        };
        Ok(Self {
            kubelets: kubelets.watch("the CA and the client certificate for kubelets")?,
            targets: targets.watch("the CA of proxy URLs' targets")?,
        })
    }

    /// Returns the watchers of the files.
    pub fn watchers(&self) -> [Arc<dyn Watcher>; 2] {
        [self.kubelets.clone(), self.targets.clone()]
    }

    /// Returns when the certificates in use expire.
    pub fn expiries(&self) -> Vec<Expiry> {
        [&self.kubelets, &self.targets].iter().flat_map(|trust| trust.get().expiries.clone()).collect()
    }

    /// Performs the handshake. An error names the certificate's names and the expected ones.
    pub(super) async fn connect(
        &self,
        server: &Server<'_>,
        socket: TargetSocket,
    ) -> Result<TlsStream<TargetSocket>, StatusError> {
        let Server { expected, who, target, caller } = server;
        let trust = if expected.kubelet { self.kubelets.get() } else { self.targets.get() };
        let verdict = Arc::<OnceLock<String>>::default();
        let config = match &trust.verification {
            Verification::By(config, policy) => {
                let (policy, names) = (policy.clone(), expected.names.clone());
                let mut config = config.clone();
                verify_by(&mut config, OneOfNames { policy, names, verdict: verdict.clone() });
                config
            }
            Verification::Skipped(config) => {
                let Caller { listener: egress, origin, .. } = caller;
                tracing::warn!(egress, %origin, %target, server = who, "certificate not verified");
                config.clone()
            }
            Verification::Impossible => {
                let (ca, kind) =
                    if expected.kubelet { ("kubelet_ca", "kubelet") } else { ("target_ca", "targets") };
                return Err(StatusError::bad_gateway(format!(
                    "there is no CA to verify the certificate of {who} by: set proxy_urls.{ca}, or insecure_skip_verify: [{kind}]"
                )));
            }
        };
        let Some(name) = expected.names.first().cloned() else {
            return Err(StatusError::bad_gateway(format!(
                "{who} has no name that a certificate could be for"
            )));
        };
        let handshake = TlsConnector::from(Arc::new(config)).connect(name, socket);
        let error = match tokio::time::timeout(HANDSHAKE, handshake).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {}", humantime::format_duration(HANDSHAKE)),
        };
        let error = verdict.get().cloned().unwrap_or(error);
        Err(StatusError::bad_gateway(format!("TLS with {who} at {target}: {error}")))
    }
}

/// The TLS material for one kind of target, as it was last read from its files.
struct Trust {
    verification: Verification,
    expiries: Vec<Expiry>,
}

/// How the certificates of one kind of target are verified.
enum Verification {
    By(ClientConfig, WebPki),
    /// Any certificate is accepted.
    Skipped(ClientConfig),
    /// There is no CA to verify certificates by.
    Impossible,
}

/// The files that [`Trust`] is read from.
struct TrustFiles {
    /// The CA's name in metrics, and its file.
    ca: Option<(&'static str, PathBuf)>,
    /// The certificate that targets are shown, and its key.
    client: Option<(PathBuf, PathBuf)>,
    skip_verify: bool,
}

impl TrustFiles {
    fn watch(self, what: &str) -> anyhow::Result<Arc<FileWatcher<Trust>>> {
        let ca = self.ca.iter().map(|(_, ca)| ca.clone());
        let client = self.client.iter().flat_map(|(cert, key)| [cert.clone(), key.clone()]);
        let files = ca.chain(client).collect();
        FileWatcher::load(what, files, move || {
            Ok(Trust { verification: self.verification()?, expiries: self.expiries() })
        })
    }

    fn expiries(&self) -> Vec<Expiry> {
        let client = self.client.as_ref().and_then(|(cert, _)| Expiry::chain("kubelet_client", cert));
        let ca = self.ca.as_ref().and_then(|(name, ca)| Expiry::authorities(name, ca));
        client.into_iter().chain(ca).collect()
    }

    fn verification(&self) -> anyhow::Result<Verification> {
        let policy = match &self.ca {
            _ if self.skip_verify => None,
            None => return Ok(Verification::Impossible),
            Some((_, ca)) => {
                Some(WebPki::new(roots(ca)?).with_context(|| format!("no usable CA in {}", ca.display()))?)
            }
        };
        // Each connection to a target that is verified gets a policy of its own.
        let mut config = client_config(AnyCertificate, self.client.as_ref())?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A resumed session would not be verified again.
        config.resumption = Resumption::disabled();
        Ok(match policy {
            Some(policy) => Verification::By(config, policy),
            None => Verification::Skipped(config),
        })
    }
}

/// Verifies a certificate as browsers do, but for any of several names.
#[derive(Debug)]
struct OneOfNames {
    policy: WebPki,
    names: Vec<ServerName<'static>>,
    /// Why the certificate was refused.
    verdict: Arc<OnceLock<String>>,
}

impl ServerPolicy for OneOfNames {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        check_chain(leaf, intermediates)
            .inspect_err(|error| drop(self.verdict.set(format!("its certificate is unusable: {error}"))))?;
        let Err(error) = self.policy.verify(leaf, intermediates, name, now) else { return Ok(()) };
        let presented = || Names(names(leaf));
        // The name is checked last: if only the name is wrong, the rest of the certificate is good.
        let message = if let rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) = &error
        {
            let certificate = ParsedCertificate::try_from(leaf)?;
            if self.names.iter().any(|name| verify_server_name(&certificate, name).is_ok()) {
                return Ok(());
            }
            let expected = Names(self.names.iter().map(|n| n.to_str().into_owned()).collect());
            format!("its certificate is for {}, and must be for {expected}", presented())
        } else {
            let expected = name.to_str();
            format!("its certificate, for {}, does not prove that it is {expected}: {error}", presented())
        };
        let _ = self.verdict.set(message);
        Err(error)
    }
}

/// The names of a certificate, as errors show them.
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

/// The names that a certificate is for. If there are none, its common name, marked as such since it does not count.
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
