//! The keys, certificates and files of the tests, and a stub of the servers that are asked over HTTPS.

use std::{
    collections::HashMap,
    convert::Infallible,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Full};
use hyper::{Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey};
use k8s_openapi::api::{authentication::v1::TokenReview, core::v1::Secret};
use proto_net::tasks::Tasks;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, PublicKeyData,
    RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::authn::cluster::{ApiError, ApiServer, BoundKind, BoundObject, Cluster, Existence, Objects, Uid};

/// The time of the tests, 2027-01-15T08:00:00Z.
pub(super) const NOW: u64 = 1_800_000_000;
/// The path to which TokenReviews are posted.
pub(super) const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";

pub(super) type Ca = CertifiedIssuer<'static, KeyPair>;

pub(super) struct World {
    dir: PathBuf,
    pub rsa: Signer,
    pub p256: Signer,
    pub p384: Signer,
    pub ed25519: Signer,
    /// A key that is in no file.
    pub rotated: Signer,
    pub ca: Ca,
    pub other_ca: Ca,
    pub ca_pem: String,
    pub other_ca_pem: String,
    pub stub: Arc<Stub>,
    pub tasks: Tasks,
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.cancel();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl World {
    pub(super) async fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("authn-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&dir).unwrap();
        let tasks = Tasks::new();
        let (rsa, rotated) = (Signer::rsa(), Signer::rsa());
        let (p256, p384, ed25519) = (Signer::p256(), Signer::p384(), Signer::ed25519());
        let (ca, other_ca) = (authority("ca"), authority("other"));
        let (stub, stub_ca) = Stub::start(&tasks).await;
        let world = Self {
            dir,
            ca_pem: ca.pem(),
            other_ca_pem: other_ca.pem(),
            rsa,
            p256,
            p384,
            ed25519,
            rotated,
            ca,
            other_ca,
            stub,
            tasks,
        };
        let keys = [&world.rsa, &world.p256, &world.p384, &world.ed25519].map(Signer::pem).concat();
        let revoked = revocations(&world.ca, &[66]);
        let jwks = jwks(&[&world.rsa, &world.p256]);
        for (name, content) in [
            ("ca.pem", world.ca_pem.clone()),
            ("cas.pem", format!("{}{}", world.other_ca_pem, world.ca_pem)),
            ("crl.pem", revoked),
            ("stub.pem", stub_ca.pem()),
            ("keys.pem", keys),
            ("rsa.pem", world.rsa.pem()),
            ("private.pem", world.rsa.pair.serialize_pem()),
            ("jwks.json", jwks.to_string()),
            ("tokens.csv", TOKENS.to_owned()),
            ("bootstrap.csv", BOOTSTRAP.to_owned()),
        ] {
            world.write(name, &content);
        }
        let stub = &world.stub;
        stub.serve("/jwks", 200, jwks.clone());
        stub.serve("/gone", 404, json!({}));
        stub.serve("/rotating", 200, jwks.clone());
        stub.serve("/rotating", 200, self::jwks(&[&world.rsa, &world.rotated]));
        let issuer = |path: &str, claimed: &str| {
            let found =
                json!({"issuer": format!("{}{claimed}", stub.url), "jwks_uri": format!("{}/jwks", stub.url)});
            stub.serve(&format!("{path}/.well-known/openid-configuration"), 200, found);
        };
        issuer("/oidc", "/oidc");
        issuer("/liar", "/oidc");
        for (id, secret) in secrets() {
            stub.serve(&format!("/api/v1/namespaces/kube-system/secrets/bootstrap-token-{id}"), 200, secret);
        }
        world
    }

    pub(super) fn cluster(&self, watches: Option<Arc<Watches>>) -> Cluster {
        let objects = watches.map(|watches| watches as Arc<dyn Objects>);
        Cluster { api_server: self.stub.clone(), objects }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn write(&self, name: &str, content: &str) {
        proto_config::secret_file::replace(&self.dir.join(name), content.as_bytes()).unwrap();
    }

    /// Returns a client certificate of the CA with this common name.
    pub(super) fn leaf(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Vec<CertificateDer<'static>> {
        vec![leaf(&self.ca, name, change)]
    }

    /// Returns the claims of a service account's token.
    pub(super) fn account_claims(&self) -> Value {
        json!({
            "iss": "https://cluster",
            "sub": "system:serviceaccount:apps:web",
            "aud": ["api"],
            "exp": NOW + 3600,
            "nbf": NOW - 10,
            "iat": NOW - 10,
            "jti": "id-1",
            "kubernetes.io": {
                "namespace": "apps",
                "serviceaccount": {"name": "web", "uid": "sa-uid"},
                "pod": {"name": "web-0", "uid": "pod-uid"},
                "node": {"name": "node-1", "uid": "node-uid"},
            },
        })
    }

    /// Returns the claims of an OIDC provider's token.
    pub(super) fn oidc_claims(&self) -> Value {
        json!({
            "iss": format!("{}/oidc", self.stub.url),
            "sub": "1234",
            "aud": "kubectl",
            "exp": NOW + 3600,
            "email": "alice@example.com",
            "groups": ["dev", "ops"],
        })
    }
}

const TOKENS: &str = r#"alice-token,alice,1
bob-token,bob,2,"dev,ops"
admin-token,admin,,system:masters
"quoted,""token",carol,3,"one"
three.part.token,dave,4

"#;

const BOOTSTRAP: &str = "fileid.0123456789abcdef
expird.0123456789abcdef,2027-01-15T07:59:59Z
lasts0.0123456789abcdef,2027-01-15T10:00:01+02:00,\"system:bootstrappers:a,system:bootstrappers:b\"
";

fn secrets() -> Vec<(&'static str, Value)> {
    let secret = |id: &str, change: &[(&str, Option<&str>)]| {
        let mut data: HashMap<&str, String> = HashMap::from([
            ("token-id", STANDARD.encode(id)),
            ("token-secret", STANDARD.encode("0123456789abcdef")),
            ("expiration", STANDARD.encode("2027-01-15T09:00:00Z")),
            ("usage-bootstrap-authentication", STANDARD.encode("true")),
            ("auth-extra-groups", STANDARD.encode("system:bootstrappers:workers")),
        ]);
        for (name, value) in change {
            match value {
                Some(value) => data.insert(name, STANDARD.encode(value)),
                None => data.remove(name),
            };
        }
        let name = format!("bootstrap-token-{id}");
        json!({
            "apiVersion": "v1", "kind": "Secret", "type": "bootstrap.kubernetes.io/token",
            "metadata": {"name": name, "namespace": "kube-system"}, "data": data,
        })
    };
    let mut opaque = secret("opaque", &[]);
    opaque["type"] = json!("Opaque");
    let mut deleted = secret("delete", &[]);
    deleted["metadata"]["deletionTimestamp"] = json!("2027-01-15T07:00:00Z");
    vec![
        ("goodid", secret("goodid", &[])),
        ("plain0", secret("plain0", &[("expiration", None), ("auth-extra-groups", None)])),
        ("opaque", opaque),
        ("delete", deleted),
        ("thisid", secret("otheri", &[])),
        ("past00", secret("past00", &[("expiration", Some("2027-01-15T08:00:00Z"))])),
        ("never0", secret("never0", &[("expiration", Some("tomorrow"))])),
        ("sign00", secret("sign00", &[("usage-bootstrap-authentication", None)])),
        ("usage1", secret("usage1", &[("usage-bootstrap-authentication", Some("1"))])),
        ("groups", secret("groups", &[("auth-extra-groups", Some("system:masters"))])),
        ("prefix", secret("prefix", &[("auth-extra-groups", Some("system:bootstrappers:"))])),
        ("empty0", secret("empty0", &[("token-secret", Some(""))])),
        ("nosecr", secret("nosecr", &[("token-secret", None)])),
    ]
}

/// A key that signs tokens.
pub(super) struct Signer {
    pub pair: KeyPair,
    pub algorithm: Algorithm,
    /// The ID that kube-apiserver gives the key.
    pub id: String,
    key: EncodingKey,
}

impl Signer {
    pub(super) fn rsa() -> Self {
        let pair = KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
        let key = EncodingKey::from_rsa_pem(pair.serialize_pem().as_bytes()).unwrap();
        Self::new(pair, Algorithm::RS256, key)
    }

    pub(super) fn p256() -> Self {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let key = EncodingKey::from_ec_der(pair.serialized_der());
        Self::new(pair, Algorithm::ES256, key)
    }

    pub(super) fn p384() -> Self {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let key = EncodingKey::from_ec_der(pair.serialized_der());
        Self::new(pair, Algorithm::ES384, key)
    }

    pub(super) fn ed25519() -> Self {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let key = EncodingKey::from_ed_der(pair.serialized_der());
        Self::new(pair, Algorithm::EdDSA, key)
    }

    fn new(pair: KeyPair, algorithm: Algorithm, key: EncodingKey) -> Self {
        let id = URL_SAFE_NO_PAD.encode(Sha256::digest(pair.subject_public_key_info()));
        Self { pair, algorithm, id, key }
    }

    /// The public key.
    pub(super) fn pem(&self) -> String {
        self.pair.public_key_pem()
    }

    pub(super) fn sign(&self, message: &str, algorithm: Algorithm) -> String {
        jsonwebtoken::crypto::sign(message.as_bytes(), &self.key, algorithm).unwrap()
    }

    pub(super) fn token(&self, claims: &Value) -> String {
        self.token_with(json!({"kid": self.id}), claims)
    }

    /// Signs a token with these header fields besides the algorithm.
    pub(super) fn token_with(&self, header: Value, claims: &Value) -> String {
        let header = change(header, "alg", serde_json::to_value(self.algorithm).unwrap());
        self.token_of(&header.to_string(), &claims.to_string(), self.algorithm)
    }

    /// Signs the header and payload without changing them.
    pub(super) fn token_of(&self, header: &str, payload: &str, algorithm: Algorithm) -> String {
        let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
        format!("{message}.{}", self.sign(&message, algorithm))
    }

    fn jwk(&self) -> Value {
        let raw = self.pair.der_bytes();
        let halves = |length: usize| {
            (URL_SAFE_NO_PAD.encode(&raw[1..=length]), URL_SAFE_NO_PAD.encode(&raw[length + 1..]))
        };
        let curve = |name, (x, y): (String, String)| json!({"kty": "EC", "crv": name, "x": x, "y": y});
        #[expect(clippy::wildcard_enum_match_arm, reason = "not exhaustive")]
        let key = match self.algorithm {
            Algorithm::ES256 => curve("P-256", halves(32)),
            Algorithm::ES384 => curve("P-384", halves(48)),
            Algorithm::EdDSA => json!({"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(raw)}),
            _ => {
                let jwk = jsonwebtoken::jwk::Jwk::from_encoding_key(&self.key, self.algorithm).unwrap();
                let mut jwk = serde_json::to_value(jwk).unwrap();
                jwk.as_object_mut().unwrap().remove("alg");
                jwk
            }
        };
        change(change(key, "kid", json!(self.id)), "use", json!("sig"))
    }
}

/// Returns a token with an HMAC that uses a public key as its secret.
pub(super) fn hmac_token(secret: &str, header: &Value, claims: &Value) -> String {
    let message = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(header.to_string()),
        URL_SAFE_NO_PAD.encode(claims.to_string())
    );
    let key = EncodingKey::from_secret(secret.as_bytes());
    format!("{message}.{}", jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap())
}

pub(super) fn jwks(signers: &[&Signer]) -> Value {
    json!({"keys": signers.iter().map(|signer| signer.jwk()).collect::<Vec<_>>()})
}

pub(super) fn change(mut object: Value, name: &str, value: Value) -> Value {
    object.as_object_mut().unwrap().insert(name.to_owned(), value);
    object
}

pub(super) fn without(mut object: Value, name: &str) -> Value {
    object.as_object_mut().unwrap().remove(name).unwrap();
    object
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date_time_ymd(2027, 1, 1);
    params.not_after = date_time_ymd(2028, 1, 1);
    params
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = params(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

pub(super) fn authority(name: &str) -> Ca {
    Ca::self_signed(authority_params(name), KeyPair::generate().unwrap()).unwrap()
}

pub(super) fn intermediate(ca: &Ca, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Ca {
    let mut params = authority_params(name);
    change(&mut params);
    Ca::signed_by(params, KeyPair::generate().unwrap(), ca).unwrap()
}

pub(super) fn leaf(
    ca: &Ca,
    name: &str,
    change: impl FnOnce(&mut CertificateParams),
) -> CertificateDer<'static> {
    let mut params = params(name);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    change(&mut params);
    params.signed_by(&KeyPair::generate().unwrap(), ca).unwrap().der().clone()
}

fn revocations(ca: &Ca, serials: &[u64]) -> String {
    let revoked = serials.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: date_time_ymd(2027, 1, 2),
        reason_code: None,
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: date_time_ymd(2027, 1, 2),
        next_update: date_time_ymd(2027, 1, 3),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(ca).unwrap().pem().unwrap()
}

/// Serves key sets, discovery and TokenReviews over HTTPS, and answers for the API server.
pub(super) struct Stub {
    pub url: String,
    /// Whether TokenReviews are answered with an error.
    pub fail: AtomicBool,
    /// The key sets that are served one after another. The last one is served for ever.
    served: Mutex<HashMap<String, Vec<(u16, Value)>>>,
    counts: Mutex<HashMap<String, usize>>,
    review: Mutex<Value>,
}

impl Stub {
    async fn start(tasks: &Tasks) -> (Arc<Self>, Ca) {
        let mut params = authority_params("stub ca");
        (params.not_before, params.not_after) = (date_time_ymd(1975, 1, 1), date_time_ymd(4096, 1, 1));
        let ca = Ca::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &ca).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stub = Arc::new(Self {
            url: format!("https://localhost:{}", listener.local_addr().unwrap().port()),
            fail: AtomicBool::new(false),
            served: Mutex::default(),
            counts: Mutex::default(),
            review: Mutex::default(),
        });
        let (served, connections) = (stub.clone(), tasks.clone());
        tasks.spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let (stub, acceptor) = (served.clone(), acceptor.clone());
                connections.spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else { return };
                    let service = service_fn(|request| stub.clone().answer(request));
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(tls), service).await;
                });
            }
        });
        (stub, ca)
    }

    pub(super) fn serve(&self, path: &str, status: u16, body: Value) {
        let mut served = self.served.lock().unwrap();
        served.entry(path.to_owned()).or_default().push((status, body));
    }

    /// Replaces the key sets that are served.
    pub(super) fn serve_only(&self, path: &str, body: Value) {
        self.served.lock().unwrap().insert(path.to_owned(), vec![(200, body)]);
    }

    pub(super) fn count(&self, path: &str) -> usize {
        self.counts.lock().unwrap().get(path).copied().unwrap_or_default()
    }

    /// Returns the audiences for which the last TokenReview asked.
    pub(super) fn review_audiences(&self) -> Value {
        self.review.lock().unwrap()["spec"]["audiences"].clone()
    }

    fn counted(&self, path: &str) {
        *self.counts.lock().unwrap().entry(path.to_owned()).or_default() += 1;
    }

    /// Returns the key set that is served next.
    fn next(&self, path: &str) -> (u16, Value) {
        self.counted(path);
        match self.served.lock().unwrap().get_mut(path) {
            Some(turns) if turns.len() > 1 => turns.remove(0),
            Some(turns) => turns[0].clone(),
            None => (404, json!({})),
        }
    }

    async fn answer(
        self: Arc<Self>,
        request: hyper::Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let path = request.uri().path().to_owned();
        let (status, body) = if path == "/review" {
            self.counted(&path);
            let review = request.into_body().collect().await.unwrap().to_bytes();
            let review: Value = serde_json::from_slice(&review).unwrap();
            let answer = answer(&review);
            *self.review.lock().unwrap() = review;
            if self.fail.load(Ordering::Relaxed) { (500, json!({})) } else { (200, answer) }
        } else {
            self.next(&path)
        };
        let response = Response::builder().status(status).header("content-type", "application/json");
        Ok(response.body(Full::from(body.to_string())).unwrap())
    }
}

impl ApiServer for Stub {
    fn system_secret<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Secret>, ApiError>> {
        let (status, body) = self.next(&format!("/api/v1/namespaces/kube-system/secrets/{name}"));
        let answer = match status {
            404 => Ok(None),
            200 => Ok(Some(serde_json::from_value(body).unwrap())),
            _ => Err(ApiError::Failed(status.to_string())),
        };
        Box::pin(std::future::ready(answer))
    }

    fn review<'a>(&'a self, _: &'a TokenReview) -> BoxFuture<'a, Result<TokenReview, ApiError>> {
        let (status, body) = self.next(REVIEWS);
        let answer = match status {
            200 | 201 => Ok(serde_json::from_value(body).unwrap()),
            _ => Err(ApiError::Failed(status.to_string())),
        };
        Box::pin(std::future::ready(answer))
    }
}

/// The objects that watches show.
#[derive(Default)]
pub(super) struct Watches(Mutex<Shown>);

#[derive(Default)]
struct Shown {
    objects: Vec<BoundObject>,
    /// Whether all objects are known.
    listed: bool,
    /// Whether the watches are up to date.
    current: bool,
}

impl Watches {
    pub(super) fn appear(&self, kind: BoundKind, key: &str, uid: &str) {
        self.vanish(kind, key);
        self.0.lock().unwrap().objects.push(BoundObject { kind, key: key.into(), uid: Uid::of(uid) });
    }

    pub(super) fn vanish(&self, kind: BoundKind, key: &str) {
        self.0.lock().unwrap().objects.retain(|object| (object.kind, &*object.key) != (kind, key));
    }

    /// Marks the present objects as all that exist. `current` says whether the watches are up to date.
    pub(super) fn listed(&self, current: bool) {
        let mut shown = self.0.lock().unwrap();
        (shown.listed, shown.current) = (true, current);
    }
}

impl Objects for Watches {
    fn check(&self, objects: &[BoundObject], _: i64) -> Existence {
        let shown = self.0.lock().unwrap();
        match objects.iter().all(|object| shown.objects.contains(object)) {
            false if shown.listed => Existence::Missing,
            true if shown.listed && shown.current => Existence::Exist,
            true | false => Existence::Unknown,
        }
    }
}

/// The answer to a TokenReview.
fn answer(review: &Value) -> Value {
    assert_eq!(
        (review["apiVersion"].as_str(), review["kind"].as_str()),
        (Some("authentication.k8s.io/v1"), Some("TokenReview"))
    );
    let token = review["spec"]["token"].as_str().unwrap();
    let user = |user: Value| json!({"authenticated": true, "user": user});
    let status = match token {
        "alice-token" => user(json!({
            "username": "alice", "uid": "1", "groups": ["dev", "dev", "ops"],
            "extra": {"Example.com/Scope": ["read", "write"]},
        })),
        "aud-token" => change(user(json!({"username": "alice"})), "audiences", json!(["api"])),
        "other-aud-token" => change(user(json!({"username": "alice"})), "audiences", json!(["vault"])),
        "nameless-token" => user(json!({"groups": ["dev"]})),
        "newline-token" => user(json!({"username": "alice\r\nx-remote-group: system:masters"})),
        "large-token" => user(json!({"username": "alice", "groups": ["g".repeat(70_000)]})),
        "error-token" => json!({"authenticated": false, "error": "broken"}),
        "odd-token" => json!({"authenticated": "yes"}),
        "kind-token" => {
            return json!({"apiVersion": "v1", "kind": "Status", "status": {"authenticated": true}});
        }
        _ => json!({"authenticated": false}),
    };
    json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status})
}
