//! The host CA, which signs nodes' host keys, and the user CA, which signs the master's own key and those of
//! people. Both are files of mode 0600 in the state directory.

use std::{
    io::ErrorKind,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use proto::{
    NodeName,
    revocation::{ListError, SignedList},
};
use proto_config::secret_file;
use russh::keys::{
    Algorithm, Certificate, HashAlg, PrivateKey, PublicKey,
    ssh_key::{
        LineEnding,
        certificate::{Builder, CertType},
    },
};

/// The master's SSH user name, and the principal of its certificates.
pub const LOGIN: &str = "master-agent";
/// How much the clocks of peers may be behind.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
/// 9999-12-31T23:59:59Z, the last second that RFC 3339 can write.
const LATEST: u64 = 253_402_300_799;
/// The files of the authorities' keys in the state directory.
pub(super) const KEYS: [&str; 2] = [HOST_CA, USER_CA];
const HOST_CA: &str = "host_ca";
const USER_CA: &str = "user_ca";

/// The master's certificate authorities.
#[derive(Debug)]
pub struct Authorities {
    host_ca: PrivateKey,
    user_ca: PrivateKey,
}

/// A key with which the master logs in, and its certificate.
#[derive(Debug)]
pub struct UserIdentity {
    pub key: PrivateKey,
    /// `None` for a key that nodes list in `authorized_keys`.
    pub certificate: Option<Certificate>,
}

impl UserIdentity {
    /// When the certificate expires.
    pub fn expires(&self) -> Option<SystemTime> {
        self.certificate.as_ref()?.valid_before_time()
    }

    /// Reads a key that the configuration names, on a thread for blocking work. It comes without a certificate.
    pub async fn load(path: PathBuf) -> anyhow::Result<Self> {
        tokio::task::spawn_blocking(move || Self::read(&path)).await?
    }

    fn read(path: &Path) -> anyhow::Result<Self> {
        let key = PrivateKey::from_openssh(secret_file::read_given(path)?)
            .with_context(|| format!("{} is no usable key: it has to be an Ed25519 or ECDSA key without a passphrase, as ssh-keygen writes it", path.display()))?;
        Ok(Self { key, certificate: None })
    }
}

impl Authorities {
    /// Reads the authorities' keys. Creates each that isn't there, so whether that is right is for the caller to know.
    pub(crate) fn load_or_create(state_dir: &Path) -> anyhow::Result<Self> {
        secret_file::create_directory(state_dir)?;
        Ok(Self {
            host_ca: load_or_create(state_dir, HOST_CA)?,
            user_ca: load_or_create(state_dir, USER_CA)?,
        })
    }

    pub fn host_ca(&self) -> &PublicKey {
        self.host_ca.public_key()
    }

    pub fn user_ca(&self) -> &PublicKey {
        self.user_ca.public_key()
    }

    /// The fingerprint of the user CA, `SHA256:...`, by which a joining host recognises its master.
    pub fn user_ca_pin(&self) -> String {
        self.user_ca.fingerprint(HashAlg::Sha256).to_string()
    }

    /// Certifies a node's host key for its name and addresses.
    pub fn sign_host(
        &self,
        key: &PublicKey,
        node: &NodeName,
        addresses: &[IpAddr],
        now: SystemTime,
        ttl: Duration,
    ) -> anyhow::Result<Certificate> {
        let principals = std::iter::once(node.to_string()).chain(addresses.iter().map(ToString::to_string));
        let builder = builder(key, CertType::Host, &format!("node:{node}"), principals, now, ttl)?;
        Ok(builder.sign(&self.host_ca)?)
    }

    /// Certifies a person's key for port forwarding. It refuses the master's own principal, which would make the person
    /// a master.
    pub fn sign_user(
        &self,
        key: &PublicKey,
        principals: &[String],
        key_id: &str,
        now: SystemTime,
        ttl: Duration,
    ) -> anyhow::Result<Certificate> {
        if principals.iter().any(|p| p == LOGIN) {
            bail!("{LOGIN:?} is the master's own principal: give the person another login name");
        }
        if principals.iter().any(|p| p.is_empty() || p.contains([',', '\n'])) {
            bail!("a login name must not be empty, nor contain a comma or a line break");
        }
        self.user_certificate(key, principals, key_id, now, ttl)
    }

    fn user_certificate(
        &self,
        key: &PublicKey,
        principals: &[String],
        key_id: &str,
        now: SystemTime,
        ttl: Duration,
    ) -> anyhow::Result<Certificate> {
        let mut builder = builder(key, CertType::User, key_id, principals.iter().cloned(), now, ttl)?;
        builder.extension("permit-port-forwarding", "")?;
        Ok(builder.sign(&self.user_ca)?)
    }

    /// Signs a list of revoked certificates of masters and people.
    pub fn sign_revocations(&self, list: Vec<u8>) -> Result<SignedList, ListError> {
        SignedList::sign(&self.user_ca, list)
    }

    /// Creates and certifies a key for the master, which stays in memory. The key id is `master-agent:HOST`.
    pub fn issue_user(&self, now: SystemTime, ttl: Duration) -> anyhow::Result<UserIdentity> {
        let key = PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519)?;
        let key_id = format!("{LOGIN}:{}", host_name()?);
        let certificate = self.user_certificate(key.public_key(), &[LOGIN.to_owned()], &key_id, now, ttl)?;
        Ok(UserIdentity { key, certificate: Some(certificate) })
    }
}

/// This host's name. It comes from uname(2), as the systemd unit hides the file in /proc.
pub fn host_name() -> anyhow::Result<String> {
    let system = rustix::system::uname();
    Ok(system.nodename().to_str().context("the host's name is not UTF-8")?.to_owned())
}

fn builder(
    key: &PublicKey,
    kind: CertType,
    key_id: &str,
    principals: impl Iterator<Item = String>,
    now: SystemTime,
    ttl: Duration,
) -> anyhow::Result<Builder> {
    let seconds = |t: SystemTime| t.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut builder = Builder::new_with_random_nonce(
        &mut rand::rng(),
        key.key_data().clone(),
        seconds(now).saturating_sub(CLOCK_SKEW.as_secs()),
        seconds(now).saturating_add(ttl.as_secs()).min(LATEST),
    )?;
    builder.serial(rand::random())?.cert_type(kind)?.key_id(key_id)?;
    for principal in principals {
        builder.valid_principal(principal)?;
    }
    Ok(builder)
}

fn load_or_create(directory: &Path, name: &str) -> anyhow::Result<PrivateKey> {
    let path = directory.join(name);
    if !path.exists() {
        let mut key = PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519)?;
        key.set_comment(name);
        match secret_file::write_new(&path, key.to_openssh(LineEnding::LF)?.as_bytes()) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).with_context(|| format!("can't create {}", path.display())),
        }
    }
    let key = parse(&secret_file::read(&path)?, &path)?;
    // A key that was restored from a backup comes without its public half, or beside that of another key.
    let (public, text) = (directory.join(format!("{name}.pub")), key.public_key().to_openssh()? + "\n");
    if std::fs::read_to_string(&public).ok().as_ref() != Some(&text) {
        std::fs::write(&public, text).with_context(|| format!("can't write {}", public.display()))?;
    }
    Ok(key)
}

/// Reads an authority's key from the text of its file.
pub(super) fn parse(text: &str, path: &Path) -> anyhow::Result<PrivateKey> {
    PrivateKey::from_openssh(text)
        .with_context(|| format!("{} is not an OpenSSH private key", path.display()))
}
