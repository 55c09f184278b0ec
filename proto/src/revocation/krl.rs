//! OpenSSH's key revocation list (PROTOCOL.krl): which keys and certificates are no longer good.
//!
//! A list is parsed in time and memory that are bounded by its size. Ranges of serial numbers stay ranges, a bitmap
//! becomes the ranges that it consists of, and of those there may be no more than a list of single serial numbers could
//! hold. A look-up takes a binary search in each kind of entry.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use russh::keys::{Certificate, PublicKey, ssh_key::public::KeyData};
use sha2::Digest;

/// The most bytes of a list.
pub const MAX_LIST: usize = 1024 * 1024;

const MAGIC: &[u8; 8] = b"SSHKRL\n\0";
const FORMAT: u32 = 1;

const CERTIFICATES: u8 = 1;
const KEYS: u8 = 2;
const SHA1: u8 = 3;
const SIGNATURE: u8 = 4;
const SHA256: u8 = 5;
const EXTENSION: u8 = 255;

const SERIAL_LIST: u8 = 0x20;
const SERIAL_RANGE: u8 = 0x21;
const SERIAL_BITMAP: u8 = 0x22;
const KEY_IDS: u8 = 0x23;
const CERTIFICATES_EXTENSION: u8 = 0x39;

/// The most ranges of serial numbers: as many as a list of the greatest size could name one by one.
const MAX_RANGES: usize = MAX_LIST / 8;

/// The bytes are no list that can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KrlError {
    #[error("it has {0} bytes; {MAX_LIST} are allowed")]
    TooLarge(usize),
    #[error("it is not an OpenSSH key revocation list")]
    Magic,
    #[error("its format version {0} is not known here")]
    Format(u32),
    #[error("it ends in the middle of something")]
    Truncated,
    #[error("it has a section of type {0}, which is not known here")]
    Section(u8),
    #[error("it has the critical extension {0:?}, which is not known here")]
    Extension(String),
    #[error("it has an embedded signature, which OpenSSH has given up; sign it with `ssh-keygen -Y sign`")]
    Signature,
    #[error("a range of serial numbers in it is empty, contains 0 or exceeds 64 bits")]
    Serial,
    #[error("it names more than {MAX_RANGES} ranges of serial numbers")]
    Ranges,
    #[error("a key id in it contains a zero byte")]
    KeyId,
}

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
    certificates: BTreeMap<Vec<u8>, Certificates>,
    /// As SSH has them on the wire.
    keys: BTreeSet<Vec<u8>>,
    sha1: BTreeSet<[u8; 20]>,
    sha256: BTreeSet<[u8; 32]>,
}

/// The certificates of one CA.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Certificates {
    /// First and last; sorted, and they neither overlap nor touch.
    serials: Vec<(u64, u64)>,
    key_ids: BTreeSet<Vec<u8>>,
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
            if serial != 0 && revoked.has(serial) {
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

    /// Adds an entry; serial numbers and key ids are those of the certificates of `ca`. `false` if it was there.
    pub fn add(&mut self, ca: &PublicKey, entry: Entry) -> Result<bool, KrlError> {
        let of = blob(ca.key_data());
        Ok(match entry {
            Entry::Serials(first, last) => {
                check_range(first, last)?;
                let serials = &mut self.certificates.entry(of).or_default().serials;
                let before = serials.clone();
                serials.push((first, last));
                merge(serials)?;
                *serials != before
            }
            Entry::KeyId(id) if id.contains(&0) => return Err(KrlError::KeyId),
            Entry::KeyId(id) => self.certificates.entry(of).or_default().key_ids.insert(id),
            Entry::Key(key) => self.keys.insert(key),
            Entry::Sha1(hash) => self.sha1.insert(hash),
            Entry::Sha256(hash) => self.sha256.insert(hash),
        })
    }

    /// Takes an entry out; `false` if it was not there.
    pub fn remove(&mut self, ca: &PublicKey, entry: &Entry) -> bool {
        let of = blob(ca.key_data());
        let removed = match entry {
            Entry::Serials(first, last) => self.certificates.get_mut(&of).is_some_and(|certificates| {
                let before = certificates.serials.clone();
                certificates.serials =
                    before.iter().flat_map(|range| without(*range, (*first, *last))).flatten().collect();
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

    /// Adds what another list has of keys, of the certificates of `ca`, and of those of any CA. Gives the number of CAs
    /// whose certificates were left out.
    pub fn merge(&mut self, ca: &PublicKey, other: Self) -> Result<usize, KrlError> {
        let ours = blob(ca.key_data());
        let mut left_out = 0;
        for (of, certificates) in other.certificates {
            if !of.is_empty() && of != ours {
                left_out += 1;
                continue;
            }
            let own = self.certificates.entry(ours.clone()).or_default();
            own.serials.extend(certificates.serials);
            merge(&mut own.serials)?;
            own.key_ids.extend(certificates.key_ids);
        }
        self.keys.extend(other.keys);
        self.sha1.extend(other.sha1);
        self.sha256.extend(other.sha256);
        Ok(left_out)
    }

    /// What the list revokes, in order, without the CAs.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        let serials = self.certificates.values().flat_map(|c| &c.serials);
        let key_ids = self.certificates.values().flat_map(|c| &c.key_ids);
        let entries = serials.map(|(first, last)| Entry::Serials(*first, *last));
        let entries = entries.chain(key_ids.map(|id| Entry::KeyId(id.clone())));
        let entries = entries.chain(self.keys.iter().map(|key| Entry::Key(key.clone())));
        let entries = entries.chain(self.sha1.iter().map(|hash| Entry::Sha1(*hash)));
        entries.chain(self.sha256.iter().map(|hash| Entry::Sha256(*hash)))
    }

    /// Fails if the list is larger than [`MAX_LIST`].
    pub fn encode(&self) -> Result<Vec<u8>, KrlError> {
        let mut out = MAGIC.to_vec();
        out.extend(FORMAT.to_be_bytes());
        out.extend(self.version.to_be_bytes());
        out.extend(self.generated.to_be_bytes());
        out.extend(0u64.to_be_bytes());
        put(&mut out, &[]);
        put(&mut out, &self.comment);
        for (ca, certificates) in &self.certificates {
            let mut section = Vec::new();
            put(&mut section, ca);
            put(&mut section, &[]);
            certificates.encode(&mut section);
            put_section(&mut out, CERTIFICATES, &section);
        }
        put_strings(&mut out, KEYS, &self.keys);
        put_strings(&mut out, SHA1, &self.sha1);
        put_strings(&mut out, SHA256, &self.sha256);
        if out.len() > MAX_LIST { Err(KrlError::TooLarge(out.len())) } else { Ok(out) }
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, KrlError> {
        if bytes.len() > MAX_LIST {
            return Err(KrlError::TooLarge(bytes.len()));
        }
        let rest = bytes.strip_prefix(MAGIC).ok_or(KrlError::Magic)?;
        let mut r = Reader(rest);
        let format = r.u32()?;
        if format != FORMAT {
            return Err(KrlError::Format(format));
        }
        let (version, generated, _flags) = (r.u64()?, r.u64()?, r.u64()?);
        let (_reserved, comment) = (r.string()?, r.string()?);
        let mut list = Self { version, generated, comment: comment.to_vec(), ..Self::default() };
        let mut ranges = 0;
        while !r.is_empty() {
            let kind = r.u8()?;
            if kind == SIGNATURE {
                return Err(KrlError::Signature);
            }
            let mut section = Reader(r.string()?);
            match kind {
                CERTIFICATES => {
                    let (ca, _reserved) = (section.string()?, section.string()?);
                    list.certificates.entry(ca.to_vec()).or_default().decode(section, &mut ranges)?;
                }
                KEYS => section.each(|key| {
                    list.keys.insert(key.to_vec());
                    Ok(())
                })?,
                SHA1 => section.each(|hash| {
                    list.sha1.insert(hash.try_into().map_err(|_| KrlError::Truncated)?);
                    Ok(())
                })?,
                SHA256 => section.each(|hash| {
                    list.sha256.insert(hash.try_into().map_err(|_| KrlError::Truncated)?);
                    Ok(())
                })?,
                EXTENSION => extension(section)?,
                other => return Err(KrlError::Section(other)),
            }
        }
        for certificates in list.certificates.values_mut() {
            merge(&mut certificates.serials)?;
        }
        list.certificates.retain(|_, certificates| *certificates != Certificates::default());
        Ok(list)
    }
}

impl Certificates {
    fn has(&self, serial: u64) -> bool {
        let after = self.serials.partition_point(|(first, _)| *first <= serial);
        after.checked_sub(1).and_then(|i| self.serials.get(i)).is_some_and(|(_, last)| serial <= *last)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let (single, ranges): (Vec<_>, Vec<_>) = self.serials.iter().partition(|(first, last)| first == last);
        if !single.is_empty() {
            let serials: Vec<u8> = single.iter().flat_map(|(serial, _)| serial.to_be_bytes()).collect();
            put_section(out, SERIAL_LIST, &serials);
        }
        for (first, last) in ranges {
            put_section(out, SERIAL_RANGE, &[first.to_be_bytes(), last.to_be_bytes()].concat());
        }
        put_strings(out, KEY_IDS, &self.key_ids);
    }

    /// `ranges` counts those of the whole list.
    fn decode(&mut self, mut r: Reader<'_>, ranges: &mut usize) -> Result<(), KrlError> {
        let mut add = |serials: &mut Vec<(u64, u64)>, first, last| {
            check_range(first, last)?;
            *ranges += 1;
            if *ranges > MAX_RANGES {
                return Err(KrlError::Ranges);
            }
            serials.push((first, last));
            Ok(())
        };
        while !r.is_empty() {
            let kind = r.u8()?;
            let mut section = Reader(r.string()?);
            match kind {
                SERIAL_LIST => {
                    while !section.is_empty() {
                        let serial = section.u64()?;
                        add(&mut self.serials, serial, serial)?;
                    }
                }
                SERIAL_RANGE => {
                    let (first, last) = (section.u64()?, section.u64()?);
                    section.end()?;
                    add(&mut self.serials, first, last)?;
                }
                SERIAL_BITMAP => {
                    let (offset, bits) = (section.u64()?, section.string()?);
                    section.end()?;
                    for (first, last) in runs(bits) {
                        let at = |bit| offset.checked_add(bit).ok_or(KrlError::Serial);
                        add(&mut self.serials, at(first)?, at(last)?)?;
                    }
                }
                KEY_IDS => section.each(|id| {
                    if id.contains(&0) {
                        return Err(KrlError::KeyId);
                    }
                    self.key_ids.insert(id.to_vec());
                    Ok(())
                })?,
                CERTIFICATES_EXTENSION => extension(section)?,
                other => return Err(KrlError::Section(other)),
            }
        }
        Ok(())
    }
}

/// One that is not critical may be passed over.
fn extension(mut r: Reader<'_>) -> Result<(), KrlError> {
    let (name, critical, _contents) = (r.string()?, r.u8()?, r.string()?);
    r.end()?;
    if critical != 0 {
        return Err(KrlError::Extension(name.iter().take(64).copied().map(char::from).collect()));
    }
    Ok(())
}

fn check_range(first: u64, last: u64) -> Result<(), KrlError> {
    if first == 0 || first > last { Err(KrlError::Serial) } else { Ok(()) }
}

/// Sorts ranges, and joins those that overlap or touch.
fn merge(ranges: &mut Vec<(u64, u64)>) -> Result<(), KrlError> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, kept| {
        let joins = next.0 <= kept.1.saturating_add(1);
        if joins {
            kept.1 = kept.1.max(next.1);
        }
        joins
    });
    if ranges.len() > MAX_RANGES { Err(KrlError::Ranges) } else { Ok(()) }
}

/// What is left of a range, below and above what is taken out of it.
fn without((first, last): (u64, u64), (from, to): (u64, u64)) -> [Option<(u64, u64)>; 2] {
    if to < first || last < from {
        return [Some((first, last)), None];
    }
    let below = from.checked_sub(1).filter(|end| first <= *end).map(|end| (first, end));
    let above = to.checked_add(1).filter(|begin| *begin <= last).map(|begin| (begin, last));
    [below, above]
}

/// The runs of set bits in a number in big-endian form, first and last bit of each, from the lowest.
fn runs(bits: &[u8]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let mut set = (0u64..).zip(bits.iter().rev()).flat_map(|(i, byte)| {
        let byte = *byte;
        (0..8u64).filter(move |bit| (byte >> bit) & 1 == 1).map(move |bit| i * 8 + bit)
    });
    let mut next = set.next();
    std::iter::from_fn(move || {
        let first = next?;
        let mut last = first;
        loop {
            next = set.next();
            if next != Some(last + 1) {
                return Some((first, last));
            }
            last += 1;
        }
    })
}

/// A key as SSH has it on the wire.
pub fn blob(key: &KeyData) -> Vec<u8> {
    // Only a key that is too large for a length of 32 bits can't be encoded.
    PublicKey::new(key.clone(), "").to_bytes().unwrap_or_default()
}

fn put(out: &mut Vec<u8>, string: &[u8]) {
    out.extend(u32::try_from(string.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(string);
}

fn put_section(out: &mut Vec<u8>, kind: u8, contents: &[u8]) {
    out.push(kind);
    put(out, contents);
}

fn put_strings<T: AsRef<[u8]>>(out: &mut Vec<u8>, kind: u8, strings: &BTreeSet<T>) {
    if strings.is_empty() {
        return;
    }
    let mut section = Vec::new();
    for string in strings {
        put(&mut section, string.as_ref());
    }
    put_section(out, kind, &section);
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn end(&self) -> Result<(), KrlError> {
        if self.is_empty() { Ok(()) } else { Err(KrlError::Truncated) }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], KrlError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(KrlError::Truncated)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, KrlError> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, KrlError> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, KrlError> {
        self.take().map(u64::from_be_bytes)
    }

    fn string(&mut self) -> Result<&'a [u8], KrlError> {
        let len = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        let (string, rest) = self.0.split_at_checked(len).ok_or(KrlError::Truncated)?;
        self.0 = rest;
        Ok(string)
    }

    fn each(&mut self, mut take: impl FnMut(&'a [u8]) -> Result<(), KrlError>) -> Result<(), KrlError> {
        while !self.is_empty() {
            take(self.string()?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{path::PathBuf, process::Command};

    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    pub(crate) struct TempDir(pub PathBuf);

    impl TempDir {
        pub(crate) fn new() -> Self {
            let path = std::env::temp_dir().join(format!("proto-krl-{:016x}", rand::random::<u64>()));
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    pub(crate) fn keygen(options: &[&str], files: &[&PathBuf]) -> String {
        let output = Command::new("ssh-keygen").args(options).args(files).output().unwrap();
        assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A CA and certificates by ssh-keygen.
    struct World {
        dir: TempDir,
        ca: PublicKey,
    }

    impl World {
        fn new() -> Self {
            let dir = TempDir::new();
            for name in ["ca", "other"] {
                keygen(&["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"], &[&dir.0.join(name)]);
            }
            let ca = PublicKey::read_openssh_file(dir.0.join("ca.pub")).unwrap();
            Self { dir, ca }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.0.join(name)
        }

        fn certificate(&self, name: &str, ca: &str, serial: u64, key_id: &str) -> Certificate {
            let key = self.path(name);
            keygen(&["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"], &[&key]);
            let (ca, serial) = (self.path(ca), serial.to_string());
            let ca = ca.to_str().unwrap();
            keygen(
                &["-q", "-s", ca, "-I", key_id, "-n", "u", "-z", &serial],
                &[&self.path(&format!("{name}.pub"))],
            );
            Certificate::read_file(&self.path(&format!("{name}-cert.pub"))).unwrap()
        }

        /// What `ssh-keygen -k` makes of a specification.
        fn made(&self, specification: &str) -> Krl {
            std::fs::write(self.path("specification"), specification).unwrap();
            let (ca, krl) = (self.path("ca.pub"), self.path("krl"));
            let options = ["-q", "-k", "-z", "7", "-s", ca.to_str().unwrap(), "-f", krl.to_str().unwrap()];
            keygen(&options, &[&self.path("specification")]);
            Krl::decode(&std::fs::read(krl).unwrap()).unwrap()
        }

        /// Whether ssh-keygen finds a certificate in a list of ours.
        fn finds(&self, list: &Krl, name: &str) -> bool {
            std::fs::write(self.path("ours"), list.encode().unwrap()).unwrap();
            let mut query = Command::new("ssh-keygen");
            query.arg("-Q").arg("-f").arg(self.path("ours")).arg(self.path(&format!("{name}-cert.pub")));
            let output = query.output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(text.contains(": ok") || text.contains("REVOKED"), "{text}{:?}", output.stderr);
            assert_eq!(text.contains("REVOKED"), !output.status.success());
            text.contains("REVOKED")
        }
    }

    #[test]
    fn what_ssh_keygen_makes_is_read_and_means_the_same() {
        let world = World::new();
        let a = world.certificate("a", "ca", 1000, "alice");
        let foreign = world.certificate("f", "other", 1000, "alice");
        let bare = world.certificate("z", "ca", 0, "zero");
        let (hash, own_key) = (keygen(&["-l", "-f"], &[&world.path("a.pub")]), world.path("a.pub"));
        let sha256 = hash.split_whitespace().nth(1).unwrap();
        let key = std::fs::read_to_string(own_key).unwrap();
        let even: String = (500..700).map(|i| format!("serial: {}\n", i * 2)).collect();
        for (specification, by) in [
            ("serial: 1000", Some(Revoked::Serial)),
            ("serial: 999\nserial: 1001", None),
            ("serial: 900-1000", Some(Revoked::Serial)),
            ("serial: 1-18446744073709551615", Some(Revoked::Serial)),
            (even.as_str(), Some(Revoked::Serial)),
            (even.replace("serial: 1000\n", "").as_str(), None),
            ("id: alice", Some(Revoked::KeyId)),
            ("id: alic", None),
            (format!("key: {key}").as_str(), Some(Revoked::Key)),
            (format!("sha1: {key}").as_str(), Some(Revoked::Key)),
            (format!("sha256: {key}").as_str(), Some(Revoked::Key)),
            (format!("hash: {sha256}").as_str(), Some(Revoked::Key)),
            (format!("key: {}", world.ca.to_openssh().unwrap()).as_str(), Some(Revoked::Authority)),
        ] {
            let list = world.made(specification);
            assert_eq!(list.version, 7);
            assert_eq!(list.revokes(&a), by, "{specification}");
            assert_eq!(world.finds(&list, "a"), by.is_some(), "{specification}");
            assert_eq!(Krl::decode(&list.encode().unwrap()).as_ref(), Ok(&list), "{specification}");
            if by != Some(Revoked::Key) {
                assert_eq!(list.revokes(&foreign), None, "{specification}");
            }
            assert!(!matches!(list.revokes(&bare), Some(Revoked::Serial)), "serial 0 is none");
        }
    }

    #[test]
    fn a_list_with_a_bitmap_of_ssh_keygen_has_the_same_serials() {
        let world = World::new();
        let even: String = (1..3000).map(|i| format!("serial: {}\n", i * 2)).collect();
        let list = world.made(&even);
        let raw = std::fs::read(world.path("krl")).unwrap();
        assert!(raw.len() < 2000, "ssh-keygen wrote {} bytes, and so no bitmap", raw.len());
        let serials = &list.certificates[&blob(world.ca.key_data())];
        for serial in 1..6001 {
            assert_eq!(serials.has(serial), serial % 2 == 0 && serial < 6000, "{serial}");
        }
    }

    #[test]
    fn ssh_keygen_finds_what_we_add_and_not_what_we_take_out() {
        let world = World::new();
        let a = world.certificate("a", "ca", u64::MAX, "alice");
        world.certificate("f", "other", u64::MAX, "alice");
        let key = blob(a.public_key());
        let sha1: [u8; 20] = sha1::Sha1::digest(&key).into();
        let sha256: [u8; 32] = sha2::Sha256::digest(&key).into();
        for entry in [
            Entry::Serials(u64::MAX, u64::MAX),
            Entry::Serials(5, u64::MAX),
            Entry::KeyId(b"alice".to_vec()),
            Entry::Key(key),
            Entry::Sha1(sha1),
            Entry::Sha256(sha256),
        ] {
            let mut list = Krl { version: 9, comment: b"test".to_vec(), ..Krl::default() };
            assert!(!world.finds(&list, "a"));
            assert!(list.add(&world.ca, entry.clone()).unwrap());
            assert!(!list.add(&world.ca, entry.clone()).unwrap(), "{entry:?} twice");
            assert!(list.revokes(&a).is_some() && world.finds(&list, "a"), "{entry:?}");
            assert!(!world.finds(&list, "f"), "{entry:?} of another CA");
            assert!(list.remove(&world.ca, &entry) && !list.remove(&world.ca, &entry));
            assert!(list.revokes(&a).is_none() && !world.finds(&list, "a"), "{entry:?} taken out");
        }
    }

    fn ca() -> PublicKey {
        let key = russh::keys::PrivateKey::random(&mut rand::rng(), russh::keys::Algorithm::Ed25519);
        key.unwrap().public_key().clone()
    }

    #[test]
    fn ranges_stay_ranges_and_can_be_divided() {
        let (ca, mut list) = (ca(), Krl::default());
        let serials = |list: &Krl| list.entries().collect::<Vec<_>>();
        assert!(list.add(&ca, Entry::Serials(10, u64::MAX)).unwrap());
        assert!(!list.add(&ca, Entry::Serials(11, 12)).unwrap());
        assert!(list.add(&ca, Entry::Serials(5, 9)).unwrap());
        assert_eq!(serials(&list), [Entry::Serials(5, u64::MAX)]);
        assert!(list.remove(&ca, &Entry::Serials(7, 8)));
        assert_eq!(serials(&list), [Entry::Serials(5, 6), Entry::Serials(9, u64::MAX)]);
        assert!(list.remove(&ca, &Entry::Serials(1, u64::MAX)));
        assert_eq!((serials(&list), list), (vec![], Krl::default()));
        let mut list = Krl::default();
        for (first, last) in [(0, 1), (0, 0), (2, 1)] {
            assert_eq!(list.add(&ca, Entry::Serials(first, last)), Err(KrlError::Serial));
        }
        assert_eq!(list.add(&ca, Entry::KeyId(b"a\0b".to_vec())), Err(KrlError::KeyId));
    }

    #[test]
    fn what_is_of_other_cas_is_not_merged() {
        let (ours, theirs) = (ca(), ca());
        let (mut list, mut other) = (Krl::default(), Krl::default());
        other.add(&ours, Entry::Serials(3, 3)).unwrap();
        other.add(&theirs, Entry::Serials(4, 4)).unwrap();
        other.certificates.entry(Vec::new()).or_default().serials.push((5, 5));
        assert_eq!(list.merge(&ours, other), Ok(1));
        let got: Vec<_> = list.entries().collect();
        assert_eq!(got, [Entry::Serials(3, 3), Entry::Serials(5, 5)]);
    }

    fn with(sections: &[(u8, &[u8])]) -> Vec<u8> {
        let mut bytes = Krl::default().encode().unwrap();
        for (kind, contents) in sections {
            put_section(&mut bytes, *kind, contents);
        }
        bytes
    }

    fn of_any_ca(kind: u8, contents: &[u8]) -> Vec<u8> {
        let mut section = vec![0; 8];
        put_section(&mut section, kind, contents);
        with(&[(CERTIFICATES, &section)])
    }

    #[test]
    fn what_can_not_be_understood_is_refused() {
        let string = |bytes: &[u8]| {
            let mut out = Vec::new();
            put(&mut out, bytes);
            out
        };
        let critical = [string(b"new"), vec![1], string(b"")].concat();
        let optional = [string(b"new"), vec![0], string(b"")].concat();
        let range = |a: u64, b: u64| [a.to_be_bytes(), b.to_be_bytes()].concat();
        let beyond = [&u64::MAX.to_be_bytes()[..], &string(&[0xff])].concat();
        let from_zero = [&0u64.to_be_bytes()[..], &string(&[1])].concat();
        for (bytes, want) in [
            (b"SSHKRL".to_vec(), KrlError::Magic),
            (vec![], KrlError::Magic),
            (vec![0; MAX_LIST + 1], KrlError::TooLarge(MAX_LIST + 1)),
            ([&MAGIC[..], &2u32.to_be_bytes()].concat(), KrlError::Format(2)),
            (with(&[(9, b"")]), KrlError::Section(9)),
            (with(&[(SIGNATURE, b"")]), KrlError::Signature),
            (with(&[(EXTENSION, &critical)]), KrlError::Extension("new".into())),
            (of_any_ca(CERTIFICATES_EXTENSION, &critical), KrlError::Extension("new".into())),
            (of_any_ca(0x24, b""), KrlError::Section(0x24)),
            (of_any_ca(SERIAL_LIST, &[0; 8]), KrlError::Serial),
            (of_any_ca(SERIAL_LIST, &[1; 9]), KrlError::Truncated),
            (of_any_ca(SERIAL_RANGE, &range(2, 1)), KrlError::Serial),
            (of_any_ca(SERIAL_RANGE, &[range(1, 2), vec![0]].concat()), KrlError::Truncated),
            (of_any_ca(SERIAL_BITMAP, &beyond), KrlError::Serial),
            (of_any_ca(SERIAL_BITMAP, &from_zero), KrlError::Serial),
            (of_any_ca(KEY_IDS, &string(b"a\0")), KrlError::KeyId),
            (with(&[(SHA1, &string(&[0; 21]))]), KrlError::Truncated),
            (with(&[(SHA256, &string(&[0; 31]))]), KrlError::Truncated),
        ] {
            assert_eq!(Krl::decode(&bytes), Err(want), "{:?}", &bytes[..bytes.len().min(80)]);
        }
        assert_eq!(Krl::decode(&with(&[(EXTENSION, &optional)])), Ok(Krl::default()));
    }

    #[test]
    fn a_hostile_bitmap_costs_no_more_than_its_bound() {
        // Every other bit of a mebibyte would be four million ranges.
        let bits = vec![0x55; MAX_LIST - 200];
        let mut bitmap = 1u64.to_be_bytes().to_vec();
        put(&mut bitmap, &bits);
        assert_eq!(Krl::decode(&of_any_ca(SERIAL_BITMAP, &bitmap)), Err(KrlError::Ranges));
        let mut full = 1u64.to_be_bytes().to_vec();
        put(&mut full, &vec![0xff; MAX_LIST - 200]);
        let list = Krl::decode(&of_any_ca(SERIAL_BITMAP, &full)).unwrap();
        assert_eq!(list.entries().collect::<Vec<_>>(), [Entry::Serials(1, (MAX_LIST as u64 - 200) * 8)]);
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let ca = ca();
        let mut list = Krl { version: 3, comment: b"c".to_vec(), ..Krl::default() };
        for entry in [
            Entry::Serials(3, 3),
            Entry::Serials(100, 200),
            Entry::KeyId(b"alice".to_vec()),
            Entry::Key(blob(ca.key_data())),
            Entry::Sha1([1; 20]),
            Entry::Sha256([2; 32]),
        ] {
            list.add(&ca, entry).unwrap();
        }
        let mut bitmap = 9u64.to_be_bytes().to_vec();
        put(&mut bitmap, &[0x5a; 40]);
        let samples = [list.encode().unwrap(), of_any_ca(SERIAL_BITMAP, &bitmap)];
        for sample in &samples {
            for len in 0..sample.len() {
                let _ = Krl::decode(&sample[..len]);
            }
        }
        let mut rng = StdRng::seed_from_u64(11);
        for _ in 0..50_000 {
            let mut bytes = samples[rng.random_range(0..samples.len())].clone();
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = if rng.random() { rng.random() } else { 0xff };
            }
            if let Ok(list) = Krl::decode(&bytes) {
                assert_eq!(Krl::decode(&list.encode().unwrap()), Ok(list));
            }
        }
    }
}
