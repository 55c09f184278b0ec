//! known_hosts files, as sshd(8) describes them.

use std::{
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use hmac::{Hmac, KeyInit, Mac};
use proto::Target;
use russh::keys::{
    PublicKey, PublicKeyOrCertificate,
    ssh_key::{
        known_hosts::{Entry, HostPatterns, Marker},
        public::KeyData,
    },
};
use sha1::Sha1;

use super::host_certificate;

/// The contents of a known_hosts file.
#[derive(Clone, Debug, Default)]
pub struct KnownHosts(String);

impl From<String> for KnownHosts {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// What a file says about a host key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Known,
    Unknown,
    Revoked,
}

impl KnownHosts {
    /// Reads a file on a thread for blocking work.
    pub async fn load(file: PathBuf) -> io::Result<Self> {
        tokio::task::spawn_blocking(move || Self::read(&file)).await?
    }

    /// Reads a file. This blocks.
    pub fn read(file: &Path) -> io::Result<Self> {
        std::fs::read_to_string(file).map(Self)
    }

    /// Judges a key by the lines for the host that was dialled: a plain line has the key, or a CA's line the key that
    /// signed the certificate. A key that a `@revoked` line contains is refused for every host.
    pub fn judge(&self, dialled: &Target, presented: &PublicKeyOrCertificate, now: SystemTime) -> Verdict {
        let (key, certificate) = match presented {
            PublicKeyOrCertificate::PublicKey { key, .. } => (key.key_data(), None),
            PublicKeyOrCertificate::Certificate(certificate) => (certificate.public_key(), Some(certificate)),
        };
        let ca = certificate.map(|certificate| certificate.signature_key());
        let shown = std::iter::once(key).chain(ca).map(base64_of).collect::<Option<Vec<_>>>();
        let Some(shown) = shown else { return Verdict::Unknown };
        let shows = |field: &str| shown.iter().any(|key| key == field);
        // Only lines with one of the keys matter, so no other line is split or decoded.
        let lines: Vec<Vec<&str>> = self
            .0
            .lines()
            .filter(|line| shown.iter().any(|key| line.contains(key.as_str())))
            .filter(|line| !line.trim_start().starts_with('#'))
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|fields| fields.iter().any(|field| shows(field)))
            .collect();
        if lines.iter().any(|fields| fields.first() == Some(&"@revoked")) {
            return Verdict::Revoked;
        }
        let host = dialled.host.to_string();
        let name = if dialled.port == 22 { host.clone() } else { format!("[{host}]:{}", dialled.port) };
        let known = lines.iter().filter_map(|fields| fields.join(" ").parse::<Entry>().ok()).any(|entry| {
            let listed = entry.public_key().key_data();
            match (entry.marker(), certificate) {
                (None, _) => listed == key && is_for(entry.host_patterns(), &name),
                (Some(Marker::CertAuthority), Some(certificate)) => {
                    covers(entry.host_patterns(), &name)
                        && host_certificate::check(certificate, listed, now, None, host.clone()).is_ok()
                        && certificate.valid_principals().contains(&host)
                }
                (Some(Marker::CertAuthority | Marker::Revoked), _) => false,
            }
        });
        if known { Verdict::Known } else { Verdict::Unknown }
    }
}

/// The second field of a key's text form.
fn base64_of(key: &KeyData) -> Option<String> {
    let text = PublicKey::new(key.clone(), "").to_openssh().ok()?;
    text.split_whitespace().nth(1).map(str::to_owned)
}

/// Whether a plain line is for a host. Patterns in it are not expanded.
fn is_for(patterns: &HostPatterns, name: &str) -> bool {
    match patterns {
        HostPatterns::Patterns(names) => names.iter().any(|listed| listed == name),
        HostPatterns::HashedName { salt, hash } => Hmac::<Sha1>::new_from_slice(salt)
            .is_ok_and(|hmac| hmac.chain_update(name).verify_slice(hash).is_ok()),
    }
}

/// Whether a CA's line covers a host.
fn covers(patterns: &HostPatterns, name: &str) -> bool {
    match patterns {
        HostPatterns::Patterns(patterns) => {
            let matches = |p: &str| glob(p.to_ascii_lowercase().as_bytes(), name.as_bytes());
            let negated = patterns.iter().filter_map(|p| p.strip_prefix('!')).any(matches);
            !negated && patterns.iter().any(|p| matches(p))
        }
        HostPatterns::HashedName { .. } => false,
    }
}

/// `*` stands for any characters, `?` for one (PATTERNS in ssh_config(5)).
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), None) => glob(rest, name),
        (Some((b'*', rest)), Some((_, tail))) => glob(rest, name) || glob(pattern, tail),
        (Some((p, rest)), Some((n, tail))) => (*p == b'?' || p == n) && glob(rest, tail),
        (None, Some(_)) | (Some(_), None) => false,
    }
}
