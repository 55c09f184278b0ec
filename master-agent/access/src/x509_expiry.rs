//! The expiry times of X.509 certificates in files.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use proto_net::tls::{FileError, chain};
use rustls::pki_types::CertificateDer;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

/// The expiry times of a file's certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct X509Expiry {
    pub file: String,
    /// The expiry times in seconds since 1970.
    ends: Vec<u64>,
}

impl X509Expiry {
    pub fn read(file: &Path) -> Result<Self, FileError> {
        let ends = chain(file)?.iter().filter_map(end).collect();
        Ok(Self { file: file.display().to_string(), ends })
    }

    /// Returns when a chain expires, which is when the first of its certificates expires, in seconds since 1970.
    pub fn of_chain(&self) -> Option<u64> {
        self.ends.iter().min().copied()
    }

    /// Returns when the next authority of a bundle expires, in seconds since 1970. Expired authorities may stay in
    /// their file for ever beside those that replace them, so they count only if there are no others.
    pub fn of_authorities(&self, now: u64) -> Option<u64> {
        let next = self.ends.iter().filter(|end| **end > now).min();
        next.or(self.ends.iter().max()).copied()
    }
}

/// Returns when a certificate expires.
pub(crate) fn not_after(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(end(certificate)?))
}

/// Returns when a certificate expires, in seconds since 1970. An earlier time counts as 1970.
fn end(certificate: &CertificateDer<'_>) -> Option<u64> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_ends_with_its_first_and_a_bundle_of_authorities_tells_the_next() {
        let expiry = |ends: &[u64]| X509Expiry { file: "x".to_owned(), ends: ends.to_vec() };
        let all = expiry(&[300, 100, 200]);
        assert_eq!(all.of_chain(), Some(100));
        assert_eq!(
            [50, 150, 250, 350].map(|now| all.of_authorities(now)),
            [Some(100), Some(200), Some(300), Some(300)]
        );
        assert_eq!((expiry(&[]).of_chain(), expiry(&[]).of_authorities(1)), (None, None));
    }
}
