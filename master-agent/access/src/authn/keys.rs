//! The public keys that verify tokens, from PEM files and from JSON Web Key Sets that are files or fetched.
//!
//! The type of a key decides which algorithms it verifies, and a token never does: an RSA key verifies RS* and PS*, an
//! elliptic-curve key the algorithm of its curve. Symmetric keys are not read at all, so a public key can't be taken
//! for an HMAC secret.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hyper::Uri;
use jsonwebtoken::{Algorithm, DecodingKey};
use proto_net::{file_watcher::FileWatcher, https_client::JsonClient, tasks::Tasks};
use rustls::pki_types::pem::{PemObject, SectionKind};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::sync::OwnedMutexGuard;
use x509_parser::{
    certificate::X509Certificate, prelude::FromDer, public_key::PublicKey, x509::SubjectPublicKeyInfo,
};

use super::reason::FailureReason;
use crate::moment::Moment;

/// The most keys of one file or key set.
const MAX_KEYS: usize = 100;

/// The shortest RSA key, in bits.
const MIN_RSA: usize = 2048;

const RSA: [Algorithm; 6] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
];

pub struct Key {
    id: Option<String>,
    algorithms: Vec<Algorithm>,
    key: DecodingKey,
}

impl Key {
    pub fn allows(&self, algorithm: Algorithm) -> bool {
        self.algorithms.contains(&algorithm)
    }

    /// Whether a signature in base64url was made with this key.
    pub fn verifies(&self, message: &str, signature: &str, algorithm: Algorithm) -> bool {
        jsonwebtoken::crypto::verify(signature, message.as_bytes(), &self.key, algorithm).unwrap_or(false)
    }
}

#[derive(Default)]
pub struct KeySet(Vec<Key>);

impl KeySet {
    /// Returns the keys with this ID, or all keys if there is no ID.
    pub fn select(&self, id: Option<&str>) -> impl Iterator<Item = &Key> {
        self.0.iter().filter(move |key| id.is_none_or(|id| key.id.as_deref() == Some(id)))
    }

    /// Reads public keys and certificates in PEM. They get the IDs that kube-apiserver gives its keys.
    pub fn from_pem(pem: &[u8]) -> anyhow::Result<Self> {
        let mut keys = Vec::new();
        for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(pem) {
            let (kind, der) = section.context("is not PEM")?;
            #[expect(clippy::wildcard_enum_match_arm, reason = "not exhaustive")]
            let key = match kind {
                SectionKind::PublicKey => {
                    let (_, info) = SubjectPublicKeyInfo::from_der(&der).context("has a malformed key")?;
                    Key::from_info(&info)?
                }
                SectionKind::Certificate => {
                    let (_, certificate) =
                        X509Certificate::from_der(&der).context("has a malformed certificate")?;
                    Key::from_info(certificate.public_key())?
                }
                SectionKind::PrivateKey | SectionKind::RsaPrivateKey | SectionKind::EcPrivateKey => {
                    bail!("has a private key: only the public key belongs here")
                }
                _ => bail!("has an item that is neither a public key nor a certificate"),
            };
            keys.push(key);
        }
        Self::checked(keys)
    }

    /// Reads a JSON Web Key Set (RFC 7517). Keys of other kinds are left out.
    pub fn from_jwks(set: Jwks) -> anyhow::Result<Self> {
        let keys = set.keys.into_iter().filter_map(|key| Key::from_jwk(key).transpose());
        Self::checked(keys.collect::<anyhow::Result<_>>()?)
    }

    fn checked(keys: Vec<Key>) -> anyhow::Result<Self> {
        ensure!(!keys.is_empty(), "has no key that verifies signatures");
        ensure!(keys.len() <= MAX_KEYS, "has more than {MAX_KEYS} keys");
        Ok(Self(keys))
    }
}

#[derive(Deserialize)]
pub struct Jwks {
    keys: Vec<Jwk>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    r#use: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl Key {
    fn from_info(info: &SubjectPublicKeyInfo<'_>) -> anyhow::Result<Self> {
        let bits = &info.subject_public_key.data;
        let curve = info.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
        let algorithm = info.algorithm.algorithm.to_id_string();
        let (algorithms, key) = match (algorithm.as_str(), curve.map(|curve| curve.to_id_string()).as_deref())
        {
            ("1.2.840.113549.1.1.1", _) => {
                let long = matches!(info.parsed(), Ok(PublicKey::RSA(key)) if key.key_size() >= MIN_RSA);
                ensure!(long, "has an RSA key of less than {MIN_RSA} bits");
                (RSA.to_vec(), DecodingKey::from_rsa_der(bits))
            }
            ("1.2.840.10045.2.1", Some("1.2.840.10045.3.1.7")) => {
                (vec![Algorithm::ES256], DecodingKey::from_ec_der(bits))
            }
            ("1.2.840.10045.2.1", Some("1.3.132.0.34")) => {
                (vec![Algorithm::ES384], DecodingKey::from_ec_der(bits))
            }
            ("1.3.101.112", _) => (vec![Algorithm::EdDSA], DecodingKey::from_ed_der(bits)),
            _ => bail!("has a key of a kind that is not supported: use RSA, P-256, P-384 or Ed25519"),
        };
        let id = URL_SAFE_NO_PAD.encode(Sha256::digest(info.raw));
        Ok(Self { id: Some(id), algorithms, key })
    }

    fn from_jwk(jwk: Jwk) -> anyhow::Result<Option<Self>> {
        if jwk.r#use.is_some_and(|purpose| purpose != "sig") {
            return Ok(None);
        }
        let bytes = |value: &Option<String>, length: Option<usize>| {
            let value = value.as_ref().context("a key lacks a parameter")?;
            let value = URL_SAFE_NO_PAD.decode(value).ok().context("a key's parameter is not base64url")?;
            ensure!(length.is_none_or(|length| length == value.len()), "a key has a wrong length");
            anyhow::Ok(value)
        };
        let (x, y) = (&jwk.x, &jwk.y);
        let point = |length| anyhow::Ok([vec![4], bytes(x, Some(length))?, bytes(y, Some(length))?].concat());
        let (mut algorithms, key) = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("RSA", _) => {
                let (n, e) = (bytes(&jwk.n, None)?, bytes(&jwk.e, None)?);
                (RSA.to_vec(), DecodingKey::from_rsa_raw_components(&n, &e))
            }
            ("EC", Some("P-256")) => (vec![Algorithm::ES256], DecodingKey::from_ec_der(&point(32)?)),
            ("EC", Some("P-384")) => (vec![Algorithm::ES384], DecodingKey::from_ec_der(&point(48)?)),
            ("OKP", Some("Ed25519")) => {
                (vec![Algorithm::EdDSA], DecodingKey::from_ed_der(&bytes(x, Some(32))?))
            }
            _ => return Ok(None),
        };
        if let Some(only) = jwk.alg {
            algorithms.retain(|algorithm| only.parse().is_ok_and(|only: Algorithm| only == *algorithm));
        }
        Ok((!algorithms.is_empty()).then_some(Self { id: jwk.kid, algorithms, key }))
    }
}

/// The source of keys.
pub enum KeySource {
    File(Arc<FileWatcher<KeySet>>),
    Remote(Arc<RemoteKeys>),
}

impl KeySource {
    pub fn pem(path: PathBuf) -> anyhow::Result<Arc<FileWatcher<KeySet>>> {
        let what = format!("the keys of {}", path.display());
        FileWatcher::load(what, vec![path.clone()], move || {
            KeySet::from_pem(&read(&path)?).with_context(|| path.display().to_string())
        })
    }

    pub fn jwks_file(path: PathBuf) -> anyhow::Result<Arc<FileWatcher<KeySet>>> {
        let what = format!("the key set of {}", path.display());
        FileWatcher::load(what, vec![path.clone()], move || {
            let set = serde_json::from_slice(&read(&path)?).context("is not a JSON Web Key Set");
            set.and_then(KeySet::from_jwks).with_context(|| path.display().to_string())
        })
    }

    pub async fn current(&self, now: Moment) -> Result<Arc<KeySet>, FailureReason> {
        match self {
            Self::File(keys) => Ok(keys.get()),
            Self::Remote(keys) => keys.current(now).await,
        }
    }

    /// Returns a newer set than one that lacked a key, if there is one.
    pub async fn newer(&self, than: &Arc<KeySet>, now: Moment) -> Result<Option<Arc<KeySet>>, FailureReason> {
        match self {
            Self::File(_) => Ok(None),
            Self::Remote(keys) => keys.newer(than, now).await,
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("can't read {}", path.display()))
}

/// A key set that is fetched when it is first needed, when a token names a key that it lacks, and when it is old.
///
/// There is one fetch at a time, and no two within [`RemoteKeys::pause`], whatever tokens are presented. A set stays in
/// use until another one has been fetched.
pub struct RemoteKeys {
    client: Arc<FileWatcher<JsonClient>>,
    location: KeysLocation,
    pause: Duration,
    fetched: RwLock<Option<(Arc<KeySet>, Instant)>>,
    fetching: Arc<tokio::sync::Mutex<Option<Fetch>>>,
    /// The group of the fetches, which go on when the callers that caused them leave.
    fetches: Tasks,
}

/// The last fetch.
struct Fetch {
    began: Instant,
    /// Why the fetch failed.
    failure: Option<FailureReason>,
}

pub enum KeysLocation {
    Jwks(Uri),
    /// The URL of the set is found by OpenID Connect discovery for this issuer.
    Discovery(String),
}

/// The age at which a set is fetched again, so that withdrawn keys are dropped.
const MAX_AGE: Duration = Duration::from_secs(300);

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

impl RemoteKeys {
    /// `fetches` is the group of the fetches.
    pub fn new(
        client: Arc<FileWatcher<JsonClient>>,
        location: KeysLocation,
        pause: Duration,
        fetches: Tasks,
    ) -> Self {
        Self { client, location, pause, fetched: RwLock::default(), fetching: Arc::default(), fetches }
    }

    async fn current(self: &Arc<Self>, now: Moment) -> Result<Arc<KeySet>, FailureReason> {
        let Some((set, at)) = self.fetched() else {
            let fetching = self.fetching.clone().lock_owned().await;
            return match self.fetched() {
                Some((set, _)) => Ok(set),
                None => match self.fetch(fetching, now).await? {
                    Some(set) => Ok(set),
                    None => Err(FailureReason::Unavailable("the keys were fetched a moment ago".into())),
                },
            };
        };
        if now.monotonic.saturating_duration_since(at) < MAX_AGE {
            return Ok(set);
        }
        // One request waits for the new set. The others use the old one.
        match self.fetching.clone().try_lock_owned() {
            Ok(fetching) => Ok(self.fetch(fetching, now).await.ok().flatten().unwrap_or(set)),
            Err(_) => Ok(set),
        }
    }

    async fn newer(
        self: &Arc<Self>,
        than: &Arc<KeySet>,
        now: Moment,
    ) -> Result<Option<Arc<KeySet>>, FailureReason> {
        let fetching = self.fetching.clone().lock_owned().await;
        match self.fetched() {
            Some((set, _)) if !Arc::ptr_eq(&set, than) => Ok(Some(set)),
            Some(_) | None => self.fetch(fetching, now).await,
        }
    }

    fn fetched(&self) -> Option<(Arc<KeySet>, Instant)> {
        self.fetched.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Fetches the set. Returns `None` if the last fetch was within the pause.
    async fn fetch(
        self: &Arc<Self>,
        mut fetching: OwnedMutexGuard<Option<Fetch>>,
        now: Moment,
    ) -> Result<Option<Arc<KeySet>>, FailureReason> {
        if let Some(last) = &*fetching
            && now.monotonic.saturating_duration_since(last.began) < self.pause
        {
            return last.failure.clone().map_or(Ok(None), Err);
        }
        *fetching = Some(Fetch { began: now.monotonic, failure: None });
        // If a caller that leaves ended the fetch, nobody would have keys until the pause ends.
        let keys = self.clone();
        let fetched = self.fetches.spawn(async move { keys.complete(fetching, now).await });
        match fetched.await {
            Ok(Some(fetched)) => fetched.map(Some),
            Ok(None) | Err(_) => {
                Err(FailureReason::Unavailable("the fetch of the keys was cancelled".into()))
            }
        }
    }

    async fn complete(
        &self,
        mut fetching: OwnedMutexGuard<Option<Fetch>>,
        now: Moment,
    ) -> Result<Arc<KeySet>, FailureReason> {
        match self.ask().await {
            Ok(set) => {
                let set = Arc::new(set);
                let mut fetched = self.fetched.write().unwrap_or_else(PoisonError::into_inner);
                *fetched = Some((set.clone(), now.monotonic));
                Ok(set)
            }
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "the keys of tokens can't be fetched");
                let failure = FailureReason::Unavailable(format!("{error:#}"));
                *fetching = Some(Fetch { began: now.monotonic, failure: Some(failure.clone()) });
                Err(failure)
            }
        }
    }

    async fn ask(&self) -> anyhow::Result<KeySet> {
        let client = self.client.get();
        let uri = match &self.location {
            KeysLocation::Jwks(uri) => uri.clone(),
            KeysLocation::Discovery(issuer) => {
                let uri = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
                let uri: Uri = uri.parse().context("the issuer is not a URL")?;
                let found: Discovery = client.get(&uri).await?;
                ensure!(found.issuer == *issuer, "{uri} is about another issuer");
                found.jwks_uri.parse().with_context(|| format!("{uri} has a jwks_uri that is not a URL"))?
            }
        };
        KeySet::from_jwks(client.get(&uri).await?).with_context(|| uri.to_string())
    }
}
