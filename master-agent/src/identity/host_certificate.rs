//! The checks that every host certificate has to pass, whoever it is for.

use std::time::{Duration, SystemTime};

use proto::NodeName;
use russh::keys::{
    Certificate, HashAlg,
    ssh_key::{certificate::CertType, public::KeyData},
};

use super::host_key_error::HostKeyError;

/// Checks everything but the principals. `node` and `who` say in errors whose certificate it is.
pub(super) fn check(
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
        let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
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
