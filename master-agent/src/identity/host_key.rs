//! Whose host key is this? Pure: keys, trust and the time are arguments.
//!
//! The SSH handshake has proved that the peer holds the private half; this decides which node that is. A name
//! is never taken from what the peer claims, only from a certificate of the host CA, a pin, a known_hosts file
//! or the key remembered from the first use.

use std::{collections::HashMap, net::IpAddr, path::Path, time::SystemTime};

use proto::{NodeName, Target, refusal::printable};
use russh::{
    keys::PublicKeyOrCertificate,
    keys::{
        Certificate, HashAlg, PublicKey,
        known_hosts::known_host_keys_path,
        ssh_key::{
            certificate::CertType,
            known_hosts::{Entry, HostPatterns, Marker},
            public::KeyData,
        },
    },
};

use crate::host_trust::HostTrust;

/// A node that has proved itself.
#[derive(Clone, Debug)]
pub struct VerifiedHost {
    pub node: NodeName,
    pub key: PublicKey,
    /// When its certificate expires; `None` where a key was trusted without one.
    pub not_after: Option<SystemTime>,
    /// The addresses in its certificate.
    pub addresses: Vec<IpAddr>,
}

/// Which node is expected, and by what it may prove itself.
#[derive(Debug)]
pub enum Expected<'a> {
    /// A node that the master dialled.
    Node { name: &'a NodeName, dialled: &'a Target, trust: &'a HostTrust, first_use: Option<&'a str> },
    /// Any node; by the fingerprints pinned for nodes, or else by a certificate.
    CallHome { pins: &'a HashMap<String, NodeName> },
}

/// Why a host key was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostKeyError {
    #[error(
        "host key {fingerprint} of {who} has no certificate of this master's host CA: join the host (`master-agent token create`), or for a plain sshd run `master-agent sshd-config`, or pin the key in the inventory"
    )]
    NoCertificate { node: Option<NodeName>, who: String, fingerprint: String },
    #[error("{who} shows a certificate of another CA ({ca}); it must be signed by this master's host CA")]
    WrongCa { node: Option<NodeName>, who: String, ca: String },
    #[error("the signature of the certificate that {who} shows is wrong")]
    BadSignature { node: Option<NodeName>, who: String },
    #[error("{who} shows a user certificate in place of a host certificate")]
    NotAHostCertificate { node: Option<NodeName>, who: String },
    #[error(
        "the host certificate of {who} expired at {at}: join the host again with `master-agent token create --node`"
    )]
    Expired { node: Option<NodeName>, who: String, at: String },
    #[error("the host certificate of {who} is not valid before {at}: check both clocks")]
    NotYetValid { node: Option<NodeName>, who: String, at: String },
    #[error("expected node {expected}, but the host certificate is for {principals}")]
    WrongPrincipal { expected: NodeName, principals: String },
    #[error("the host certificate names no node (key id {key_id:?}, principals {principals})")]
    NoName { key_id: String, principals: String },
    #[error("the host certificate of {who} has the critical option {option:?}, which is not known here")]
    CriticalOption { node: Option<NodeName>, who: String, option: String },
    #[error("host key {fingerprint} of node {node} is not one of the pinned keys")]
    NotPinned { node: NodeName, fingerprint: String },
    #[error("host key {fingerprint} of node {node} is not in {file} for the address that was dialled")]
    NotInKnownHosts { node: NodeName, fingerprint: String, file: String },
    #[error("host key {fingerprint} of node {node} is revoked in {file}")]
    Revoked { node: NodeName, fingerprint: String, file: String },
    #[error(
        "node {node} is recognised by its `host_keys:` in the inventory; a certificate (of key {fingerprint}) does not count for it"
    )]
    OtherTrust { node: NodeName, fingerprint: String },
    #[error(
        "the host key of node {node} has changed: first seen {first}, now {fingerprint}. If that is right, forget the old one (`master-agent node forget {node}`)"
    )]
    Changed { node: NodeName, first: String, fingerprint: String },
    #[error("node {node} has joined with another key ({current}) since this certificate was made")]
    Superseded { node: NodeName, current: String },
    #[error(
        "no key of node {node} is known here (it was forgotten, or the state was lost): join it anew with `master-agent token create --node {node}`, or run `master-agent sshd-config {node}` again"
    )]
    Forgotten { node: NodeName },
    #[error("what admitted the call home is of node {admitted}, and the host key is of node {node}")]
    OtherNode { admitted: NodeName, node: NodeName },
    #[error(
        "the host key is of node {node} already, which the call home was not admitted as: it was to join"
    )]
    NotJoining { node: NodeName },
    #[error("node {node} is not in the inventory")]
    UnknownNode { node: NodeName },
    #[error("the store can't be read: {0}")]
    Store(String),
}

impl HostKeyError {
    /// A short, fixed word for metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NoCertificate { .. } => "unknown_key",
            Self::WrongCa { .. } => "wrong_ca",
            Self::BadSignature { .. } => "bad_signature",
            Self::NotAHostCertificate { .. } => "user_certificate",
            Self::Expired { .. } => "expired",
            Self::NotYetValid { .. } => "not_yet_valid",
            Self::WrongPrincipal { .. } | Self::NoName { .. } => "wrong_principal",
            Self::CriticalOption { .. } => "critical_option",
            Self::NotPinned { .. } => "not_pinned",
            Self::NotInKnownHosts { .. } => "not_in_known_hosts",
            Self::Revoked { .. } => "revoked",
            Self::OtherTrust { .. } => "other_trust",
            Self::Changed { .. } => "key_changed",
            Self::Superseded { .. } => "superseded",
            Self::Forgotten { .. } => "forgotten",
            Self::OtherNode { .. } => "other_node",
            Self::NotJoining { .. } => "not_joining",
            Self::UnknownNode { .. } => "unknown_node",
            Self::Store(_) => "store",
        }
    }

    /// The reason as the refused peer may read it. One whose key has proved a name learns why that name is refused;
    /// any other, what is wrong with what it showed, and nothing of this master's nodes and files.
    pub fn for_peer(&self) -> String {
        match self {
            Self::NoCertificate { .. } => {
                "the host key has no certificate of this master's host CA: join the \
                host with a token of `master-agent token create`"
                    .to_owned()
            }
            Self::WrongCa { ca, .. } => format!(
                "the host certificate is signed by another CA ({ca}) than this master's: join the host to this master"
            ),
            Self::BadSignature { .. } => "the signature of the host certificate is wrong".to_owned(),
            Self::NotAHostCertificate { .. } => {
                "the certificate is a user certificate in place of a host certificate".to_owned()
            }
            Self::Expired { at, .. } => format!(
                "the host certificate expired at {at}: join the host again with a token of `master-agent token \
                 create --node`"
            ),
            Self::NotYetValid { at, .. } => {
                format!("the host certificate is not valid before {at}: check both clocks")
            }
            Self::WrongPrincipal { principals, .. } => {
                format!("another node than the one of the host certificate ({principals}) is expected here")
            }
            Self::CriticalOption { option, .. } => {
                format!("the host certificate has the critical option {option:?}, which is not known here")
            }
            Self::NotPinned { .. } | Self::NotInKnownHosts { .. } | Self::Changed { .. } => {
                "the host key is not the one that this master knows the node by".to_owned()
            }
            Self::Revoked { .. } => "the host key is revoked".to_owned(),
            Self::Superseded { node, .. } => {
                format!("node {node} has joined with another key since this certificate was made")
            }
            Self::NoName { .. }
            | Self::OtherTrust { .. }
            | Self::Forgotten { .. }
            | Self::OtherNode { .. }
            | Self::NotJoining { .. }
            | Self::UnknownNode { .. } => self.to_string(),
            Self::Store(_) => "the master can't check host keys at the moment; its log says why".to_owned(),
        }
    }

    /// The node that was expected or claimed.
    pub fn node(&self) -> Option<&NodeName> {
        match self {
            Self::NoCertificate { node, .. }
            | Self::WrongCa { node, .. }
            | Self::BadSignature { node, .. }
            | Self::NotAHostCertificate { node, .. }
            | Self::Expired { node, .. }
            | Self::NotYetValid { node, .. }
            | Self::CriticalOption { node, .. } => node.as_ref(),
            Self::WrongPrincipal { expected: node, .. }
            | Self::NotPinned { node, .. }
            | Self::NotInKnownHosts { node, .. }
            | Self::Revoked { node, .. }
            | Self::OtherTrust { node, .. }
            | Self::Changed { node, .. }
            | Self::Superseded { node, .. }
            | Self::Forgotten { node }
            | Self::NotJoining { node }
            | Self::OtherNode { admitted: node, .. }
            | Self::UnknownNode { node } => Some(node),
            Self::NoName { .. } | Self::Store(_) => None,
        }
    }
}

/// A key's fingerprint as `ssh-keygen -l` prints it.
pub fn fingerprint(key: &PublicKey) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

/// Decides which node a presented key belongs to. With [`HostTrust::FirstUse`] and nothing remembered, the key
/// is accepted; the caller remembers it.
pub fn verify_host(
    presented: &PublicKeyOrCertificate,
    expected: &Expected<'_>,
    host_ca: &PublicKey,
    now: SystemTime,
) -> Result<VerifiedHost, HostKeyError> {
    let key = presented_key(presented);
    match expected {
        Expected::CallHome { pins } => match (pins.get(&fingerprint(&key)), presented) {
            (Some(node), _) => {
                Ok(VerifiedHost { node: node.clone(), key, not_after: None, addresses: Vec::new() })
            }
            (None, PublicKeyOrCertificate::Certificate(certificate)) => {
                by_certificate(certificate, None, host_ca, now)
            }
            (None, PublicKeyOrCertificate::PublicKey { key, .. }) => Err(HostKeyError::NoCertificate {
                node: None,
                who: "a host that called home".to_owned(),
                fingerprint: fingerprint(key),
            }),
        },
        Expected::Node { name, dialled, trust, first_use } => {
            let node = (*name).clone();
            let trusted =
                |key| Ok(VerifiedHost { node: node.clone(), key, not_after: None, addresses: Vec::new() });
            match trust {
                HostTrust::HostCa => match presented {
                    PublicKeyOrCertificate::Certificate(certificate) => {
                        by_certificate(certificate, Some(name), host_ca, now)
                    }
                    PublicKeyOrCertificate::PublicKey { key, .. } => Err(HostKeyError::NoCertificate {
                        node: Some(node.clone()),
                        who: format!("node {name}"),
                        fingerprint: fingerprint(key),
                    }),
                },
                HostTrust::Pins(pins) if pins.contains(&fingerprint(&key)) => trusted(key),
                HostTrust::Pins(_) => Err(HostKeyError::NotPinned { node, fingerprint: fingerprint(&key) }),
                HostTrust::KnownHosts(file) => match in_known_hosts(file, dialled, presented, now) {
                    Known::Yes => trusted(key),
                    Known::No => Err(HostKeyError::NotInKnownHosts {
                        node,
                        fingerprint: fingerprint(&key),
                        file: file.display().to_string(),
                    }),
                    Known::Revoked => Err(HostKeyError::Revoked {
                        node,
                        fingerprint: fingerprint(&key),
                        file: file.display().to_string(),
                    }),
                },
                HostTrust::FirstUse => match first_use {
                    Some(first) if *first != fingerprint(&key) => Err(HostKeyError::Changed {
                        node,
                        first: (*first).to_owned(),
                        fingerprint: fingerprint(&key),
                    }),
                    Some(_) | None => trusted(key),
                },
            }
        }
    }
}

fn presented_key(presented: &PublicKeyOrCertificate) -> PublicKey {
    match presented {
        PublicKeyOrCertificate::PublicKey { key, .. } => PublicKey::new(key.key_data().clone(), ""),
        PublicKeyOrCertificate::Certificate(certificate) => {
            PublicKey::new(certificate.public_key().clone(), "")
        }
    }
}

fn by_certificate(
    certificate: &Certificate,
    expected: Option<&NodeName>,
    host_ca: &PublicKey,
    now: SystemTime,
) -> Result<VerifiedHost, HostKeyError> {
    let node = expected.cloned();
    let who = expected.map_or_else(
        || format!("the host that claims to be {:?}", printable(certificate.key_id())),
        |name| format!("node {name}"),
    );
    check_certificate(certificate, host_ca.key_data(), now, node, who)?;
    let principals = || certificate.valid_principals().join(", ");
    let listed = |name: &NodeName| certificate.valid_principals().iter().any(|p| p == name.as_str());
    let node = match expected {
        Some(name) if listed(name) => name.clone(),
        Some(name) => {
            return Err(HostKeyError::WrongPrincipal { expected: name.clone(), principals: principals() });
        }
        None => certificate
            .key_id()
            .strip_prefix("node:")
            .and_then(|name| name.parse().ok())
            .filter(listed)
            .ok_or_else(|| HostKeyError::NoName {
                key_id: certificate.key_id().to_owned(),
                principals: principals(),
            })?,
    };
    Ok(VerifiedHost {
        node,
        key: PublicKey::new(certificate.public_key().clone(), ""),
        not_after: certificate.valid_before_time(),
        addresses: certificate.valid_principals().iter().filter_map(|p| p.parse().ok()).collect(),
    })
}

/// All that makes a host certificate good, but for its principals.
fn check_certificate(
    certificate: &Certificate,
    ca: &KeyData,
    now: SystemTime,
    node: Option<NodeName>,
    who: String,
) -> Result<(), HostKeyError> {
    if certificate.signature_key() != ca {
        let ca = certificate.signature_key().fingerprint(HashAlg::Sha256).to_string();
        return Err(HostKeyError::WrongCa { node, who, ca });
    }
    let unix = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let time = |seconds: u64| {
        let time = SystemTime::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(seconds));
        time.map_or_else(|| seconds.to_string(), |t| humantime::format_rfc3339_seconds(t).to_string())
    };
    if certificate.verify_signature().is_err() {
        return Err(HostKeyError::BadSignature { node, who });
    }
    if certificate.cert_type() != CertType::Host {
        return Err(HostKeyError::NotAHostCertificate { node, who });
    }
    if unix < certificate.valid_after() {
        return Err(HostKeyError::NotYetValid { node, who, at: time(certificate.valid_after()) });
    }
    if unix >= certificate.valid_before() {
        return Err(HostKeyError::Expired { node, who, at: time(certificate.valid_before()) });
    }
    if let Some((option, _)) = certificate.critical_options().iter().next() {
        return Err(HostKeyError::CriticalOption { node, who, option: option.clone() });
    }
    Ok(())
}

/// What a known_hosts file says about a presented key.
enum Known {
    Yes,
    No,
    Revoked,
}

/// As sshd(8) describes the file: a plain line for the host, or a CA's line. A key that any line revokes is
/// never good, whatever host that line is for and however the rest of it reads.
fn in_known_hosts(
    file: &Path,
    dialled: &Target,
    presented: &PublicKeyOrCertificate,
    now: SystemTime,
) -> Known {
    let Ok(text) = std::fs::read_to_string(file) else { return Known::No };
    let key = presented_key(presented);
    let ca = match presented {
        PublicKeyOrCertificate::Certificate(certificate) => Some(certificate.signature_key()),
        PublicKeyOrCertificate::PublicKey { .. } => None,
    };
    let Some(shown) = std::iter::once(key.key_data()).chain(ca).map(base64_of).collect::<Option<Vec<_>>>()
    else {
        return Known::No;
    };
    if text.lines().any(|line| revokes(line, &shown)) {
        return Known::Revoked;
    }
    let (host, port) = (dialled.host.to_string(), dialled.port);
    let known = known_host_keys_path(&host, port, file).unwrap_or_default();
    if known.iter().any(|(_, k)| k.key_data() == key.key_data()) {
        return Known::Yes;
    }
    let PublicKeyOrCertificate::Certificate(certificate) = presented else { return Known::No };
    let signed_by_a_listed_ca = text
        .lines()
        .filter_map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ").parse::<Entry>().ok())
        .filter(|e| e.marker() == Some(&Marker::CertAuthority) && covers(e.host_patterns(), &host, port))
        .any(|e| {
            let checked = check_certificate(certificate, e.public_key().key_data(), now, None, host.clone());
            checked.is_ok() && certificate.valid_principals().contains(&host)
        });
    if signed_by_a_listed_ca { Known::Yes } else { Known::No }
}

/// The second field of a key's text form.
fn base64_of(key: &KeyData) -> Option<String> {
    let text = PublicKey::new(key.clone(), "").to_openssh().ok()?;
    text.split_whitespace().nth(1).map(str::to_owned)
}

fn revokes(line: &str, shown: &[String]) -> bool {
    let mut fields = line.split_whitespace();
    fields.next() == Some("@revoked") && fields.any(|field| shown.iter().any(|key| key == field))
}

fn covers(patterns: &HostPatterns, host: &str, port: u16) -> bool {
    let name = if port == 22 { host.to_owned() } else { format!("[{host}]:{port}") };
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
