//! Revoked certificates of masters and people: the list in the store, which `master-agent revoke` changes.

use std::{sync::Arc, time::SystemTime};

use anyhow::{Context, bail};
use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use bytes::Bytes;
use proto::revocation::{
    SignedList,
    krl::{Entry, Krl, blob},
};
use russh::keys::{Certificate, HashAlg, PublicKey};
use tokio::sync::watch;

use super::{authorities::Authorities, store::Store};

/// A list that is ready for nodes.
#[derive(Debug)]
pub struct Published {
    pub version: u64,
    pub list: Krl,
    /// The list with its signature, in the form that nodes take.
    pub signed: Bytes,
}

/// The list that nodes should have; `None` while nothing has ever been revoked.
pub type Revocations = watch::Sender<Option<Arc<Published>>>;

/// The list in the store.
pub fn stored(store: &dyn Store) -> anyhow::Result<Krl> {
    match store.revocations()? {
        Some(bytes) => {
            Krl::decode(&bytes).context("the list of revoked certificates in the store can't be read")
        }
        None => Ok(Krl::default()),
    }
}

/// Changes the list in the store in one transaction. Returns the new version, or `None` if nothing changed.
pub fn change(
    store: &dyn Store,
    ca: &PublicKey,
    now: SystemTime,
    edit: &dyn Fn(&mut Krl) -> anyhow::Result<()>,
) -> anyhow::Result<Option<u64>> {
    let mut version = None;
    store.change_revocations(&mut |before| {
        let mut list = match before {
            Some(bytes) => Krl::decode(bytes).context("the list of revoked certificates can't be read")?,
            None => Krl::default(),
        };
        let was = list.clone();
        edit(&mut list)?;
        if list == was {
            return Ok(None);
        }
        if list.revokes_key(ca.key_data()) {
            bail!("it would revoke the user CA, and with it every certificate of masters and people");
        }
        // Even after a backup was restored, a new list is newer than any that nodes may hold.
        let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        list.version = list.version.saturating_add(1).max(seconds);
        list.generated = seconds;
        version = Some(list.version);
        Ok(Some((list.version, list.encode()?)))
    })?;
    Ok(version)
}

/// The list and its signature, as files for `ssh-keygen` and `RevokedKeys`.
pub fn sign(authorities: &Authorities, list: &Krl) -> anyhow::Result<SignedList> {
    Ok(authorities.sign_revocations(list.encode()?)?)
}

/// Reads the argument of `--key`: `SHA256:...`, or a file with a public key or a certificate.
pub fn key_entry(text: &str, read: impl Fn(&str) -> anyhow::Result<String>) -> anyhow::Result<Entry> {
    if let Some(hash) = text.strip_prefix("SHA256:") {
        let hash = STANDARD_NO_PAD.decode(hash.trim_end_matches('=')).ok().and_then(|h| h.try_into().ok());
        return hash.map(Entry::Sha256).with_context(|| format!("{text:?} is no SHA-256 fingerprint"));
    }
    let contents = read(text)?;
    let key = PublicKey::from_openssh(contents.trim()).map(|key| key.key_data().clone());
    let key = key.or_else(|_| Certificate::from_openssh(contents.trim()).map(|c| c.public_key().clone()));
    Ok(Entry::Key(blob(&key.with_context(|| format!("{text} holds no OpenSSH public key or certificate"))?)))
}

/// Reads the argument of `--serial`: a number, or the first and the last one of a range.
pub fn serials(text: &str) -> Result<Entry, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if first > 0 && first <= last => Ok(Entry::Serials(first, last)),
        _ => Err("a serial number from 1 to 18446744073709551615, or a range FIRST-LAST".to_owned()),
    }
}

/// An entry as `revoke --list` shows it: its kind and its value.
pub fn show(entry: &Entry) -> (&'static str, String) {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    match entry {
        Entry::Serials(first, last) if first == last => ("serial", first.to_string()),
        Entry::Serials(first, last) => ("serial", format!("{first}-{last}")),
        Entry::KeyId(id) => ("key-id", String::from_utf8_lossy(id).escape_debug().to_string()),
        Entry::Key(key) => match PublicKey::from_bytes(key) {
            Ok(key) => ("key", key.fingerprint(HashAlg::Sha256).to_string()),
            Err(_) => ("key", hex(key)),
        },
        Entry::Sha1(hash) => ("sha1", hex(hash)),
        Entry::Sha256(hash) => ("sha256", format!("SHA256:{}", STANDARD_NO_PAD.encode(hash))),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::identity::{
        sqlite::SqliteStore,
        tests::{TempDir, new_key},
    };

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn each_change_makes_a_newer_list_and_the_ca_is_safe() {
        let dir = TempDir::new();
        let store = SqliteStore::open(&dir.0).unwrap();
        let ca = new_key().public_key().clone();
        let add = |entry: Entry, now| {
            change(&store, &ca, at(now), &|list| Ok(list.add(&ca, entry.clone()).map(drop)?))
        };
        assert_eq!((store.revocations_version().unwrap(), stored(&store).unwrap()), (None, Krl::default()));
        assert_eq!(add(Entry::Serials(5, 5), 100).unwrap(), Some(100));
        assert_eq!(add(Entry::Serials(5, 5), 200).unwrap(), None, "nothing new");
        assert_eq!(add(Entry::Serials(6, 9), 50).unwrap(), Some(101), "a clock that was set back");
        assert_eq!(add(Entry::KeyId(b"alice".to_vec()), 300).unwrap(), Some(300));
        let refused = add(Entry::Key(blob(ca.key_data())), 400).unwrap_err();
        assert!(refused.to_string().contains("the user CA"), "{refused}");
        // Another process.
        let store = SqliteStore::open(&dir.0).unwrap();
        assert_eq!(store.revocations_version().unwrap(), Some(300));
        let list = stored(&store).unwrap();
        let shown: Vec<_> = list.entries().map(|entry| show(&entry)).collect();
        assert_eq!(shown, [("serial", "5-9".to_owned()), ("key-id", "alice".to_owned())]);
    }

    #[test]
    fn arguments_name_keys_and_serials_in_several_ways() {
        let key = new_key();
        let none = |_: &str| bail!("no file");
        let fingerprint = key.public_key().fingerprint(HashAlg::Sha256);
        let by_hash = key_entry(&fingerprint.to_string(), none).unwrap();
        assert_eq!(by_hash, Entry::Sha256(fingerprint.as_bytes().try_into().unwrap()));
        let by_file = key_entry("f", |_| Ok(key.public_key().to_openssh()?)).unwrap();
        assert_eq!(by_file, Entry::Key(blob(key.public_key().key_data())));
        let dir = TempDir::new();
        let authorities = Authorities::load_or_create(&dir.0).unwrap();
        let certificate = authorities
            .sign_user(
                key.public_key(),
                &["alice".to_owned()],
                "alice",
                SystemTime::now(),
                Duration::from_secs(60),
            )
            .unwrap();
        assert_eq!(key_entry("f", |_| Ok(certificate.to_openssh()?)).unwrap(), by_file);
        for bad in ["SHA256:", "SHA256:abc", "MD5:00"] {
            assert!(key_entry(bad, none).is_err(), "{bad}");
        }
        assert_eq!(serials("7"), Ok(Entry::Serials(7, 7)));
        assert_eq!(serials("7-18446744073709551615"), Ok(Entry::Serials(7, u64::MAX)));
        for bad in ["", "0", "-", "7-6", "0-1", "a", "18446744073709551616", "1-2-3"] {
            assert!(serials(bad).is_err(), "{bad}");
        }
    }
}
