//! Makes X.509 certificates for the mutual TLS of listeners.

use std::{path::Path, sync::Arc, time::SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, CustomExtension,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

/// A certificate authority.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ok(Self(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// The private key, PEM.
    pub fn key_pem(&self) -> String {
        self.0.key().serialize_pem()
    }

    /// Writes `NAME.crt` and `NAME.key` for a server with these names and addresses.
    pub fn server(&self, directory: &Path, name: &str, names: &[&str]) -> anyhow::Result<()> {
        self.issue(directory, name, names, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// Writes `NAME.crt` and `NAME.key` for a client, whose common name is `name`.
    pub fn client(&self, directory: &Path, name: &str) -> anyhow::Result<()> {
        self.issue(directory, name, &[], ExtendedKeyUsagePurpose::ClientAuth)
    }

    /// Writes `NAME.crt` and `NAME.key` for a client: its common name, and two organizations.
    pub fn client_in(
        &self,
        directory: &Path,
        name: &str,
        user: &str,
        groups: [&str; 2],
    ) -> anyhow::Result<()> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        // rcgen keeps one value of each type: the second has the same identifier under another name.
        let types = [DnType::OrganizationName, DnType::CustomDnType(vec![2, 5, 4, 10])];
        for (of_type, group) in types.into_iter().zip(groups) {
            params.distinguished_name.push(of_type, group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(directory, name, params)
    }

    /// A list of revoked certificates: those of `NAME.crt` in `directory`.
    pub fn revocations(&self, directory: &Path, revoked: &[&str]) -> anyhow::Result<String> {
        let entry = |name: &&str| {
            let der = CertificateDer::from_pem_file(directory.join(format!("{name}.crt")))?;
            let (_, certificate) = X509Certificate::from_der(&der)?;
            anyhow::Ok(RevokedCertParams {
                serial_number: SerialNumber::from_slice(certificate.raw_serial()),
                revocation_time: date_time_ymd(2020, 1, 2),
                reason_code: None,
                invalidity_date: None,
            })
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 2),
            next_update: date_time_ymd(2100, 1, 1),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect::<anyhow::Result<_>>()?,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(params.signed_by(&self.0)?.pem()?)
    }

    /// Writes `NAME.crt` and `NAME.key` for a client whose certificate ends then.
    pub fn client_until(&self, directory: &Path, name: &str, end: SystemTime) -> anyhow::Result<()> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + end.duration_since(SystemTime::UNIX_EPOCH)?;
        self.sign(directory, name, params)
    }

    fn issue(
        &self,
        directory: &Path,
        name: &str,
        names: &[&str],
        usage: ExtendedKeyUsagePurpose,
    ) -> anyhow::Result<()> {
        let mut params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>())?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![usage];
        self.sign(directory, name, params)
    }

    fn sign(&self, directory: &Path, name: &str, params: CertificateParams) -> anyhow::Result<()> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.0)?;
        std::fs::write(directory.join(format!("{name}.crt")), certificate.pem())?;
        proto_config::secret_file::replace(
            &directory.join(format!("{name}.key")),
            key.serialize_pem().as_bytes(),
        )?;
        Ok(())
    }
}

/// Certificates that strangers show, with the key of the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strange {
    /// One that is signed by itself.
    SelfSigned,
    /// Ten intermediates of one name, each of which could have issued each other: more paths than a verifier tries.
    ManyPaths { extensions: u8 },
}

impl Strange {
    /// A TLS client that trusts `ca` and shows these.
    pub fn client_config(self, ca: &Path) -> anyhow::Result<ClientConfig> {
        let params = || {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, "many");
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            if let Self::ManyPaths { extensions } = self {
                let unknown =
                    |i| CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, u64::from(i)], vec![]);
                params.custom_extensions.extend((0..extensions).map(unknown));
            }
            params
        };
        let key = KeyPair::generate()?;
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name.push(DnType::CommonName, "stranger");
        let chain = match self {
            Self::SelfSigned => vec![leaf.self_signed(&key)?.into()],
            Self::ManyPaths { .. } => {
                let issuer = CertifiedIssuer::self_signed(params(), KeyPair::generate()?)?;
                let mut chain = vec![leaf.signed_by(&key, &issuer)?.into()];
                for _ in 0..10 {
                    chain.push(params().self_signed(&KeyPair::generate()?)?.into());
                }
                chain
            }
        };
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(ca)? {
            roots.add(certificate?)?;
        }
        Ok(ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)?)
    }
}

/// A TLS client that trusts `ca` and shows `NAME.crt` of `directory`; none for `None`.
pub fn client_config(ca: &Path, identity: Option<(&Path, &str)>) -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca)? {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    Ok(Arc::new(match identity {
        Some((directory, name)) => {
            let chain = CertificateDer::pem_file_iter(directory.join(format!("{name}.crt")))?
                .collect::<Result<_, _>>()?;
            let key = PrivateKeyDer::from_pem_file(directory.join(format!("{name}.key")))?;
            builder.with_client_auth_cert(chain, key)?
        }
        None => builder.with_no_client_auth(),
    }))
}

/// A TLS server that shows `NAME.crt` of `directory`, over HTTP/1.1.
pub fn server_config(directory: &Path, name: &str) -> anyhow::Result<Arc<ServerConfig>> {
    let chain = CertificateDer::pem_file_iter(directory.join(format!("{name}.crt")))?
        .collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(directory.join(format!("{name}.key")))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
