//! The list as OpenSSH writes it (PROTOCOL.krl).

use std::collections::{BTreeMap, BTreeSet};

use super::{
    error::{KrlError, MAX_LIST, MAX_RANGES},
    list::{Certificates, Krl},
    serials::{Range, check_range, runs},
};

pub(super) const MAGIC: &[u8; 8] = b"SSHKRL\n\0";
const FORMAT: u32 = 1;

pub(super) const CERTIFICATES: u8 = 1;
const KEYS: u8 = 2;
pub(super) const SHA1: u8 = 3;
pub(super) const SIGNATURE: u8 = 4;
pub(super) const SHA256: u8 = 5;
pub(super) const EXTENSION: u8 = 255;

pub(super) const SERIAL_LIST: u8 = 0x20;
pub(super) const SERIAL_RANGE: u8 = 0x21;
pub(super) const SERIAL_BITMAP: u8 = 0x22;
pub(super) const KEY_IDS: u8 = 0x23;
pub(super) const CERTIFICATES_EXTENSION: u8 = 0x39;

impl Krl {
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

    /// Reads a whole list.
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
        let mut budget = RangeBudget(MAX_RANGES);
        let mut ranges: BTreeMap<&[u8], Vec<Range>> = BTreeMap::new();
        while !r.is_empty() {
            let kind = r.u8()?;
            if kind == SIGNATURE {
                return Err(KrlError::Signature);
            }
            let mut section = Reader(r.string()?);
            match kind {
                CERTIFICATES => {
                    let (ca, _reserved) = (section.string()?, section.string()?);
                    let key_ids = &mut list.certificates.entry(ca.to_vec()).or_default().key_ids;
                    certificates(section, ranges.entry(ca).or_default(), key_ids, &mut budget)?;
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
        for (ca, ranges) in ranges {
            list.certificates.entry(ca.to_vec()).or_default().serials.extend(ranges)?;
        }
        list.certificates.retain(|_, certificates| *certificates != Certificates::default());
        Ok(list)
    }
}

impl Certificates {
    fn encode(&self, out: &mut Vec<u8>) {
        let (single, ranges): (Vec<_>, Vec<_>) =
            self.serials.ranges().partition(|(first, last)| first == last);
        if !single.is_empty() {
            let serials: Vec<u8> = single.iter().flat_map(|(serial, _)| serial.to_be_bytes()).collect();
            put_section(out, SERIAL_LIST, &serials);
        }
        for (first, last) in ranges {
            put_section(out, SERIAL_RANGE, &[first.to_be_bytes(), last.to_be_bytes()].concat());
        }
        put_strings(out, KEY_IDS, &self.key_ids);
    }
}

/// How many more ranges the whole list may name.
struct RangeBudget(usize);

impl RangeBudget {
    fn take(&mut self) -> Result<(), KrlError> {
        self.0 = self.0.checked_sub(1).ok_or(KrlError::Ranges)?;
        Ok(())
    }
}

/// Reads a section of certificates, and adds what it revokes.
fn certificates(
    mut r: Reader<'_>,
    ranges: &mut Vec<Range>,
    key_ids: &mut BTreeSet<Vec<u8>>,
    budget: &mut RangeBudget,
) -> Result<(), KrlError> {
    let mut add = |first, last| -> Result<(), KrlError> {
        check_range((first, last))?;
        budget.take()?;
        ranges.push((first, last));
        Ok(())
    };
    while !r.is_empty() {
        let kind = r.u8()?;
        let mut section = Reader(r.string()?);
        match kind {
            SERIAL_LIST => {
                while !section.is_empty() {
                    let serial = section.u64()?;
                    add(serial, serial)?;
                }
            }
            SERIAL_RANGE => {
                let (first, last) = (section.u64()?, section.u64()?);
                section.end()?;
                add(first, last)?;
            }
            SERIAL_BITMAP => {
                let (offset, bits) = (section.u64()?, section.string()?);
                section.end()?;
                for (first, last) in runs(bits) {
                    let at = |bit| offset.checked_add(bit).ok_or(KrlError::Serial);
                    add(at(first)?, at(last)?)?;
                }
            }
            KEY_IDS => section.each(|id| {
                if id.contains(&0) {
                    return Err(KrlError::KeyId);
                }
                key_ids.insert(id.to_vec());
                Ok(())
            })?,
            CERTIFICATES_EXTENSION => extension(section)?,
            other => return Err(KrlError::Section(other)),
        }
    }
    Ok(())
}

/// Skips an extension, unless it is critical.
fn extension(mut r: Reader<'_>) -> Result<(), KrlError> {
    let (name, critical, _contents) = (r.string()?, r.u8()?, r.string()?);
    r.end()?;
    if critical != 0 {
        return Err(KrlError::Extension(name.iter().take(64).copied().map(char::from).collect()));
    }
    Ok(())
}

pub(super) fn put(out: &mut Vec<u8>, string: &[u8]) {
    out.extend(u32::try_from(string.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(string);
}

pub(super) fn put_section(out: &mut Vec<u8>, kind: u8, contents: &[u8]) {
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
