//! The node's own key and certificate, and whom it trusts as a user: files in the state directory.
//!
//! | file | holds |
//! | --- | --- |
//! | `host_key` | the private host key, mode 0600 |
//! | `host_key-cert.pub` | its certificate, from joining or renewal |
//! | `host_ca.pub` | the CA that signs this node's certificates |
//! | `user_ca.pub` | the CAs whose user certificates are accepted, one a line |

use std::{
    io::ErrorKind,
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::SystemTime,
};

use anyhow::{Context, bail};
use ipnet::IpNet;
use proto::{NodeName, join::JoinResponse, secret_file};
use russh::keys::{
    Algorithm, Certificate, HashAlg, PrivateKey, PublicKey,
    ssh_key::{LineEnding, certificate::CertType, public::KeyData},
};

/// The login name and principal of masters.
pub const MASTER: &str = "master-agent";

/// What an accepted user certificate entitles to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserRole {
    /// A master: the multiplexer, and direct-tcpip.
    Master,
    /// A person: direct-tcpip.
    Person { login: String, key_id: String },
}

/// Why a user certificate was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserCertError {
    #[error("no user CA is trusted here yet: run `node-agent join`")]
    NoCa,
    #[error("signed by a CA that is not trusted here ({0})")]
    WrongCa(String),
    #[error("its signature is wrong")]
    BadSignature,
    #[error("it is not a user certificate")]
    NotAUserCertificate,
    #[error("it is not valid yet: check both clocks")]
    NotYetValid,
    #[error("it has expired")]
    Expired,
    #[error("it is not for the login {login:?}, but for {principals:?}")]
    WrongPrincipal { login: String, principals: Vec<String> },
    #[error("its source-address option does not allow {0}")]
    SourceAddress(String),
    #[error("it has the critical option {0:?}, which is not known here")]
    CriticalOption(String),
    #[error("it does not permit port forwarding")]
    NoForwarding,
    #[error("the login {0:?} is not in `users:`")]
    NotAllowed(String),
}

/// The node's identity.
#[derive(Debug)]
pub struct NodeIdentity {
    directory: PathBuf,
    key: PrivateKey,
    certificate: Option<Certificate>,
    host_ca: Option<PublicKey>,
    user_cas: Vec<PublicKey>,
}

impl NodeIdentity {
    /// Reads the identity; a host without a key gets one.
    pub fn load_or_create(directory: &Path) -> anyhow::Result<Self> {
        secret_file::create_directory(directory)?;
        let path = directory.join("host_key");
        if !path.exists() {
            let key = PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519)?;
            match secret_file::write_new(&path, key.to_openssh(LineEnding::LF)?.as_bytes()) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e).with_context(|| format!("can't create {}", path.display())),
            }
        }
        let key = PrivateKey::from_openssh(secret_file::read(&path)?)
            .with_context(|| format!("{} is not an OpenSSH private key", path.display()))?;
        let mut identity =
            Self { directory: directory.to_owned(), key, certificate: None, host_ca: None, user_cas: Vec::new() };
        identity.read_public_files()?;
        Ok(identity)
    }

    fn read_public_files(&mut self) -> anyhow::Result<()> {
        let parse = |name: &str, what: &str| format!("{} is not {what}", self.directory.join(name).display());
        self.certificate = match self.read_optional("host_key-cert.pub")? {
            Some(text) => {
                let certificate = Certificate::from_openssh(text.trim())
                    .with_context(|| parse("host_key-cert.pub", "an OpenSSH certificate"))?;
                if certificate.public_key() != self.key.public_key().key_data() {
                    bail!("{} is for another key than host_key", self.directory.join("host_key-cert.pub").display());
                }
                Some(certificate)
            }
            None => None,
        };
        self.host_ca = match self.read_optional("host_ca.pub")? {
            Some(text) => Some(PublicKey::from_openssh(text.trim()).with_context(|| parse("host_ca.pub", "an OpenSSH public key"))?),
            None => None,
        };
        self.user_cas = match self.read_optional("user_ca.pub")? {
            Some(text) => text
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(PublicKey::from_openssh)
                .collect::<Result<_, _>>()
                .with_context(|| parse("user_ca.pub", "a list of OpenSSH public keys"))?,
            None => Vec::new(),
        };
        Ok(())
    }

    fn read_optional(&self, name: &str) -> anyhow::Result<Option<String>> {
        let path = self.directory.join(name);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("can't read {}", path.display())),
        }
    }

    pub fn host_key(&self) -> &PrivateKey {
        &self.key
    }

    pub fn certificate(&self) -> Option<&Certificate> {
        self.certificate.as_ref()
    }

    /// The name that the certificate gives this node.
    pub fn node_name(&self) -> Option<NodeName> {
        node_of(self.certificate.as_ref()?)
    }

    /// The addresses that the certificate gives this node.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let principals = self.certificate.iter().flat_map(|c| c.valid_principals());
        principals.filter_map(|p| p.parse().ok()).collect()
    }

    pub fn not_after(&self) -> Option<SystemTime> {
        self.certificate.as_ref()?.valid_before_time()
    }

    /// Installs what a master gave this joining host.
    pub fn install(&mut self, response: &JoinResponse) -> anyhow::Result<()> {
        let JoinResponse::Accepted { node, host_certificate, host_ca, user_ca } = response else {
            bail!("the master refused");
        };
        let ca = PublicKey::from_openssh(host_ca).context("the host CA can't be read")?;
        let user_ca = PublicKey::from_openssh(user_ca).context("the user CA can't be read")?;
        let certificate = self.check(host_certificate, &ca)?;
        if node_of(&certificate).as_ref() != Some(node) {
            bail!("the certificate is not for node {node}");
        }
        // The certificate comes last: with it, the identity is complete.
        self.write("host_ca.pub", &ca.to_openssh()?)?;
        self.write("user_ca.pub", &user_ca.to_openssh()?)?;
        self.write("host_key-cert.pub", &certificate.to_openssh()?)?;
        (self.certificate, self.host_ca, self.user_cas) = (Some(certificate), Some(ca), vec![user_ca]);
        Ok(())
    }

    /// Takes a renewed certificate: of the same CA, for the same node, valid for longer.
    pub fn renew(&mut self, text: &str) -> anyhow::Result<()> {
        let Some(ca) = self.host_ca.clone() else { bail!("no host CA is known here: run `node-agent join`") };
        let renewed = self.check(text, &ca)?;
        if let Some(present) = &self.certificate {
            if node_of(present) != node_of(&renewed) {
                bail!("it is for another node than the present one");
            }
            if renewed.valid_before() <= present.valid_before() {
                bail!("it does not last longer than the present one");
            }
        }
        self.write("host_key-cert.pub", &renewed.to_openssh()?)?;
        self.certificate = Some(renewed);
        Ok(())
    }

    fn check(&self, text: &str, ca: &PublicKey) -> anyhow::Result<Certificate> {
        let certificate = Certificate::from_openssh(text.trim()).context("the certificate can't be read")?;
        if certificate.public_key() != self.key.public_key().key_data() {
            bail!("the certificate is for another key");
        }
        if certificate.cert_type() != CertType::Host || node_of(&certificate).is_none() {
            bail!("the certificate is not a node's host certificate");
        }
        if certificate.signature_key() != ca.key_data() || certificate.verify_signature().is_err() {
            bail!("the certificate is not signed by this node's host CA");
        }
        Ok(certificate)
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.directory.join(name);
        secret_file::replace(&path, format!("{}\n", text.trim()).as_bytes())
            .with_context(|| format!("can't write {}", path.display()))
    }

    /// Decides about a user certificate whose key the session has proved.
    pub fn verify_user(
        &self,
        login: &str,
        certificate: &Certificate,
        peer: Option<IpAddr>,
        now: SystemTime,
    ) -> Result<UserRole, UserCertError> {
        if self.user_cas.is_empty() {
            return Err(UserCertError::NoCa);
        }
        let trusted = |ca: &KeyData| self.user_cas.iter().any(|trusted| trusted.key_data() == ca);
        check_user(login, certificate, peer, now, trusted)?;
        if login == MASTER {
            return Ok(UserRole::Master);
        }
        Ok(UserRole::Person { login: login.to_owned(), key_id: certificate.key_id().to_owned() })
    }

    /// Decides whether a peer is the master whose user CA has the fingerprint `pin`.
    pub fn verify_pinned_user(
        pin: &str,
        login: &str,
        certificate: &Certificate,
        now: SystemTime,
    ) -> Result<(), UserCertError> {
        let trusted = |ca: &KeyData| ca.fingerprint(HashAlg::Sha256).to_string() == pin.trim();
        check_user(login, certificate, None, now, trusted)?;
        if login == MASTER {
            return Ok(());
        }
        Err(UserCertError::WrongPrincipal { login: login.to_owned(), principals: vec![MASTER.to_owned()] })
    }
}

/// The node that a certificate names: its key id says which of its principals.
fn node_of(certificate: &Certificate) -> Option<NodeName> {
    let name: NodeName = certificate.key_id().strip_prefix("node:")?.parse().ok()?;
    certificate.valid_principals().iter().any(|p| p == name.as_str()).then_some(name)
}

fn check_user(
    login: &str,
    certificate: &Certificate,
    peer: Option<IpAddr>,
    now: SystemTime,
    trusted: impl Fn(&KeyData) -> bool,
) -> Result<(), UserCertError> {
    if !trusted(certificate.signature_key()) {
        return Err(UserCertError::WrongCa(certificate.signature_key().fingerprint(HashAlg::Sha256).to_string()));
    }
    if certificate.verify_signature().is_err() {
        return Err(UserCertError::BadSignature);
    }
    if certificate.cert_type() != CertType::User {
        return Err(UserCertError::NotAUserCertificate);
    }
    let unix = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    if unix < certificate.valid_after() {
        return Err(UserCertError::NotYetValid);
    }
    if unix >= certificate.valid_before() {
        return Err(UserCertError::Expired);
    }
    if !certificate.valid_principals().iter().any(|p| p == login) {
        return Err(UserCertError::WrongPrincipal {
            login: login.to_owned(),
            principals: certificate.valid_principals().to_vec(),
        });
    }
    for (option, value) in certificate.critical_options().iter() {
        match option.as_str() {
            "source-address" => check_source(value, peer)?,
            _ => return Err(UserCertError::CriticalOption(option.clone())),
        }
    }
    if !certificate.extensions().iter().any(|(name, _)| name == "permit-port-forwarding") {
        return Err(UserCertError::NoForwarding);
    }
    Ok(())
}

/// The option's value is a comma-separated list of addresses and CIDRs (OpenSSH's PROTOCOL.certkeys).
fn check_source(list: &str, peer: Option<IpAddr>) -> Result<(), UserCertError> {
    let peer = peer.map(|p| p.to_canonical());
    let inside = |item: &str| match (peer, IpNet::from_str(item), item.parse::<IpAddr>()) {
        (Some(peer), Ok(net), _) => net.contains(&peer),
        (Some(peer), _, Ok(address)) => peer == address.to_canonical(),
        _ => false,
    };
    if list.split(',').map(str::trim).any(inside) {
        return Ok(());
    }
    Err(UserCertError::SourceAddress(peer.map_or_else(|| "an unknown address".to_owned(), |p| p.to_string())))
}
