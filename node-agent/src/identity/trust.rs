//! Who may open a session on this node.

use std::{net::IpAddr, sync::Arc, time::SystemTime};

use russh::keys::{Certificate, PublicKey};

use super::user::{self, UserCertError, UserRole};
use crate::revocation::Revocations;

/// Who may open a session on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// A master or a person.
    Anybody,
    Master,
}

/// The user CAs that are trusted, what they have revoked, and which people may come.
pub struct Trust {
    cas: Vec<PublicKey>,
    revocations: Arc<Revocations>,
    /// Login names of people; empty allows every name.
    people: Vec<String>,
}

impl Trust {
    pub fn new(cas: Vec<PublicKey>, revocations: Arc<Revocations>, people: Vec<String>) -> Self {
        Self { cas, revocations, people }
    }

    /// Decides about a user certificate whose key the session has proved.
    pub fn verify(
        &self,
        expected: Expected,
        login: &str,
        certificate: &Certificate,
        peer: Option<IpAddr>,
        now: SystemTime,
    ) -> Result<UserRole, UserCertError> {
        let role = user::verify(certificate, login, peer, now, &self.cas)?;
        if let Some(by) = self.revocations.revokes(certificate) {
            return Err(UserCertError::Revoked(by));
        }
        match &role {
            UserRole::Person { login, .. } if expected == Expected::Master => {
                Err(UserCertError::NotAMaster(login.clone()))
            }
            UserRole::Person { login, .. } if !self.people.is_empty() && !self.people.contains(login) => {
                Err(UserCertError::NotAllowed(login.clone()))
            }
            UserRole::Person { .. } | UserRole::Master => Ok(role),
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::revocation::{
        SignedList,
        krl::{Entry, Krl},
    };

    use super::*;
    use crate::testing::{CertificateSpec, TempDir, new_key, now};

    #[test]
    fn revoked_certificates_and_people_who_are_not_listed_are_refused() {
        let (dir, ca, key) = (TempDir::new(), new_key(), new_key());
        let cas = vec![ca.public_key().clone()];
        let revocations = Arc::new(Revocations::load(dir.path(), &cas).unwrap());
        let trust = |people: &[&str]| {
            let people = people.iter().map(|p| (*p).to_owned()).collect();
            Trust::new(cas.clone(), revocations.clone(), people)
        };
        let spec = CertificateSpec::user(&ca, key.public_key());
        let alice = CertificateSpec { key_id: "alice", principals: &["alice"], ..spec }.sign();
        let master = CertificateSpec { principals: &[user::MASTER], ..spec }.sign();
        let verify = |trust: Trust, login, certificate| {
            trust.verify(Expected::Anybody, login, certificate, None, now())
        };

        assert!(verify(trust(&[]), "alice", &alice).is_ok());
        assert!(verify(trust(&["bob", "alice"]), "alice", &alice).is_ok());
        let refused = verify(trust(&["bob"]), "alice", &alice);
        assert_eq!(refused, Err(UserCertError::NotAllowed("alice".into())));
        assert_eq!(verify(trust(&["bob"]), user::MASTER, &master), Ok(UserRole::Master));

        let called =
            |login, certificate| trust(&[]).verify(Expected::Master, login, certificate, None, now());
        assert_eq!(called("alice", &alice), Err(UserCertError::NotAMaster("alice".into())));
        assert_eq!(called(user::MASTER, &master), Ok(UserRole::Master));

        let mut list = Krl::new(1);
        list.add(ca.public_key(), Entry::KeyId(b"alice".to_vec())).unwrap();
        revocations.install(SignedList::sign(&ca, list.encode().unwrap()).unwrap()).unwrap();
        assert!(matches!(verify(trust(&[]), "alice", &alice), Err(UserCertError::Revoked(_))));
        assert_eq!(verify(trust(&[]), user::MASTER, &master), Ok(UserRole::Master));
    }
}
