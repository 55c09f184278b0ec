//! The list: what it revokes, and how that changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use russh::keys::{Certificate, PublicKey, ssh_key::public::KeyData};
use sha2::Digest;

use super::{
    error::KrlError,
    serials::{Serials, check_range},
};

/// What a certificate was found to be revoked by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revoked {
    Serial,
    KeyId,
    Key,
    Authority,
}

impl fmt::Display for Revoked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Serial => "its serial number",
            Self::KeyId => "its key id",
            Self::Key => "its key",
            Self::Authority => "the key of its CA",
        })
    }
}

/// A key revocation list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Krl {
    pub version: u64,
    /// Seconds since 1970.
    pub generated: u64,
    pub comment: Vec<u8>,
    /// By the CA's key, as SSH has it on the wire; the empty key stands for any CA.
    pub(super) certificates: BTreeMap<Vec<u8>, Certificates>,
    /// As SSH has them on the wire.
    pub(super) keys: BTreeSet<Vec<u8>>,
    pub(super) sha1: BTreeSet<[u8; 20]>,
    pub(super) sha256: BTreeSet<[u8; 32]>,
}

/// The revoked certificates of one CA.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Certificates {
    pub(super) serials: Serials,
    pub(super) key_ids: BTreeSet<Vec<u8>>,
}

/// One thing that a list revokes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Serial numbers from the first to the last, neither of them 0.
    Serials(u64, u64),
    KeyId(Vec<u8>),
    /// A key as SSH has it on the wire.
    Key(Vec<u8>),
    Sha1([u8; 20]),
    Sha256([u8; 32]),
}

impl Krl {
    /// A list of this version that revokes nothing.
    pub fn new(version: u64) -> Self {
        Self { version, ..Self::default() }
    }

    /// Whether a certificate is revoked, as OpenSSH decides it: a serial number 0 means that there is none.
    pub fn revokes(&self, certificate: &Certificate) -> Option<Revoked> {
        if self.revokes_key(certificate.public_key()) {
            return Some(Revoked::Key);
        }
        let ca = certificate.signature_key();
        let (serial, key_id) = (certificate.serial(), certificate.key_id().as_bytes());
        // An unsigned list has entries for any CA; the empty key is theirs.
        for of in [blob(ca), Vec::new()] {
            let Some(revoked) = self.certificates.get(&of) else { continue };
            if revoked.key_ids.contains(key_id) {
                return Some(Revoked::KeyId);
            }
            if serial != 0 && revoked.serials.contains(serial) {
                return Some(Revoked::Serial);
            }
        }
        self.revokes_key(ca).then_some(Revoked::Authority)
    }

    /// Whether a key is revoked, with all certificates of it.
    pub fn revokes_key(&self, key: &KeyData) -> bool {
        if self.keys.is_empty() && self.sha1.is_empty() && self.sha256.is_empty() {
            return false;
        }
        let blob = blob(key);
        let sha1 = || <[u8; 20]>::from(sha1::Sha1::digest(&blob));
        let sha256 = || <[u8; 32]>::from(sha2::Sha256::digest(&blob));
        self.keys.contains(&blob)
            || !self.sha1.is_empty() && self.sha1.contains(&sha1())
            || !self.sha256.is_empty() && self.sha256.contains(&sha256())
    }

    /// Adds an entry, in which serial numbers and key ids are those of the certificates of `ca`. `false` if the list had
    /// it already.
    pub fn add(&mut self, ca: &PublicKey, entry: Entry) -> Result<bool, KrlError> {
        let of = blob(ca.key_data());
        Ok(match entry {
            Entry::Serials(first, last) => {
                check_range((first, last))?;
                let serials = &mut self.certificates.entry(of).or_default().serials;
                let before = serials.clone();
                serials.extend([(first, last)])?;
                *serials != before
            }
            Entry::KeyId(id) if id.contains(&0) => return Err(KrlError::KeyId),
            Entry::KeyId(id) => self.certificates.entry(of).or_default().key_ids.insert(id),
            Entry::Key(key) => self.keys.insert(key),
            Entry::Sha1(hash) => self.sha1.insert(hash),
            Entry::Sha256(hash) => self.sha256.insert(hash),
        })
    }

    /// Takes an entry out; `false` if the list did not have it.
    pub fn remove(&mut self, ca: &PublicKey, entry: &Entry) -> bool {
        let of = blob(ca.key_data());
        let removed = match entry {
            Entry::Serials(first, last) => self.certificates.get_mut(&of).is_some_and(|certificates| {
                let before = certificates.serials.clone();
                certificates.serials.remove((*first, *last));
                certificates.serials != before
            }),
            Entry::KeyId(id) => self.certificates.get_mut(&of).is_some_and(|c| c.key_ids.remove(id)),
            Entry::Key(key) => self.keys.remove(key),
            Entry::Sha1(hash) => self.sha1.remove(hash),
            Entry::Sha256(hash) => self.sha256.remove(hash),
        };
        self.certificates.retain(|_, certificates| *certificates != Certificates::default());
        removed
    }

    /// Adds the keys of another list, and its entries for the certificates of `ca` and of any CA. Returns the number of
    /// CAs whose certificates were left out.
    pub fn merge(&mut self, ca: &PublicKey, other: Self) -> Result<usize, KrlError> {
        let ours = blob(ca.key_data());
        let mut left_out = 0;
        for (of, certificates) in other.certificates {
            if !of.is_empty() && of != ours {
                left_out += 1;
                continue;
            }
            let own = self.certificates.entry(ours.clone()).or_default();
            own.serials.extend(certificates.serials.ranges())?;
            own.key_ids.extend(certificates.key_ids);
        }
        self.keys.extend(other.keys);
        self.sha1.extend(other.sha1);
        self.sha256.extend(other.sha256);
        Ok(left_out)
    }

    /// What the list revokes, in order, without saying for which CA.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        let serials = self.certificates.values().flat_map(|c| c.serials.ranges());
        let key_ids = self.certificates.values().flat_map(|c| &c.key_ids);
        let entries = serials.map(|(first, last)| Entry::Serials(first, last));
        let entries = entries.chain(key_ids.map(|id| Entry::KeyId(id.clone())));
        let entries = entries.chain(self.keys.iter().map(|key| Entry::Key(key.clone())));
        let entries = entries.chain(self.sha1.iter().map(|hash| Entry::Sha1(*hash)));
        entries.chain(self.sha256.iter().map(|hash| Entry::Sha256(*hash)))
    }
}

/// A key as SSH has it on the wire.
pub fn blob(key: &KeyData) -> Vec<u8> {
    // Only a key that is too large for a length of 32 bits can't be encoded.
    PublicKey::new(key.clone(), "").to_bytes().unwrap_or_default()
}
