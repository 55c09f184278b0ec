//! Client certificates: the common name is the user, each organization is a group.
//!
//! TLS has verified that the caller holds the certificate's key, and the chain as the CA was then. The chain is
//! verified again here for each request, since the CA and its CRLs can change while a connection is open, and a
//! certificate can end.

use std::{fmt::Write, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use rustls::{
    CertificateError,
    pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime, pem::PemObject},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use sha2::{Digest as _, Sha256};
use x509_parser::{certificate::X509Certificate, prelude::FromDer, x509::AttributeTypeAndValue};

use super::{Authenticator, BoxFuture, Moment, Presented, Reason, Recognized, X509Config};
use crate::{
    front_end::{https_client, reloaded::Reloaded, user::User},
    metrics::X509Expiry,
};

/// The attribute of a subject that Kubernetes takes for the user's UID.
const UID: &str = "1.3.6.1.4.1.57683.2";
pub const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";

const NOT_X509: &str = "it is not X.509";

/// Intermediate certificates that are looked at.
const MAX_CHAIN: usize = 10;

/// Whom client certificates are accepted from.
pub struct ClientCa {
    verifier: Arc<dyn ClientCertVerifier>,
    pub expiry: X509Expiry,
}

impl ClientCa {
    /// With CRLs, each certificate of a chain must be covered by one. A CRL that is past its next update still
    /// tells who is revoked.
    pub fn read(config: &X509Config) -> anyhow::Result<Self> {
        let roots = https_client::roots(&config.ca)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut builder = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
        for path in &config.crls {
            let crls = CertificateRevocationListDer::pem_file_iter(path)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .with_context(|| format!("can't read CRLs in {}", path.display()))?;
            if crls.is_empty() {
                bail!("{} has no CRL in PEM", path.display());
            }
            builder = builder.with_crls(crls);
        }
        let verifier = builder.allow_unauthenticated().build().context("the client CA can't be used")?;
        Ok(Self { verifier, expiry: X509Expiry::read(&config.ca)? })
    }

    /// For the handshake: callers without a certificate are let in.
    pub fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        self.verifier.clone()
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: Moment,
    ) -> Result<(), Reason> {
        if intermediates.len() > MAX_CHAIN {
            return Err(Reason::Certificate("the chain is too long".into()));
        }
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now.unix()));
        self.verifier.verify_client_cert(leaf, intermediates, now).map(|_| ()).map_err(|error| reason(&error))
    }
}

pub struct X509(Arc<Reloaded<ClientCa>>);

impl X509 {
    pub fn load(config: X509Config) -> anyhow::Result<(Self, Arc<Reloaded<ClientCa>>)> {
        let files: Vec<PathBuf> = config.crls.iter().chain([&config.ca]).cloned().collect();
        let ca = Reloaded::load("the client CA", files, move || ClientCa::read(&config))?;
        Ok((Self(ca.clone()), ca))
    }

    fn check(&self, certificates: &[CertificateDer<'_>], now: Moment) -> Result<Option<Recognized>, Reason> {
        let Some((leaf, intermediates)) = certificates.split_first() else { return Ok(None) };
        self.0.get().verify(leaf, intermediates, now)?;
        user(leaf).map(Some)
    }
}

impl Authenticator for X509 {
    fn authenticate<'a>(
        &'a self,
        presented: &'a Presented<'a>,
        now: Moment,
    ) -> BoxFuture<'a, Result<Option<Recognized>, Reason>> {
        Box::pin(std::future::ready(self.check(presented.certificates, now)))
    }
}

fn user(leaf: &CertificateDer<'_>) -> Result<Recognized, Reason> {
    let malformed = || Reason::Certificate(NOT_X509.into());
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|_| malformed())?;
    let usage = certificate.extended_key_usage().map_err(|_| malformed())?;
    // The verifier lets a certificate pass that has no usages at all.
    if !usage.is_some_and(|usage| usage.value.client_auth) {
        return Err(Reason::CertificateUsage);
    }
    let subject = certificate.subject();
    let mut names = subject.iter_common_name();
    let name = match (names.next(), names.next()) {
        (Some(name), None) => text(name)?,
        (None, _) | (Some(_), Some(_)) => return Err(Reason::CommonName),
    };
    if name.is_empty() {
        return Err(Reason::CommonName);
    }
    let groups = subject.iter_organization().map(text).collect::<Result<_, _>>()?;
    let mut uids = subject.iter_attributes().filter(|attribute| attribute.attr_type().to_id_string() == UID);
    let uid = match (uids.next(), uids.next()) {
        (None, _) => None,
        (Some(uid), None) => Some(text(uid)?).filter(|uid| !uid.is_empty()),
        (Some(_), Some(_)) => return Err(Reason::SubjectAttribute),
    };
    let mut id = "X509SHA256=".to_owned();
    for byte in Sha256::digest(leaf) {
        let _ = write!(id, "{byte:02x}");
    }
    let extra = [(CREDENTIAL_ID.to_owned(), vec![id])].into();
    let end = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
    let expires = std::time::SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(end));
    Ok(Recognized { user: User { name, uid, groups, extra }, expires })
}

fn text(attribute: &AttributeTypeAndValue<'_>) -> Result<String, Reason> {
    attribute.as_str().map(str::to_owned).map_err(|_| Reason::SubjectAttribute)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "not exhaustive")]
fn reason(error: &rustls::Error) -> Reason {
    let rustls::Error::InvalidCertificate(error) = error else {
        return Reason::Certificate(error.to_string());
    };
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => Reason::CertificateExpired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Reason::CertificateNotYetValid
        }
        CertificateError::Revoked => Reason::CertificateRevoked,
        CertificateError::UnknownRevocationStatus => Reason::RevocationUnknown,
        // Where another CA has the name of one that is trusted, the signature is what is wrong.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Reason::CertificateIssuer,
        CertificateError::BadEncoding => Reason::Certificate(NOT_X509.into()),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            Reason::CertificateUsage
        }
        CertificateError::Other(other) => Reason::Certificate(other.to_string()),
        other => Reason::Certificate(other.to_string()),
    }
}
