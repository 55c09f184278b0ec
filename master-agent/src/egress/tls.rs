//! Mutual TLS with the callers of egress listeners. The certificate, its key and the client CA follow their files: changes
//! take effect for new connections within two seconds, and a file that can't be used leaves the last good one in force.

use std::{fmt::Display, sync::Arc, time::SystemTime};

use anyhow::Context;
use proto::refusal::printable;
use proto_net::tls::{self, Possession, chain, private_key};
use rustls::{ServerConfig, crypto::aws_lc_rs, pki_types::CertificateDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::server::TlsStream;

use crate::{fields::TlsConfig, metrics::Expiry};
use access::{
    client_certificates::{ClientCa, ClientVerifier},
    x509_expiry::X509Expiry,
};
use proto_net::file_watcher::{FileWatcher, Watcher};

/// The egress listeners that callers reach over TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsListener {
    HttpConnect,
    Konnectivity,
}

/// The certificate that callers are shown, and the verification of their client certificates.
pub struct CallerTls {
    listener: TlsListener,
    serving: Arc<FileWatcher<Serving>>,
    verifier: ClientVerifier,
    /// The names of the callers that may connect. If it is empty, every certificate of the client CA is accepted.
    allowed_names: Vec<String>,
}

/// Why a caller is not let in.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsRefusal {
    /// The caller has shown no certificate of the client CA. Whoever reaches the address can cause this.
    #[error("{0}")]
    Stranger(String),
    #[error("the certificate is for {0}, which allowed_names does not list")]
    NotAllowed(String),
}

impl TlsRefusal {
    pub(super) fn stranger(error: impl Display) -> Self {
        Self::Stranger(error.to_string())
    }
}

/// The TLS configuration of new connections, and when its certificate expires.
struct Serving {
    config: Arc<ServerConfig>,
    expiry: X509Expiry,
}

impl CallerTls {
    /// Reads the files that the configuration names.
    pub fn load(listener: TlsListener, config: &TlsConfig) -> anyhow::Result<Self> {
        let section = listener.section();
        let files = vec![config.cert.clone(), config.key.clone()];
        let given = config.clone();
        let serving = FileWatcher::load(format!("the certificate of {section}"), files, move || {
            let expiry = X509Expiry::read(&given.cert)?;
            Ok(Serving { config: Arc::new(server_config(listener, &given)?), expiry })
        })?;
        let client_ca = config.client_ca.clone();
        let ca =
            FileWatcher::load(format!("the client CA of {section}"), vec![client_ca.clone()], move || {
                ClientCa::read(&client_ca, &[])
            })?;
        let allowed_names = config.allowed_names.clone();
        Ok(Self { listener, serving, verifier: ClientVerifier::new(ca), allowed_names })
    }

    /// Returns the watchers of the files.
    pub fn watchers(&self) -> [Arc<dyn Watcher>; 2] {
        [self.serving.clone(), self.verifier.ca.clone()]
    }

    /// Returns when the certificates in use expire.
    pub fn expiries(&self) -> [Expiry; 2] {
        let (certificate, client_ca) = self.listener.expiry_names();
        [
            Expiry::Chain(certificate, self.serving.get().expiry.clone()),
            Expiry::Authorities(client_ca, self.verifier.ca.get().expiry.clone()),
        ]
    }

    /// Performs the handshake and verifies the caller's certificate. Returns the caller's name for the records. Whoever
    /// requested the certificate may have chosen any characters for the name, so only printable ones are kept. `begun` is
    /// called once the caller's part of the handshake has begun.
    pub async fn handshake<S>(
        &self,
        socket: S,
        begun: impl FnOnce(),
    ) -> Result<(TlsStream<S>, String), TlsRefusal>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let config = self.serving.get().config.clone();
        let stream = tls::accept(socket, config, begun).await.map_err(TlsRefusal::stranger)?;
        let caller = self.check(stream.get_ref().1.peer_certificates()).await?;
        Ok((stream, caller))
    }

    async fn check(&self, chain: Option<&[CertificateDer<'static>]>) -> Result<String, TlsRefusal> {
        let chain: Arc<[_]> = chain.unwrap_or_default().into();
        self.verifier.verify(&chain, SystemTime::now()).await.map_err(TlsRefusal::stranger)?;
        let own = chain.first().ok_or_else(|| TlsRefusal::stranger("no client certificate"))?;
        let names = certificate_names(own).map_err(TlsRefusal::stranger)?;
        if self.allowed_names.is_empty() || names.iter().any(|name| self.allowed_names.contains(name)) {
            return Ok(names.first().map_or_else(|| "without a name".to_owned(), |name| printable(name)));
        }
        Err(TlsRefusal::NotAllowed(printable(&names.join(", "))))
    }
}

impl TlsListener {
    fn section(self) -> &'static str {
        match self {
            Self::HttpConnect => "http_connect.tls",
            Self::Konnectivity => "konnectivity.tls",
        }
    }

    /// Returns the application protocol (RFC 7301) that callers must accept.
    fn alpn(self) -> &'static [u8] {
        match self {
            Self::HttpConnect => b"http/1.1",
            Self::Konnectivity => b"h2",
        }
    }

    /// Returns the values of the metric label `certificate` for the certificate and for the client CA.
    fn expiry_names(self) -> (&'static str, &'static str) {
        match self {
            Self::HttpConnect => ("connect", "connect_client_ca"),
            Self::Konnectivity => ("konnectivity", "konnectivity_client_ca"),
        }
    }
}

fn server_config(listener: TlsListener, config: &TlsConfig) -> anyhow::Result<ServerConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let possession = Possession { provider: provider.clone(), mandatory: true };
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_client_cert_verifier(Arc::new(possession))
        .with_single_cert(chain(&config.cert)?, private_key(&config.key)?)
        .with_context(|| {
            let (cert, key) = (config.cert.display(), config.key.display());
            format!("the certificate in {cert} and the private key in {key} do not belong together")
        })?;
    tls.alpn_protocols = vec![listener.alpn().to_vec()];
    Ok(tls)
}

/// Returns the common names of the subject, followed by the DNS names.
fn certificate_names(der: &CertificateDer<'_>) -> Result<Vec<String>, String> {
    use x509_parser::{extensions::GeneralName, prelude::FromDer};
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der)
        .map_err(|e| format!("client certificate: {e}"))?;
    let common =
        certificate.subject().iter_common_name().filter_map(|cn| cn.as_str().ok().map(str::to_owned));
    let mut names: Vec<String> = common.collect();
    if let Ok(Some(san)) = certificate.subject_alternative_name() {
        for name in &san.value.general_names {
            if let GeneralName::DNSName(dns) = name {
                names.push((*dns).to_owned());
            }
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proto_config::secret_file;
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    use rustls::{
        ClientConfig, RootCertStore,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    };
    use tokio_rustls::TlsConnector;

    use super::*;

    type Ca = CertifiedIssuer<'static, KeyPair>;

    fn ca(name: &str) -> Ca {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    struct Issued {
        certificate: rcgen::Certificate,
        key: KeyPair,
    }

    fn issue(ca: &Ca, name: &str) -> Issued {
        let mut params = CertificateParams::new(vec!["master.example".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        Issued { certificate: params.signed_by(&key, ca).unwrap(), key }
    }

    /// The files of a listener, in a directory of their own.
    struct Files(PathBuf);

    impl Files {
        fn new() -> Self {
            let dir = std::env::temp_dir().join(format!("egress-tls-{:016x}", rand::random::<u64>()));
            std::fs::create_dir(&dir).unwrap();
            Self(dir)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }

        fn write(&self, name: &str, text: &str) {
            secret_file::replace(&self.path(name), text.as_bytes()).unwrap();
        }

        fn serve(&self, issued: &Issued) {
            self.write("tls.crt", &issued.certificate.pem());
            self.write("tls.key", &issued.key.serialize_pem());
        }

        fn load(&self, allowed_names: &[&str]) -> CallerTls {
            let config = TlsConfig {
                listen: "127.0.0.1:0".parse().unwrap(),
                cert: self.path("tls.crt"),
                key: self.path("tls.key"),
                client_ca: self.path("client-ca.crt"),
                allowed_names: allowed_names.iter().map(|name| (*name).to_owned()).collect(),
            };
            CallerTls::load(TlsListener::HttpConnect, &config).unwrap()
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// Polls the files until a change is in force.
    fn poll_files(tls: &CallerTls) {
        for watcher in tls.watchers() {
            watcher.poll();
            watcher.poll();
        }
    }

    /// A caller with a certificate, who trusts one CA: whether the handshake succeeds, and what the listener calls the
    /// caller.
    async fn call(tls: &CallerTls, trusted: &Ca, caller: &Issued) -> (bool, Result<String, TlsRefusal>) {
        let mut roots = RootCertStore::empty();
        roots.add(trusted.der().clone()).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(caller.key.serialize_der()));
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![caller.certificate.der().clone()], key)
            .unwrap();
        let (near, far) = tokio::io::duplex(64 * 1024);
        let name = "master.example".try_into().unwrap();
        let connect = TlsConnector::from(Arc::new(config)).connect(name, near);
        // The caller's socket stays open until the listener is done, too.
        let (connected, accepted) = tokio::join!(connect, tls.handshake(far, || ()));
        (connected.is_ok(), accepted.map(|(_, name)| name))
    }

    #[tokio::test]
    async fn certificate_and_client_ca_follow_their_files_and_a_broken_file_changes_nothing() {
        let (first, second, callers, others) = (ca("first"), ca("second"), ca("callers"), ca("others"));
        let (caller, other) = (issue(&callers, "kube-apiserver"), issue(&others, "other"));
        let files = Files::new();
        files.serve(&issue(&first, "first"));
        files.write("client-ca.crt", &callers.pem());
        let tls = files.load(&[]);
        assert_eq!(call(&tls, &first, &caller).await, (true, Ok("kube-apiserver".to_owned())));
        assert!(!call(&tls, &second, &caller).await.0);
        assert!(matches!(call(&tls, &first, &other).await.1, Err(TlsRefusal::Stranger(_))));
        let expiries = tls.expiries();

        files.serve(&issue(&second, "second"));
        poll_files(&tls);
        assert_eq!(call(&tls, &second, &caller).await, (true, Ok("kube-apiserver".to_owned())));
        assert!(!call(&tls, &first, &caller).await.0);
        assert_eq!(tls.expiries(), expiries, "both end at the same time, in the same files");

        for (name, text) in [("tls.crt", "broken"), ("tls.key", "broken"), ("client-ca.crt", "broken")] {
            files.write(name, text);
            poll_files(&tls);
            assert_eq!(call(&tls, &second, &caller).await, (true, Ok("kube-apiserver".to_owned())), "{name}");
        }

        files.write("client-ca.crt", &others.pem());
        poll_files(&tls);
        assert_eq!(call(&tls, &second, &other).await, (true, Ok("other".to_owned())));
        assert!(call(&tls, &second, &caller).await.1.is_err());
    }

    #[tokio::test]
    async fn only_allowed_names_may_call() {
        let authority = ca("authority");
        let files = Files::new();
        files.serve(&issue(&authority, "master"));
        files.write("client-ca.crt", &authority.pem());
        let tls = files.load(&["kube-apiserver", "ops.example"]);
        let (_, called) = call(&tls, &authority, &issue(&authority, "kube-apiserver")).await;
        assert_eq!(called, Ok("kube-apiserver".to_owned()));
        let (_, called) = call(&tls, &authority, &issue(&authority, "somebody")).await;
        assert_eq!(called, Err(TlsRefusal::NotAllowed("somebody, master.example".to_owned())));
    }
}
