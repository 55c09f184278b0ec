//! Keys, certificates and directories for unit tests.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use proto::join::JoinResponse;
use proto_config::secret_file;
use russh::keys::{
    Algorithm, Certificate, PrivateKey, PublicKey,
    ssh_key::certificate::{Builder, CertType},
};

/// The time for tests that pass it in, in seconds since the epoch.
pub(crate) const NOW: u64 = 1_800_000_000;

pub(crate) fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
}

/// The validity of a certificate that russh accepts at present, in seconds since the epoch.
pub(crate) fn valid_for(time: Duration) -> (u64, u64) {
    let present = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    (present - 60, present + time.as_secs())
}

/// A directory that only this user can enter, removed on drop.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        let path = std::env::temp_dir().join(format!("node-agent-test-{:016x}", rand::random::<u64>()));
        secret_file::create_directory(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn new_key() -> PrivateKey {
    PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap()
}

/// A certificate that is to be signed.
#[derive(Clone, Copy)]
pub(crate) struct CertificateSpec<'a> {
    pub(crate) ca: &'a PrivateKey,
    pub(crate) key: &'a PublicKey,
    pub(crate) kind: CertType,
    pub(crate) key_id: &'a str,
    pub(crate) principals: &'a [&'a str],
    pub(crate) options: &'a [(&'a str, &'a str)],
    pub(crate) forwarding: bool,
    /// In seconds since the epoch.
    pub(crate) valid: (u64, u64),
}

impl<'a> CertificateSpec<'a> {
    /// The host certificate of the node `n1`.
    pub(crate) fn host(ca: &'a PrivateKey, key: &'a PublicKey) -> Self {
        Self {
            ca,
            key,
            kind: CertType::Host,
            key_id: "node:n1",
            principals: &["n1", "10.0.0.5", "fd00::5"],
            options: &[],
            forwarding: false,
            valid: (NOW - 60, NOW + 3600),
        }
    }

    /// A user certificate without principals.
    pub(crate) fn user(ca: &'a PrivateKey, key: &'a PublicKey) -> Self {
        Self {
            kind: CertType::User,
            key_id: "user",
            principals: &[],
            forwarding: true,
            ..Self::host(ca, key)
        }
    }

    pub(crate) fn sign(&self) -> Certificate {
        let (from, to) = self.valid;
        let mut builder =
            Builder::new_with_random_nonce(&mut rand::rng(), self.key.key_data().clone(), from, to).unwrap();
        builder.cert_type(self.kind).unwrap().key_id(self.key_id).unwrap();
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

    pub(crate) fn text(&self) -> String {
        self.sign().to_openssh().unwrap()
    }
}

/// What a master answers to the node `n1` that joins.
pub(crate) fn accepted(certificate: &str, host_ca: &PrivateKey, user_ca: &PrivateKey) -> JoinResponse {
    JoinResponse::Accepted {
        node: "n1".parse().unwrap(),
        host_certificate: certificate.to_owned(),
        host_ca: host_ca.public_key().to_openssh().unwrap(),
        user_ca: user_ca.public_key().to_openssh().unwrap(),
    }
}
