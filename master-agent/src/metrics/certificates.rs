//! When certificates expire, collected from those in use whenever metrics are scraped.

use std::{
    fmt,
    path::Path,
    time::{Duration, SystemTime},
};

use access::x509_expiry::X509Expiry;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
};

/// What expires, and when. The name says what it is used for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// A certificate that peers are shown.
    Chain(&'static str, X509Expiry),
    /// CAs whose certificates are accepted.
    Authorities(&'static str, X509Expiry),
    /// An SSH certificate, which is in no file. It expires so many seconds after 1970, or never.
    Ssh(&'static str, Option<u64>),
}

impl Expiry {
    /// Returns `None` if the file can't be read, which the part that uses it reports.
    pub fn chain(name: &'static str, file: &Path) -> Option<Self> {
        X509Expiry::read(file).ok().map(|expiry| Self::Chain(name, expiry))
    }

    pub fn authorities(name: &'static str, file: &Path) -> Option<Self> {
        X509Expiry::read(file).ok().map(|expiry| Self::Authorities(name, expiry))
    }

    /// Returns the use, the file and the expiry.
    fn labels_and_expiry(&self, now: u64) -> (&'static str, &str, Option<u64>) {
        match self {
            Self::Chain(name, expiry) => (name, &expiry.file, expiry.of_chain()),
            Self::Authorities(name, expiry) => (name, &expiry.file, expiry.of_authorities(now)),
            Self::Ssh(name, end) => (name, "", *end),
        }
    }
}

/// Collects the expiries of the certificates in use.
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
        for (name, file, end) in all.iter().map(|expiry| expiry.labels_and_expiry(now)) {
            let Some(end) = end else { continue };
            ConstGauge::new(end as f64)
                .encode(family.encode_family(&[("certificate", name), ("file", file)])?)?;
        }
        Ok(())
    }
}
