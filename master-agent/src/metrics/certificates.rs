//! When certificates expire, read off those that are in use when asked.

use std::{
    fmt,
    path::Path,
    time::{Duration, SystemTime},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};
use proto_net::tls::{FileError, chain};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

/// When the certificates of a file end, in seconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct X509Expiry {
    file: String,
    ends: Vec<u64>,
}

impl X509Expiry {
    pub fn read(file: &Path) -> Result<Self, FileError> {
        let end = |der: &_| {
            let (_, certificate) = X509Certificate::from_der(der).ok()?;
            u64::try_from(certificate.validity().not_after.timestamp()).ok()
        };
        let ends = chain(file)?.iter().filter_map(|der| end(der)).collect();
        Ok(Self { file: file.display().to_string(), ends })
    }

    /// A chain is good until its first end.
    fn of_chain(&self) -> Option<u64> {
        self.ends.iter().min().copied()
    }

    /// The next one to end. A CA that has ended may stay in its file for ever, where others have taken its place.
    fn of_authorities(&self, now: u64) -> Option<u64> {
        let next = self.ends.iter().filter(|end| **end > now).min();
        next.or(self.ends.iter().max()).copied()
    }
}

/// When what is in use expires, and what it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// Shown to others.
    Chain(&'static str, X509Expiry),
    /// Whose certificates are accepted.
    Authorities(&'static str, X509Expiry),
    /// An SSH certificate, which is in no file, with its end in seconds since 1970 if it has one.
    Ssh(&'static str, Option<u64>),
}

impl Expiry {
    /// `None` where it can't be read, which whoever uses it says.
    pub fn chain(name: &'static str, file: &Path) -> Option<Self> {
        X509Expiry::read(file).ok().map(|expiry| Self::Chain(name, expiry))
    }

    pub fn authorities(name: &'static str, file: &Path) -> Option<Self> {
        X509Expiry::read(file).ok().map(|expiry| Self::Authorities(name, expiry))
    }

    /// What it is for, its file, and when it ends.
    fn told(&self, now: u64) -> (&'static str, &str, Option<u64>) {
        match self {
            Self::Chain(name, expiry) => (name, &expiry.file, expiry.of_chain()),
            Self::Authorities(name, expiry) => (name, &expiry.file, expiry.of_authorities(now)),
            Self::Ssh(name, end) => (name, "", *end),
        }
    }
}

/// Tells of those that are in use when asked.
pub struct Certificates(Box<dyn Fn() -> Vec<Expiry> + Send + Sync>);

impl Certificates {
    pub fn new(in_use: impl Fn() -> Vec<Expiry> + Send + Sync + 'static) -> Self {
        Self(Box::new(in_use))
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Certificates")
    }
}

impl Collector for Certificates {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let now =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        let all = (self.0)();
        let (name, help) =
            ("certificate_expiry_timestamp_seconds", "When a certificate expires, by its use and file.");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (name, file, end) in all.iter().map(|expiry| expiry.told(now)) {
            let Some(end) = end else { continue };
            ConstGauge::new(end as f64)
                .encode(family.encode_family(&[("certificate", name), ("file", file)])?)?;
        }
        Ok(())
    }
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
