//! Credential, configuration, and who that is or why nobody.

mod certificates;
mod jwt;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::json;

use super::{
    FailureReason, Request,
    world::{self, NOW, World, change},
};
use jwt::WEB;

pub(super) struct Row {
    pub name: &'static str,
    /// The items of `authentication`.
    pub config: &'static str,
    /// Sent a minute before.
    pub before: Option<Request>,
    pub request: Request,
    /// Seconds after `NOW`.
    pub at: i64,
    pub expected: Result<String, Vec<FailureReason>>,
}

const X509: &str = "- x509: {ca: ca.pem}";
const X509_CRL: &str = "- x509: {ca: ca.pem, crls: [crl.pem]}";
const X509_CAS: &str = "- x509: {ca: cas.pem}";
const TOKENS: &str = "- token_file: tokens.csv";
const BOOT_FILE: &str = "- bootstrap_tokens: {file: bootstrap.csv}";
const BOOT_CLUSTER: &str = "- bootstrap_tokens: {file: bootstrap.csv, cluster: true}";
const ACCOUNTS: &str = "- service_account: {issuers: [https://cluster, https://old-cluster], audiences: [api, other-api], key_files: [keys.pem]}";
const ACCOUNTS_RSA: &str =
    "- service_account: {issuers: [https://cluster], audiences: [api], key_files: [rsa.pem]}";
const ACCOUNTS_JWKS: &str =
    "- service_account: {issuers: [https://cluster], audiences: [api], jwks: {file: jwks.json}}";
const ACCOUNTS_URL: &str =
    "- service_account: {issuers: [https://cluster], audiences: [api], jwks: {url: STUB/jwks, ca: stub.pem}}";
const ACCOUNTS_ROTATING: &str = "- service_account: {issuers: [https://cluster], audiences: [api], jwks: {url: STUB/rotating, ca: stub.pem}}";
const OIDC: &str = "- oidc: {issuer: STUB/oidc, ca: stub.pem, client_ids: [kubectl], username_prefix: 'oidc:', \
                    groups_claim: groups, groups_prefix: 'oidc:'}";
const OIDC_BARE: &str = "- oidc: {issuer: STUB/oidc, ca: stub.pem, client_ids: [web, kubectl], username_prefix: '-', \
                         groups_claim: groups}";
const OIDC_DEFAULT: &str =
    "- oidc: {issuer: STUB/oidc, ca: stub.pem, client_ids: [kubectl], username_claim: name}";
const OIDC_EMAIL: &str =
    "- oidc: {issuer: STUB/oidc, ca: stub.pem, client_ids: [kubectl], username_claim: email}";
const OIDC_REQUIRED: &str = "- oidc: {issuer: STUB/oidc, ca: stub.pem, client_ids: [kubectl], username_prefix: '-', \
                             required_claims: [{claim: tenant, value: acme}]}";
const OIDC_LIAR: &str = "- oidc: {issuer: STUB/liar, ca: stub.pem, client_ids: [kubectl]}";
const WEBHOOK: &str = "- webhook: {url: STUB/review, ca: stub.pem}";
const WEBHOOK_API: &str = "- webhook: {url: STUB/review, ca: stub.pem, audiences: [api]}";
const ANONYMOUS: &str = "- anonymous: {paths: [/healthz, /readyz]}";
const SEVERAL: &str = "- anonymous: {paths: [/healthz]}
- x509: {ca: ca.pem}
- token_file: tokens.csv
- bootstrap_tokens: {file: bootstrap.csv}
- service_account: {issuers: [https://cluster], audiences: [api], key_files: [keys.pem]}
- webhook: {url: STUB/review, ca: stub.pem}";
const NONE: &str = "";

struct Rows(Vec<Row>);

impl Rows {
    fn row(
        &mut self,
        name: &'static str,
        config: &'static str,
        request: Request,
        expected: Result<&str, FailureReason>,
    ) -> &mut Row {
        let expected = expected.map(str::to_owned).map_err(|reason| vec![reason]);
        self.0.push(Row { name, config, before: None, request, at: 0, expected });
        self.0.last_mut().unwrap()
    }
}

pub(super) fn rows(world: &World) -> Vec<Row> {
    let mut rows = Rows(Vec::new());
    heads(&mut rows);
    certificates::rows(&mut rows, world);
    bootstrap(&mut rows);
    jwt::accounts(&mut rows, world);
    jwt::hostile_tokens(&mut rows, world);
    jwt::oidc(&mut rows, world);
    webhook(&mut rows);
    anonymous(&mut rows, world);
    several(&mut rows, world);
    rows.0
}

const ALICE: Result<&str, FailureReason> = Ok("alice uid=1 [system:authenticated] by token_file");

fn heads(rows: &mut Rows) {
    let authorization = |value: &str| Request::default().header("authorization", value);
    let mut row = |name, request, expected| {
        rows.row(name, TOKENS, request, expected);
    };
    row("bearer", authorization("Bearer alice-token"), ALICE);
    row("lower-case scheme", authorization("bearer alice-token"), ALICE);
    row("odd-case scheme", authorization("bEARER alice-token"), ALICE);
    row("spaces around", authorization("  Bearer alice-token  "), ALICE);
    row(
        "groups in quotes",
        authorization("Bearer bob-token"),
        Ok("bob uid=2 [dev,ops,system:authenticated] by token_file"),
    );
    row(
        "token file gives system:masters",
        authorization("Bearer admin-token"),
        Ok("admin [system:masters,system:authenticated] by token_file"),
    );
    row(
        "token with quotes and comma",
        authorization("Bearer quoted,\"token"),
        Ok("carol uid=3 [one,system:authenticated] by token_file"),
    );
    row(
        "token of three parts in the token file",
        authorization("Bearer three.part.token"),
        Ok("dave uid=4 [system:authenticated] by token_file"),
    );
    row("unknown token", authorization("Bearer mallory-token"), Err(FailureReason::Unrecognized));
    row("prefix of a token", authorization("Bearer alice-toke"), Err(FailureReason::Unrecognized));
    row("token in another case", authorization("Bearer ALICE-TOKEN"), Err(FailureReason::Unrecognized));
    row("nothing", Request::default(), Err(FailureReason::NoCredential));
    row("basic is no bearer", authorization("Basic YWxpY2U6YWxpY2U="), Err(FailureReason::NoCredential));
    row("empty authorization", authorization(""), Err(FailureReason::NoCredential));
    row("token alone", authorization("alice-token"), Err(FailureReason::NoCredential));
    row("scheme alone", authorization("Bearer"), Err(FailureReason::MalformedAuthorization));
    row("scheme and space", authorization("Bearer "), Err(FailureReason::MalformedAuthorization));
    row("two spaces", authorization("Bearer  alice-token"), Err(FailureReason::MalformedAuthorization));
    row("tab for a space", authorization("Bearer\talice-token"), Err(FailureReason::MalformedAuthorization));
    row(
        "something after the token",
        authorization("Bearer alice-token x"),
        Err(FailureReason::MalformedAuthorization),
    );
    row(
        "two tokens in one header",
        authorization("Bearer alice-token, Bearer bob-token"),
        Err(FailureReason::MalformedAuthorization),
    );
    let bytes = Request::default().header("authorization", b"Bearer alice-token\xff".as_slice());
    row("token with bytes above ASCII", bytes, Err(FailureReason::MalformedAuthorization));
    let twice = |first: &str, second: &str| authorization(first).header("authorization", second);
    row(
        "duplicate Authorization headers",
        twice("Bearer alice-token", "Bearer bob-token"),
        Err(FailureReason::TwoAuthorizations),
    );
    row(
        "the same Authorization header twice",
        twice("Bearer alice-token", "Bearer alice-token"),
        Err(FailureReason::TwoAuthorizations),
    );
    row(
        "Authorization in two schemes",
        twice("Basic YWxpY2U6YWxpY2U=", "Bearer alice-token"),
        Err(FailureReason::TwoAuthorizations),
    );
    row(
        "oversized token",
        authorization(&format!("Bearer {}", "a".repeat(16_385))),
        Err(FailureReason::TokenTooLong(16_384)),
    );
    row(
        "longest token",
        authorization(&format!("Bearer {}", "a".repeat(16_384))),
        Err(FailureReason::Unrecognized),
    );
    row(
        "token in the query",
        Request::to("/api?access_token=alice-token&token=alice-token"),
        Err(FailureReason::NoCredential),
    );
    row(
        "proxy authorization",
        Request::default().header("proxy-authorization", "Bearer alice-token"),
        Err(FailureReason::NoCredential),
    );
    row("cookie", Request::default().header("cookie", "token=alice-token"), Err(FailureReason::NoCredential));
    row(
        "X-Remote-User",
        Request::default().header("x-remote-user", "alice"),
        Err(FailureReason::NoCredential),
    );

    let prefix = "base64url.bearer.authorization.k8s.io.";
    let encoded = |token: &str| format!("{prefix}{}", URL_SAFE_NO_PAD.encode(token));
    let alice = encoded("alice-token");
    row("WebSocket bearer", Request::websocket(&format!("{alice}, v4.channel.k8s.io")), ALICE);
    row("WebSocket bearer last", Request::websocket(&format!("v4.channel.k8s.io,{alice}")), ALICE);
    row(
        "WebSocket bearer in a header of its own",
        Request::websocket("v4.channel.k8s.io").header("sec-websocket-protocol", alice.as_str()),
        ALICE,
    );
    row("WebSocket bearer alone", Request::websocket(&alice), Err(FailureReason::LoneSubprotocol));
    row(
        "WebSocket bearer twice",
        Request::websocket(&format!("{alice}, {alice}, a")),
        Err(FailureReason::TwoTokens),
    );
    row(
        "WebSocket bearer twice in two headers",
        Request::websocket(&format!("{alice}, a")).header("sec-websocket-protocol", encoded("bob-token")),
        Err(FailureReason::TwoTokens),
    );
    row(
        "WebSocket bearer beside Authorization",
        Request::websocket(&format!("{alice}, a")).header("authorization", "Bearer alice-token"),
        Err(FailureReason::TwoTokens),
    );
    let malformed = Err(FailureReason::MalformedSubprotocol);
    row(
        "bad base64 in the WebSocket protocol",
        Request::websocket(&format!("{prefix}a!b, a")),
        malformed.clone(),
    );
    row(
        "padded base64 in the WebSocket protocol",
        Request::websocket(&format!("{prefix}YQ==, a")),
        malformed.clone(),
    );
    row(
        "standard base64 in the WebSocket protocol",
        Request::websocket(&format!("{prefix}+/8a, a")),
        malformed.clone(),
    );
    row(
        "WebSocket bearer that is not UTF-8",
        Request::websocket(&format!("{prefix}_w, a")),
        malformed.clone(),
    );
    row("WebSocket bearer that is empty", Request::websocket(&format!("{prefix}, a")), malformed.clone());
    row("WebSocket bearer with a newline", Request::websocket(&format!("{}, a", encoded("a\nb"))), malformed);
    row(
        "oversized WebSocket bearer",
        Request::websocket(&format!("{}, a", encoded(&"a".repeat(16_390)))),
        Err(FailureReason::TokenTooLong(16_384)),
    );
    row(
        "WebSocket bearer without an upgrade",
        Request::default().header("sec-websocket-protocol", format!("{alice}, a")),
        Err(FailureReason::NoCredential),
    );
    row(
        "WebSocket bearer in an upgrade to SPDY",
        Request::default()
            .header("connection", "Upgrade")
            .header("upgrade", "SPDY/3.1")
            .header("sec-websocket-protocol", format!("{alice}, a")),
        Err(FailureReason::NoCredential),
    );
    row(
        "WebSocket without a bearer",
        Request::websocket("v4.channel.k8s.io"),
        Err(FailureReason::NoCredential),
    );
}

fn bootstrap(rows: &mut Rows) {
    let token = |id: &str| Request::bearer(&format!("{id}.0123456789abcdef"));
    let mut row = |name, config, request, expected| {
        rows.row(name, config, request, expected);
    };
    row(
        "bootstrap token of a file",
        BOOT_FILE,
        token("fileid"),
        Ok("system:bootstrap:fileid [system:bootstrappers,system:authenticated] by bootstrap_tokens"),
    );
    row(
        "bootstrap token of a file with groups",
        BOOT_FILE,
        token("lasts0"),
        Ok("system:bootstrap:lasts0 \
            [system:bootstrappers,system:bootstrappers:a,system:bootstrappers:b,system:authenticated] by bootstrap_tokens"),
    );
    row("bootstrap token of a file expired", BOOT_FILE, token("expird"), Err(FailureReason::Expired));
    row("bootstrap token unknown", BOOT_FILE, token("noneid"), Err(FailureReason::UnknownBootstrapToken));
    row(
        "bootstrap token with a wrong secret",
        BOOT_FILE,
        Request::bearer("fileid.0123456789abcdee"),
        Err(FailureReason::WrongSecret),
    );
    row(
        "bootstrap token too short",
        BOOT_FILE,
        Request::bearer("fileid.0123456789abcde"),
        Err(FailureReason::Unrecognized),
    );
    row(
        "bootstrap token in capitals",
        BOOT_FILE,
        Request::bearer("FILEID.0123456789ABCDEF"),
        Err(FailureReason::Unrecognized),
    );
    row(
        "bootstrap token that is a path",
        BOOT_CLUSTER,
        Request::bearer("../../.0123456789abcdef"),
        Err(FailureReason::Unrecognized),
    );
    row(
        "bootstrap token of the cluster",
        BOOT_CLUSTER,
        token("goodid"),
        Ok(
            "system:bootstrap:goodid [system:bootstrappers,system:bootstrappers:workers,system:authenticated] \
            by bootstrap_tokens",
        ),
    );
    row(
        "bootstrap token of the cluster without an end",
        BOOT_CLUSTER,
        token("plain0"),
        Ok("system:bootstrap:plain0 [system:bootstrappers,system:authenticated] by bootstrap_tokens"),
    );
    row(
        "bootstrap token of the cluster with a wrong secret",
        BOOT_CLUSTER,
        Request::bearer("goodid.0123456789abcdee"),
        Err(FailureReason::WrongSecret),
    );
    row(
        "bootstrap token not in the cluster",
        BOOT_CLUSTER,
        token("noneid"),
        Err(FailureReason::UnknownBootstrapToken),
    );
    row(
        "bootstrap Secret of another type",
        BOOT_CLUSTER,
        token("opaque"),
        Err(FailureReason::BootstrapToken("its Secret is of another type")),
    );
    row(
        "bootstrap Secret being deleted",
        BOOT_CLUSTER,
        token("delete"),
        Err(FailureReason::BootstrapToken("its Secret is being deleted")),
    );
    row(
        "bootstrap Secret of another ID",
        BOOT_CLUSTER,
        token("thisid"),
        Err(FailureReason::BootstrapToken("its Secret has another token-id")),
    );
    row("bootstrap Secret expired", BOOT_CLUSTER, token("past00"), Err(FailureReason::Expired));
    row(
        "bootstrap Secret with a malformed end",
        BOOT_CLUSTER,
        token("never0"),
        Err(FailureReason::BootstrapToken("its expiration is not RFC 3339")),
    );
    row(
        "bootstrap Secret for signing only",
        BOOT_CLUSTER,
        token("sign00"),
        Err(FailureReason::NotForAuthentication),
    );
    row(
        "bootstrap Secret with usage 1",
        BOOT_CLUSTER,
        token("usage1"),
        Err(FailureReason::NotForAuthentication),
    );
    let groups = || Err(FailureReason::BootstrapToken("its groups don't begin with system:bootstrappers:"));
    row("bootstrap Secret that gives system:masters", BOOT_CLUSTER, token("groups"), groups());
    row("bootstrap Secret with half a group", BOOT_CLUSTER, token("prefix"), groups());
    let no_secret = || Err(FailureReason::BootstrapToken("its Secret has no token-secret"));
    row("bootstrap Secret with an empty secret", BOOT_CLUSTER, token("empty0"), no_secret());
    row("bootstrap Secret without a secret", BOOT_CLUSTER, token("nosecr"), no_secret());
}

fn webhook(rows: &mut Rows) {
    let mut row =
        |name, config, token: &str, expected| rows.row(name, config, Request::bearer(token), expected).at;
    row(
        "webhook",
        WEBHOOK,
        "alice-token",
        Ok("alice uid=1 [dev,ops,system:authenticated] {example.com/scope=read|write} by webhook"),
    );
    row("webhook refuses", WEBHOOK, "mallory-token", Err(FailureReason::Refused));
    row("webhook has an error", WEBHOOK, "error-token", Err(FailureReason::Refused));
    row("webhook with our audience", WEBHOOK_API, "aud-token", Ok("alice [system:authenticated] by webhook"));
    row("webhook with another audience", WEBHOOK_API, "other-aud-token", Err(FailureReason::Audience));
    row(
        "webhook that knows no audiences",
        WEBHOOK_API,
        "alice-token",
        Ok("alice uid=1 [dev,ops,system:authenticated] {example.com/scope=read|write} by webhook"),
    );
    row("webhook names nobody", WEBHOOK, "nameless-token", Err(FailureReason::NoName));
    row("webhook names one with a newline", WEBHOOK, "newline-token", Err(FailureReason::ControlCharacters));
    row("webhook names one too large", WEBHOOK, "large-token", Err(FailureReason::UserTooLarge));
    rows.row("webhook without a token", WEBHOOK, Request::default(), Err(FailureReason::NoCredential));
}

fn anonymous(rows: &mut Rows, world: &World) {
    let nobody = Ok("system:anonymous [system:unauthenticated] by anonymous");
    let mut row = |name, config, request, expected| {
        rows.row(name, config, request, expected);
    };
    row("anonymous on a listed path", ANONYMOUS, Request::to("/healthz"), nobody.clone());
    row("anonymous with a query", ANONYMOUS, Request::to("/readyz?verbose"), nobody.clone());
    row("anonymous elsewhere", ANONYMOUS, Request::to("/api"), Err(FailureReason::NoCredential));
    for (name, path) in [
        ("anonymous below a listed path", "/healthz/etcd"),
        ("anonymous with a slash more", "/healthz/"),
        ("anonymous with two slashes", "//healthz"),
        ("anonymous with dots", "/healthz/../api"),
        ("anonymous with an escape", "/health%7a"),
        ("anonymous in capitals", "/HEALTHZ"),
        ("anonymous at the root", "/"),
    ] {
        row(name, ANONYMOUS, Request::to(path), Err(FailureReason::NoCredential));
    }
    row("anonymous is off by default", NONE, Request::to("/healthz"), Err(FailureReason::NoCredential));
    row(
        "anonymous is off unless configured",
        TOKENS,
        Request::to("/healthz"),
        Err(FailureReason::NoCredential),
    );
    let bad = Request::to("/healthz").header("authorization", "Bearer mallory-token");
    row("a bad token is not anonymous", ANONYMOUS, bad.clone(), Err(FailureReason::Unrecognized));
    row(
        "a bad token beside other authenticators is not anonymous",
        SEVERAL,
        bad,
        Err(FailureReason::Refused),
    );
    let foreign = vec![world::leaf(&world.other_ca, "alice", |_| {})];
    let foreign = Request { path: Some("/healthz"), certificates: foreign, ..Request::default() };
    row("a bad certificate is not anonymous", SEVERAL, foreign, Err(FailureReason::CertificateIssuer));
    let basic = Request::to("/healthz").header("authorization", "Basic YWxpY2U6YWxpY2U=");
    row("another scheme is no credential", ANONYMOUS, basic, nobody);
}

fn several(rows: &mut Rows, world: &World) {
    let foreign = vec![world::leaf(&world.other_ca, "alice", |_| {})];
    let with = |certificates: Vec<_>, token: &str| Request { certificates, ..Request::bearer(token) };
    let alice = world.leaf("alice", |_| {});
    rows.row(
        "the first that recognises the caller wins",
        SEVERAL,
        with(alice.clone(), "bob-token"),
        Ok("alice [system:authenticated] by x509"),
    );
    rows.row(
        "a token beside a bad certificate",
        SEVERAL,
        with(foreign.clone(), "bob-token"),
        Ok("bob uid=2 [dev,ops,system:authenticated] by token_file"),
    );
    rows.row(
        "a good certificate beside a bad token",
        SEVERAL,
        with(alice, "mallory-token"),
        Ok("alice [system:authenticated] by x509"),
    );
    rows.row("two bad credentials", SEVERAL, with(foreign, "mallory-token"), ALICE).expected =
        Err(vec![FailureReason::CertificateIssuer, FailureReason::Refused]);
    rows.row("token file before webhook", SEVERAL, Request::bearer("alice-token"), ALICE);
    rows.row(
        "a service account among several",
        SEVERAL,
        Request::bearer(&world.rsa.token(&world.account_claims())),
        WEB,
    );
    let expired = change(world.account_claims(), "exp", json!(NOW - 1));
    rows.row("each says what is wrong", SEVERAL, Request::bearer(&world.rsa.token(&expired)), ALICE)
        .expected = Err(vec![FailureReason::Expired, FailureReason::Refused]);
    rows.row("a bootstrap token among several", SEVERAL, Request::bearer("noneid.0123456789abcdef"), ALICE)
        .expected = Err(vec![FailureReason::UnknownBootstrapToken, FailureReason::Refused]);
    rows.row("no authenticator", NONE, Request::bearer("alice-token"), Err(FailureReason::Unrecognized));
}
