//! The lists of revoked certificates that this node holds: for each trusted user CA the newest list that any master has
//! brought. They outlive a restart.
//!
//! A list is accepted only with the CA's own signature, and applies to that CA's certificates alone. A master without the
//! CA's key can therefore neither make a list nor bring an older one back.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use proto::revocation::{
    ListError, Report, SignedList,
    krl::{Krl, Revoked, blob},
};
use proto_config::secret_file;
use proto_net::log_throttle::LogThrottle;
use russh::keys::{Certificate, HashAlg, PublicKey, ssh_key::public::KeyData};
use tokio::sync::{Semaphore, watch};

/// The number of log lines in ten seconds about lists that are not taken.
const LOG_BURST: u32 = 16;

/// Why a list that a master brought was not taken.
#[derive(Debug, thiserror::Error)]
pub enum RefusedList {
    #[error(transparent)]
    List(#[from] ListError),
    #[error("it has version {offered}, and this node holds version {held}")]
    Older { offered: u64, held: u64 },
    #[error("it has the version that this node holds, {0}, and other content")]
    SameVersion(u64),
    #[error("it is in force, but will be lost with a restart: {0}")]
    NotKept(io::Error),
}

/// Why the list in a file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("can't read {path}: {error}", path = path.display())]
    Read { path: PathBuf, error: io::Error },
    #[error(
        "{path} is no list of revoked certificates by the user CA: remove it, and the next master that connects brings it again: {error}",
        path = path.display()
    )]
    Content { path: PathBuf, error: ListError },
    #[error(
        "{path} is not a complete list of revoked certificates: remove it, and the next master that connects brings it again",
        path = .0.display()
    )]
    Incomplete(PathBuf),
}

struct Held {
    /// The list as it was signed.
    bytes: Vec<u8>,
    list: Krl,
    /// Whether the list is in the state directory.
    is_kept: bool,
}

/// The lists in force.
pub struct Revocations {
    directory: PathBuf,
    /// The user CAs that are trusted.
    cas: Vec<PublicKey>,
    /// By the CA's key in SSH's wire encoding.
    held: RwLock<BTreeMap<Vec<u8>, Arc<Held>>>,
    /// Locked while a list is compared with the one in force, and written.
    installing: Mutex<()>,
    changed: watch::Sender<()>,
    /// One list is taken after the other, since each may cost a thread, a good deal of memory and a signature's check.
    pub(crate) turn: Arc<Semaphore>,
    refused: LogThrottle,
}

impl Revocations {
    /// Reads the lists of these CAs.
    pub fn load(directory: &Path, cas: &[PublicKey]) -> Result<Self, LoadError> {
        let revocations = Self {
            directory: directory.to_owned(),
            cas: cas.to_vec(),
            held: RwLock::default(),
            installing: Mutex::default(),
            changed: watch::Sender::new(()),
            turn: Arc::new(Semaphore::new(1)),
            refused: LogThrottle::with_burst(LOG_BURST),
        };
        for ca in cas {
            let path = revocations.path(ca);
            match std::fs::read(&path) {
                Ok(bytes) => revocations.put(ca, read(bytes, ca, path)?),
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(LoadError::Read { path, error }),
            }
        }
        Ok(revocations)
    }

    /// Takes a list that a master has brought, and returns what to answer. Once begun, this goes on to the end, also when
    /// the list ends the session that it came by and nobody waits any more. `held` is dropped after that.
    pub async fn take<H: Send + 'static>(self: Arc<Self>, signed: SignedList, held: H) -> Option<Report> {
        let turn = self.turn.clone().acquire_owned().await.ok()?;
        let taking = tokio::task::spawn_blocking(move || {
            let _until_the_end = (turn, held);
            self.take_now(signed)
        });
        taking.await.ok()
    }

    fn take_now(&self, signed: SignedList) -> Report {
        let refused = match self.install(signed) {
            Ok(new) => {
                if new {
                    tracing::info!(held = ?self.report(None).held, "took a list of revoked certificates");
                }
                None
            }
            Err(error) => {
                match (&error, self.refused.count(1)) {
                    (_, None) => {}
                    (RefusedList::NotKept(_), Some(times)) => {
                        tracing::error!(%error, times, "can't keep the list of revoked certificates");
                    }
                    (_, Some(times)) => {
                        tracing::warn!(%error, times, "refused a list of revoked certificates")
                    }
                }
                Some(error.to_string())
            }
        };
        self.report(refused)
    }

    /// Installs a list that is signed by one of the CAs and no older than the one in force. Returns `false` if it is the
    /// one in force; such a list is written again if it could not be written before.
    pub(crate) fn install(&self, signed: SignedList) -> Result<bool, RefusedList> {
        let ca = signed.verify(&self.cas)?;
        let list = Krl::decode(&signed.list).map_err(ListError::from)?;
        let _one_at_a_time = self.installing.lock().unwrap_or_else(PoisonError::into_inner);
        self.read_again_of(ca);
        if let Some(held) = self.of(ca.key_data()) {
            let (offered, version) = (list.version, held.list.version);
            if offered < version {
                return Err(RefusedList::Older { offered, held: version });
            }
            if offered == version && held.bytes != signed.list {
                return Err(RefusedList::SameVersion(version));
            }
            if offered == version && held.is_kept {
                return Ok(false);
            }
        }
        let kept = secret_file::replace(&self.path(ca), &signed.encode());
        self.put(ca, Held { bytes: signed.list, list, is_kept: kept.is_ok() });
        self.changed.send_replace(());
        kept.map_err(RefusedList::NotKept).map(|()| true)
    }

    /// Takes over the lists that another process of this agent has written since. Blocks.
    pub fn read_again(&self) {
        let _one_at_a_time = self.installing.lock().unwrap_or_else(PoisonError::into_inner);
        self.cas.iter().for_each(|ca| self.read_again_of(ca));
    }

    fn read_again_of(&self, ca: &PublicKey) {
        let path = self.path(ca);
        let Some(written) = std::fs::read(&path).ok().and_then(|bytes| read(bytes, ca, path).ok()) else {
            return;
        };
        let held = self.of(ca.key_data());
        if held.is_none_or(|held| held.list.version < written.list.version) {
            self.put(ca, written);
            self.changed.send_replace(());
        }
    }

    /// What a certificate is revoked by, if it is.
    pub fn revokes(&self, certificate: &Certificate) -> Option<Revoked> {
        self.of(certificate.signature_key())?.list.revokes(certificate)
    }

    /// Waits until a certificate is revoked.
    pub async fn revoked(&self, certificate: &Certificate) -> Revoked {
        let mut changes = self.changed.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(by) = self.revokes(certificate) {
                return by;
            }
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// What a master is told of the lists in force, and of the one that it brought if that was `refused`.
    pub fn report(&self, refused: Option<String>) -> Report {
        let version = |ca: &PublicKey| {
            let held = self.of(ca.key_data())?;
            Some((ca.fingerprint(HashAlg::Sha256).to_string(), held.list.version))
        };
        Report { held: self.cas.iter().filter_map(version).collect(), refused }
    }

    fn of(&self, ca: &KeyData) -> Option<Arc<Held>> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        if held.is_empty() { None } else { held.get(&blob(ca)).cloned() }
    }

    fn put(&self, ca: &PublicKey, held: Held) {
        let mut all = self.held.write().unwrap_or_else(PoisonError::into_inner);
        all.insert(blob(ca.key_data()), Arc::new(held));
    }

    /// The list's file. A fingerprint in its usual form has slashes, so the name has its first bytes in hexadecimal.
    fn path(&self, ca: &PublicKey) -> PathBuf {
        let fingerprint = ca.fingerprint(HashAlg::Sha256);
        let name: String = fingerprint.as_bytes().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        self.directory.join(format!("revoked-{name}"))
    }
}

fn read(bytes: Vec<u8>, ca: &PublicKey, path: PathBuf) -> Result<Held, LoadError> {
    let decode = || -> Result<Option<Held>, ListError> {
        let Some(signed) = SignedList::decode(&bytes)? else { return Ok(None) };
        signed.verify(std::slice::from_ref(ca))?;
        let list = Krl::decode(&signed.list)?;
        Ok(Some(Held { bytes: signed.list, list, is_kept: true }))
    };
    match decode() {
        Ok(Some(held)) => Ok(held),
        Ok(None) => Err(LoadError::Incomplete(path)),
        Err(error) => Err(LoadError::Content { path, error }),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::PermissionsExt,
        task::{Context, Poll, Waker},
    };

    use proto::revocation::krl::Entry;
    use russh::keys::PrivateKey;

    use super::*;
    use crate::testing::{CertificateSpec, TempDir, new_key};

    fn list(ca: &PrivateKey, version: u64, id: &str) -> SignedList {
        let mut list = Krl::new(version);
        list.add(ca.public_key(), Entry::KeyId(id.as_bytes().to_vec())).unwrap();
        SignedList::sign(ca, list.encode().unwrap()).unwrap()
    }

    fn certificate(ca: &PrivateKey, key_id: &str) -> Certificate {
        let key = new_key();
        CertificateSpec { key_id, ..CertificateSpec::user(ca, key.public_key()) }.sign()
    }

    #[test]
    fn an_older_list_is_refused_also_after_a_restart() {
        let (dir, other_ca, ca) = (TempDir::new(), new_key(), new_key());
        let cas = [ca.public_key().clone()];
        let load = || Revocations::load(dir.path(), &cas).unwrap();
        let held = |revocations: &Revocations| revocations.report(None).held.into_values().next();
        let revocations = load();
        assert_eq!(held(&revocations), None);
        assert!(revocations.install(list(&ca, 7, "alice")).unwrap());
        assert!(!revocations.install(list(&ca, 7, "alice")).unwrap(), "the same again");
        for revocations in [revocations, load()] {
            let refuses = |list| revocations.install(list).unwrap_err();
            assert!(matches!(refuses(list(&ca, 6, "bob")), RefusedList::Older { offered: 6, held: 7 }));
            assert!(matches!(refuses(list(&ca, 7, "bob")), RefusedList::SameVersion(7)));
            assert!(matches!(refuses(list(&other_ca, 8, "bob")), RefusedList::List(ListError::Untrusted)));
            let forged = SignedList { list: list(&ca, 8, "bob").list, ..list(&ca, 9, "bob") };
            assert!(matches!(refuses(forged), RefusedList::List(ListError::Forged)));
            let nonsense = SignedList::sign(&ca, b"nonsense".to_vec()).unwrap();
            assert!(matches!(refuses(nonsense), RefusedList::List(ListError::Krl(_))));
            assert_eq!(held(&revocations), Some(7));
            assert_eq!(revocations.revokes(&certificate(&ca, "alice")), Some(Revoked::KeyId));
            assert_eq!(revocations.revokes(&certificate(&ca, "bob")), None);
        }
        let revocations = load();
        assert!(revocations.install(list(&ca, 8, "bob")).unwrap());
        assert_eq!(revocations.revokes(&certificate(&ca, "alice")), None, "the newer list says so");
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
        }
    }

    #[test]
    fn a_ca_speaks_for_its_own_certificates_only() {
        let (dir, ours, other) = (TempDir::new(), new_key(), new_key());
        let cas = [ours.public_key().clone(), other.public_key().clone()];
        let revocations = Revocations::load(dir.path(), &cas).unwrap();
        let victim = certificate(&ours, "alice");
        let mut list = Krl::new(u64::MAX);
        list.add(ours.public_key(), Entry::KeyId(b"alice".to_vec())).unwrap();
        list.add(ours.public_key(), Entry::Key(blob(victim.public_key()))).unwrap();
        list.add(ours.public_key(), Entry::Key(blob(ours.public_key().key_data()))).unwrap();
        let signed = SignedList::sign(&other, list.encode().unwrap()).unwrap();
        assert!(revocations.install(signed).unwrap());
        assert_eq!(revocations.revokes(&victim), None);
        assert!(revocations.install(self::list(&ours, 1, "bob")).unwrap(), "versions are a CA's own");
    }

    #[test]
    fn a_file_that_is_no_list_is_named() {
        let (dir, ca) = (TempDir::new(), new_key());
        let cas = [ca.public_key().clone()];
        let revocations = Revocations::load(dir.path(), &cas).unwrap();
        revocations.install(list(&ca, 1, "alice")).unwrap();
        let path = revocations.path(&cas[0]);
        let good = std::fs::read(&path).unwrap();
        let mut changed = good.clone();
        *changed.last_mut().unwrap() ^= 1;
        for bad in [&b""[..], &good[..good.len() - 1], &changed[..]] {
            std::fs::write(&path, bad).unwrap();
            let error = Revocations::load(dir.path(), &cas).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
    }

    #[tokio::test]
    async fn lists_are_taken_one_after_the_other() {
        let (dir, ca) = (TempDir::new(), new_key());
        let revocations = Arc::new(Revocations::load(dir.path(), &[ca.public_key().clone()]).unwrap());
        let under_way = revocations.turn.clone().acquire_owned().await.unwrap();
        let (held, released) = tokio::sync::oneshot::channel::<()>();
        let mut next = std::pin::pin!(revocations.clone().take(list(&ca, 1, "alice"), held));
        let pending = tokio::time::timeout(std::time::Duration::from_millis(50), next.as_mut()).await;
        assert!(pending.is_err() && revocations.report(None).held.is_empty());
        drop(under_way);
        assert_eq!(next.await.unwrap().held.into_values().next(), Some(1));
        assert!(released.await.is_err(), "what was held is dropped");
    }

    #[tokio::test]
    async fn whoever_waits_learns_of_the_list_that_revokes() {
        let (dir, ca) = (TempDir::new(), new_key());
        let revocations = Revocations::load(dir.path(), &[ca.public_key().clone()]).unwrap();
        let alice = certificate(&ca, "alice");
        let mut waiting = std::pin::pin!(revocations.revoked(&alice));
        let mut poll =
            || std::future::Future::poll(waiting.as_mut(), &mut Context::from_waker(Waker::noop()));
        assert!(poll().is_pending());
        revocations.install(list(&ca, 1, "bob")).unwrap();
        assert!(poll().is_pending());
        revocations.install(list(&ca, 2, "alice")).unwrap();
        assert_eq!(poll(), Poll::Ready(Revoked::KeyId));
    }
}
