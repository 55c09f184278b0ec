//! The node's own key and certificate, and whom it trusts as a user: files in the state directory.
//!
//! | file | holds |
//! | --- | --- |
//! | `host_key` | the private host key, mode 0600 |
//! | `host_key-cert.pub` | its certificate, from joining or renewal |
//! | `host_ca.pub` | the CA that signs this node's certificates |
//! | `user_ca.pub` | the CAs whose user certificates are accepted, one a line |
//!
//! The lists of revoked certificates beside them are those of [`crate::revocation`].

use std::{
    io::ErrorKind,
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::SystemTime,
};

use anyhow::{Context, bail};
use ipnet::IpNet;
use proto::{NodeName, join::JoinResponse, revocation::krl::Revoked};
use proto_config::secret_file;
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
    #[error("it is revoked by {0}")]
    Revoked(Revoked),
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
        let mut identity = Self {
            directory: directory.to_owned(),
            key,
            certificate: None,
            host_ca: None,
            user_cas: Vec::new(),
        };
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
                    bail!(
                        "{} is for another key than host_key",
                        self.directory.join("host_key-cert.pub").display()
                    );
                }
                Some(certificate)
            }
            None => None,
        };
        self.host_ca = match self.read_optional("host_ca.pub")? {
            Some(text) => Some(
                PublicKey::from_openssh(text.trim())
                    .with_context(|| parse("host_ca.pub", "an OpenSSH public key"))?,
            ),
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
        match secret_file::read_public(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e.into()),
        }
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

    /// Takes a renewed certificate: of the same CA, for the same node, valid for longer, and with no principal that
    /// the present one does not have. A master that turned must not give a node further addresses or names.
    pub fn renew(&mut self, text: &str) -> anyhow::Result<()> {
        let (Some(ca), Some(present)) = (&self.host_ca, &self.certificate) else {
            bail!("there is no certificate to renew: run `node-agent join`")
        };
        let renewed = self.check(text, ca)?;
        if node_of(present) != node_of(&renewed) {
            bail!("it is for another node than the present one");
        }
        if renewed.valid_before() <= present.valid_before() {
            bail!("it does not last longer than the present one");
        }
        if let Some(added) =
            renewed.valid_principals().iter().find(|p| !present.valid_principals().contains(p))
        {
            bail!(
                "it adds the principal {added:?}: an address or name is added by joining again, `node-agent join`"
            );
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
        return Err(UserCertError::WrongCa(
            certificate.signature_key().fingerprint(HashAlg::Sha256).to_string(),
        ));
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

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, time::Duration};

    use russh::keys::ssh_key::certificate::Builder;

    use super::*;

    struct TempDir(PathBuf);

    impl TempDir {
        fn new() -> Self {
            let path = std::env::temp_dir().join(format!("node-agent-test-{:016x}", rand::random::<u64>()));
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const NOW: u64 = 1_800_000_000;

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
    }

    fn new_key() -> PrivateKey {
        PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap()
    }

    #[derive(Clone, Copy)]
    struct Make<'a> {
        ca: &'a PrivateKey,
        key: &'a PublicKey,
        kind: CertType,
        id: &'a str,
        principals: &'a [&'a str],
        options: &'a [(&'a str, &'a str)],
        forwarding: bool,
        valid: (u64, u64),
    }

    impl Make<'_> {
        fn make(&self) -> Certificate {
            let (from, to) = self.valid;
            let mut builder =
                Builder::new_with_random_nonce(&mut rand::rng(), self.key.key_data().clone(), from, to)
                    .unwrap();
            builder.cert_type(self.kind).unwrap().key_id(self.id).unwrap();
            if self.principals.is_empty() {
                builder.all_principals_valid().unwrap();
            }
            for principal in self.principals {
                builder.valid_principal(*principal).unwrap();
            }
            for (option, value) in self.options {
                builder.critical_option(*option, *value).unwrap();
            }
            if self.forwarding {
                builder.extension("permit-port-forwarding", "").unwrap();
            }
            builder.sign(self.ca).unwrap()
        }

        fn text(&self) -> String {
            self.make().to_openssh().unwrap()
        }
    }

    fn host<'a>(ca: &'a PrivateKey, key: &'a PublicKey) -> Make<'a> {
        Make {
            ca,
            key,
            kind: CertType::Host,
            id: "node:n1",
            principals: &["n1", "10.0.0.5", "fd00::5"],
            options: &[],
            forwarding: false,
            valid: (NOW - 60, NOW + 3600),
        }
    }

    fn accepted(certificate: &str, host_ca: &PrivateKey, user_ca: &PrivateKey) -> JoinResponse {
        JoinResponse::Accepted {
            node: "n1".parse().unwrap(),
            host_certificate: certificate.to_owned(),
            host_ca: host_ca.public_key().to_openssh().unwrap(),
            user_ca: user_ca.public_key().to_openssh().unwrap(),
        }
    }

    #[test]
    fn what_a_master_gives_is_checked_and_kept() {
        let dir = TempDir::new();
        let (host_ca, user_ca) = (new_key(), new_key());
        let mut identity = NodeIdentity::load_or_create(&dir.0).unwrap();
        assert_eq!((identity.node_name(), identity.addresses().len()), (None, 0));
        let key = identity.host_key().public_key().clone();
        let other = new_key();
        let good = host(&host_ca, &key);
        for (what, bad) in [
            ("another key", Make { key: other.public_key(), ..good }),
            ("user type", Make { kind: CertType::User, ..good }),
            ("other CA", Make { ca: &other, ..good }),
            ("other node", Make { id: "node:n2", principals: &["n2"], ..good }),
            ("no name", Make { principals: &["10.0.0.5"], ..good }),
        ] {
            assert!(identity.install(&accepted(&bad.text(), &host_ca, &user_ca)).is_err(), "{what}");
            assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 1, "{what}: nothing is written");
        }
        identity.install(&accepted(&good.text(), &host_ca, &user_ca)).unwrap();
        let identity = NodeIdentity::load_or_create(&dir.0).unwrap();
        assert_eq!(identity.host_key().public_key().key_data(), key.key_data());
        assert_eq!(identity.node_name().unwrap().as_str(), "n1");
        let addresses: Vec<IpAddr> = vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
        assert_eq!(identity.addresses(), addresses);
        assert_eq!(identity.not_after(), Some(now() + Duration::from_secs(3600)));
        for entry in std::fs::read_dir(&dir.0).unwrap() {
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
        let mut identity = NodeIdentity::load_or_create(&dir.0).unwrap();
        let key = identity.host_key().public_key().clone();
        let good = host(&host_ca, &key);
        assert!(identity.renew(&good.text()).is_err(), "nothing has been joined");
        let installed = good.text();
        identity.install(&accepted(&installed, &host_ca, &user_ca)).unwrap();
        let later = Make { valid: (NOW, NOW + 7200), ..good };
        for (what, bad) in [
            ("not longer", good),
            ("other node", Make { id: "node:n2", principals: &["n2", "n1"], ..later }),
            ("other CA", Make { ca: &other, ..later }),
            ("other key", Make { key: other.public_key(), ..later }),
            ("user type", Make { kind: CertType::User, ..later }),
            ("an address more", Make { principals: &["n1", "10.0.0.5", "fd00::5", "10.0.0.6"], ..later }),
            ("another address", Make { principals: &["n1", "169.254.169.254"], ..later }),
            ("a name more", Make { principals: &["n1", "10.0.0.5", "n2"], ..later }),
            ("every principal", Make { principals: &[], ..later }),
        ] {
            assert!(identity.renew(&bad.text()).is_err(), "{what}");
            let read = NodeIdentity::load_or_create(&dir.0).unwrap();
            assert_eq!(read.certificate(), Some(&Certificate::from_openssh(&installed).unwrap()), "{what}");
        }
        assert!(identity.renew("ssh-ed25519-cert-v01@openssh.com AAAA").is_err());
        assert!(identity.renew("").is_err());
        identity.renew(&later.text()).unwrap();
        let read = NodeIdentity::load_or_create(&dir.0).unwrap();
        assert_eq!(read.not_after(), Some(now() + Duration::from_secs(7200)));
        // What a renewal has left out, the next one can't bring back.
        let fewer = Make { principals: &["n1", "fd00::5"], valid: (NOW, NOW + 9000), ..good };
        identity.renew(&fewer.text()).unwrap();
        assert_eq!(identity.addresses(), ["fd00::5".parse::<IpAddr>().unwrap()]);
        assert!(identity.renew(&Make { valid: (NOW, NOW + 9900), ..good }.text()).is_err());
    }

    #[test]
    fn a_user_is_whom_a_good_certificate_names() {
        let dir = TempDir::new();
        let (host_ca, user_ca, other_ca, key) = (new_key(), new_key(), new_key(), new_key());
        let mut identity = NodeIdentity::load_or_create(&dir.0).unwrap();
        let alice = Make {
            ca: &user_ca,
            key: key.public_key(),
            kind: CertType::User,
            id: "alice@example",
            principals: &["alice", "ops"],
            options: &[],
            forwarding: true,
            valid: (NOW - 60, NOW + 3600),
        };
        assert_eq!(identity.verify_user("alice", &alice.make(), None, now()), Err(UserCertError::NoCa));
        let own = identity.host_key().public_key().clone();
        identity.install(&accepted(&host(&host_ca, &own).text(), &host_ca, &user_ca)).unwrap();

        let master = Make { id: "m", principals: &["master-agent"], ..alice };
        let person =
            |login: &str| Ok(UserRole::Person { login: login.into(), key_id: "alice@example".into() });
        let from = |list: &'static str| [("source-address", list)];
        let principal = |login: &str, listed: &[&str]| {
            Err(UserCertError::WrongPrincipal {
                login: login.into(),
                principals: listed.iter().map(|p| (*p).to_owned()).collect(),
            })
        };
        let ca_shown =
            |ca: &PrivateKey| Err(UserCertError::WrongCa(ca.fingerprint(HashAlg::Sha256).to_string()));
        let elsewhere = |peer: &str| Err(UserCertError::SourceAddress(peer.into()));
        let peer = Some("10.0.0.1");
        type Row<'a> = (&'a str, &'a str, Certificate, Option<&'a str>, Result<UserRole, UserCertError>);
        let table: Vec<Row<'_>> = vec![
            ("person", "alice", alice.make(), peer, person("alice")),
            ("second principal", "ops", alice.make(), None, person("ops")),
            ("master", MASTER, master.make(), peer, Ok(UserRole::Master)),
            ("a person as the master", MASTER, alice.make(), peer, principal(MASTER, &["alice", "ops"])),
            ("the master as a person", "alice", master.make(), peer, principal("alice", &["master-agent"])),
            (
                "every principal",
                "alice",
                Make { principals: &[], ..alice }.make(),
                peer,
                principal("alice", &[]),
            ),
            ("empty login", "", alice.make(), peer, principal("", &["alice", "ops"])),
            ("other CA", "alice", Make { ca: &other_ca, ..alice }.make(), peer, ca_shown(&other_ca)),
            ("host CA", "alice", Make { ca: &host_ca, ..alice }.make(), peer, ca_shown(&host_ca)),
            (
                "host type",
                "alice",
                Make { kind: CertType::Host, ..alice }.make(),
                peer,
                Err(UserCertError::NotAUserCertificate),
            ),
            (
                "expires this second",
                "alice",
                Make { valid: (NOW - 60, NOW), ..alice }.make(),
                peer,
                Err(UserCertError::Expired),
            ),
            (
                "not yet",
                "alice",
                Make { valid: (NOW + 1, NOW + 60), ..alice }.make(),
                peer,
                Err(UserCertError::NotYetValid),
            ),
            ("first second", "alice", Make { valid: (NOW, NOW + 60), ..alice }.make(), peer, person("alice")),
            (
                "no forwarding",
                "alice",
                Make { forwarding: false, ..alice }.make(),
                peer,
                Err(UserCertError::NoForwarding),
            ),
            (
                "force-command",
                "alice",
                Make { options: &[("force-command", "true")], ..alice }.make(),
                peer,
                Err(UserCertError::CriticalOption("force-command".into())),
            ),
            (
                "verify-required",
                "alice",
                Make { options: &[("verify-required", "")], ..alice }.make(),
                peer,
                Err(UserCertError::CriticalOption("verify-required".into())),
            ),
            (
                "from there",
                "alice",
                Make { options: &from("10.0.0.0/24"), ..alice }.make(),
                peer,
                person("alice"),
            ),
            (
                "from there, mapped",
                "alice",
                Make { options: &from("192.0.2.1,10.0.0.1"), ..alice }.make(),
                Some("::ffff:10.0.0.1"),
                person("alice"),
            ),
            (
                "from elsewhere",
                "alice",
                Make { options: &from("10.0.1.0/24,fd00::/64"), ..alice }.make(),
                peer,
                elsewhere("10.0.0.1"),
            ),
            (
                "from nobody knows where",
                "alice",
                Make { options: &from("0.0.0.0/0"), ..alice }.make(),
                None,
                elsewhere("an unknown address"),
            ),
            (
                "an address list that can't be read",
                "alice",
                Make { options: &from("anywhere"), ..alice }.make(),
                peer,
                elsewhere("10.0.0.1"),
            ),
        ];
        for (what, login, certificate, peer, want) in table {
            let got = identity.verify_user(login, &certificate, peer.map(|p| p.parse().unwrap()), now());
            assert_eq!(got, want, "{what}");
        }

        let mut bytes = alice.make().to_bytes().unwrap();
        let at = bytes.windows(5).position(|w| w == b"alice").unwrap();
        bytes[at] = b'b';
        let tampered = Certificate::from_bytes(&bytes).unwrap();
        let got = identity.verify_user("alice", &tampered, None, now());
        assert_eq!(got, Err(UserCertError::BadSignature));

        let pin = user_ca.fingerprint(HashAlg::Sha256).to_string();
        let pinned = |pin: &str, login, certificate: &Certificate| {
            NodeIdentity::verify_pinned_user(pin, login, certificate, now())
        };
        assert_eq!(pinned(&pin, MASTER, &master.make()), Ok(()));
        assert!(pinned(&pin, MASTER, &alice.make()).is_err());
        assert!(pinned(&pin, "alice", &alice.make()).is_err(), "a person is no master");
        assert!(pinned("", MASTER, &master.make()).is_err());
        let other_pin = other_ca.fingerprint(HashAlg::Sha256).to_string();
        assert!(matches!(pinned(&other_pin, MASTER, &master.make()), Err(UserCertError::WrongCa(_))));
    }

    #[test]
    fn files_that_do_not_fit_are_named() {
        let dir = TempDir::new();
        let (host_ca, user_ca) = (new_key(), new_key());
        let mut identity = NodeIdentity::load_or_create(&dir.0).unwrap();
        let key = identity.host_key().public_key().clone();
        identity.install(&accepted(&host(&host_ca, &key).text(), &host_ca, &user_ca)).unwrap();
        let error = |name: &str, text: &str| {
            let path = dir.0.join(name);
            let before = std::fs::read(&path).unwrap();
            std::fs::write(&path, text).unwrap();
            let error = format!("{:#}", NodeIdentity::load_or_create(&dir.0).unwrap_err());
            std::fs::write(&path, before).unwrap();
            error
        };
        for (name, text) in [
            ("host_key", "x"),
            ("host_key-cert.pub", "x"),
            ("host_ca.pub", "x"),
            ("user_ca.pub", "x"),
            ("host_key-cert.pub", &host(&host_ca, new_key().public_key()).text()),
        ] {
            assert!(error(name, text).contains(name), "{name}");
        }
        std::fs::set_permissions(dir.0.join("host_key"), std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = format!("{:#}", NodeIdentity::load_or_create(&dir.0).unwrap_err());
        assert!(error.contains("chmod 600"), "{error}");
    }
}
