//! Decides which node a host key belongs to. Keys, trust and the time are arguments; there is no I/O.
//!
//! The SSH handshake has proved that the peer holds the private key. A name is never taken from what the peer claims,
//! only from a certificate of the host CA, a pin, a known_hosts file or the key recorded on first use.

use std::{collections::HashMap, net::IpAddr, path::Path, time::SystemTime};

use proto::{NodeName, Target, refusal::printable};
use russh::keys::{Certificate, HashAlg, PublicKey, PublicKeyOrCertificate};

use super::{
    host_certificate,
    host_key_error::HostKeyError,
    known_hosts::{KnownHosts, Verdict},
};

/// A node that has proved itself.
#[derive(Clone, Debug)]
pub struct VerifiedHost {
    pub node: NodeName,
    pub key: PublicKey,
    /// When its certificate expires. It is `None` if the key was trusted without a certificate, or if the certificate
    /// never expires.
    pub not_after: Option<SystemTime>,
    /// The addresses in its certificate.
    pub addresses: Vec<IpAddr>,
}

/// Which node is expected.
#[derive(Debug)]
pub enum Expected<'a> {
    /// The node that the master dialled.
    Dialled { name: &'a NodeName, dialled: &'a Target, proof: Proof<'a> },
    /// Any node that calls home: one whose key is pinned, by its fingerprint, or one with a certificate.
    CallHome { pins: &'a HashMap<String, NodeName> },
}

/// What a dialled node may prove itself by.
#[derive(Clone, Copy, Debug)]
pub enum Proof<'a> {
    /// A certificate of the master's host CA.
    HostCa,
    /// A key with one of these fingerprints.
    Pins(&'a [String]),
    /// A line of a known_hosts file.
    KnownHosts { file: &'a Path, known: &'a KnownHosts },
    /// The key with the fingerprint recorded on first use, or any key while there is none.
    FirstUse(Option<&'a str>),
}

/// A key's fingerprint as `ssh-keygen -l` prints it.
pub fn fingerprint(key: &PublicKey) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

/// Decides which node a presented key belongs to. With [`Proof::FirstUse`] and nothing recorded, any key is accepted;
/// the caller records it.
pub fn verify_host(
    presented: &PublicKeyOrCertificate,
    expected: &Expected<'_>,
    host_ca: &PublicKey,
    now: SystemTime,
) -> Result<VerifiedHost, HostKeyError> {
    match expected {
        Expected::CallHome { pins } => verify_call_home(presented, pins, host_ca, now),
        Expected::Dialled { name, dialled, proof } => {
            verify_dialled(presented, name, dialled, *proof, host_ca, now)
        }
    }
}

fn verify_call_home(
    presented: &PublicKeyOrCertificate,
    pins: &HashMap<String, NodeName>,
    host_ca: &PublicKey,
    now: SystemTime,
) -> Result<VerifiedHost, HostKeyError> {
    let key = presented_key(presented);
    match (pins.get(&fingerprint(&key)), presented) {
        (Some(node), _) => Ok(trusted(node, key)),
        (None, PublicKeyOrCertificate::Certificate(certificate)) => {
            by_certificate(certificate, None, host_ca, now)
        }
        (None, PublicKeyOrCertificate::PublicKey { .. }) => Err(HostKeyError::NoCertificate {
            node: None,
            who: "a host that called home".to_owned(),
            fingerprint: fingerprint(&key),
        }),
    }
}

fn verify_dialled(
    presented: &PublicKeyOrCertificate,
    name: &NodeName,
    dialled: &Target,
    proof: Proof<'_>,
    host_ca: &PublicKey,
    now: SystemTime,
) -> Result<VerifiedHost, HostKeyError> {
    let (node, key) = (name.clone(), presented_key(presented));
    let fingerprint = fingerprint(&key);
    match proof {
        Proof::HostCa => match presented {
            PublicKeyOrCertificate::Certificate(certificate) => {
                by_certificate(certificate, Some(name), host_ca, now)
            }
            PublicKeyOrCertificate::PublicKey { .. } => Err(HostKeyError::NoCertificate {
                node: Some(node),
                who: format!("node {name}"),
                fingerprint,
            }),
        },
        Proof::Pins(pins) if pins.contains(&fingerprint) => Ok(trusted(name, key)),
        Proof::Pins(_) => Err(HostKeyError::NotPinned { node, fingerprint }),
        Proof::KnownHosts { file, known } => {
            let file = file.display().to_string();
            match known.judge(dialled, presented, now) {
                Verdict::Known => Ok(trusted(name, key)),
                Verdict::Unknown => Err(HostKeyError::NotInKnownHosts { node, fingerprint, file }),
                Verdict::Revoked => Err(HostKeyError::Revoked { node, fingerprint, file }),
            }
        }
        Proof::FirstUse(Some(first)) if first != fingerprint => {
            Err(HostKeyError::Changed { node, first: first.to_owned(), fingerprint })
        }
        Proof::FirstUse(_) => Ok(trusted(name, key)),
    }
}

/// A node whose key was trusted without a certificate.
fn trusted(node: &NodeName, key: PublicKey) -> VerifiedHost {
    VerifiedHost { node: node.clone(), key, not_after: None, addresses: Vec::new() }
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
    host_certificate::check(certificate, host_ca.key_data(), now, node, who)?;
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
