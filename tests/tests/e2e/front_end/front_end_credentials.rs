//! The front end follows credentials that come and go, counts failures against those who cause them, and audits what it
//! decides.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response, StatusCode, body::Incoming, header, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use tests::{
    cluster::SOON,
    front_end::{Answer, Credential, FrontEnd, Http, RELOADED, Setup},
    load::completes,
    pki::{Authority, server_config},
    process::{TempDir, eventually},
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tokio_rustls::TlsAcceptor;

/// Servers that the front end asks over HTTPS: an OpenID Connect provider, and webhooks.
struct Stub {
    dir: TempDir,
    url: String,
    /// By path, for GET.
    documents: Mutex<HashMap<String, Value>>,
    /// Paths and bodies.
    asked: Mutex<Vec<(String, Value)>>,
    /// Answers nothing but errors.
    down: AtomicBool,
    /// Answers wait while this is false.
    open: watch::Sender<bool>,
}

impl Stub {
    async fn start() -> Arc<Self> {
        let dir = TempDir::new("stub").unwrap();
        let authority = Authority::new("stub CA").unwrap();
        std::fs::write(dir.path().join("ca.crt"), authority.pem()).unwrap();
        authority.server(dir.path(), "stub", &["localhost"]).unwrap();
        let acceptor = TlsAcceptor::from(server_config(dir.path(), "stub").unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stub = Arc::new(Self {
            dir,
            url: format!("https://localhost:{}", listener.local_addr().unwrap().port()),
            documents: Mutex::default(),
            asked: Mutex::default(),
            down: AtomicBool::new(false),
            open: watch::Sender::new(true),
        });
        let accepting = stub.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (stub, acceptor) = (accepting.clone(), acceptor.clone());
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(socket).await else { return };
                    let service = service_fn(|request| stub.clone().answer(request));
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(tls), service).await;
                });
            }
        });
        stub
    }

    fn ca(&self) -> String {
        self.dir.path().join("ca.crt").display().to_string()
    }

    fn serve(&self, path: &str, document: Value) {
        self.documents.lock().unwrap().insert(path.to_owned(), document);
    }

    /// How often a path was asked for.
    fn count(&self, path: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|(asked, _)| asked == path).count()
    }

    fn last(&self, path: &str) -> Value {
        let asked = self.asked.lock().unwrap();
        asked.iter().rev().find(|(asked, _)| asked == path).unwrap().1.clone()
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let path = request.uri().path().to_owned();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        self.asked.lock().unwrap().push((path.clone(), body.clone()));
        let _ = self.open.subscribe().wait_for(|open| *open).await;
        let document = match path.as_str() {
            _ if self.down.load(Ordering::SeqCst) => None,
            "/tokens" => Some(token_review(&body)),
            "/access" => Some(access_review(&body)),
            path => self.documents.lock().unwrap().get(path).cloned(),
        };
        let status = if document.is_some() { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR };
        let body = Full::from(document.unwrap_or(Value::Null).to_string());
        Ok(Response::builder().status(status).body(body).unwrap())
    }
}

/// Whoever has the token `of-NAME` is NAME.
fn token_review(review: &Value) -> Value {
    assert_eq!(review["kind"], "TokenReview");
    let name = review["spec"]["token"].as_str().unwrap().strip_prefix("of-");
    let status = match name {
        Some(name) => json!({
            "authenticated": true,
            "user": {"username": name, "uid": "7", "groups": ["dev"]},
        }),
        None => json!({"authenticated": false}),
    };
    json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status})
}

/// Alice may read, and bob hears why not.
fn access_review(review: &Value) -> Value {
    assert_eq!(review["kind"], "SubjectAccessReview");
    let spec = &review["spec"];
    let attributes =
        if spec["resourceAttributes"].is_null() { "nonResourceAttributes" } else { "resourceAttributes" };
    let status = match (spec["user"].as_str(), spec[attributes]["verb"].as_str()) {
        (Some("alice"), Some("get" | "list")) => json!({"allowed": true, "reason": "readers read"}),
        (Some("bob"), _) => json!({"allowed": false, "denied": true, "reason": "bob is on leave"}),
        _ => json!({"allowed": false}),
    };
    json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": {}, "status": status})
}

/// A front end with these authenticators beside nothing else, and further lines of its section.
async fn front_end(authentication: &str, lines: &str) -> FrontEnd {
    let lines = format!("  authentication: [{authentication}]\n{lines}");
    FrontEnd::start(Setup { unconfigured: true, lines, ..Setup::default() }).await.unwrap()
}

async fn ask(front_end: &FrontEnd, token: &str, target: &str) -> Answer {
    let token = Some(token.to_owned());
    let mut caller = front_end.caller_with(Credential::None, token, Http::V1).await.unwrap();
    completes("an answer", caller.get(target)).await.unwrap()
}

/// The audit's lines that hold these values, once there are so many.
async fn audited(front_end: &FrontEnd, values: &[(&str, Value)], lines: usize) -> Vec<Value> {
    let what = format!("{lines} audit lines with {values:?}");
    eventually(&what, SOON, async || {
        let text = std::fs::read_to_string(front_end.file("audit.log")).ok()?;
        // One that is being written has no end yet.
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let all = whole.map(|line| serde_json::from_str::<Value>(line).unwrap());
        let found: Vec<_> =
            all.filter(|line| values.iter().all(|(name, value)| line[name] == *value)).collect();
        (found.len() >= lines).then_some(found)
    })
    .await
}

/// One failure is a second's, and two are all at once.
const FEW_FAILURES: &str = "failures_per_second_per_address: 1";

#[tokio::test]
async fn who_guesses_does_not_lock_out_others_of_his_address() {
    let setup = Setup {
        limits: Some(format!("{{{FEW_FAILURES}}}")),
        // Nothing is remembered: a token of a service account is verified each time.
        lines: "  authentication_cache: {ttl: 0s}\n".to_owned(),
        ..Setup::default()
    };
    let front_end = FrontEnd::start(setup).await.unwrap();
    let known = front_end.bearer(Credential::ServiceAccount).unwrap();
    assert_eq!(ask(&front_end, &known, "/echo").await.status, StatusCode::OK);
    for round in 0..10 {
        let mut limited = 0;
        for guess in 0..5 {
            let answer = ask(&front_end, &format!("guess-{round}-{guess}"), "/echo").await;
            if answer.status == StatusCode::TOO_MANY_REQUESTS {
                assert!(answer.headers.contains_key(header::RETRY_AFTER));
                limited += 1;
            } else {
                assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
            }
        }
        assert!(limited > 0 || round == 0, "guessing has a limit");
        for credential in [Credential::Certificate, Credential::Token, Credential::Bootstrap] {
            for http in [Http::V1, Http::V2] {
                let mut caller = front_end.caller(credential, http).await.unwrap();
                assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK, "{credential:?}");
            }
        }
        assert_eq!(ask(&front_end, &known, "/echo").await.status, StatusCode::OK, "it was good before");
    }
    let limited = audited(&front_end, &[("decision", json!("limited"))], 1).await;
    assert!(limited.iter().all(|line| line["code"] == 429 && line["user"].is_null()), "{limited:?}");
}

#[tokio::test]
async fn guesses_at_once_count_as_many_and_a_good_token_as_none() {
    const GUESSES: usize = 20;
    let stub = Stub::start().await;
    let webhook = format!("{{webhook: {{url: '{}/tokens', ca: {}, timeout: 60s}}}}", stub.url, stub.ca());
    let front_end = Arc::new(front_end(&webhook, &format!("  limits: {{{FEW_FAILURES}}}\n")).await);
    for name in 0..10 {
        let answer = ask(&front_end, &format!("of-{name}"), "/echo").await;
        assert_eq!(answer.status, StatusCode::OK, "one after the other, all are good");
    }
    stub.open.send_replace(false);
    let (before, began) = (stub.count("/tokens"), Instant::now());
    let mut guesses = JoinSet::new();
    for guess in 0..GUESSES {
        let front_end = front_end.clone();
        guesses.spawn(async move { ask(&front_end, &format!("guess-{guess}"), "/echo").await.status });
    }
    let mut refused = 0;
    let asked = eventually("each guess is asked about or refused", SOON, async || {
        while let Some(answer) = guesses.try_join_next() {
            assert_eq!(answer.unwrap(), StatusCode::TOO_MANY_REQUESTS);
            refused += 1;
        }
        let asked = stub.count("/tokens") - before;
        (asked + refused == GUESSES).then_some(asked)
    })
    .await;
    let more = usize::try_from(began.elapsed().as_secs()).unwrap() + 1;
    assert!(asked <= 2 + more, "{asked} were asked about at once");
    stub.open.send_replace(true);
    while let Some(answer) = guesses.join_next().await {
        assert_eq!(answer.unwrap(), StatusCode::UNAUTHORIZED);
    }
}

#[tokio::test]
async fn that_a_webhook_is_down_is_not_its_callers_failure() {
    let stub = Stub::start().await;
    let webhook = format!("{{webhook: {{url: '{}/tokens', ca: {}}}}}", stub.url, stub.ca());
    let front_end = front_end(&webhook, &format!("  limits: {{{FEW_FAILURES}}}\n")).await;
    stub.down.store(true, Ordering::SeqCst);
    for _ in 0..20 {
        let answer = ask(&front_end, "of-alice", "/echo").await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{answer:?}");
        assert!(answer.headers.contains_key(header::RETRY_AFTER));
        let said = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(!said.contains("localhost") && !said.contains("webhook"), "{said}");
    }
    stub.down.store(false, Ordering::SeqCst);
    assert_eq!(ask(&front_end, "of-alice", "/echo").await.status, StatusCode::OK);
    let unchecked = audited(&front_end, &[("code", json!(503))], 20).await;
    assert!(unchecked.iter().all(|line| line["decision"] == "error" && line["user"].is_null()));
    let wrong = ask(&front_end, "of", "/echo").await;
    assert_eq!(wrong.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_webhook_says_who_a_token_is() {
    let stub = Stub::start().await;
    let webhook = format!(
        "{{webhook: {{url: '{}/tokens', ca: {}, audiences: [api], authenticated_ttl: 1h}}}}",
        stub.url,
        stub.ca()
    );
    let front_end = front_end(&webhook, "").await;
    for _ in 0..3 {
        assert_eq!(ask(&front_end, "of-alice", "/echo").await.status, StatusCode::OK);
        let [received] = front_end.upstream.take().try_into().unwrap();
        let identity = received.identity().unwrap();
        assert_eq!((identity.user.as_str(), identity.uid.as_deref()), ("alice", Some("7")));
        assert_eq!(identity.groups, ["dev", "system:authenticated"]);
    }
    assert_eq!(stub.count("/tokens"), 1, "it is asked once");
    assert_eq!(stub.last("/tokens")["spec"]["audiences"], json!(["api"]));
    let lines = audited(&front_end, &[("user", json!("alice"))], 3).await;
    assert!(lines.iter().all(|line| line["authenticator"] == "webhook" && line["code"] == 200), "{lines:?}");
    assert_eq!(ask(&front_end, "alice", "/echo").await.status, StatusCode::UNAUTHORIZED);
    assert!(front_end.upstream.take().is_empty());
    audited(&front_end, &[("decision", json!("unauthenticated")), ("code", json!(401))], 1).await;
    let audit = std::fs::read_to_string(front_end.file("audit.log")).unwrap();
    assert!(!audit.contains("of-alice") && !front_end.log().contains("of-alice"), "no token is written down");
}

#[tokio::test]
async fn a_webhook_says_who_may_what() {
    let stub = Stub::start().await;
    let (url, ca) = (&stub.url, stub.ca());
    let lines = format!(
        "  authorization: [{{webhook: {{url: '{url}/access', ca: {ca}}}}}]\n  authorize_everything: true\n"
    );
    let front_end = front_end(&format!("{{webhook: {{url: '{url}/tokens', ca: {ca}}}}}"), &lines).await;
    let pods = "/api/v1/namespaces/default/pods";
    for (token, status, decision, rule) in [
        // The stub of kube-apiserver has none: it was asked.
        ("of-alice", 404, "allow", json!("readers read")),
        ("of-bob", 403, "deny", json!("bob is on leave")),
        ("of-carol", 403, "deny", Value::Null),
    ] {
        let answer = ask(&front_end, token, pods).await;
        assert_eq!(answer.status.as_u16(), status, "{token} {answer:?}\n{}", front_end.log());
        let user = token.strip_prefix("of-").unwrap();
        let [line] = audited(&front_end, &[("user", json!(user))], 1).await.try_into().unwrap();
        let said = (&line["decision"], &line["rule"], &line["code"], &line["verb"], &line["resource"]);
        assert_eq!(said, (&json!(decision), &rule, &json!(status), &json!("list"), &json!("pods")), "{line}");
    }
    let asked = stub.last("/access")["spec"].clone();
    assert_eq!(
        (&asked["user"], &asked["groups"]),
        (&json!("carol"), &json!(["dev", "system:authenticated"]))
    );
    assert_eq!(asked["resourceAttributes"]["namespace"], "default");
    assert_eq!(front_end.upstream.take().len(), 1);
    // While the webhook cannot be asked, nothing new is allowed, and earlier answers are remembered.
    stub.down.store(true, Ordering::SeqCst);
    assert_eq!(ask(&front_end, "of-alice", pods).await.status, StatusCode::NOT_FOUND);
    assert_eq!(ask(&front_end, "of-alice", "/api/v1/nodes").await.status, StatusCode::FORBIDDEN);
}

/// A key of a provider, and its public half as a JSON Web Key.
struct Signer {
    id: &'static str,
    key: rcgen::KeyPair,
}

impl Signer {
    fn new(id: &'static str) -> Self {
        Self { id, key: rcgen::KeyPair::generate().unwrap() }
    }

    fn jwk(&self) -> Value {
        use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
        use rcgen::PublicKeyData;
        let point = self.key.der_bytes();
        assert_eq!((point.len(), point[0]), (65, 4), "an uncompressed point of P-256");
        let (x, y) = point[1..].split_at(32);
        let [x, y] = [x, y].map(|half| URL_SAFE_NO_PAD.encode(half));
        json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.id, "x": x, "y": y})
    }

    fn token(&self, issuer: &str, name: &str, lives: i64) -> String {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let claims = json!({
            "iss": issuer, "aud": "cluster", "sub": name, "groups": ["dev"],
            "exp": now.as_secs().checked_add_signed(lives),
        });
        let header = Header { kid: Some(self.id.to_owned()), ..Header::new(Algorithm::ES256) };
        let key = EncodingKey::from_ec_pem(self.key.serialize_pem().as_bytes()).unwrap();
        jsonwebtoken::encode(&header, &claims, &key).unwrap()
    }
}

#[tokio::test]
async fn a_provider_s_keys_are_found_and_rotate() {
    let stub = Stub::start().await;
    let issuer = stub.url.clone();
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    let oidc = format!(
        "{{oidc: {{issuer: '{issuer}', ca: {}, client_ids: [cluster], username_prefix: 'oidc:', groups_claim: groups, \
         groups_prefix: 'oidc:', refresh_pause: 1s}}}}",
        stub.ca()
    );
    let front_end = front_end(&oidc, &format!("  limits: {{{FEW_FAILURES}}}\n")).await;
    let tokens = [&old, &new].map(|signer| signer.token(&issuer, "alice", 600));
    // As long as there is no provider, nobody can say that a token is wrong.
    let answer = ask(&front_end, &tokens[0], "/echo").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{answer:?}");
    stub.serve(
        "/.well-known/openid-configuration",
        json!({"issuer": issuer, "jwks_uri": format!("{issuer}/keys")}),
    );
    stub.serve("/keys", json!({"keys": [old.jwk()]}));
    eventually("the provider is asked again", SOON, async || {
        (ask(&front_end, &tokens[0], "/echo").await.status == StatusCode::OK).then_some(())
    })
    .await;
    let identity = front_end.upstream.take().pop().unwrap().identity().unwrap();
    assert_eq!(identity.user, "oidc:alice");
    assert_eq!(identity.groups, ["oidc:dev", "system:authenticated"]);
    let [line] = audited(&front_end, &[("user", json!("oidc:alice"))], 1).await.try_into().unwrap();
    assert_eq!((&line["authenticator"], &line["code"]), (&json!("oidc"), &json!(200)));

    assert_eq!(ask(&front_end, &tokens[1], "/echo").await.status, StatusCode::UNAUTHORIZED, "not in yet");
    stub.serve("/keys", json!({"keys": [old.jwk(), new.jwk()]}));
    eventually("the new key rules", SOON, async || {
        (ask(&front_end, &tokens[1], "/echo").await.status == StatusCode::OK).then_some(())
    })
    .await;
    eventually("failures are forgiven", SOON, async || {
        let expired = old.token(&issuer, "alice", -60);
        (ask(&front_end, &expired, "/echo").await.status == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    // The provider is down, and its keys are known.
    stub.down.store(true, Ordering::SeqCst);
    let bob = new.token(&issuer, "bob", 600);
    eventually("a new token is verified", SOON, async || {
        (ask(&front_end, &bob, "/echo").await.status == StatusCode::OK).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_certificate_that_comes_to_be_revoked_is_refused_within_two_seconds() {
    let clients = Authority::new("clients").unwrap();
    let dir = TempDir::new("revoked").unwrap();
    let path = dir.path();
    std::fs::write(path.join("ca.crt"), clients.pem()).unwrap();
    for name in ["jane", "joan"] {
        clients.client_in(path, name, name, ["dev", "ops"]).unwrap();
    }
    let revoke = |names: &[&str]| {
        let list = clients.revocations(path, names).unwrap();
        proto_config::secret_file::replace(&path.join("revoked.crl"), list.as_bytes()).unwrap();
    };
    revoke(&[]);
    let (ca, crl) = (path.join("ca.crt"), path.join("revoked.crl"));
    let x509 = format!("{{x509: {{ca: {}, crls: [{}]}}}}", ca.display(), crl.display());
    let front_end = front_end(&x509, "").await;
    let become_somebody = |name: &str| {
        for end in ["crt", "key"] {
            let from = path.join(format!("{name}.{end}"));
            std::fs::copy(from, front_end.file(&format!("jane.{end}"))).unwrap();
        }
    };
    become_somebody("joan");
    let mut joan = front_end.caller(Credential::Certificate, Http::V2).await.unwrap();
    become_somebody("jane");
    let mut kept = front_end.caller(Credential::Certificate, Http::V2).await.unwrap();
    for caller in [&mut joan, &mut kept] {
        assert_eq!(caller.get("/echo").await.unwrap().status, StatusCode::OK, "{}", front_end.log());
    }
    revoke(&["jane"]);
    let revoked = Instant::now();
    let status = loop {
        let Ok(answer) = kept.get("/echo").await else { break StatusCode::UNAUTHORIZED };
        if answer.status != StatusCode::OK || revoked.elapsed() > RELOADED {
            break answer.status;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert_eq!(status, StatusCode::UNAUTHORIZED, "on a kept connection");
    let mut again = front_end.caller(Credential::Certificate, Http::V1).await.unwrap();
    assert_eq!(again.get("/echo").await.unwrap().status, StatusCode::UNAUTHORIZED, "on a new one");
    assert_eq!(joan.get("/echo").await.unwrap().status, StatusCode::OK, "another's goes on");
    let lines = audited(&front_end, &[("decision", json!("unauthenticated"))], 2).await;
    assert!(lines.iter().all(|line| line["code"] == 401 && line["user"].is_null()), "{lines:?}");
    front_end.cluster.master.says(&["the certificate is revoked"]).await;
    // A list that can't be read leaves the last in force.
    proto_config::secret_file::replace(&crl, b"no list").unwrap();
    eventually("the log says so", SOON, async || {
        front_end.log().contains("the last good one stays").then_some(())
    })
    .await;
    let mut again = front_end.caller(Credential::Certificate, Http::V1).await.unwrap();
    assert_eq!(again.get("/echo").await.unwrap().status, StatusCode::UNAUTHORIZED);
    revoke(&[]);
    eventually("jane is back", SOON, async || {
        let mut again = front_end.caller(Credential::Certificate, Http::V1).await.unwrap();
        (again.get("/echo").await.unwrap().status == StatusCode::OK).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_user_has_one_measure_whoever_he_acts_as() {
    let limits = "{requests_per_second_per_user: 1, failures_per_second_per_address: 1000}";
    let setup = Setup { limits: Some(limits.to_owned()), ..Setup::default() };
    let front_end = FrontEnd::start(setup).await.unwrap();
    let mut jane = front_end.caller(Credential::Certificate, Http::V2).await.unwrap();
    let began = Instant::now();
    let mut statuses = Vec::new();
    for name in 0..20 {
        let request = Request::get("/echo").header("impersonate-user", format!("user-{name}"));
        statuses.push(jane.ask(request.body(Full::default()).unwrap()).await.unwrap().status);
    }
    let served = statuses.iter().filter(|status| **status == StatusCode::OK).count();
    let more = usize::try_from(began.elapsed().as_secs()).unwrap() + 1;
    assert!(served <= 2 + more, "{statuses:?}");
    assert!(statuses.contains(&StatusCode::TOO_MANY_REQUESTS));
    let lines = audited(&front_end, &[("decision", json!("limited"))], 1).await;
    assert!(lines.iter().all(|line| line["user"] == "jane" && line["code"] == 429), "{lines:?}");
    // Those whom she acted as are none the worse.
    let sam = ask(&front_end, tests::front_end::TOKEN, "/echo").await;
    assert_eq!(sam.status, StatusCode::OK);
}

#[tokio::test]
async fn what_could_not_be_recorded_is_not_served() {
    for (audit, refuses) in [(", queue: 2, strangers_queue: 1", true), (", queue: 2, on_full: drop", false)] {
        let front_end = Arc::new(FrontEnd::start(Setup { audit, ..Setup::default() }).await.unwrap());
        let token = tests::front_end::TOKEN;
        let mut watching = Vec::new();
        for _ in 0..5 {
            let mut caller = front_end.caller(Credential::Token, Http::V1).await.unwrap();
            let watch =
                Request::get("/api/v1/pods?watch=1&resourceVersion=239").body(Full::default()).unwrap();
            let response = completes("a watch", caller.send(watch)).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK, "one that lasts takes no room of others");
            watching.push((response, caller));
        }
        front_end.upstream.take();
        front_end.upstream.hold(true);
        let mut under_way = JoinSet::new();
        for request in 0..2 {
            let asking = front_end.clone();
            under_way.spawn(async move { ask(&asking, token, &format!("/echo/{request}")).await.status });
        }
        eventually("both are at kube-apiserver", SOON, async || {
            (front_end.upstream.received().len() == 2).then_some(())
        })
        .await;
        let mut more = JoinSet::new();
        let asking = front_end.clone();
        more.spawn(async move { ask(&asking, token, "/echo/more").await });
        if refuses {
            let answer = completes("a refusal", more.join_next()).await.unwrap().unwrap();
            assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{answer:?}");
            assert!(answer.headers.contains_key(header::RETRY_AFTER));
            // Strangers have a room of their own, and no other's.
            assert_eq!(ask(&front_end, "nobody's", "/echo").await.status, StatusCode::UNAUTHORIZED);
            audited(&front_end, &[("decision", json!("unauthenticated"))], 1).await;
        } else {
            eventually("it is served", SOON, async || {
                (front_end.upstream.received().len() == 3).then_some(())
            })
            .await;
        }
        assert_eq!(front_end.upstream.received().len(), if refuses { 2 } else { 3 });
        front_end.upstream.hold(false);
        while let Some(status) = under_way.join_next().await {
            assert_eq!(status.unwrap(), StatusCode::OK);
        }
        for request in 0..2 {
            let path = format!("/echo/{request}");
            audited(&front_end, &[("path", json!(path)), ("code", json!(200))], 1).await;
        }
        assert_eq!(ask(&front_end, token, "/echo/after").await.status, StatusCode::OK);
        audited(&front_end, &[("path", json!("/echo/after"))], 1).await;
        drop(watching);
        audited(&front_end, &[("verb", json!("watch")), ("code", json!(200))], 5).await;
        // The line that there was no room for is there, or it is said that one is not.
        eventually("nothing is lost in silence", SOON, async || {
            assert_eq!(ask(&front_end, token, "/echo/after").await.status, StatusCode::OK);
            let lines = audited(&front_end, &[], 1).await;
            let more = lines.iter().filter(|line| line["path"] == "/echo/more").count() as u64;
            let lost: u64 = lines.iter().filter_map(|line| line["lost"].as_u64()).sum();
            assert!(more + lost <= 1, "{lines:?}");
            (more + lost == 1).then_some(())
        })
        .await;
    }
}
