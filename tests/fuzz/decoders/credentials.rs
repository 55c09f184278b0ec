//! Credentials: headers that say who a caller is, tokens, certificates and host keys.

use std::{net::Ipv4Addr, time::SystemTime};

use access::{
    authn::{
        self, Authenticator, Bootstrap, BootstrapToken, BootstrapTokens, Certificates, FailureReason,
        Presented, jwt::Unverified,
    },
    moment::Moment,
    secret::Secret,
    user::User,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::{FutureExt, future::BoxFuture};
use hyper::{
    HeaderMap, Request,
    header::{self, HeaderValue},
    http::request::Parts,
};
use master_agent::{
    front_end::headers::{IdentityForwarder, IdentityHeaders},
    http::{claims::Claims, hop::Hop},
    identity::known_hosts::{KnownHosts, Verdict},
};
use proto::target::Target;
use proto_net::tls::{ChainError, MAX_CHAIN, MAX_INTERMEDIATES, check_chain};
use russh::keys::{PublicKey, PublicKeyOrCertificate};
use rustls::pki_types::CertificateDer;
use serde::Deserialize;
use serde_json::Value;

use super::heads;

/// Headers of a request. No spelling of a header that says who the caller is gets through, and an API server reads the
/// user's own.
pub fn identity_headers(bytes: &[u8]) {
    let sent = heads::read(bytes);
    let mut kept = sent.clone();
    Claims::default().remove(&mut kept);
    for name in sent.keys() {
        assert_eq!(kept.contains_key(name), !is_claim(&as_variable(name.as_str())), "{name}");
    }

    let user = User {
        name: "jane".to_owned(),
        uid: Some("7".to_owned()),
        groups: vec!["a".to_owned(), "b".to_owned()],
        ..User::default()
    };
    let (mut headers, hop) = (sent.clone(), Hop::of(&sent));
    let peer = Ipv4Addr::new(192, 0, 2, 1).into();
    let forwarder = IdentityForwarder::new(IdentityHeaders::default());
    let identity = forwarder.lines(&user, peer).expect("the user can be named");
    forwarder.rewrite(&mut headers, &hop, &identity);
    let mut claims: Vec<(String, &[u8])> = headers
        .iter()
        .map(|(name, value)| (as_variable(name.as_str()), value.as_bytes()))
        .filter(|(name, _)| is_claim(name))
        .collect();
    claims.sort();
    let expected: [(&str, &[u8]); 5] = [
        ("X_FORWARDED_FOR", b"192.0.2.1"),
        ("X_REMOTE_GROUP", b"a"),
        ("X_REMOTE_GROUP", b"b"),
        ("X_REMOTE_UID", b"7"),
        ("X_REMOTE_USER", b"jane"),
    ];
    assert_eq!(claims, expected.map(|(name, value)| (name.to_owned(), value)));
    let connection: Vec<&HeaderValue> = headers.get_all(header::CONNECTION).iter().collect();
    assert!(connection.is_empty() || connection == ["Upgrade"], "the caller names hop-by-hop headers");
    for name in [header::AUTHORIZATION, header::HOST, header::TRANSFER_ENCODING, header::TE] {
        assert!(!headers.contains_key(&name), "{name}");
    }
}

/// The name of a header as a CGI program gets it, without `HTTP_`.
fn as_variable(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
}

fn is_claim(variable: &str) -> bool {
    matches!(variable, "FORWARDED" | "X_REAL_IP")
        || ["X_REMOTE_", "IMPERSONATE_", "X_FORWARDED_", "X_AUTH_REQUEST_"]
            .iter()
            .any(|prefix| variable.starts_with(prefix))
}

const SUBPROTOCOL: &str = "base64url.bearer.authorization.k8s.io.";
const MAX_TOKEN: usize = 16 * 1024;

fn parts(headers: HeaderMap) -> Parts {
    let mut parts = Request::new(()).into_parts().0;
    parts.headers = headers;
    parts
}

/// Headers of a request. A bearer token is one that the caller has sent, and is gone once it has been removed, without
/// anything that belongs to others.
pub fn bearer_token(bytes: &[u8]) {
    let sent = parts(heads::read(bytes));
    let certificates = Certificates::default();
    let is_token = |protocol: &String| protocol.starts_with(SUBPROTOCOL);
    let protocols = heads::elements(&sent.headers, header::SEC_WEBSOCKET_PROTOCOL);
    if let Ok(presented) = Presented::of(&sent, &certificates)
        && let Some(token) = &presented.bearer
    {
        let token = token.expose();
        assert!((1..=MAX_TOKEN).contains(&token.len()) && token.bytes().all(|byte| byte.is_ascii_graphic()));
        let encoded = format!("{SUBPROTOCOL}{}", URL_SAFE_NO_PAD.encode(token));
        let as_protocol: Vec<&String> = protocols.iter().filter(|protocol| is_token(protocol)).collect();
        let as_header = bearer(&sent.headers);
        assert!(
            as_header == Some(token.as_bytes()) || as_header.is_none() && as_protocol == [&encoded],
            "the token is another than the caller's"
        );
    }

    let mut kept = sent.headers.clone();
    authn::strip(&mut kept);
    let others: Vec<String> = protocols.into_iter().filter(|protocol| !is_token(protocol)).collect();
    assert_eq!(heads::elements(&kept, header::SEC_WEBSOCKET_PROTOCOL), others);
    let mut rest = sent.headers;
    rest.remove(header::AUTHORIZATION);
    rest.remove(header::SEC_WEBSOCKET_PROTOCOL);
    kept.remove(header::SEC_WEBSOCKET_PROTOCOL);
    assert_eq!(kept, rest);
}

/// The token of the only `Authorization` header, if it has the scheme `Bearer` and one space behind it.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let values: Vec<&HeaderValue> = headers.get_all(header::AUTHORIZATION).iter().collect();
    let [only] = values.as_slice() else { return None };
    let (scheme, token) = only.as_bytes().trim_ascii().split_at_checked(7)?;
    (scheme.eq_ignore_ascii_case(b"bearer ") && !token.is_empty() && token.iter().all(u8::is_ascii_graphic))
        .then_some(token)
}

const BOOTSTRAP_SECRET: &str = "0123456789abcdef";

/// Knows a token with every ID.
struct EveryId;

impl BootstrapTokens for EveryId {
    fn get<'a>(
        &'a self,
        _: &'a str,
        _: &'a Presented<'a>,
        _: Moment,
    ) -> BoxFuture<'a, Result<Option<BootstrapToken>, FailureReason>> {
        let secret = Secret::new(BOOTSTRAP_SECRET);
        let token = BootstrapToken { secret, expiration: None, extra_groups: Vec::new() };
        Box::pin(std::future::ready(Ok(Some(token))))
    }
}

/// A bearer token. A caller is recognised by a token of the right form with the right secret, and by no other.
pub fn bootstrap_token(bytes: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(&[&b"Bearer "[..], bytes].concat()) else { return };
    let sent = parts(HeaderMap::from_iter([(header::AUTHORIZATION, value)]));
    let certificates = Certificates::default();
    let Ok(presented) = Presented::of(&sent, &certificates) else { return };
    let bootstrap = Bootstrap::new(vec![Box::new(EveryId)]);
    let recognized = bootstrap.authenticate(&presented, Moment::now()).now_or_never().expect("nothing waits");

    let token = presented.bearer.as_ref().map(Secret::expose).unwrap_or_default();
    let id = token.strip_suffix(BOOTSTRAP_SECRET).and_then(|id| id.strip_suffix('.'));
    let id = id.filter(|id| id.len() == 6 && id.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9')));
    let name = recognized.ok().flatten().map(|recognized| recognized.user.name.clone());
    assert_eq!(name, id.map(|id| format!("system:bootstrap:{id}")));
}

/// What matters before a signature has been verified. A derived reader refuses fields that are there twice.
#[derive(Deserialize)]
struct JoseHeader {
    #[serde(default)]
    crit: Option<Value>,
}

#[derive(Deserialize)]
struct Issuer {
    #[serde(default)]
    iss: Option<Value>,
}

/// A JSON Web Token, whose issuer has one reading.
pub fn json_web_token(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(Some(token)) = Unverified::read(text) else { return };
    let parts: Vec<&str> = text.split('.').collect();
    let [header, payload, signature] = parts.as_slice() else { panic!("a token has three parts") };
    let decoded = |part: &str| URL_SAFE_NO_PAD.decode(part).expect("base64url without padding");
    let jose: JoseHeader = serde_json::from_slice(&decoded(header)).expect("a JSON object");
    assert_eq!(jose.crit, None);
    let json = decoded(payload);
    let payload: Issuer = serde_json::from_slice(&json).expect("a JSON object with one issuer at most");
    assert_eq!(token.issuer(), payload.iss.as_ref().and_then(Value::as_str));
    if payload.iss.is_some() {
        let begin = json.iter().position(|byte| *byte == b'{').expect("an object");
        let twice = URL_SAFE_NO_PAD.encode([&br#"{"iss":"another","#[..], &json[begin + 1..]].concat());
        assert!(Unverified::read(&format!("{header}.{twice}.{signature}")).is_err());
    }
}

/// A chain of certificates, the leaf first, each behind its length in two bytes. A chain that will be verified is short and
/// has each subject once.
pub fn client_chain(bytes: &[u8]) {
    let (mut rest, mut chain) = (bytes, Vec::new());
    while let Some((len, others)) = rest.split_first_chunk::<2>() {
        let len = usize::from(u16::from_be_bytes(*len)).min(others.len());
        let (der, others) = others.split_at(len);
        chain.push(CertificateDer::from(der));
        rest = others;
    }
    let Some((leaf, intermediates)) = chain.split_first() else { return };
    let size: usize = chain.iter().map(|der| der.len()).sum();
    // Certificates of one subject are told by the verifier's own parser. Another one may find a different subject in what is
    // hardly a certificate, but never two in the same bytes.
    let distinct = (1..intermediates.len()).all(|at| !intermediates[..at].contains(&intermediates[at]));
    match check_chain(leaf, intermediates) {
        Ok(()) => assert!(intermediates.len() <= MAX_INTERMEDIATES && size <= MAX_CHAIN && distinct),
        Err(ChainError::TooMany) => assert!(intermediates.len() > MAX_INTERMEDIATES),
        Err(ChainError::TooLarge) => assert!(size > MAX_CHAIN),
        Err(ChainError::SameSubject) => assert!(intermediates.len() > 1),
        Err(ChainError::Malformed) => assert!(!intermediates.is_empty()),
    }
}

/// The host key that is presented.
const HOST_KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIClzIycMTDOiJWU3LXiv/5fFKXphFj5RdRsBXnpOhbL7";

/// A known_hosts file. A host is known only by a line with its key, and never once the key is revoked.
pub fn known_hosts(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let key = PublicKey::from_openssh(HOST_KEY).expect("a key");
    let presented = PublicKeyOrCertificate::from(key);
    let dialled: Target = "n1.example:22".parse().expect("a target");
    let judge = |text: String| KnownHosts::from(text).judge(&dialled, &presented, SystemTime::UNIX_EPOCH);
    let verdict = judge(text.to_owned());
    let encoded = HOST_KEY.split(' ').nth(1).expect("the key's second field");
    let named = |line: &str| {
        let hosts = line.split_whitespace().next().unwrap_or_default();
        let listed = hosts.split(',').any(|host| host == "n1.example");
        line.contains(encoded) && (listed || hosts.starts_with("|1|"))
    };
    match verdict {
        Verdict::Known => assert!(text.lines().any(named)),
        Verdict::Revoked => assert!(text.contains("@revoked") && text.contains(encoded)),
        Verdict::Unknown => {}
    }
    let line = |line: &str| format!("{text}\n{line}\n");
    assert_eq!(judge(line(&format!("# @revoked * {HOST_KEY}"))), verdict, "a comment changes the verdict");
    assert_eq!(judge(line(&format!("@revoked * {HOST_KEY}"))), Verdict::Revoked);
    let known = if verdict == Verdict::Revoked { Verdict::Revoked } else { Verdict::Known };
    assert_eq!(judge(line(&format!("n1.example {HOST_KEY}"))), known);
}
