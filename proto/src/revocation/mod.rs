//! The revocation of SSH certificates of masters and people: the list ([`krl`]), who may make one, and how it travels.
//!
//! A list is signed by the user CA whose certificates it revokes (OpenSSH's PROTOCOL.sshsig, namespace [`NAMESPACE`]), so
//! that a master without that key can withhold a list but not forge one. The signature is verified before the list is
//! parsed. Of each CA, a node keeps the list with the highest version that it has seen, and accepts no older one.
//!
//! The master sends a list on an SSH channel of its own (subsystem [`SUBSYSTEM`]), which peers that do not know it refuse.
//! The node says which lists it holds (a [`Report`]), the master sends a [`SignedList`] if the node's is older, the node
//! reports again, and the master closes the channel.

pub mod krl;

use std::collections::BTreeMap;

pub use krl::MAX_LIST;
use russh::keys::{
    HashAlg, PrivateKey, PublicKey,
    ssh_key::{LineEnding, SshSig},
};
use serde::{Deserialize, Serialize};

use crate::join::{self, MessageError};

/// The SSH subsystem under which a node-agent takes revocation lists.
pub const SUBSYSTEM: &str = "revocations-v1";
/// The namespace of a list's signature: `ssh-keygen -Y verify -n revocations@master-agent`.
pub const NAMESPACE: &str = "revocations@master-agent";
/// The most bytes of a list's signature.
const MAX_SIGNATURE: usize = 4 * 1024;

/// Why a list was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    #[error(
        "a signed list has a signature of at most {MAX_SIGNATURE} bytes and a list of at most {MAX_LIST}"
    )]
    TooLarge,
    #[error("bytes follow the signed list")]
    Trailing,
    #[error("its signature can't be read")]
    Signature,
    #[error("it is not signed by a user CA that is trusted here")]
    Untrusted,
    #[error("its signature is wrong, or for another purpose than {NAMESPACE}")]
    Forged,
    #[error("it can't be read: {0}")]
    Krl(#[from] krl::KrlError),
}

/// A list in OpenSSH's KRL format and its detached signature.
///
/// On the wire and on disk: the length of the signature (u32, big endian) and the signature in its text form, then the
/// length of the list and the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedList {
    pub signature: String,
    pub list: Vec<u8>,
}

impl SignedList {
    pub fn sign(ca: &PrivateKey, list: Vec<u8>) -> Result<Self, ListError> {
        if list.len() > MAX_LIST {
            return Err(ListError::TooLarge);
        }
        let signature = ca.sign(NAMESPACE, HashAlg::Sha512, &list).map_err(|_| ListError::Signature)?;
        let signature = signature.to_pem(LineEnding::LF).map_err(|_| ListError::Signature)?;
        Ok(Self { signature, list })
    }

    /// Verifies the signature, and returns the one of `cas` that made it.
    pub fn verify<'a>(&self, cas: &'a [PublicKey]) -> Result<&'a PublicKey, ListError> {
        let signature = SshSig::from_pem(&self.signature).map_err(|_| ListError::Signature)?;
        let signed_by = |ca: &&PublicKey| ca.key_data() == signature.public_key();
        let ca = cas.iter().find(signed_by).ok_or(ListError::Untrusted)?;
        ca.verify(NAMESPACE, &self.list, &signature).map_err(|_| ListError::Forged)?;
        Ok(ca)
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(8 + self.signature.len() + self.list.len());
        for part in [self.signature.as_bytes(), &self.list] {
            out.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
            out.extend_from_slice(part);
        }
        out
    }

    /// Decodes the one list that `bytes` hold; `None` if more bytes are needed.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, ListError> {
        let Some((signature, rest)) = part(bytes, MAX_SIGNATURE)? else { return Ok(None) };
        let Some((list, rest)) = part(rest, MAX_LIST)? else { return Ok(None) };
        if !rest.is_empty() {
            return Err(ListError::Trailing);
        }
        let signature = std::str::from_utf8(signature).map_err(|_| ListError::Signature)?;
        Ok(Some(Self { signature: signature.to_owned(), list: list.to_vec() }))
    }
}

/// One part, and the bytes after it.
type Part<'a> = (&'a [u8], &'a [u8]);

fn part(bytes: &[u8], most: usize) -> Result<Option<Part<'_>>, ListError> {
    let Some((len, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let len = usize::try_from(u32::from_be_bytes(*len)).unwrap_or(usize::MAX);
    if len > most {
        return Err(ListError::TooLarge);
    }
    Ok(rest.split_at_checked(len))
}

/// What a node says about the lists that it holds: a length (u32, big endian) and JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The version of the list of each trusted user CA, by the CA's SHA-256 fingerprint. CAs without a list are left out.
    pub held: BTreeMap<String, u64>,
    /// Why the list that was sent was not accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

impl Report {
    pub fn encode(&self) -> Vec<u8> {
        join::encode(self)
    }

    /// The report at the beginning of `bytes` and its length; `None` if more bytes are needed.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, MessageError> {
        let Some(report) = join::decode::<Self>(bytes)? else { return Ok(None) };
        let len = bytes.first_chunk::<4>().map_or(0, |len| u32::from_be_bytes(*len));
        Ok(Some((report, 4 + usize::try_from(len).unwrap_or(usize::MAX - 4))))
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};

    use russh::keys::Algorithm;

    use super::*;

    fn ca() -> PrivateKey {
        PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap()
    }

    #[test]
    fn only_the_signature_of_a_trusted_ca_for_this_purpose_is_good() {
        let (ours, theirs) = (ca(), ca());
        let cas = [theirs.public_key().clone(), ours.public_key().clone()];
        let signed = SignedList::sign(&ours, b"a list".to_vec()).unwrap();
        assert_eq!(signed.verify(&cas).unwrap().key_data(), ours.public_key().key_data());
        assert_eq!(signed.verify(&cas[..1]), Err(ListError::Untrusted));
        assert_eq!(signed.verify(&[]), Err(ListError::Untrusted));
        let other = SignedList { list: b"another".to_vec(), ..signed.clone() };
        assert_eq!(other.verify(&cas), Err(ListError::Forged));
        let purpose = ours.sign("file", HashAlg::Sha512, b"a list").unwrap().to_pem(LineEnding::LF).unwrap();
        let purpose = SignedList { signature: purpose, ..signed.clone() };
        assert_eq!(purpose.verify(&cas), Err(ListError::Forged));
        for signature in ["", "x", &signed.signature[..signed.signature.len() / 2]] {
            let broken = SignedList { signature: signature.to_owned(), ..signed.clone() };
            assert_eq!(broken.verify(&cas), Err(ListError::Signature), "{signature:?}");
        }
    }

    #[test]
    fn a_list_is_decoded_when_it_is_complete_and_never_beyond_its_bounds() {
        let signed = SignedList::sign(&ca(), b"a list".to_vec()).unwrap();
        let bytes = signed.encode();
        for len in 0..bytes.len() {
            assert_eq!(SignedList::decode(&bytes[..len]), Ok(None));
        }
        assert_eq!(SignedList::decode(&bytes), Ok(Some(signed.clone())));
        assert_eq!(SignedList::decode(&[&bytes[..], b"x"].concat()), Err(ListError::Trailing));
        assert_eq!(SignedList::decode(b"\0\0\x10\x01"), Err(ListError::TooLarge));
        assert_eq!(SignedList::decode(b"\0\0\0\0\0\x10\0\x01"), Err(ListError::TooLarge));
        assert_eq!(SignedList::sign(&ca(), vec![0; MAX_LIST + 1]), Err(ListError::TooLarge));
    }

    #[test]
    fn reports_follow_one_another() {
        let report = Report { held: [("SHA256:a".to_owned(), 7)].into(), refused: None };
        let refused = Report { refused: Some("older".into()), ..report.clone() };
        let bytes = [report.encode(), refused.encode()].concat();
        let (first, used) = Report::decode(&bytes).unwrap().unwrap();
        assert_eq!((&first, Report::decode(&bytes[used..]).unwrap().unwrap().0), (&report, refused));
        assert!(Report::decode(&bytes[..used - 1]).unwrap().is_none());
    }

    #[test]
    fn ssh_keygen_verifies_a_signature_and_we_verify_its_own() {
        let dir = krl::tests::TempDir::new();
        let ca = ca();
        let key = dir.0.join("ca");
        let mut file =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&key).unwrap();
        file.write_all(ca.to_openssh(LineEnding::LF).unwrap().as_bytes()).unwrap();
        let signed = SignedList::sign(&ca, b"a list".to_vec()).unwrap();
        std::fs::write(dir.0.join("list"), &signed.list).unwrap();
        std::fs::write(dir.0.join("list.sig"), &signed.signature).unwrap();
        let allowed = format!("ca {}\n", ca.public_key().to_openssh().unwrap());
        std::fs::write(dir.0.join("allowed"), allowed).unwrap();
        let verify = |namespace: &str| {
            let file = std::fs::File::open(dir.0.join("list")).unwrap();
            let mut command = std::process::Command::new("ssh-keygen");
            command.args(["-Y", "verify", "-I", "ca", "-n", namespace, "-f"]).arg(dir.0.join("allowed"));
            command.arg("-s").arg(dir.0.join("list.sig")).stdin(file).output().unwrap().status.success()
        };
        assert!(verify(NAMESPACE));
        assert!(!verify("file"));
        std::fs::remove_file(dir.0.join("list.sig")).unwrap();
        krl::tests::keygen(&["-Y", "sign", "-q", "-n", NAMESPACE, "-f"], &[&key, &dir.0.join("list")]);
        let signature = std::fs::read_to_string(dir.0.join("list.sig")).unwrap();
        let theirs = SignedList { signature, list: signed.list };
        assert!(theirs.verify(&[ca.public_key().clone()]).is_ok());
    }
}
