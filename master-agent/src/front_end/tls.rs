//! The TLS configuration of the HTTPS port, with serving certificates by name and optional client certificates.
//!
//! In the handshake, a caller only proves possession of its certificate's key. [`access::authn`] verifies the
//! certificate, and verifies it again on open connections when a CA or a revocation list has changed.

use std::{path::PathBuf, sync::Arc};

use access::x509_expiry::X509Expiry;
use anyhow::{Context, bail};
use proto_config::{Meanings, Section};
use proto_net::{
    file_watcher::FileWatcher,
    tls::{chain, private_key},
};
use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::CertificateDer,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use x509_parser::{extensions::GeneralName, prelude::FromDer};

/// A serving certificate: its chain and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServingCertificate {
    pub cert: PathBuf,
    pub key: PathBuf,
}

const FIELDS: Meanings = &[
    ("cert", "The certificate and its chain, in PEM."),
    ("key", "The key of cert, with mode 0600 or 0640."),
];

impl ServingCertificate {
    pub fn read(s: &Section<'_>) -> Option<Self> {
        s.document(FIELDS);
        let (cert, key) = (s.required_file("cert"), s.required_private_file("key"));
        Some(Self { cert: cert?, key: key? })
    }
}

/// The TLS configuration of new connections, as of the last change of the files.
pub struct Serving {
    pub config: Arc<ServerConfig>,
    pub expiries: Vec<X509Expiry>,
}

/// Loads the serving certificates, which follow their files. `request_client_certificates` says whether callers are
/// asked for certificates.
pub fn load(
    certificates: Vec<ServingCertificate>,
    request_client_certificates: bool,
) -> anyhow::Result<Arc<FileWatcher<Serving>>> {
    let files = certificates.iter().flat_map(|c| [c.cert.clone(), c.key.clone()]).collect();
    FileWatcher::load("the front end's certificates", files, move || {
        let expiries = certificates.iter().map(|c| X509Expiry::read(&c.cert)).collect::<Result<_, _>>()?;
        Ok(Serving { config: Arc::new(server_config(&certificates, request_client_certificates)?), expiries })
    })
}

fn server_config(
    certificates: &[ServingCertificate],
    request_client_certificates: bool,
) -> anyhow::Result<ServerConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let by_name = ByName::load(certificates, &provider)?;
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?;
    let builder = if request_client_certificates {
        builder.with_client_cert_verifier(Arc::new(proto_net::tls::Possession { provider, mandatory: false }))
    } else {
        builder.with_no_client_auth()
    };
    let mut config = builder.with_cert_resolver(Arc::new(by_name));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.max_early_data_size = 0;
    Ok(config)
}

/// Resolves a name to the first certificate that contains it, and every other name to the first certificate of all.
#[derive(Debug)]
struct ByName(Vec<(Vec<String>, Arc<CertifiedKey>)>);

impl ByName {
    fn load(certificates: &[ServingCertificate], provider: &CryptoProvider) -> anyhow::Result<Self> {
        let mut all = Vec::new();
        for ServingCertificate { cert, key } in certificates {
            let chain = chain(cert)?;
            let names = chain.first().map(dns_names).unwrap_or_default();
            let certified = CertifiedKey::from_der(chain, private_key(key)?, provider)
                .with_context(|| format!("{} and {} don't go together", cert.display(), key.display()))?;
            all.push((names, Arc::new(certified)));
        }
        if all.is_empty() {
            bail!("there is no serving certificate");
        }
        Ok(Self(all))
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let asked = hello.server_name().map(str::to_ascii_lowercase);
        let named =
            asked.and_then(|name| self.0.iter().find(|(names, _)| names.iter().any(|n| matches(n, &name))));
        named.or(self.0.first()).map(|(_, key)| key.clone())
    }
}

/// Whether a name matches a pattern, in which `*` stands for one whole label (RFC 6125, section 6.4).
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix("*.") {
        Some(domain) => name.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == domain),
        None => pattern == name,
    }
}

fn dns_names(der: &CertificateDer<'static>) -> Vec<String> {
    let Ok((_, certificate)) = x509_parser::certificate::X509Certificate::from_der(der) else {
        return Vec::new();
    };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let mut all = Vec::new();
    for name in &names.value.general_names {
        if let GeneralName::DNSName(dns) = name {
            all.push(dns.to_ascii_lowercase());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_stands_for_one_label() {
        for (pattern, name, same) in [
            ("a.example", "a.example", true),
            ("*.example", "a.example", true),
            ("*.example", "a.b.example", false),
            ("*.example", ".example", false),
            ("*.example", "example", false),
            ("a.example", "b.example", false),
        ] {
            assert_eq!(matches(pattern, name), same, "{pattern} {name}");
        }
    }
}
