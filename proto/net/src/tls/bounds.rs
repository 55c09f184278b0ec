//! Bounds the chain of certificates that a peer presents, before it is verified.

use std::sync::Arc;

use rustls::{CertificateError, OtherError, pki_types::CertificateDer};
use webpki::EndEntityCert;

/// The most certificates that a peer may send in addition to its own.
pub const MAX_INTERMEDIATES: usize = 3;
/// The most bytes that a peer's certificates may have together.
pub const MAX_CHAIN: usize = 16 * 1024;

/// Why a chain is not verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("the chain has more than {MAX_INTERMEDIATES} intermediate certificates")]
    TooMany,
    #[error("the chain has more than {MAX_CHAIN} bytes")]
    TooLarge,
    #[error("the chain has several intermediate certificates of one subject")]
    SameSubject,
    #[error("an intermediate certificate is not X.509")]
    Malformed,
}

impl From<ChainError> for rustls::Error {
    fn from(error: ChainError) -> Self {
        CertificateError::Other(OtherError(Arc::new(error))).into()
    }
}

/// Refuses chains whose verification would cost more than that of any honest one.
///
/// A verifier that builds paths tries every certificate that has the issuer's name, and certificates with the same name
/// multiply the paths: ten intermediate certificates with one subject make webpki try 200,000 of them, which takes
/// seconds if they are large. With one certificate for each name there is one path, and the limit on bytes bounds what
/// is parsed on the way.
pub fn check_chain(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
) -> Result<(), ChainError> {
    if intermediates.len() > MAX_INTERMEDIATES {
        return Err(ChainError::TooMany);
    }
    if leaf.len() + intermediates.iter().map(|der| der.len()).sum::<usize>() > MAX_CHAIN {
        return Err(ChainError::TooLarge);
    }
    let mut subjects = Vec::with_capacity(intermediates.len());
    for der in intermediates {
        let certificate = EndEntityCert::try_from(der).map_err(|_| ChainError::Malformed)?;
        let subject = certificate.subject().to_vec();
        if subjects.contains(&subject) {
            return Err(ChainError::SameSubject);
        }
        subjects.push(subject);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

    use super::*;

    fn ca(name: &str, size: usize) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let unknown = rcgen::CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![0; size]);
        params.custom_extensions.push(unknown);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        issuer.der().clone()
    }

    #[test]
    fn chains_are_bounded_before_they_are_verified() {
        let leaf = ca("leaf", 1);
        let chain = |names: &[&str]| names.iter().map(|name| ca(name, 1)).collect::<Vec<_>>();
        for (intermediates, expected) in [
            (chain(&[]), Ok(())),
            (chain(&["a", "b", "c"]), Ok(())),
            (chain(&["a", "b", "c", "d"]), Err(ChainError::TooMany)),
            (chain(&["a", "b", "a"]), Err(ChainError::SameSubject)),
            (vec![ca("a", MAX_CHAIN / 2), ca("b", MAX_CHAIN / 2)], Err(ChainError::TooLarge)),
            (vec![CertificateDer::from(vec![0x30, 0x80])], Err(ChainError::Malformed)),
        ] {
            assert_eq!(check_chain(&leaf, &intermediates), expected);
        }
        assert_eq!(check_chain(&ca("leaf", MAX_CHAIN), &[]), Err(ChainError::TooLarge));
    }
}
