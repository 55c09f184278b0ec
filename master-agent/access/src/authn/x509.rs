//! The authenticator of client certificates, whose common name is the user and whose organizations are the groups.
//!
//! In the TLS handshake, the caller has proved possession of the certificate's key. The chain is verified once for a
//! connection, and again when the CA or its CRLs have changed or a certificate of the chain has expired.

use std::{fmt::Write, path::PathBuf, sync::Arc, time::SystemTime};

use futures_util::future::BoxFuture;
use proto_net::file_watcher::{FileWatcher, Watcher};
use rustls::{CertificateError, pki_types::CertificateDer};
use sha2::{Digest as _, Sha256};
use x509_parser::{certificate::X509Certificate, prelude::FromDer, x509::AttributeTypeAndValue};

use super::{
    authenticated::Recognized,
    authenticator::Authenticator,
    certificates::{Certificates, Verification},
    config::X509Config,
    credential::Presented,
    reason::FailureReason,
};
use crate::{
    client_certificates::{ClientCa, ClientVerifier},
    moment::Moment,
    user::User,
    x509_expiry::not_after,
};

/// The attribute of a subject that Kubernetes reads as the user's UID.
const UID: &str = "1.3.6.1.4.1.57683.2";
pub(super) const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";

const NOT_X509: &str = "it is not X.509";

pub struct X509(ClientVerifier);

impl X509 {
    pub fn load(config: X509Config) -> anyhow::Result<(Self, Arc<FileWatcher<ClientCa>>)> {
        let files: Vec<PathBuf> = config.crls.iter().chain([&config.ca]).cloned().collect();
        let ca = FileWatcher::load("the client CA", files, move || ClientCa::read(&config.ca, &config.crls))?;
        Ok((Self(ClientVerifier::new(ca.clone())), ca))
    }

    async fn check(
        &self,
        presented: &Presented<'_>,
        now: Moment,
    ) -> Result<Option<Recognized>, FailureReason> {
        let Certificates { chain, verification } = presented.certificates;
        if chain.is_empty() {
            return Ok(None);
        }
        let mut verification = verification.lock().await;
        let generation = self.0.ca.generation();
        if let Some(known) = verification.as_ref().filter(|known| known.holds(generation, now)) {
            return known.found.clone().map(Some);
        }
        if !self.0.is_cheap(chain) {
            presented.cost.incur()?;
        }
        let verified = self.0.verify(chain, now.wall).await.map_err(|error| reason(&error));
        let found = verified.and_then(|()| user(chain, now.wall));
        *verification = Some(Verification { generation, at: now.monotonic, found: found.clone() });
        found.map(Some)
    }
}

impl Authenticator for X509 {
    fn authenticate<'a>(
        &'a self,
        presented: &'a Presented<'a>,
        now: Moment,
    ) -> BoxFuture<'a, Result<Option<Recognized>, FailureReason>> {
        Box::pin(self.check(presented, now))
    }
}

fn user(chain: &[CertificateDer<'_>], now: SystemTime) -> Result<Recognized, FailureReason> {
    let malformed = || FailureReason::Certificate(NOT_X509.into());
    let leaf = chain.first().ok_or_else(malformed)?;
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|_| malformed())?;
    let usage = certificate.extended_key_usage().map_err(|_| malformed())?;
    // The verifier accepts a certificate without any extended key usage.
    if !usage.is_some_and(|usage| usage.value.client_auth) {
        return Err(FailureReason::CertificateUsage);
    }
    let subject = certificate.subject();
    let mut names = subject.iter_common_name();
    let name = match (names.next(), names.next()) {
        (Some(name), None) => text(name)?,
        (None, _) | (Some(_), Some(_)) => return Err(FailureReason::CommonName),
    };
    if name.is_empty() {
        return Err(FailureReason::CommonName);
    }
    let groups = subject.iter_organization().map(text).collect::<Result<_, _>>()?;
    let mut uids = subject.iter_attributes().filter(|attribute| attribute.attr_type().to_id_string() == UID);
    let uid = match (uids.next(), uids.next()) {
        (None, _) => None,
        (Some(uid), None) => Some(text(uid)?).filter(|uid| !uid.is_empty()),
        (Some(_), Some(_)) => return Err(FailureReason::SubjectAttribute),
    };
    let mut id = "X509SHA256=".to_owned();
    for byte in Sha256::digest(leaf) {
        let _ = write!(id, "{byte:02x}");
    }
    let extra = [(CREDENTIAL_ID.to_owned(), vec![id])].into();
    // The verifier has not used an intermediate certificate that has expired.
    let issuers = chain.iter().skip(1).filter_map(not_after).filter(|end| *end > now);
    let expires = not_after(leaf).into_iter().chain(issuers).min();
    let user = User { name, uid, groups, extra };
    Ok(Recognized { user: user.into(), expires, bound: None })
}

fn text(attribute: &AttributeTypeAndValue<'_>) -> Result<String, FailureReason> {
    attribute.as_str().map(str::to_owned).map_err(|_| FailureReason::SubjectAttribute)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "not exhaustive")]
fn reason(error: &rustls::Error) -> FailureReason {
    let rustls::Error::InvalidCertificate(error) = error else {
        return FailureReason::Certificate(error.to_string());
    };
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            FailureReason::CertificateExpired
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            FailureReason::CertificateNotYetValid
        }
        CertificateError::Revoked => FailureReason::CertificateRevoked,
        CertificateError::UnknownRevocationStatus => FailureReason::RevocationUnknown,
        // The signature is wrong if another CA has the name of a trusted one.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => FailureReason::CertificateIssuer,
        CertificateError::BadEncoding => FailureReason::Certificate(NOT_X509.into()),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            FailureReason::CertificateUsage
        }
        CertificateError::Other(other) => FailureReason::Certificate(other.to_string()),
        other => FailureReason::Certificate(other.to_string()),
    }
}
