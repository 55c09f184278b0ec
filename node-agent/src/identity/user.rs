//! User certificates: what one entitles to, and why one is refused.

use std::{net::IpAddr, str::FromStr, time::SystemTime};

use ipnet::IpNet;
use proto::revocation::krl::Revoked;
use russh::keys::{
    Certificate, HashAlg, PublicKey,
    ssh_key::{certificate::CertType, public::KeyData},
};

/// The login name and the principal of masters.
pub const MASTER: &str = "master-agent";

/// What an accepted user certificate entitles to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserRole {
    /// The multiplexer, and direct-tcpip channels.
    Master,
    /// Direct-tcpip channels.
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
    #[error("the login {0:?} is a person's, and only a master may answer where this node calls home")]
    NotAMaster(String),
}

/// Decides what a user certificate, whose key the peer has proved, entitles to under these CAs.
pub fn verify(
    certificate: &Certificate,
    login: &str,
    peer: Option<IpAddr>,
    now: SystemTime,
    cas: &[PublicKey],
) -> Result<UserRole, UserCertError> {
    if cas.is_empty() {
        return Err(UserCertError::NoCa);
    }
    let trusted = |ca: &KeyData| cas.iter().any(|trusted| trusted.key_data() == ca);
    check(certificate, login, peer, now, trusted)?;
    if login == MASTER {
        return Ok(UserRole::Master);
    }
    Ok(UserRole::Person { login: login.to_owned(), key_id: certificate.key_id().to_owned() })
}

/// Decides whether a peer is the master whose user CA has the fingerprint `pin`.
pub fn verify_pinned(
    certificate: &Certificate,
    login: &str,
    pin: &str,
    now: SystemTime,
) -> Result<(), UserCertError> {
    let trusted = |ca: &KeyData| ca.fingerprint(HashAlg::Sha256).to_string() == pin.trim();
    check(certificate, login, None, now, trusted)?;
    if login == MASTER {
        return Ok(());
    }
    Err(UserCertError::WrongPrincipal { login: login.to_owned(), principals: vec![MASTER.to_owned()] })
}

fn check(
    certificate: &Certificate,
    login: &str,
    peer: Option<IpAddr>,
    now: SystemTime,
    trusted: impl Fn(&KeyData) -> bool,
) -> Result<(), UserCertError> {
    if !trusted(certificate.signature_key()) {
        let ca = certificate.signature_key().fingerprint(HashAlg::Sha256);
        return Err(UserCertError::WrongCa(ca.to_string()));
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
    use std::time::Duration;

    use russh::keys::PrivateKey;

    use super::*;
    use crate::testing::{CertificateSpec, NOW, new_key, now};

    type Verdict = Result<UserRole, UserCertError>;

    struct Keys {
        ca: PrivateKey,
        user: PrivateKey,
    }

    impl Keys {
        fn new() -> Self {
            Self { ca: new_key(), user: new_key() }
        }

        fn alice(&self) -> CertificateSpec<'_> {
            CertificateSpec {
                key_id: "alice@example",
                principals: &["alice", "ops"],
                ..CertificateSpec::user(&self.ca, self.user.public_key())
            }
        }

        fn master(&self) -> CertificateSpec<'_> {
            CertificateSpec { key_id: "m", principals: &[MASTER], ..self.alice() }
        }

        fn verdict(&self, login: &str, spec: CertificateSpec<'_>, peer: Option<&str>) -> Verdict {
            let peer = peer.map(|p| p.parse().unwrap());
            verify(&spec.sign(), login, peer, now(), &[self.ca.public_key().clone()])
        }
    }

    fn person(login: &str) -> Verdict {
        Ok(UserRole::Person { login: login.into(), key_id: "alice@example".into() })
    }

    fn wrong_principal(login: &str, listed: &[&str]) -> Verdict {
        Err(UserCertError::WrongPrincipal {
            login: login.into(),
            principals: listed.iter().map(|p| (*p).to_owned()).collect(),
        })
    }

    #[test]
    fn a_login_is_one_of_the_principals_and_the_masters_is_a_master() {
        let keys = Keys::new();
        for (login, spec, expected) in [
            ("alice", keys.alice(), person("alice")),
            ("ops", keys.alice(), person("ops")),
            (MASTER, keys.master(), Ok(UserRole::Master)),
            (MASTER, keys.alice(), wrong_principal(MASTER, &["alice", "ops"])),
            ("alice", keys.master(), wrong_principal("alice", &[MASTER])),
            ("", keys.alice(), wrong_principal("", &["alice", "ops"])),
            // A certificate without principals is good for every login in OpenSSH, and for none here.
            ("alice", CertificateSpec { principals: &[], ..keys.alice() }, wrong_principal("alice", &[])),
        ] {
            let shown = format!("{login} {:?}", spec.principals);
            assert_eq!(keys.verdict(login, spec, Some("10.0.0.1")), expected, "{shown}");
        }
    }

    #[test]
    fn only_a_valid_user_certificate_of_a_trusted_ca_is_accepted() {
        let keys = Keys::new();
        let other = new_key();
        let wrong_ca = Err(UserCertError::WrongCa(other.fingerprint(HashAlg::Sha256).to_string()));
        for (what, spec, expected) in [
            ("another CA", CertificateSpec { ca: &other, ..keys.alice() }, wrong_ca),
            (
                "a host certificate",
                CertificateSpec { kind: CertType::Host, ..keys.alice() },
                Err(UserCertError::NotAUserCertificate),
            ),
            (
                "it ends this second",
                CertificateSpec { valid: (NOW - 60, NOW), ..keys.alice() },
                Err(UserCertError::Expired),
            ),
            (
                "it begins next second",
                CertificateSpec { valid: (NOW + 1, NOW + 60), ..keys.alice() },
                Err(UserCertError::NotYetValid),
            ),
            (
                "it begins this second",
                CertificateSpec { valid: (NOW, NOW + 60), ..keys.alice() },
                person("alice"),
            ),
        ] {
            assert_eq!(keys.verdict("alice", spec, None), expected, "{what}");
        }
        let signed = keys.alice().sign();
        assert_eq!(verify(&signed, "alice", None, now(), &[]), Err(UserCertError::NoCa));

        let mut bytes = signed.to_bytes().unwrap();
        let at = bytes.windows(5).position(|w| w == b"alice").unwrap();
        bytes[at] = b'b';
        let tampered = Certificate::from_bytes(&bytes).unwrap();
        let verdict = verify(&tampered, "alice", None, now(), &[keys.ca.public_key().clone()]);
        assert_eq!(verdict, Err(UserCertError::BadSignature));
    }

    #[test]
    fn critical_options_are_obeyed_or_refused() {
        let keys = Keys::new();
        let peer = Some("10.0.0.1");
        let elsewhere = |peer: &str| Err(UserCertError::SourceAddress(peer.into()));
        for (option, value, peer, expected) in [
            ("source-address", "10.0.0.0/24", peer, person("alice")),
            ("source-address", "192.0.2.1,10.0.0.1", Some("::ffff:10.0.0.1"), person("alice")),
            ("source-address", "10.0.1.0/24,fd00::/64", peer, elsewhere("10.0.0.1")),
            ("source-address", "0.0.0.0/0", None, elsewhere("an unknown address")),
            ("source-address", "anywhere", peer, elsewhere("10.0.0.1")),
            ("force-command", "true", peer, Err(UserCertError::CriticalOption("force-command".into()))),
            ("verify-required", "", peer, Err(UserCertError::CriticalOption("verify-required".into()))),
        ] {
            let spec = CertificateSpec { options: &[(option, value)], ..keys.alice() };
            assert_eq!(keys.verdict("alice", spec, peer), expected, "{option} {value} {peer:?}");
        }
        let closed = CertificateSpec { forwarding: false, ..keys.alice() };
        assert_eq!(keys.verdict("alice", closed, peer), Err(UserCertError::NoForwarding));
    }

    #[test]
    fn a_pin_names_the_ca_of_a_master() {
        let keys = Keys::new();
        let pin = keys.ca.fingerprint(HashAlg::Sha256).to_string();
        let (master, alice) = (keys.master().sign(), keys.alice().sign());
        assert_eq!(verify_pinned(&master, MASTER, &pin, now()), Ok(()));
        assert_eq!(verify_pinned(&master, MASTER, &format!(" {pin}\n"), now()), Ok(()));
        assert!(verify_pinned(&alice, MASTER, &pin, now()).is_err());
        assert!(verify_pinned(&alice, "alice", &pin, now()).is_err(), "a person is no master");
        assert!(verify_pinned(&master, MASTER, "", now()).is_err());
        let later = now() + Duration::from_secs(86_400);
        assert_eq!(verify_pinned(&master, MASTER, &pin, later), Err(UserCertError::Expired));
        let other_pin = new_key().fingerprint(HashAlg::Sha256).to_string();
        assert!(matches!(verify_pinned(&master, MASTER, &other_pin, now()), Err(UserCertError::WrongCa(_))));
    }
}
