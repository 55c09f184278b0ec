//! The table of credentials and configurations, and what only shows over several requests.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::FutureExt;
use hyper::http::request::Parts;
use jsonwebtoken::Algorithm;
use proto_config::Source;
use proto_net::file_watcher::Watcher;
use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};

use super::*;
use crate::{moment::Moment, user::User};

mod bound;
mod table;
mod world;

use world::{NOW, World};

/// What a caller sends.
#[derive(Clone, Default)]
struct Request {
    path: Option<&'static str>,
    headers: Vec<(&'static str, Vec<u8>)>,
    certificates: Vec<CertificateDer<'static>>,
}

impl Request {
    fn to(path: &'static str) -> Self {
        Self { path: Some(path), ..Self::default() }
    }

    fn bearer(token: &str) -> Self {
        Self::default().header("authorization", format!("Bearer {token}"))
    }

    fn certificates(certificates: Vec<CertificateDer<'static>>) -> Self {
        Self { certificates, ..Self::default() }
    }

    fn header(mut self, name: &'static str, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn websocket(protocols: &str) -> Self {
        let upgrade =
            Self::default().header("connection", "keep-alive, Upgrade").header("upgrade", "WebSocket");
        upgrade.header("sec-websocket-protocol", protocols)
    }

    fn head(&self) -> Parts {
        let mut request = hyper::Request::builder().uri(self.path.unwrap_or("/api/v1/pods"));
        for (name, value) in &self.headers {
            request = request.header(*name, value.as_slice());
        }
        request.body(()).unwrap().into_parts().0
    }

    async fn authenticate(
        &self,
        with: &Authenticators,
        at: Moment,
    ) -> Result<Authenticated, AuthenticationFailure> {
        let head = self.head();
        let certificates = Certificates::new(self.certificates.clone());
        let presented = Presented::of(&head, &certificates)?;
        assert!(!format!("{presented:?}").contains("Secret(\""));
        with.authenticate(presented, at).await
    }
}

/// A moment this many seconds from [`NOW`].
fn at(seconds: i64) -> Moment {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let start = *START.get_or_init(|| Instant::now() + Duration::from_secs(1_000_000_000));
    let shift = |by: u64| if seconds < 0 { by - seconds.unsigned_abs() } else { by + seconds.unsigned_abs() };
    let monotonic = if seconds < 0 {
        start - Duration::from_secs(seconds.unsigned_abs())
    } else {
        start + Duration::from_secs(seconds.unsigned_abs())
    };
    Moment { wall: SystemTime::UNIX_EPOCH + Duration::from_secs(shift(NOW)), monotonic }
}

fn read(yaml: &str, world: &World) -> Result<AuthnConfig, proto_config::Errors> {
    let source = Source { origin: "test.yaml", base_dir: world.dir(), check_files: true };
    proto_config::parse(yaml, source, |section| Some(AuthnConfig::read(section)))
}

fn load(items: &str, world: &World) -> (Authenticators, Vec<Arc<dyn Watcher>>) {
    let yaml = match items {
        "" => "{}".to_owned(),
        items => format!("authentication:\n{}", items.replace("STUB", &world.stub.url)),
    };
    let config = read(&yaml, world).unwrap_or_else(|errors| panic!("{yaml}\n{errors}"));
    Authenticators::load(&config, Some(&world.cluster(None)), &world.tasks).unwrap()
}

/// `NAME uid=UID [GROUPS] {EXTRA} by KIND`, the UID and the extra where there are any.
fn show(found: &Authenticated) -> String {
    let User { name, uid, groups, extra } = &*found.user;
    let uid = uid.as_ref().map(|uid| format!(" uid={uid}")).unwrap_or_default();
    let extra = extra.iter().map(|(key, values)| {
        let key = key.strip_prefix("authentication.kubernetes.io/").unwrap_or(key);
        format!("{key}={}", values.join("|"))
    });
    let extra: Vec<_> = extra.filter(|one| !one.contains("X509SHA256=")).collect();
    let extra = if extra.is_empty() { String::new() } else { format!(" {{{}}}", extra.join(",")) };
    format!("{name}{uid} [{}]{extra} by {}", groups.join(","), found.authenticator)
}

#[tokio::test]
async fn the_table() {
    let world = World::new().await;
    let rows = table::rows(&world);
    assert!(rows.len() >= 120, "{} rows", rows.len());
    let mut names: Vec<_> = rows.iter().map(|row| row.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), rows.len(), "each row has a name of its own");
    let mut wrong = Vec::new();
    for row in &rows {
        let (authenticators, _files) = load(row.config, &world);
        if let Some(before) = &row.before {
            let _ = before.authenticate(&authenticators, at(row.at - 60)).await;
        }
        // Remembered or not, the answer is the same.
        for round in 0..2 {
            let found = row.request.authenticate(&authenticators, at(row.at)).await;
            let shown = found.as_ref().map(show).map_err(|failure| failure.to_string());
            let as_expected = match (&found, &row.expected) {
                (Ok(_), Ok(expected)) => shown.as_ref() == Ok(expected),
                (Err(failure), Err(expected)) => failure.reasons().eq(expected),
                (Ok(_), Err(_)) | (Err(_), Ok(_)) => false,
            };
            if !as_expected {
                wrong.push(format!("{} ({round}): {shown:?}, expected {:?}", row.name, row.expected));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    println!("{} rows", rows.len());
}

#[tokio::test]
async fn no_failure_shows_a_secret() {
    let world = World::new().await;
    for row in table::rows(&world) {
        let (authenticators, _files) = load(row.config, &world);
        let Err(failure) = row.request.authenticate(&authenticators, at(row.at)).await else { continue };
        let shown = format!("{failure} {failure:?}");
        for (_, value) in &row.request.headers {
            let value = String::from_utf8_lossy(value);
            for part in value.split([' ', '.', ',']).filter(|part| part.len() >= 16) {
                assert!(!shown.contains(part), "{}: {shown}", row.name);
            }
        }
    }
}

#[test]
fn what_carries_credentials_is_stripped() {
    let token = format!("base64url.bearer.authorization.k8s.io.{}", URL_SAFE_NO_PAD.encode("secret"));
    for (given, kept) in [
        (vec!["v4.channel.k8s.io"], vec!["v4.channel.k8s.io"]),
        (vec!["a,b"], vec!["a,b"]),
        (vec!["TOKEN, v4.channel.k8s.io"], vec!["v4.channel.k8s.io"]),
        (vec!["a", "TOKEN", "b , c"], vec!["a, b, c"]),
        (vec!["TOKEN"], vec![]),
        (vec!["TOKEN,TOKEN", " TOKEN "], vec![]),
    ] {
        let mut request =
            Request::bearer("secret").header("authorization", "Basic c2VjcmV0").header("accept", "*/*");
        for value in given {
            request = request.header("sec-websocket-protocol", value.replace("TOKEN", &token));
        }
        let mut headers = request.head().headers;
        strip(&mut headers);
        assert!(!headers.contains_key("authorization") && headers.contains_key("accept"));
        let left: Vec<_> =
            headers.get_all("sec-websocket-protocol").iter().map(|v| v.to_str().unwrap()).collect();
        assert_eq!(left, kept);
    }
    // A value with other than visible ASCII hides nothing either.
    let mut headers =
        Request::default().header("sec-websocket-protocol", format!("a, {token}, \u{e9}")).head().headers;
    strip(&mut headers);
    assert!(!format!("{headers:?}").contains(&URL_SAFE_NO_PAD.encode("secret")), "{headers:?}");
}

#[tokio::test]
async fn a_token_is_remembered_until_a_file_changes_or_its_time_is_over() {
    let world = World::new().await;
    let claims = world.account_claims();
    let request = Request::bearer(&world.rsa.token(&world::change(claims, "exp", json!(NOW + 5))));
    world.write("own-keys.pem", &world.rsa.pem());
    let items =
        "- service_account: {issuers: [https://cluster], audiences: [api], key_files: [own-keys.pem]}";
    let (authenticators, files) = load(items, &world);
    let reasons = |found: Result<Authenticated, AuthenticationFailure>| {
        found.map_err(|e| e.reasons().cloned().collect::<Vec<_>>())
    };
    let first = request.authenticate(&authenticators, at(0)).await.unwrap();
    assert_eq!(request.authenticate(&authenticators, at(1)).await.unwrap(), first);
    assert_eq!(first.validity.expires, Some(at(5).wall));
    let late = request.authenticate(&authenticators, at(5)).await;
    assert_eq!(reasons(late), Err(vec![FailureReason::Expired]), "remembered or not");
    let generation = authenticators.generation();
    world.write("own-keys.pem", &world.p256.pem());
    for file in files.iter().chain(&files) {
        file.poll();
    }
    assert_ne!(authenticators.generation(), generation);
    let changed = request.authenticate(&authenticators, at(2)).await;
    assert_eq!(reasons(changed), Err(vec![FailureReason::UnknownKey]));
}

#[tokio::test]
async fn a_token_with_any_character_changed_is_refused() {
    let world = World::new().await;
    let items = "- service_account: {issuers: [https://cluster], audiences: [api], key_files: [keys.pem]}";
    let (authenticators, _files) = load(items, &world);
    for signer in [&world.rsa, &world.p256, &world.ed25519] {
        let token = signer.token(&world.account_claims());
        assert!(Request::bearer(&token).authenticate(&authenticators, at(0)).await.is_ok());
        for (i, character) in token.char_indices() {
            for other in ["A", "B", "_", ".", "="].into_iter().filter(|other| *other != character.to_string())
            {
                let mut changed = token.clone();
                changed.replace_range(i..=i, other);
                let found = Request::bearer(&changed).authenticate(&authenticators, at(0)).await;
                assert!(found.is_err(), "character {i} changed to {other}");
            }
        }
    }
}

#[tokio::test]
async fn what_is_remembered_does_not_change_the_order() {
    let world = World::new().await;
    let token = world.rsa.token(&world.account_claims());
    let items = "- x509: {ca: ca.pem}\n- service_account: {issuers: [https://cluster], audiences: [api], \
                 key_files: [keys.pem]}";
    let (authenticators, _files) = load(items, &world);
    let bare = Request::bearer(&token);
    let both = Request { certificates: world.leaf("alice", |_| {}), ..bare.clone() };
    for _ in 0..2 {
        assert_eq!(bare.authenticate(&authenticators, at(0)).await.unwrap().authenticator, "service_account");
        assert_eq!(both.authenticate(&authenticators, at(0)).await.unwrap().authenticator, "x509");
    }
}

#[tokio::test]
async fn unknown_keys_make_one_fetch_in_a_while_and_a_broken_set_keeps_the_last() {
    let world = World::new().await;
    let items = "- service_account: {issuers: [https://cluster], audiences: [api], \
                 jwks: {url: STUB/own-jwks, ca: stub.pem, refresh_pause: 10s}}";
    let (authenticators, _files) = load(items, &world);
    let known = Request::bearer(&world.rsa.token(&world.account_claims()));
    let rotated = Request::bearer(&world.rotated.token(&world.account_claims()));
    let serve = |body: Value| world.stub.serve_only("/own-jwks", body);
    let fetches = || world.stub.count("/own-jwks");
    serve(world::jwks(&[&world.rsa]));
    let leaves = known.authenticate(&authenticators, at(0)).now_or_never();
    assert!(leaves.is_none(), "the fetch goes on when its caller leaves");
    assert!(known.authenticate(&authenticators, at(0)).await.is_ok());
    assert_eq!(fetches(), 1);
    for second in 0..10 {
        assert!(rotated.authenticate(&authenticators, at(second)).await.is_err());
    }
    assert_eq!(fetches(), 1, "unknown keys within the pause");
    let guesses: Vec<_> = (0..20).map(|_| rotated.authenticate(&authenticators, at(20))).collect();
    for failed in futures_util::future::join_all(guesses).await {
        assert!(failed.is_err());
    }
    assert_eq!(fetches(), 2, "one fetch for all");
    serve(json!({"keys": "none"}));
    assert!(rotated.authenticate(&authenticators, at(40)).await.is_err());
    assert!(known.authenticate(&authenticators, at(40)).await.is_ok(), "the last good set stays");
    serve(world::jwks(&[&world.rotated]));
    let callers: Vec<_> = (0..20).map(|_| rotated.authenticate(&authenticators, at(60))).collect();
    for found in futures_util::future::join_all(callers).await {
        assert!(found.is_ok(), "rotated in, for all who waited");
    }
    assert_eq!(fetches(), 4);
    let later = 60 + 301;
    serve(world::jwks(&[&world.rsa]));
    assert!(rotated.authenticate(&authenticators, at(later)).await.is_err(), "an old set is fetched again");
}

#[tokio::test]
async fn a_webhook_is_asked_once_and_never_too_often() {
    let world = World::new().await;
    let items = "- webhook: {url: STUB/review, ca: stub.pem, authenticated_ttl: 30s, refused_ttl: 10s, cache_size: 2}";
    let (authenticators, _files) = load(items, &world);
    let asked = || world.stub.count("/review");
    let alice = Request::bearer("alice-token");
    for second in 0..30 {
        assert!(alice.authenticate(&authenticators, at(second)).await.is_ok());
    }
    assert_eq!(asked(), 1);
    assert!(alice.authenticate(&authenticators, at(30)).await.is_ok());
    assert_eq!(asked(), 2);
    for guess in 0..5 {
        for second in [31, 32] {
            assert!(
                Request::bearer(&format!("guess-{guess}"))
                    .authenticate(&authenticators, at(second))
                    .await
                    .is_err()
            );
        }
    }
    assert_eq!(asked(), 7, "refusals are remembered");
    assert!(alice.authenticate(&authenticators, at(40)).await.is_ok());
    assert_eq!(asked(), 7, "guesses don't push out those who are known");
    assert_eq!(world.stub.review_audiences(), json!([]));
    world.stub.fail.store(true, Ordering::Relaxed);
    let failure = Request::bearer("alice-token").authenticate(&authenticators, at(100)).await.unwrap_err();
    assert!(matches!(failure.reasons().next(), Some(FailureReason::Unavailable(_))), "{failure}");
    world.stub.fail.store(false, Ordering::Relaxed);
    assert!(alice.authenticate(&authenticators, at(100)).await.is_ok(), "that it failed is not remembered");
}

#[tokio::test]
async fn requests_that_present_one_token_at_once_cause_one_call() {
    let world = World::new().await;
    let items = "- webhook: {url: STUB/review, ca: stub.pem, max_in_flight: 1}";
    let (authenticators, _files) = load(items, &world);
    for (token, good) in [("alice-token", true), ("guess", false)] {
        let before = world.stub.count("/review");
        let request = Request::bearer(token);
        let asking = (0..10).map(|_| request.authenticate(&authenticators, at(0)));
        for found in futures_util::future::join_all(asking).await {
            assert_eq!(found.is_ok(), good, "{token}");
        }
        assert_eq!(world.stub.count("/review") - before, 1, "{token}");
    }
}

#[tokio::test]
async fn guesses_do_not_each_dial_a_webhook_that_can_t_be_reached() {
    let world = World::new().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/review", listener.local_addr().unwrap());
    let dialled = Arc::<AtomicUsize>::default();
    let dials = dialled.clone();
    world.tasks.spawn(async move {
        // Each connection ends before its TLS handshake.
        while listener.accept().await.is_ok() {
            dials.fetch_add(1, Ordering::Relaxed);
        }
    });
    let (authenticators, _files) =
        load(&format!("- webhook: {{url: '{url}', ca: stub.pem, max_in_flight: 1}}"), &world);
    for (second, expected) in [(0, 1), (1, 1), (3, 2)] {
        let guesses: Vec<_> = (0..5).map(|i| Request::bearer(&format!("guess-{second}-{i}"))).collect();
        let asking = guesses.iter().map(|guess| guess.authenticate(&authenticators, at(second)));
        for failed in futures_util::future::join_all(asking).await {
            let failure = failed.unwrap_err();
            assert!(failure.is_unavailable(), "{failure}");
        }
        assert_eq!(dialled.load(Ordering::Relaxed), expected, "{second}");
    }
}

#[tokio::test]
async fn a_cluster_is_asked_about_a_bootstrap_token_once_in_a_while() {
    let world = World::new().await;
    let (authenticators, _files) = load("- bootstrap_tokens: {cluster: true}", &world);
    let path = |id| format!("/api/v1/namespaces/kube-system/secrets/bootstrap-token-{id}");
    for second in 0..10 {
        let good = Request::bearer("goodid.0123456789abcdef");
        assert!(good.authenticate(&authenticators, at(second)).await.is_ok());
        let none = Request::bearer("noneid.0123456789abcdef");
        assert!(none.authenticate(&authenticators, at(second)).await.is_err());
    }
    assert_eq!((world.stub.count(&path("goodid")), world.stub.count(&path("noneid"))), (1, 1));
    assert!(Request::bearer("goodid.0123456789abcdef").authenticate(&authenticators, at(10)).await.is_ok());
    assert_eq!(world.stub.count(&path("goodid")), 2);
}

#[tokio::test]
async fn a_certificate_is_judged_by_the_ca_of_now() {
    let world = World::new().await;
    world.write("own-ca.pem", &world.ca_pem);
    let (authenticators, files) = load("- x509: {ca: own-ca.pem}", &world);
    let alice = Request::certificates(world.leaf("alice", |_| {}));
    let found = alice.authenticate(&authenticators, at(0)).await.unwrap();
    let id = found.user.extra.get("authentication.kubernetes.io/credential-id").unwrap();
    assert!(id[0].strip_prefix("X509SHA256=").is_some_and(|hash| hash.len() == 64), "{id:?}");
    assert!(found.validity.expires.is_some_and(|end| end > at(0).wall));
    world.write("own-ca.pem", &world.other_ca_pem);
    for file in files.iter().chain(&files) {
        file.poll();
    }
    let failure = alice.authenticate(&authenticators, at(1)).await.unwrap_err();
    assert_eq!(failure.reasons().collect::<Vec<_>>(), [&FailureReason::CertificateIssuer]);
}

#[tokio::test]
async fn files_with_secrets_must_be_private() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new().await;
    let path = world.dir().join("tokens.csv");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let errors = read("authentication: [{token_file: tokens.csv}]", &world).unwrap_err().to_string();
    assert!(errors.contains("chmod 600"), "{errors}");
    let error = format!("{:#}", TokenFile::load(path).err().unwrap());
    assert!(error.contains("chmod 600"), "{error}");
}

#[tokio::test]
async fn the_configuration_is_strict() {
    let world = World::new().await;
    for (yaml, error) in [
        ("[{}]", "an item has exactly one of"),
        ("[{token_file: tokens.csv, x509: {ca: ca.pem}}]", "an item has exactly one of"),
        ("[{basic: {}}]", "unknown field"),
        ("[{x509: {}}]", "authentication[0].x509.ca: is required"),
        ("[{x509: {ca: ca.pem, crl: x}}]", "did you mean crls?"),
        ("[{bootstrap_tokens: {}}]", "needs a file, or cluster: true"),
        ("[{service_account: {issuers: [], audiences: [a], key_files: [keys.pem]}}]", "issuers: is empty"),
        ("[{service_account: {issuers: [i], key_files: [keys.pem]}}]", "audiences: is required"),
        ("[{service_account: {issuers: [i], audiences: [a]}}]", "needs key_files or jwks"),
        ("[{service_account: {issuers: [i], audiences: [a], jwks: {}}}]", "needs either a file or a url"),
        (
            "[{service_account: {issuers: [i], audiences: [a], jwks: {url: 'http://h/'}}}]",
            "begins with https://",
        ),
        ("[{oidc: {issuer: 'http://h', client_ids: [a]}}]", "begins with https://"),
        ("[{oidc: {issuer: 'https://h'}}]", "client_ids: is required"),
        (
            "[{oidc: {issuer: 'https://h', client_ids: [a], groups_prefix: 'system:x'}}]",
            "groups_prefix: can't begin with system:",
        ),
        ("[{webhook: {url: 'http://127.0.0.1/'}}]", "begins with https://"),
        (
            "[{webhook: {url: 'https://h/', client_cert: ca.pem}}]",
            "needs client_cert and client_key, or neither",
        ),
        ("[{anonymous: {}}]", "paths: is required"),
        ("[{anonymous: {paths: ['/healthz*']}}]", "expected an exact path"),
        ("[{anonymous: {paths: [healthz]}}]", "expected an exact path"),
        ("[{x509: {ca: ca.pem}}, {x509: {ca: cas.pem}}]", "has x509 twice"),
        ("{}", "expected a list"),
    ] {
        let errors = read(&format!("authentication: {yaml}"), &world).unwrap_err().to_string();
        assert!(errors.contains(error), "{yaml}: {errors}");
    }
    assert_eq!(read("{}", &world).unwrap(), AuthnConfig::default());
    for (file, error) in [("private.pem", "only the public key belongs here"), ("tokens.csv", "has no key")] {
        let yaml = format!(
            "authentication: [{{service_account: {{issuers: [i], audiences: [a], key_files: [{file}]}}}}]"
        );
        let config = read(&yaml, &world).unwrap();
        let shown = format!("{:#}", Authenticators::load(&config, None, &world.tasks).err().unwrap());
        assert!(shown.contains(error), "{shown}");
    }
}

#[test]
fn algorithms_follow_from_the_kind_of_key() {
    let all = [
        Algorithm::HS256,
        Algorithm::HS384,
        Algorithm::HS512,
        Algorithm::RS256,
        Algorithm::PS512,
        Algorithm::ES256,
        Algorithm::ES384,
        Algorithm::EdDSA,
    ];
    for (signer, allowed) in [
        (world::Signer::rsa(), vec![Algorithm::RS256, Algorithm::PS512]),
        (world::Signer::p256(), vec![Algorithm::ES256]),
        (world::Signer::p384(), vec![Algorithm::ES384]),
        (world::Signer::ed25519(), vec![Algorithm::EdDSA]),
    ] {
        let sets = [
            keys::KeySet::from_pem(signer.pem().as_bytes()).unwrap(),
            keys::KeySet::from_jwks(serde_json::from_value(world::jwks(&[&signer])).unwrap()).unwrap(),
        ];
        for set in sets {
            let key = set.select(Some(&signer.id)).next().unwrap();
            assert_eq!(
                all.iter().filter(|algorithm| key.allows(**algorithm)).copied().collect::<Vec<_>>(),
                allowed
            );
            let signature = signer.sign("message", signer.algorithm);
            assert!(key.verifies("message", &signature, signer.algorithm));
            assert!(!key.verifies("massage", &signature, signer.algorithm));
        }
    }
    let secret = json!({"keys": [{"kty": "oct", "kid": "a", "k": "c2VjcmV0"}]});
    assert!(keys::KeySet::from_jwks(serde_json::from_value(secret).unwrap()).is_err(), "no symmetric keys");
}

/// Lets nothing pass, and counts what wanted to.
#[derive(Debug, Default)]
struct Shut(std::sync::atomic::AtomicUsize);

impl Guard for Shut {
    fn pass(&self) -> Result<(), Duration> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Err(Duration::from_secs(3))
    }
}

#[tokio::test]
async fn behind_a_shut_guard_is_what_costs_and_nothing_else() {
    let world = World::new().await;
    let (authenticators, _files) = load(
        "- x509: {ca: ca.pem}\n- webhook: {url: STUB/review, ca: stub.pem, authenticated_ttl: 10s}\n\
         - service_account: {issuers: [https://cluster], audiences: [api], key_files: [keys.pem]}\n\
         - bootstrap_tokens: {file: bootstrap.csv, cluster: true}\n- token_file: tokens.csv",
        &world,
    );
    let shut = Shut::default();
    let guarded = async |request: &Request, seconds| {
        let head = request.head();
        let certificates = Certificates::new(request.certificates.clone());
        let presented = Presented::of(&head, &certificates).unwrap().guarded(&shut);
        authenticators.authenticate(presented, at(seconds)).await
    };
    let wait = Some(Duration::from_secs(3));
    let middle = world::intermediate(&world.ca, "middle", |_| {});
    let chained = vec![world::leaf(&middle, "alice", |_| {}), middle.der().clone()];
    assert_eq!(guarded(&Request::certificates(chained), 0).await.unwrap_err().not_tried(), wait);
    shut.0.store(0, Ordering::Relaxed);
    let alice = Request::certificates(world.leaf("alice", |_| {}));
    assert_eq!(guarded(&alice, 0).await.unwrap().authenticator, "x509");
    let claims = world::change(world.account_claims(), "exp", json!(NOW + 100));
    let account = Request::bearer(&world.rsa.token(&claims));
    let (reviewed, clustered) = (Request::bearer("aud-token"), Request::bearer("goodid.0123456789abcdef"));
    for request in [&account, &reviewed, &clustered, &Request::bearer("guess")] {
        assert_eq!(guarded(request, 0).await.unwrap_err().not_tried(), wait);
    }
    assert_eq!(world.stub.count("/review"), 0, "nobody was asked");
    // These stand behind the webhook, which is passed over.
    let text = |name| std::fs::read_to_string(world.dir().join(name)).unwrap();
    let first = |name| text(name).lines().next().unwrap().split(',').next().unwrap().to_owned();
    for (file, by) in [("tokens.csv", "token_file"), ("bootstrap.csv", "bootstrap_tokens")] {
        assert_eq!(guarded(&Request::bearer(&first(file)), 0).await.unwrap().authenticator, by);
    }
    let asked = shut.0.load(Ordering::Relaxed);
    // What was good a while ago is no guess, also when it is no longer remembered.
    for (request, second) in [(&account, 0), (&reviewed, 0), (&account, 20), (&reviewed, 20)] {
        assert!(request.authenticate(&authenticators, at(0)).await.is_ok());
        assert!(guarded(request, second).await.is_ok());
    }
    assert_eq!(shut.0.load(Ordering::Relaxed), asked);
    // Once it is bad, it is a guess like any other.
    assert_eq!(guarded(&account, 100).await.unwrap_err().not_tried(), None, "it was tried, and has expired");
    assert_eq!(guarded(&account, 101).await.unwrap_err().not_tried(), wait);
}

#[tokio::test]
async fn a_key_that_can_not_be_had_may_be_the_right_one() {
    let world = World::new().await;
    let token = Request::bearer(&world.rotated.token(&world.account_claims()));
    for (set, unavailable) in [("gone", true), ("jwks", false)] {
        let items = format!(
            "- service_account: {{issuers: [https://cluster], audiences: [api], key_files: [keys.pem], \
             jwks: {{url: STUB/{set}, ca: stub.pem}}}}"
        );
        let (authenticators, _files) = load(&items, &world);
        for _ in 0..2 {
            let failure = token.authenticate(&authenticators, at(0)).await.unwrap_err();
            assert_eq!(failure.is_unavailable(), unavailable, "{set}: {failure}");
        }
    }
}

#[tokio::test]
async fn a_connections_chain_is_verified_once_and_again_when_the_ca_changes() {
    let world = World::new().await;
    let (authenticators, files) = load("- x509: {ca: ca.pem}", &world);
    let middle = world::intermediate(&world.ca, "middle", |_| {});
    let certificates = Certificates::new(vec![world::leaf(&middle, "alice", |_| {}), middle.der().clone()]);
    let head = Request::default().head();
    let attempts = Open::default();
    let ask = async |seconds| {
        let presented = Presented::of(&head, &certificates).unwrap().guarded(&attempts);
        authenticators.authenticate(presented, at(seconds)).await
    };
    let asked = futures_util::future::join_all((0..10).map(|_| ask(0))).await;
    assert!(asked.iter().all(Result::is_ok), "{asked:?}");
    assert!(ask(60).await.is_ok());
    assert_eq!(attempts.0.load(Ordering::Relaxed), 1);
    std::fs::write(world.dir().join("ca.pem"), world.other_ca.pem()).unwrap();
    for file in &files {
        file.poll();
        file.poll();
    }
    for seconds in [61, 62, 70] {
        assert_eq!(
            ask(seconds).await.unwrap_err().to_string(),
            "x509: the certificate is from a CA that is not trusted"
        );
    }
    assert_eq!(attempts.0.load(Ordering::Relaxed), 2, "a bad verdict lasts a while, too");
    assert!(ask(71).await.is_err());
    assert_eq!(attempts.0.load(Ordering::Relaxed), 3);
}

/// A certificate is good for the whole second in which it ends, and a verdict of that second must not outlive it.
#[tokio::test]
async fn a_certificate_that_is_verified_in_its_last_second_ends_all_the_same() {
    let world = World::new().await;
    let (authenticators, _files) = load("- x509: {ca: ca.pem}", &world);
    let end = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(NOW + 5);
    let leaf = world.leaf("alice", |params| params.not_after = end);
    let certificates = Certificates::new(leaf);
    let head = Request::default().head();
    let ask = async |seconds| {
        authenticators.authenticate(Presented::of(&head, &certificates).unwrap(), at(seconds)).await
    };
    assert!(ask(5).await.unwrap().validity.expires.is_some());
    assert_eq!(ask(6).await.unwrap_err().reasons().collect::<Vec<_>>(), [&FailureReason::CertificateExpired]);
}

/// Lets everything pass, and counts it.
#[derive(Debug, Default)]
struct Open(std::sync::atomic::AtomicUsize);

impl Guard for Open {
    fn pass(&self) -> Result<(), Duration> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
