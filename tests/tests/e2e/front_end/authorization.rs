//! The authorization webhook is asked over verified TLS.

use std::{convert::Infallible, net::SocketAddr, path::Path};

use access::{
    authz::{Attributes, Authorizers, config::AuthzConfig},
    request_info::RequestInfo,
    user::User,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use proto_config::{Source, parse};
use serde_json::{Value, json};
use tests::{
    pki::{self, Authority},
    process::TempDir,
};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

async fn review(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let uri = request.uri().to_string();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let asked: Value = serde_json::from_slice(&body).unwrap();
    let user = asked["spec"]["user"].as_str().unwrap();
    let status = match user {
        "alice" if uri == "/review?x=1" => json!({"allowed": true, "reason": asked["kind"]}),
        "mallory" => json!({"allowed": false, "denied": true, "reason": "no"}),
        "hang" => std::future::pending().await,
        _ => json!({"allowed": false}),
    };
    let answer = match user {
        "garbage" => "{".to_owned(),
        "huge" => format!("{{\"kind\": \"{}\"}}", "x".repeat(2 << 20)),
        _ => json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "metadata": {}, "spec": {}, "status": status})
            .to_string(),
    };
    let code = if user == "error" { 500 } else { 201 };
    Ok(Response::builder().status(code).body(Full::new(answer.into())).unwrap())
}

async fn serve(directory: &Path, name: &str) -> SocketAddr {
    let acceptor = TlsAcceptor::from(pki::server_config(directory, name).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(tls) = acceptor.accept(socket).await {
                    let http = hyper::server::conn::http1::Builder::new();
                    let _ = http.serve_connection(TokioIo::new(tls), service_fn(review)).await;
                }
            });
        }
    });
    address
}

fn config(url: &str, ca: &Path, policy: &str) -> AuthzConfig {
    let text = format!(
        "authorization: [{{webhook: {{url: \"{url}\", ca: {}, timeout: 1s, failure_policy: {policy}}}}}]",
        ca.display()
    );
    let source = Source { origin: "test", base_dir: Path::new("/"), check_files: true };
    parse(&text, source, |section| Some(AuthzConfig::read(section, "authorization"))).unwrap()
}

async fn decided(authorizers: &Authorizers, user: &str) -> String {
    let user = User { name: user.to_owned(), ..User::default() };
    let request = RequestInfo::resolve("GET", "/api/v1/nodes/n/proxy/", None, false).unwrap();
    let verdict = authorizers.decide(&Attributes { user: &user, request: &request }).await;
    format!("{} {} {}", verdict.allowed, verdict.authorizer.unwrap_or("-"), verdict.rule)
}

#[tokio::test]
async fn a_webhook_decides_over_verified_tls() {
    let directory = TempDir::new("authorization").unwrap();
    let directory = directory.path();
    let ca = directory.join("ca.crt");
    let authority = Authority::new("webhook").unwrap();
    authority.server(directory, "good", &["127.0.0.1"]).unwrap();
    authority.server(directory, "other", &["127.0.0.2"]).unwrap();
    Authority::new("webhook").unwrap().server(directory, "rogue", &["127.0.0.1"]).unwrap();
    std::fs::write(&ca, authority.pem()).unwrap();

    let good = format!("https://{}/review?x=1", serve(directory, "good").await);
    let rows = [
        ("alice", "true webhook SubjectAccessReview", "true webhook SubjectAccessReview"),
        ("mallory", "false webhook no", "false webhook no"),
        ("bob", "false - ", "false - "),
        ("error", "false - ", "false webhook failure"),
        ("garbage", "false - ", "false webhook failure"),
        ("huge", "false - ", "false webhook failure"),
        ("hang", "false - ", "false webhook failure"),
    ];
    let (open, _) = Authorizers::load(&config(&good, &ca, "no_opinion")).unwrap();
    let (closed, _) = Authorizers::load(&config(&good, &ca, "deny")).unwrap();
    for (user, when_open, when_closed) in rows {
        assert_eq!(decided(&open, user).await, when_open, "{user}");
        assert_eq!(decided(&closed, user).await, when_closed, "{user}");
    }
    for impostor in ["other", "rogue"] {
        let url = format!("https://{}/review?x=1", serve(directory, impostor).await);
        let (authorizers, _) = Authorizers::load(&config(&url, &ca, "deny")).unwrap();
        assert_eq!(decided(&authorizers, "alice").await, "false webhook failure", "{impostor}");
    }
}

#[tokio::test]
async fn a_webhooks_ca_is_followed() {
    let directory = TempDir::new("authorization-ca").unwrap();
    let directory = directory.path();
    let ca = directory.join("ca.crt");
    let authority = Authority::new("webhook").unwrap();
    authority.server(directory, "good", &["127.0.0.1"]).unwrap();
    std::fs::write(&ca, Authority::new("an older one").unwrap().pem()).unwrap();
    let url = format!("https://{}/review?x=1", serve(directory, "good").await);
    let (authorizers, follow) = Authorizers::load(&config(&url, &ca, "deny")).unwrap();
    let poll_twice = || follow.iter().cycle().take(2 * follow.len()).for_each(|watcher| drop(watcher.poll()));
    assert_eq!(decided(&authorizers, "alice").await, "false webhook failure");
    std::fs::write(&ca, "broken, and of another length").unwrap();
    poll_twice();
    assert_eq!(decided(&authorizers, "alice").await, "false webhook failure");
    proto_config::secret_file::replace(&ca, authority.pem().as_bytes()).unwrap();
    poll_twice();
    assert_eq!(decided(&authorizers, "alice").await, "true webhook SubjectAccessReview");
}
