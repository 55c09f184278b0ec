//! The lists of revoked certificates that this node holds: of each trusted user CA the newest that any master has
//! brought, also after a restart.
//!
//! A list is taken only with the CA's own signature, and speaks for that CA's certificates alone. A master without the
//! CA's key can therefore neither make one nor bring an older one back.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use anyhow::Context;
use proto::revocation::{
    ListError, Report, SignedList,
    krl::{Krl, Revoked, blob},
};
use proto_config::secret_file;
use russh::keys::{Certificate, HashAlg, PublicKey, ssh_key::public::KeyData};
use tokio::sync::watch;

/// Why a list was not taken.
#[derive(Debug, thiserror::Error)]
pub enum RefusedList {
    #[error(transparent)]
    List(#[from] ListError),
    #[error("it has version {offered}, and this node holds version {held}")]
    Older { offered: u64, held: u64 },
    #[error("it has version {0} as the one that this node holds, and another content")]
    SameVersion(u64),
    #[error("it is in force, but will be lost with a restart: {0}")]
    NotKept(std::io::Error),
}

struct Held {
    /// As it was signed.
    bytes: Vec<u8>,
    list: Krl,
}

/// The lists in force.
pub struct Revocations {
    directory: PathBuf,
    /// By the CA's key, as SSH has it on the wire.
    held: RwLock<BTreeMap<Vec<u8>, Arc<Held>>>,
    /// Held while a list is compared with the one in force, and written.
    installing: Mutex<()>,
    changed: watch::Sender<()>,
}

impl Revocations {
    /// Reads the lists of these CAs.
    pub fn load(directory: &Path, cas: &[PublicKey]) -> anyhow::Result<Self> {
        let revocations = Self {
            directory: directory.to_owned(),
            held: RwLock::default(),
            installing: Mutex::default(),
            changed: watch::Sender::new(()),
        };
        for ca in cas {
            let path = revocations.path(ca);
            let bytes = match std::fs::read(&path) {
                Ok(bytes) => bytes,
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) => return Err(e).with_context(|| format!("can't read {}", path.display())),
            };
            let held = read(bytes, ca).with_context(|| {
                format!(
                    "{} is no list of revoked certificates by the user CA: take it away, and the next master that comes brings it again",
                    path.display()
                )
            })?;
            revocations.put(ca, held);
        }
        Ok(revocations)
    }

    /// Takes a list: signed by one of `cas`, and no older than the one in force. `false` if that is the same. Takes
    /// time, and writes a file.
    pub fn install(&self, signed: SignedList, cas: &[PublicKey]) -> Result<bool, RefusedList> {
        let ca = signed.verify(cas)?;
        let list = Krl::decode(&signed.list).map_err(ListError::from)?;
        let _one_at_a_time = self.installing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = self.of(ca.key_data()) {
            let (offered, version) = (list.version, held.list.version);
            if offered < version {
                return Err(RefusedList::Older { offered, held: version });
            }
            if offered == version && held.bytes != signed.list {
                return Err(RefusedList::SameVersion(version));
            }
            if offered == version {
                return Ok(false);
            }
        }
        let kept = secret_file::replace(&self.path(ca), &signed.encode());
        self.put(ca, Held { bytes: signed.list, list });
        self.changed.send_replace(());
        kept.map_err(RefusedList::NotKept).map(|()| true)
    }

    /// What a certificate is revoked by, if it is.
    pub fn revokes(&self, certificate: &Certificate) -> Option<Revoked> {
        self.of(certificate.signature_key())?.list.revokes(certificate)
    }

    /// Changes with every list that is taken.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub fn report(&self, cas: &[PublicKey], refused: Option<String>) -> Report {
        let version = |ca: &PublicKey| {
            let held = self.of(ca.key_data())?;
            Some((ca.fingerprint(HashAlg::Sha256).to_string(), held.list.version))
        };
        Report { held: cas.iter().filter_map(version).collect(), refused }
    }

    fn of(&self, ca: &KeyData) -> Option<Arc<Held>> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        if held.is_empty() { None } else { held.get(&blob(ca)).cloned() }
    }

    fn put(&self, ca: &PublicKey, held: Held) {
        let mut all = self.held.write().unwrap_or_else(PoisonError::into_inner);
        all.insert(blob(ca.key_data()), Arc::new(held));
    }

    /// Named by the CA, whose fingerprint in text form has slashes.
    fn path(&self, ca: &PublicKey) -> PathBuf {
        let fingerprint = ca.fingerprint(HashAlg::Sha256);
        let name: String = fingerprint.as_bytes().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        self.directory.join(format!("revoked-{name}"))
    }
}

fn read(bytes: Vec<u8>, ca: &PublicKey) -> anyhow::Result<Held> {
    let signed = SignedList::decode(&bytes)?.context("it is not complete")?;
    signed.verify(std::slice::from_ref(ca))?;
    let list = Krl::decode(&signed.list)?;
    Ok(Held { bytes: signed.list, list })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proto::revocation::krl::Entry;
    use russh::keys::{Algorithm, PrivateKey};

    use super::*;

    struct TempDir(PathBuf);

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn directory() -> TempDir {
        let path = std::env::temp_dir().join(format!("node-agent-test-{:016x}", rand::random::<u64>()));
        secret_file::create_directory(&path).unwrap();
        TempDir(path)
    }

    fn ca() -> PrivateKey {
        PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap()
    }

    fn list(ca: &PrivateKey, version: u64, id: &str) -> SignedList {
        let mut list = Krl::new(version);
        list.add(ca.public_key(), Entry::KeyId(id.as_bytes().to_vec())).unwrap();
        SignedList::sign(ca, list.encode().unwrap()).unwrap()
    }

    fn certificate(ca: &PrivateKey, id: &str) -> Certificate {
        let key = PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap();
        let key = key.public_key().key_data().clone();
        let mut builder =
            russh::keys::ssh_key::certificate::Builder::new_with_random_nonce(&mut rand::rng(), key, 0, 9)
                .unwrap();
        builder.key_id(id).unwrap().all_principals_valid().unwrap();
        builder.sign(ca).unwrap()
    }

    #[test]
    fn an_older_list_is_refused_also_after_a_restart() {
        let (dir, stranger, ca) = (directory(), ca(), ca());
        let cas = [ca.public_key().clone()];
        let load = || Revocations::load(&dir.0, &cas).unwrap();
        let held = |revocations: &Revocations| revocations.report(&cas, None).held.into_values().next();
        let revocations = load();
        assert_eq!(held(&revocations), None);
        assert!(revocations.install(list(&ca, 7, "alice"), &cas).unwrap());
        assert!(!revocations.install(list(&ca, 7, "alice"), &cas).unwrap(), "the same again");
        for revocations in [revocations, load()] {
            let refuses = |list| revocations.install(list, &cas).unwrap_err();
            assert!(matches!(refuses(list(&ca, 6, "bob")), RefusedList::Older { offered: 6, held: 7 }));
            assert!(matches!(refuses(list(&ca, 7, "bob")), RefusedList::SameVersion(7)));
            assert!(matches!(refuses(list(&stranger, 8, "bob")), RefusedList::List(ListError::Untrusted)));
            let forged = SignedList { list: list(&ca, 8, "bob").list, ..list(&ca, 9, "bob") };
            assert!(matches!(refuses(forged), RefusedList::List(ListError::Forged)));
            let nonsense = SignedList::sign(&ca, b"nonsense".to_vec()).unwrap();
            assert!(matches!(refuses(nonsense), RefusedList::List(ListError::Krl(_))));
            assert_eq!(held(&revocations), Some(7));
            assert_eq!(revocations.revokes(&certificate(&ca, "alice")), Some(Revoked::KeyId));
            assert_eq!(revocations.revokes(&certificate(&ca, "bob")), None);
        }
        let revocations = load();
        let changes = revocations.changes();
        assert!(revocations.install(list(&ca, 8, "bob"), &cas).unwrap());
        assert!(changes.has_changed().unwrap());
        assert_eq!(revocations.revokes(&certificate(&ca, "alice")), None, "the newer list says so");
        for entry in std::fs::read_dir(&dir.0).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
        }
    }

    #[test]
    fn a_ca_speaks_for_its_own_certificates_only() {
        let (dir, ours, other) = (directory(), ca(), ca());
        let cas = [ours.public_key().clone(), other.public_key().clone()];
        let revocations = Revocations::load(&dir.0, &cas).unwrap();
        let victim = certificate(&ours, "alice");
        let mut list = Krl::new(u64::MAX);
        list.add(ours.public_key(), Entry::KeyId(b"alice".to_vec())).unwrap();
        list.add(ours.public_key(), Entry::Key(blob(victim.public_key()))).unwrap();
        list.add(ours.public_key(), Entry::Key(blob(ours.public_key().key_data()))).unwrap();
        let signed = SignedList::sign(&other, list.encode().unwrap()).unwrap();
        assert!(revocations.install(signed, &cas).unwrap());
        assert_eq!(revocations.revokes(&victim), None);
        assert!(revocations.install(self::list(&ours, 1, "bob"), &cas).unwrap(), "versions are a CA's own");
    }

    #[test]
    fn a_file_that_is_no_list_is_named() {
        let (dir, ca) = (directory(), ca());
        let cas = [ca.public_key().clone()];
        let revocations = Revocations::load(&dir.0, &cas).unwrap();
        revocations.install(list(&ca, 1, "alice"), &cas).unwrap();
        let path = revocations.path(&cas[0]);
        let good = std::fs::read(&path).unwrap();
        let mut changed = good.clone();
        *changed.last_mut().unwrap() ^= 1;
        for bad in [&b""[..], &good[..good.len() - 1], &changed[..]] {
            std::fs::write(&path, bad).unwrap();
            let error = Revocations::load(&dir.0, &cas).map(|_| ()).unwrap_err();
            assert!(format!("{error:#}").contains(path.to_str().unwrap()), "{error:#}");
        }
    }
}
