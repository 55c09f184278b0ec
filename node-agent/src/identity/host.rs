//! The node's own key and certificate, and the CAs that it trusts: files in the state directory.
//!
//! | file | holds |
//! | --- | --- |
//! | `host_key` | the private host key, mode 0600 |
//! | `host_key-cert.pub` | its certificate, from joining or renewal |
//! | `host_ca.pub` | the CA that signs this node's certificates |
//! | `user_ca.pub` | the CAs whose user certificates are accepted, one on each line |
//!
//! [`crate::revocation`] keeps the lists of revoked certificates beside them.

use std::{
    io::{self, ErrorKind},
    net::IpAddr,
    path::{Path, PathBuf},
    time::SystemTime,
};

use proto::{NodeName, join::JoinResponse};
use proto_config::secret_file;
use russh::keys::{
    Algorithm, Certificate, PrivateKey, PublicKey,
    ssh_key::{self, LineEnding, certificate::CertType},
};

const HOST_KEY: &str = "host_key";
const CERTIFICATE: &str = "host_key-cert.pub";
const HOST_CA: &str = "host_ca.pub";
const USER_CAS: &str = "user_ca.pub";

/// Why the identity can't be read, installed or renewed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The text names the file.
    #[error(transparent)]
    File(#[from] io::Error),
    #[error("can't write {path}: {error}", path = path.display())]
    Write { path: PathBuf, error: io::Error },
    #[error("{path} is not {expected}: {error}", path = path.display())]
    Content { path: PathBuf, expected: &'static str, error: ssh_key::Error },
    #[error("{} is for another key than host_key", .0.display())]
    CertificateOfAnotherKey(PathBuf),
    #[error("{} is not signed by the CA in host_ca.pub: join this host again (`node-agent join`)", .0.display())]
    CertificateOfAnotherCa(PathBuf),
    #[error("SSH keys can't be generated or encoded: {0}")]
    Encoding(ssh_key::Error),
    #[error("the master refused")]
    Refused,
    #[error("the {what} can't be read: {error}")]
    Unreadable { what: &'static str, error: ssh_key::Error },
    #[error("the certificate is for another key")]
    AnotherKey,
    #[error("the certificate is not a node's host certificate")]
    NoHostCertificate,
    #[error("the certificate is not signed by this node's host CA")]
    AnotherCa,
    #[error("the certificate is not for node {0}")]
    NotForNode(NodeName),
    #[error("there is no certificate to renew: run `node-agent join`")]
    NothingToRenew,
    #[error("this host has joined again since this agent started: restart the agent")]
    JoinedAgain,
    #[error("it is for another node than the present one")]
    AnotherNode,
    #[error("it does not last longer than the present one")]
    NotLonger,
    #[error("it adds the principal {0:?}: an address or name is added by joining again, `node-agent join`")]
    AddedPrincipal(String),
}

/// The node's identity. Renewal makes a new one.
#[derive(Clone, Debug)]
pub struct NodeIdentity {
    directory: PathBuf,
    key: PrivateKey,
    certificate: Option<Certificate>,
    host_ca: Option<PublicKey>,
    user_cas: Vec<PublicKey>,
}

impl NodeIdentity {
    /// Reads the identity; a host without a key gets one.
    pub fn load_or_create(directory: &Path) -> Result<Self, IdentityError> {
        secret_file::create_directory(directory)?;
        let path = directory.join(HOST_KEY);
        if !path.exists() {
            create_key(&path)?;
        }
        let key = PrivateKey::from_openssh(secret_file::read(&path)?);
        let key = key.map_err(|error| content_error(&path, "an OpenSSH private key", error))?;
        let certificate = read_certificate(directory, &key)?;
        let host_ca =
            match read_optional(&directory.join(HOST_CA))? {
                Some(text) => Some(PublicKey::from_openssh(text.trim()).map_err(|error| {
                    content_error(&directory.join(HOST_CA), "an OpenSSH public key", error)
                })?),
                None => None,
            };
        if let (Some(certificate), Some(ca)) = (&certificate, &host_ca)
            && !is_signed_by(certificate, ca)
        {
            return Err(IdentityError::CertificateOfAnotherCa(directory.join(CERTIFICATE)));
        }
        let user_cas = read_user_cas(&directory.join(USER_CAS))?;
        Ok(Self { directory: directory.to_owned(), key, certificate, host_ca, user_cas })
    }

    pub fn host_key(&self) -> &PrivateKey {
        &self.key
    }

    pub fn certificate(&self) -> Option<&Certificate> {
        self.certificate.as_ref()
    }

    /// The CAs whose user certificates are accepted.
    pub fn user_cas(&self) -> &[PublicKey] {
        &self.user_cas
    }

    /// The name that the certificate gives this node.
    pub fn node_name(&self) -> Option<NodeName> {
        node_of(self.certificate.as_ref()?)
    }

    /// The addresses that the certificate gives this node.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let principals = self.certificate.iter().flat_map(|c| c.valid_principals());
        principals.filter_map(|p| p.parse().ok()).map(|address: IpAddr| address.to_canonical()).collect()
    }

    pub fn not_after(&self) -> Option<SystemTime> {
        self.certificate.as_ref()?.valid_before_time()
    }

    /// Installs what a master gave this joining host.
    pub fn install(&mut self, response: &JoinResponse) -> Result<(), IdentityError> {
        let JoinResponse::Accepted { node, host_certificate, host_ca, user_ca } = response else {
            return Err(IdentityError::Refused);
        };
        let public_key = |text: &str, what| {
            PublicKey::from_openssh(text).map_err(|error| IdentityError::Unreadable { what, error })
        };
        let ca = public_key(host_ca, "host CA")?;
        let user_ca = public_key(user_ca, "user CA")?;
        let certificate = self.check(host_certificate, &ca)?;
        if node_of(&certificate).as_ref() != Some(node) {
            return Err(IdentityError::NotForNode(node.clone()));
        }
        // The certificate goes first and comes last, so that there is never one beside the CAs of another master.
        self.remove_certificate()?;
        self.write(HOST_CA, ca.to_openssh())?;
        self.write(USER_CAS, user_ca.to_openssh())?;
        self.write(CERTIFICATE, certificate.to_openssh())?;
        (self.certificate, self.host_ca, self.user_cas) = (Some(certificate), Some(ca), vec![user_ca]);
        Ok(())
    }

    /// Checks a renewed certificate, writes it to its file, and returns the identity that has it. It must come from the
    /// same CA, name the same node, last longer, and have no principal that the present certificate lacks: a
    /// compromised master must not give a node further addresses or names. It does not replace what `node-agent join` has
    /// installed since. If another process of this agent has installed a certificate that lasts longer, that is taken.
    /// Blocks while it writes.
    pub fn renew(&self, text: &str) -> Result<Self, IdentityError> {
        let (Some(ca), Some(present)) = (&self.host_ca, &self.certificate) else {
            return Err(IdentityError::NothingToRenew);
        };
        let renewed = self.check(text, ca)?;
        renews(present, &renewed)?;
        let on_disk = match read_certificate(&self.directory, &self.key) {
            Ok(Some(on_disk)) => on_disk,
            Ok(None) | Err(IdentityError::CertificateOfAnotherKey(_)) => {
                return Err(IdentityError::JoinedAgain);
            }
            Err(error) => return Err(error),
        };
        if on_disk != *present && !(is_signed_by(&on_disk, ca) && renews(present, &on_disk).is_ok()) {
            return Err(IdentityError::JoinedAgain);
        }
        let certificate = if renewed.valid_before() > on_disk.valid_before() {
            self.write(CERTIFICATE, renewed.to_openssh())?;
            renewed
        } else {
            on_disk
        };
        Ok(Self { certificate: Some(certificate), ..self.clone() })
    }

    fn check(&self, text: &str, ca: &PublicKey) -> Result<Certificate, IdentityError> {
        let certificate = Certificate::from_openssh(text.trim())
            .map_err(|error| IdentityError::Unreadable { what: "certificate", error })?;
        if certificate.public_key() != self.key.public_key().key_data() {
            return Err(IdentityError::AnotherKey);
        }
        if certificate.cert_type() != CertType::Host || node_of(&certificate).is_none() {
            return Err(IdentityError::NoHostCertificate);
        }
        if !is_signed_by(&certificate, ca) {
            return Err(IdentityError::AnotherCa);
        }
        Ok(certificate)
    }

    fn remove_certificate(&self) -> Result<(), IdentityError> {
        let path = self.directory.join(CERTIFICATE);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(IdentityError::Write { path, error }),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn write(&self, name: &str, encoded: Result<String, ssh_key::Error>) -> Result<(), IdentityError> {
        let text = encoded.map_err(IdentityError::Encoding)?;
        let path = self.directory.join(name);
        secret_file::replace(&path, format!("{}\n", text.trim()).as_bytes())
            .map_err(|error| IdentityError::Write { path, error })
    }
}

/// Whether a certificate of the same CA and key may take the place of the present one.
fn renews(present: &Certificate, renewed: &Certificate) -> Result<(), IdentityError> {
    if node_of(present) != node_of(renewed) {
        return Err(IdentityError::AnotherNode);
    }
    if renewed.valid_before() <= present.valid_before() {
        return Err(IdentityError::NotLonger);
    }
    let present_principals = present.valid_principals();
    match renewed.valid_principals().iter().find(|p| !present_principals.contains(p)) {
        Some(added) => Err(IdentityError::AddedPrincipal(added.clone())),
        None => Ok(()),
    }
}

/// The node that a certificate names: its key id says which of its principals.
fn node_of(certificate: &Certificate) -> Option<NodeName> {
    let name: NodeName = certificate.key_id().strip_prefix("node:")?.parse().ok()?;
    certificate.valid_principals().iter().any(|p| p == name.as_str()).then_some(name)
}

fn is_signed_by(certificate: &Certificate, ca: &PublicKey) -> bool {
    certificate.signature_key() == ca.key_data() && certificate.verify_signature().is_ok()
}

fn create_key(path: &Path) -> Result<(), IdentityError> {
    let key = PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).map_err(IdentityError::Encoding)?;
    let text = key.to_openssh(LineEnding::LF).map_err(IdentityError::Encoding)?;
    match secret_file::write_new(path, text.as_bytes()) {
        Ok(()) => Ok(()),
        // Another process was faster; its key is the one that counts.
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(IdentityError::Write { path: path.to_owned(), error }),
    }
}

fn read_certificate(directory: &Path, key: &PrivateKey) -> Result<Option<Certificate>, IdentityError> {
    let path = directory.join(CERTIFICATE);
    let Some(text) = read_optional(&path)? else { return Ok(None) };
    let certificate = Certificate::from_openssh(text.trim())
        .map_err(|error| content_error(&path, "an OpenSSH certificate", error))?;
    if certificate.public_key() != key.public_key().key_data() {
        return Err(IdentityError::CertificateOfAnotherKey(path));
    }
    Ok(Some(certificate))
}

fn read_user_cas(path: &Path) -> Result<Vec<PublicKey>, IdentityError> {
    let Some(text) = read_optional(path)? else { return Ok(Vec::new()) };
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let cas: Result<_, _> = lines.map(PublicKey::from_openssh).collect();
    cas.map_err(|error| content_error(path, "a list of OpenSSH public keys", error))
}

fn read_optional(path: &Path) -> Result<Option<String>, IdentityError> {
    match secret_file::read_public(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn content_error(path: &Path, expected: &'static str, error: ssh_key::Error) -> IdentityError {
    IdentityError::Content { path: path.to_owned(), expected, error }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, time::Duration};

    use super::*;
    use crate::testing::{CertificateSpec, NOW, TempDir, accepted, new_key, now};

    #[test]
    fn what_a_master_gives_is_checked_and_kept() {
        let dir = TempDir::new();
        let (host_ca, user_ca) = (new_key(), new_key());
        let mut identity = NodeIdentity::load_or_create(dir.path()).unwrap();
        assert_eq!((identity.node_name(), identity.addresses().len()), (None, 0));
        let key = identity.host_key().public_key().clone();
        let other = new_key();
        let good = CertificateSpec::host(&host_ca, &key);
        for (what, bad) in [
            ("another key", CertificateSpec { key: other.public_key(), ..good }),
            ("user type", CertificateSpec { kind: CertType::User, ..good }),
            ("another CA", CertificateSpec { ca: &other, ..good }),
            ("another node", CertificateSpec { key_id: "node:n2", principals: &["n2"], ..good }),
            ("no name", CertificateSpec { principals: &["10.0.0.5"], ..good }),
        ] {
            assert!(identity.install(&accepted(&bad.text(), &host_ca, &user_ca)).is_err(), "{what}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{what}: nothing is written");
        }
        identity.install(&accepted(&good.text(), &host_ca, &user_ca)).unwrap();
        let identity = NodeIdentity::load_or_create(dir.path()).unwrap();
        assert_eq!(identity.host_key().public_key().key_data(), key.key_data());
        assert_eq!(identity.node_name().unwrap().as_str(), "n1");
        let addresses: Vec<IpAddr> = vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
        assert_eq!(identity.addresses(), addresses);
        assert_eq!(identity.not_after(), Some(now() + Duration::from_secs(3600)));
        let user_cas: Vec<_> = identity.user_cas().iter().map(PublicKey::key_data).collect();
        assert_eq!(user_cas, [user_ca.public_key().key_data()]);
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
        }
        let secret = identity.host_key().key_data().ed25519().unwrap().private.to_bytes();
        let list = secret.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
        assert!(!format!("{identity:?}").contains(&list));
    }

    #[test]
    fn a_renewal_is_of_the_same_node_and_ca_and_lasts_longer() {
        let dir = TempDir::new();
        let (host_ca, user_ca, other) = (new_key(), new_key(), new_key());
        let mut identity = NodeIdentity::load_or_create(dir.path()).unwrap();
        let key = identity.host_key().public_key().clone();
        let good = CertificateSpec::host(&host_ca, &key);
        assert!(matches!(identity.renew(&good.text()), Err(IdentityError::NothingToRenew)));
        let installed = good.text();
        identity.install(&accepted(&installed, &host_ca, &user_ca)).unwrap();
        let later = CertificateSpec { valid: (NOW, NOW + 7200), ..good };
        let more = &["n1", "10.0.0.5", "fd00::5", "10.0.0.6"];
        for (what, bad) in [
            ("not longer", good),
            ("another node", CertificateSpec { key_id: "node:n2", principals: &["n2", "n1"], ..later }),
            ("another CA", CertificateSpec { ca: &other, ..later }),
            ("another key", CertificateSpec { key: other.public_key(), ..later }),
            ("user type", CertificateSpec { kind: CertType::User, ..later }),
            ("an address more", CertificateSpec { principals: more, ..later }),
            ("another address", CertificateSpec { principals: &["n1", "169.254.169.254"], ..later }),
            ("a name more", CertificateSpec { principals: &["n1", "10.0.0.5", "n2"], ..later }),
            ("every principal", CertificateSpec { principals: &[], ..later }),
        ] {
            assert!(identity.renew(&bad.text()).is_err(), "{what}");
            let read = NodeIdentity::load_or_create(dir.path()).unwrap();
            assert_eq!(read.certificate(), Some(&Certificate::from_openssh(&installed).unwrap()), "{what}");
        }
        assert!(identity.renew("ssh-ed25519-cert-v01@openssh.com AAAA").is_err());
        assert!(identity.renew("").is_err());
        let identity = identity.renew(&later.text()).unwrap();
        let read = NodeIdentity::load_or_create(dir.path()).unwrap();
        assert_eq!(read.not_after(), Some(now() + Duration::from_secs(7200)));
        // A later renewal can't bring back what an earlier one has left out.
        let fewer = CertificateSpec { principals: &["n1", "fd00::5"], valid: (NOW, NOW + 9000), ..good };
        let identity = identity.renew(&fewer.text()).unwrap();
        assert_eq!(identity.addresses(), ["fd00::5".parse::<IpAddr>().unwrap()]);
        assert!(identity.renew(&CertificateSpec { valid: (NOW, NOW + 9900), ..good }.text()).is_err());
    }

    #[test]
    fn a_running_agent_leaves_what_the_host_has_joined_since() {
        let dir = TempDir::new();
        let (host_ca, other_ca, user_ca) = (new_key(), new_key(), new_key());
        let mut running = NodeIdentity::load_or_create(dir.path()).unwrap();
        let key = running.host_key().public_key().clone();
        let ours = CertificateSpec::host(&host_ca, &key);
        running.install(&accepted(&ours.text(), &host_ca, &user_ca)).unwrap();
        let renewed = CertificateSpec { valid: (NOW, NOW + 7200), ..ours }.text();

        let mut joining = NodeIdentity::load_or_create(dir.path()).unwrap();
        let theirs = CertificateSpec { ca: &other_ca, ..ours }.text();
        joining.install(&accepted(&theirs, &other_ca, &user_ca)).unwrap();
        let read = || std::fs::read_to_string(dir.path().join(CERTIFICATE)).ok();
        let joined = read();
        assert!(matches!(running.renew(&renewed), Err(IdentityError::JoinedAgain)));
        assert_eq!(read(), joined);
        assert!(NodeIdentity::load_or_create(dir.path()).is_ok());
        // Also while the host is joining, when there is no certificate.
        joining.remove_certificate().unwrap();
        assert!(matches!(running.renew(&renewed), Err(IdentityError::JoinedAgain)));
        assert_eq!(read(), None);
    }

    #[test]
    fn files_that_do_not_fit_are_named() {
        let dir = TempDir::new();
        let (host_ca, user_ca) = (new_key(), new_key());
        let mut identity = NodeIdentity::load_or_create(dir.path()).unwrap();
        let key = identity.host_key().public_key().clone();
        let certificate = CertificateSpec::host(&host_ca, &key).text();
        identity.install(&accepted(&certificate, &host_ca, &user_ca)).unwrap();
        let error = |name: &str, text: &str| {
            let path = dir.path().join(name);
            let before = std::fs::read(&path).unwrap();
            std::fs::write(&path, text).unwrap();
            let error = NodeIdentity::load_or_create(dir.path()).unwrap_err().to_string();
            std::fs::write(&path, before).unwrap();
            error
        };
        for (name, text) in [
            (HOST_KEY, "x"),
            (CERTIFICATE, "x"),
            (HOST_CA, "x"),
            (USER_CAS, "x"),
            (CERTIFICATE, &CertificateSpec::host(&host_ca, new_key().public_key()).text()),
            (CERTIFICATE, &CertificateSpec::host(&new_key(), &key).text()),
        ] {
            assert!(error(name, text).contains(name), "{name}");
        }
        let readable = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(dir.path().join(HOST_KEY), readable).unwrap();
        let error = NodeIdentity::load_or_create(dir.path()).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }
}
