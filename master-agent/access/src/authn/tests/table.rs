//! Credential, configuration, and who that is or why nobody.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::Algorithm;
use rcgen::{DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, SerialNumber, date_time_ymd};
use serde_json::{Value, json};

use super::{
    Reason, Request,
    world::{self, NOW, World, change, without},
};

pub(super) struct Row {
    pub name: &'static str,
    /// The items of `authentication`.
    pub config: &'static str,
    /// Sent a minute before.
    pub before: Option<Request>,
    pub request: Request,
    /// Seconds after `NOW`.
    pub at: i64,
    pub expected: Result<String, Vec<Reason>>,
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
        expected: Result<&str, Reason>,
    ) -> &mut Row {
        let expected = expected.map(str::to_owned).map_err(|reason| vec![reason]);
        self.0.push(Row { name, config, before: None, request, at: 0, expected });
        self.0.last_mut().unwrap()
    }
}

pub(super) fn rows(world: &World) -> Vec<Row> {
    let mut rows = Rows(Vec::new());
    heads(&mut rows);
    certificates(&mut rows, world);
    bootstrap(&mut rows);
    accounts(&mut rows, world);
    hostile_tokens(&mut rows, world);
    oidc(&mut rows, world);
    webhook(&mut rows);
    anonymous(&mut rows, world);
    several(&mut rows, world);
    rows.0
}

const ALICE: Result<&str, Reason> = Ok("alice uid=1 [system:authenticated] by token_file");

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
    row("unknown token", authorization("Bearer mallory-token"), Err(Reason::Unrecognized));
    row("prefix of a token", authorization("Bearer alice-toke"), Err(Reason::Unrecognized));
    row("token in another case", authorization("Bearer ALICE-TOKEN"), Err(Reason::Unrecognized));
    row("nothing", Request::default(), Err(Reason::NoCredential));
    row("basic is no bearer", authorization("Basic YWxpY2U6YWxpY2U="), Err(Reason::NoCredential));
    row("empty authorization", authorization(""), Err(Reason::NoCredential));
    row("token alone", authorization("alice-token"), Err(Reason::NoCredential));
    row("scheme alone", authorization("Bearer"), Err(Reason::MalformedAuthorization));
    row("scheme and space", authorization("Bearer "), Err(Reason::MalformedAuthorization));
    row("two spaces", authorization("Bearer  alice-token"), Err(Reason::MalformedAuthorization));
    row("tab for a space", authorization("Bearer\talice-token"), Err(Reason::MalformedAuthorization));
    row(
        "something after the token",
        authorization("Bearer alice-token x"),
        Err(Reason::MalformedAuthorization),
    );
    row(
        "two tokens in one header",
        authorization("Bearer alice-token, Bearer bob-token"),
        Err(Reason::MalformedAuthorization),
    );
    let bytes = Request::default().header("authorization", b"Bearer alice-token\xff".as_slice());
    row("token with bytes above ASCII", bytes, Err(Reason::MalformedAuthorization));
    let twice = |first: &str, second: &str| authorization(first).header("authorization", second);
    row(
        "duplicate Authorization headers",
        twice("Bearer alice-token", "Bearer bob-token"),
        Err(Reason::TwoAuthorizations),
    );
    row(
        "the same Authorization header twice",
        twice("Bearer alice-token", "Bearer alice-token"),
        Err(Reason::TwoAuthorizations),
    );
    row(
        "Authorization in two schemes",
        twice("Basic YWxpY2U6YWxpY2U=", "Bearer alice-token"),
        Err(Reason::TwoAuthorizations),
    );
    row(
        "oversized token",
        authorization(&format!("Bearer {}", "a".repeat(16_385))),
        Err(Reason::TokenTooLong(16_384)),
    );
    row("longest token", authorization(&format!("Bearer {}", "a".repeat(16_384))), Err(Reason::Unrecognized));
    row(
        "token in the query",
        Request::to("/api?access_token=alice-token&token=alice-token"),
        Err(Reason::NoCredential),
    );
    row(
        "proxy authorization",
        Request::default().header("proxy-authorization", "Bearer alice-token"),
        Err(Reason::NoCredential),
    );
    row("cookie", Request::default().header("cookie", "token=alice-token"), Err(Reason::NoCredential));
    row("X-Remote-User", Request::default().header("x-remote-user", "alice"), Err(Reason::NoCredential));

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
    row("WebSocket bearer alone", Request::websocket(&alice), Err(Reason::LoneSubprotocol));
    row(
        "WebSocket bearer twice",
        Request::websocket(&format!("{alice}, {alice}, a")),
        Err(Reason::TwoTokens),
    );
    row(
        "WebSocket bearer twice in two headers",
        Request::websocket(&format!("{alice}, a")).header("sec-websocket-protocol", encoded("bob-token")),
        Err(Reason::TwoTokens),
    );
    row(
        "WebSocket bearer beside Authorization",
        Request::websocket(&format!("{alice}, a")).header("authorization", "Bearer alice-token"),
        Err(Reason::TwoTokens),
    );
    let malformed = Err(Reason::MalformedSubprotocol);
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
        Err(Reason::TokenTooLong(16_384)),
    );
    row(
        "WebSocket bearer without an upgrade",
        Request::default().header("sec-websocket-protocol", format!("{alice}, a")),
        Err(Reason::NoCredential),
    );
    row(
        "WebSocket bearer in an upgrade to SPDY",
        Request::default()
            .header("connection", "Upgrade")
            .header("upgrade", "SPDY/3.1")
            .header("sec-websocket-protocol", format!("{alice}, a")),
        Err(Reason::NoCredential),
    );
    row("WebSocket without a bearer", Request::websocket("v4.channel.k8s.io"), Err(Reason::NoCredential));
}

fn certificates(rows: &mut Rows, world: &World) {
    let ca = &world.ca;
    let named = |change: &dyn Fn(&mut rcgen::DistinguishedName)| {
        Request::certificates(world.leaf("alice", |params| change(&mut params.distinguished_name)))
    };
    let alice = Request::certificates(world.leaf("alice", |_| {}));
    let plain = Ok("alice [system:authenticated] by x509");
    rows.row("certificate", X509, alice.clone(), plain.clone());
    rows.row(
        "certificate with organizations",
        X509,
        named(&|name| {
            name.push(DnType::OrganizationName, "system:masters");
            name.push(DnType::CustomDnType(vec![2, 5, 4, 10]), "dev");
        }),
        Ok("alice [system:masters,dev,system:authenticated] by x509"),
    );
    let node = world.leaf("system:node:n1", |params| {
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    });
    rows.row(
        "kubelet's certificate",
        X509,
        Request::certificates(node),
        Ok("system:node:n1 [system:nodes,system:authenticated] by x509"),
    );
    let uid = DnType::CustomDnType(vec![1, 3, 6, 1, 4, 1, 57683, 2]);
    rows.row(
        "certificate with a UID",
        X509,
        named(&|name| name.push(uid.clone(), "uid-1")),
        Ok("alice uid=uid-1 [system:authenticated] by x509"),
    );
    rows.row(
        "certificate with a common name of another encoding",
        X509,
        named(&|name| {
            name.push(DnType::CommonName, DnValue::BmpString("alice".try_into().unwrap()));
        }),
        Err(Reason::SubjectAttribute),
    );
    rows.row("empty CN", X509, Request::certificates(world.leaf("", |_| {})), Err(Reason::CommonName));
    rows.row(
        "no CN",
        X509,
        named(&|name| {
            name.remove(DnType::CommonName);
            name.push(DnType::OrganizationName, "dev");
        }),
        Err(Reason::CommonName),
    );
    rows.row(
        "two CNs",
        X509,
        named(&|name| name.push(DnType::CustomDnType(vec![2, 5, 4, 3]), "bob")),
        Err(Reason::CommonName),
    );
    rows.row(
        "CN with a newline",
        X509,
        Request::certificates(world.leaf("alice\nx-remote-group: system:masters", |_| {})),
        Err(Reason::ControlCharacters),
    );
    rows.row("certificate's last second", X509, alice.clone(), plain.clone()).at = 30_297_599;
    rows.row("certificate expired", X509, alice.clone(), Err(Reason::CertificateExpired)).at = 366 * 86_400;
    rows.row("certificate not yet valid", X509, alice.clone(), Err(Reason::CertificateNotYetValid)).at =
        -15 * 86_400;
    let usage = |usages: Vec<ExtendedKeyUsagePurpose>| {
        Request::certificates(world.leaf("alice", |params| params.extended_key_usages = usages))
    };
    rows.row(
        "certificate without client usage",
        X509,
        usage(vec![ExtendedKeyUsagePurpose::ServerAuth]),
        Err(Reason::CertificateUsage),
    );
    rows.row("certificate without any usage", X509, usage(vec![]), Err(Reason::CertificateUsage));
    rows.row(
        "certificate with any usage is none for clients",
        X509,
        usage(vec![ExtendedKeyUsagePurpose::Any]),
        Err(Reason::CertificateUsage),
    );
    rows.row(
        "certificate with server and client usage",
        X509,
        usage(vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]),
        plain.clone(),
    );
    let serial = |serial: u64| {
        Request::certificates(
            world.leaf("alice", |params| params.serial_number = Some(SerialNumber::from(serial))),
        )
    };
    rows.row("certificate revoked", X509_CRL, serial(66), Err(Reason::CertificateRevoked));
    rows.row("certificate not revoked", X509_CRL, serial(67), plain.clone());
    rows.row("revoked without a CRL", X509, serial(66), plain.clone());
    let foreign = Request::certificates(vec![world::leaf(&world.other_ca, "alice", |_| {})]);
    rows.row("certificate of another CA", X509, foreign.clone(), Err(Reason::CertificateIssuer));
    rows.row("certificate of the other CA of a bundle", X509_CAS, foreign.clone(), plain.clone());
    let same_name = world::authority("ca");
    rows.row(
        "certificate of a CA with the same name",
        X509,
        Request::certificates(vec![world::leaf(&same_name, "alice", |_| {})]),
        Err(Reason::CertificateIssuer),
    );
    let middle = world::intermediate(ca, "middle", |_| {});
    let under = world::leaf(&middle, "alice", |_| {});
    let chained = Request::certificates(vec![under.clone(), middle.der().clone()]);
    rows.row("certificate chained through an intermediate", X509, chained.clone(), plain.clone());
    rows.row("chained, but no CRL of the intermediate", X509_CRL, chained, Err(Reason::RevocationUnknown));
    rows.row(
        "intermediate missing",
        X509,
        Request::certificates(vec![under.clone()]),
        Err(Reason::CertificateIssuer),
    );
    let second = world::intermediate(&middle, "second", |_| {});
    let deep = world::leaf(&second, "alice", |_| {});
    rows.row(
        "two intermediates in the wrong order",
        X509,
        Request::certificates(vec![deep, middle.der().clone(), second.der().clone()]),
        plain.clone(),
    );
    let no_ca = world::intermediate(ca, "no ca", |params| params.is_ca = IsCa::NoCa);
    let forged = world::leaf(&no_ca, "admin", |_| {});
    rows.row(
        "chained through a certificate that is no CA",
        X509,
        Request::certificates(vec![forged, no_ca.der().clone()]),
        Err(Reason::Certificate("EndEntityUsedAsCa".into())),
    );
    let old = world::intermediate(ca, "old", |params| params.not_after = date_time_ymd(2027, 1, 2));
    let under_old = world::leaf(&old, "alice", |_| {});
    rows.row(
        "chained through an expired intermediate",
        X509,
        Request::certificates(vec![under_old, old.der().clone()]),
        Err(Reason::CertificateExpired),
    );
    let padded = [vec![under], vec![middle.der().clone(); 2]].concat();
    rows.row(
        "two intermediates of one subject",
        X509,
        Request::certificates(padded),
        Err(Reason::Certificate("the chain has several intermediate certificates of one subject".into())),
    );
    let junk = Request::certificates(vec![b"junk".to_vec().into()]);
    rows.row("junk for a certificate", X509, junk, Err(Reason::Certificate("it is not X.509".into())));
    rows.row("no certificate", X509, Request::default(), Err(Reason::NoCredential));
    rows.row("certificate where none is asked for", TOKENS, alice, Err(Reason::Unrecognized));
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
    row("bootstrap token of a file expired", BOOT_FILE, token("expird"), Err(Reason::Expired));
    row("bootstrap token unknown", BOOT_FILE, token("noneid"), Err(Reason::UnknownBootstrapToken));
    row(
        "bootstrap token with a wrong secret",
        BOOT_FILE,
        Request::bearer("fileid.0123456789abcdee"),
        Err(Reason::WrongSecret),
    );
    row(
        "bootstrap token too short",
        BOOT_FILE,
        Request::bearer("fileid.0123456789abcde"),
        Err(Reason::Unrecognized),
    );
    row(
        "bootstrap token in capitals",
        BOOT_FILE,
        Request::bearer("FILEID.0123456789ABCDEF"),
        Err(Reason::Unrecognized),
    );
    row(
        "bootstrap token that is a path",
        BOOT_CLUSTER,
        Request::bearer("../../.0123456789abcdef"),
        Err(Reason::Unrecognized),
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
        Err(Reason::WrongSecret),
    );
    row(
        "bootstrap token not in the cluster",
        BOOT_CLUSTER,
        token("noneid"),
        Err(Reason::UnknownBootstrapToken),
    );
    row(
        "bootstrap Secret of another type",
        BOOT_CLUSTER,
        token("opaque"),
        Err(Reason::BootstrapToken("its Secret is of another type")),
    );
    row(
        "bootstrap Secret being deleted",
        BOOT_CLUSTER,
        token("delete"),
        Err(Reason::BootstrapToken("its Secret is being deleted")),
    );
    row(
        "bootstrap Secret of another ID",
        BOOT_CLUSTER,
        token("thisid"),
        Err(Reason::BootstrapToken("its Secret has another token-id")),
    );
    row("bootstrap Secret expired", BOOT_CLUSTER, token("past00"), Err(Reason::Expired));
    row(
        "bootstrap Secret with a malformed end",
        BOOT_CLUSTER,
        token("never0"),
        Err(Reason::BootstrapToken("its expiration is not RFC 3339")),
    );
    row(
        "bootstrap Secret for signing only",
        BOOT_CLUSTER,
        token("sign00"),
        Err(Reason::NotForAuthentication),
    );
    row("bootstrap Secret with usage 1", BOOT_CLUSTER, token("usage1"), Err(Reason::NotForAuthentication));
    let groups = || Err(Reason::BootstrapToken("its groups don't begin with system:bootstrappers:"));
    row("bootstrap Secret that gives system:masters", BOOT_CLUSTER, token("groups"), groups());
    row("bootstrap Secret with half a group", BOOT_CLUSTER, token("prefix"), groups());
    let no_secret = || Err(Reason::BootstrapToken("its Secret has no token-secret"));
    row("bootstrap Secret with an empty secret", BOOT_CLUSTER, token("empty0"), no_secret());
    row("bootstrap Secret without a secret", BOOT_CLUSTER, token("nosecr"), no_secret());
}

const WEB: Result<&str, Reason> = Ok("system:serviceaccount:apps:web uid=sa-uid \
    [system:serviceaccounts,system:serviceaccounts:apps,system:authenticated] \
    {credential-id=JTI=id-1,node-name=node-1,node-uid=node-uid,pod-name=web-0,pod-uid=pod-uid} by service_account");
const WEB_BARE: Result<&str, Reason> = Ok("system:serviceaccount:apps:web \
    [system:serviceaccounts,system:serviceaccounts:apps,system:authenticated] by service_account");

fn accounts(rows: &mut Rows, world: &World) {
    let claims = || world.account_claims();
    let rsa = |claims: &Value| Request::bearer(&world.rsa.token(claims));
    rows.row("service account", ACCOUNTS, rsa(&claims()), WEB);
    rows.row("service account, ES256", ACCOUNTS, Request::bearer(&world.p256.token(&claims())), WEB);
    rows.row("service account, ES384", ACCOUNTS, Request::bearer(&world.p384.token(&claims())), WEB);
    rows.row("service account, EdDSA", ACCOUNTS, Request::bearer(&world.ed25519.token(&claims())), WEB);
    for (name, algorithm, word) in [
        ("service account, RS384", Algorithm::RS384, "RS384"),
        ("service account, RS512", Algorithm::RS512, "RS512"),
        ("service account, PS256", Algorithm::PS256, "PS256"),
        ("service account, PS384", Algorithm::PS384, "PS384"),
        ("service account, PS512", Algorithm::PS512, "PS512"),
    ] {
        let header = json!({"alg": word, "kid": world.rsa.id}).to_string();
        let token = world.rsa.token_of(&header, &claims().to_string(), algorithm);
        rows.row(name, ACCOUNTS, Request::bearer(&token), WEB);
    }
    rows.row(
        "service account by WebSocket",
        ACCOUNTS,
        {
            let token = URL_SAFE_NO_PAD.encode(world.rsa.token(&claims()));
            Request::websocket(&format!("base64url.bearer.authorization.k8s.io.{token}, v4.channel.k8s.io"))
        },
        WEB,
    );
    rows.row("key set of a file", ACCOUNTS_JWKS, rsa(&claims()), WEB);
    rows.row("key set of a file, ES256", ACCOUNTS_JWKS, Request::bearer(&world.p256.token(&claims())), WEB);
    rows.row("key set of a URL", ACCOUNTS_URL, rsa(&claims()), WEB);
    let unreachable = "- service_account: {issuers: [https://cluster], audiences: [api], \
                       jwks: {url: STUB/gone, ca: stub.pem}}";
    let gone = format!("{}/gone answers 404 Not Found", world.stub.url);
    rows.row("key set that is gone", unreachable, rsa(&claims()), Err(Reason::Unavailable(gone)));
    let no_kid = |signer: &world::Signer| Request::bearer(&signer.token_with(json!({}), &claims()));
    rows.row("no kid: all keys are tried, the first", ACCOUNTS, no_kid(&world.rsa), WEB);
    rows.row("no kid: all keys are tried, the last", ACCOUNTS, no_kid(&world.ed25519), WEB);
    rows.row("no kid and an unknown key", ACCOUNTS, no_kid(&world.rotated), Err(Reason::Signature));
    rows.row(
        "unknown kid",
        ACCOUNTS,
        Request::bearer(&world.rotated.token(&claims())),
        Err(Reason::UnknownKey),
    );
    let rotated = Request::bearer(&world.rotated.token(&claims()));
    rows.row("unknown kid then rotated in", ACCOUNTS_ROTATING, rotated.clone(), WEB).before =
        Some(rsa(&claims()));
    rows.row("unknown kid and not rotated in", ACCOUNTS_URL, rotated, Err(Reason::UnknownKey)).before =
        Some(rsa(&claims()));
    let odd = |kid: &str| Request::bearer(&world.rsa.token_with(json!({"kid": kid}), &claims()));
    rows.row(
        "kid with odd bytes",
        ACCOUNTS,
        odd("../../etc/passwd\0\r\n\u{202e}' OR 1=1"),
        Err(Reason::UnknownKey),
    );
    rows.row("kid that is empty", ACCOUNTS, odd(""), Err(Reason::UnknownKey));
    let id = Err(Reason::Malformed("its key ID is no short text"));
    rows.row("kid too long", ACCOUNTS, odd(&"k".repeat(257)), id.clone());
    let number = Request::bearer(&world.rsa.token_with(json!({"kid": 1}), &claims()));
    rows.row("kid that is a number", ACCOUNTS, number, id.clone());
    let list = Request::bearer(&world.rsa.token_with(json!({"kid": [world.rsa.id]}), &claims()));
    rows.row("kid that is a list", ACCOUNTS, list, id);

    let mut with = |name, field: &str, value: Value, expected| {
        rows.row(name, ACCOUNTS, rsa(&change(claims(), field, value)), expected);
    };
    with("the other issuer", "iss", json!("https://old-cluster"), WEB);
    with("wrong issuer", "iss", json!("https://elsewhere"), Err(Reason::Unrecognized));
    with("issuer with a slash more", "iss", json!("https://cluster/"), Err(Reason::Unrecognized));
    with("issuer that is a list", "iss", json!(["https://cluster"]), Err(Reason::Unrecognized));
    with("legacy token", "iss", json!("kubernetes/serviceaccount"), Err(Reason::Legacy));
    with("audience that is a text", "aud", json!("other-api"), WEB);
    with("one audience of several", "aud", json!(["vault", "api"]), WEB);
    with("wrong audience", "aud", json!(["vault"]), Err(Reason::Audience));
    with("empty audiences", "aud", json!([]), Err(Reason::Audience));
    with("audience that is a number", "aud", json!(["api", 1]), Err(Reason::Audience));
    with("expired", "exp", json!(NOW), Err(Reason::Expired));
    with("expired a second later", "exp", json!(NOW + 1), WEB);
    with("expiry with a fraction", "exp", json!(NOW as f64 + 60.5), WEB);
    with("expiry that is text", "exp", json!("2000000000"), Err(Reason::Claim("exp".into())));
    with("expiry that is negative", "exp", json!(-1), Err(Reason::Claim("exp".into())));
    with("expiry beyond all time", "exp", json!(u64::MAX), WEB);
    with("expiry beyond all numbers", "exp", json!(1e300), Err(Reason::Claim("exp".into())));
    with("not valid before, within leeway", "nbf", json!(NOW + 10), WEB);
    with("not yet valid", "nbf", json!(NOW + 11), Err(Reason::NotYetValid));
    with("issued in the future", "iat", json!(NOW + 11), Err(Reason::NotYetValid));
    with("subject that is no service account", "sub", json!("admin"), Err(Reason::Subject));
    with("subject that is a node", "sub", json!("system:node:n1"), Err(Reason::Subject));
    with("subject without a name", "sub", json!("system:serviceaccount:apps:"), Err(Reason::Subject));
    with("subject with parts more", "sub", json!("system:serviceaccount:apps:web:x"), Err(Reason::Subject));
    with("subject with a slash", "sub", json!("system:serviceaccount:apps:a/b"), Err(Reason::Subject));
    with(
        "subject of another namespace",
        "sub",
        json!("system:serviceaccount:kube-system:web"),
        Err(Reason::Contradiction),
    );
    with(
        "subject of another name",
        "sub",
        json!("system:serviceaccount:apps:admin"),
        Err(Reason::Contradiction),
    );
    with(
        "subject that is a list",
        "sub",
        json!(["system:serviceaccount:apps:web"]),
        Err(Reason::Claim("sub".into())),
    );
    with(
        "Kubernetes' claims that are text",
        "kubernetes.io",
        json!("apps"),
        Err(Reason::Claim("kubernetes.io.namespace".into())),
    );
    with(
        "UID that is a number",
        "kubernetes.io",
        json!({"serviceaccount": {"uid": 7}}),
        Err(Reason::Claim("kubernetes.io.serviceaccount.uid".into())),
    );
    with(
        "pod's name with a newline",
        "kubernetes.io",
        json!({"pod": {"name": "a\nb"}}),
        Err(Reason::ControlCharacters),
    );
    rows.row("no expiry", ACCOUNTS, rsa(&without(claims(), "exp")), Err(Reason::NoExpiry));
    rows.row("no audience", ACCOUNTS, rsa(&without(claims(), "aud")), Err(Reason::Audience));
    rows.row("no subject", ACCOUNTS, rsa(&without(claims(), "sub")), Err(Reason::Claim("sub".into())));
    rows.row("no issuer", ACCOUNTS, rsa(&without(claims(), "iss")), Err(Reason::Unrecognized));
    rows.row(
        "no claims of Kubernetes",
        ACCOUNTS,
        rsa(&without(without(claims(), "kubernetes.io"), "jti")),
        WEB_BARE,
    );
}

fn hostile_tokens(rows: &mut Rows, world: &World) {
    let claims = world.account_claims();
    let text = claims.to_string();
    let mut row = |name, config, token: &str, expected| {
        rows.row(name, config, Request::bearer(token), expected);
    };
    let encode = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let good = world.rsa.token(&claims);
    let (message, signature) = good.rsplit_once('.').unwrap();
    let (head, payload) = message.split_once('.').unwrap();
    for (name, algorithm) in [
        ("alg none", "none"),
        ("alg None", "None"),
        ("alg that is empty", ""),
        ("alg unknown", "XS256"),
        ("alg in lower case", "rs256"),
        ("alg ES512", "ES512"),
    ] {
        let head = encode(&json!({"alg": algorithm, "kid": world.rsa.id}).to_string());
        let signature = if name.starts_with("alg n") || name.starts_with("alg N") { "" } else { signature };
        row(name, ACCOUNTS, &format!("{head}.{payload}.{signature}"), Err(Reason::Algorithm));
    }
    row("alg missing", ACCOUNTS, &format!("{}.{payload}.{signature}", encode("{}")), Err(Reason::Algorithm));
    row(
        "alg that is a list",
        ACCOUNTS,
        &format!("{}.{payload}.{signature}", encode(r#"{"alg":["RS256"]}"#)),
        Err(Reason::Algorithm),
    );
    let pem = world.rsa.pem();
    let confused = |secret: &str, header: Value| world::hmac_token(secret, &header, &claims);
    row(
        "RS/HS confusion: HS256 with the public key's PEM",
        ACCOUNTS_RSA,
        &confused(&pem, json!({"alg": "HS256", "kid": world.rsa.id})),
        Err(Reason::Algorithm),
    );
    row(
        "RS/HS confusion without a kid",
        ACCOUNTS_RSA,
        &confused(&pem, json!({"alg": "HS256"})),
        Err(Reason::Algorithm),
    );
    row(
        "RS/HS confusion against a key set",
        ACCOUNTS_JWKS,
        &confused(pem.trim(), json!({"alg": "HS256", "kid": world.rsa.id})),
        Err(Reason::Algorithm),
    );
    row(
        "HMAC that calls itself RS256",
        ACCOUNTS_RSA,
        &confused(&pem, json!({"alg": "RS256", "kid": world.rsa.id})),
        Err(Reason::Signature),
    );
    row(
        "HS256 with an empty secret",
        ACCOUNTS,
        &confused("", json!({"alg": "HS256"})),
        Err(Reason::Algorithm),
    );
    let kid = |signer: &world::Signer, of: &world::Signer| signer.token_with(json!({"kid": of.id}), &claims);
    row(
        "wrong key type: ES256 under an RSA key's ID",
        ACCOUNTS,
        &kid(&world.p256, &world.rsa),
        Err(Reason::Algorithm),
    );
    row(
        "wrong key type: RS256 under an EC key's ID",
        ACCOUNTS,
        &kid(&world.rsa, &world.p256),
        Err(Reason::Algorithm),
    );
    row(
        "wrong key type: EdDSA under a P-384 key's ID",
        ACCOUNTS,
        &kid(&world.ed25519, &world.p384),
        Err(Reason::Algorithm),
    );
    row(
        "wrong curve: ES384 under a P-256 key's ID",
        ACCOUNTS,
        &kid(&world.p384, &world.p256),
        Err(Reason::Algorithm),
    );
    row("another key under a known ID", ACCOUNTS, &kid(&world.rotated, &world.rsa), Err(Reason::Signature));
    row(
        "another kind of key where there is only RSA",
        ACCOUNTS_RSA,
        &world.p256.token_with(json!({}), &claims),
        Err(Reason::Algorithm),
    );
    let own = world.rotated.token_with(
        json!({"kid": world.rsa.id, "jwk": world::jwks(&[&world.rotated])["keys"][0], "jku": format!("{}/own", world.stub.url)}),
        &claims,
    );
    row("a key that the token brings along", ACCOUNTS, &own, Err(Reason::Signature));
    let critical = world.rsa.token_with(json!({"kid": world.rsa.id, "crit": ["b64"], "b64": false}), &claims);
    row(
        "critical extensions",
        ACCOUNTS,
        &critical,
        Err(Reason::Malformed("its header has critical extensions")),
    );

    let forged =
        encode(&change(claims.clone(), "sub", json!("system:serviceaccount:kube-system:admin")).to_string());
    row("payload changed", ACCOUNTS, &format!("{head}.{forged}.{signature}"), Err(Reason::Signature));
    let head_with = encode(&json!({"alg": "RS256", "kid": world.rsa.id, "x": 1}).to_string());
    row("header changed", ACCOUNTS, &format!("{head_with}.{payload}.{signature}"), Err(Reason::Signature));
    row("signature missing", ACCOUNTS, &format!("{message}."), Err(Reason::Signature));
    row("signature cut", ACCOUNTS, &good[..good.len() - 4], Err(Reason::Signature));
    row("signature padded", ACCOUNTS, &format!("{good}=="), Err(Reason::Signature));
    row("signature that is no base64", ACCOUNTS, &format!("{message}.!!!!"), Err(Reason::Signature));
    let zeros = URL_SAFE_NO_PAD.encode([0; 64]);
    let elliptic = world.p256.token(&claims);
    let elliptic = elliptic.rsplit_once('.').unwrap().0;
    row("ES256 signature of zeros", ACCOUNTS, &format!("{elliptic}.{zeros}"), Err(Reason::Signature));
    row("two parts", ACCOUNTS, message, Err(Reason::Unrecognized));
    row("four parts", ACCOUNTS, &format!("{good}.x"), Err(Reason::Unrecognized));
    row("five parts, as encrypted tokens have", ACCOUNTS, &format!("{good}.x.y"), Err(Reason::Unrecognized));
    let (no_header, no_payload) = (
        Err(Reason::Malformed("its header is no JSON object")),
        Err(Reason::Malformed("its payload is no JSON object")),
    );
    row("only dots", ACCOUNTS, "..", no_header.clone());
    row("header that is no base64", ACCOUNTS, &format!("!.{payload}.{signature}"), no_header.clone());
    row("header padded", ACCOUNTS, &format!("{head}=.{payload}.{signature}"), no_header.clone());
    row(
        "header that is a list",
        ACCOUNTS,
        &format!("{}.{payload}.{signature}", encode("[]")),
        no_header.clone(),
    );
    row(
        "header too long",
        ACCOUNTS,
        &format!("{}.{payload}.{signature}", "e".repeat(4097)),
        Err(Reason::Malformed("its header is too long")),
    );
    let mut signed = |name, header: &str, payload: &str, expected| {
        row(name, ACCOUNTS, &world.rsa.token_of(header, payload, Algorithm::RS256), expected);
    };
    let header = json!({"alg": "RS256", "kid": world.rsa.id}).to_string();
    let before = |field: &str| text.replacen('{', &format!("{{{field},"), 1);
    let after = |field: &str| format!("{},{field}}}", &text[..text.len() - 1]);
    signed("payload as it is", &header, &text, WEB);
    signed(
        "duplicate claim first",
        &header,
        &before(r#""sub":"system:serviceaccount:apps:x""#),
        no_payload.clone(),
    );
    signed(
        "duplicate claim last",
        &header,
        &after(r#""sub":"system:serviceaccount:apps:x""#),
        no_payload.clone(),
    );
    signed("duplicate claim by an escape", &header, &after(r#""\u0073ub":"x""#), no_payload.clone());
    signed(
        "duplicate claim of the same value",
        &header,
        &after(r#""iss":"https://cluster""#),
        no_payload.clone(),
    );
    signed("duplicate nested claim", &header, &after(r#""x":{"a":[{"b":1,"b":2}]}"#), no_payload.clone());
    signed("claim in another case is another claim", &header, &after(r#""SUB":"admin""#), WEB);
    let deep = |n: usize| after(&format!("\"x\":{}{}", "[".repeat(n), "]".repeat(n)));
    signed("claims nested deep", &header, &deep(100), WEB);
    signed("claims nested too deep", &header, &deep(5000), no_payload.clone());
    signed("payload with something after it", &header, &format!("{text} {{}}"), no_payload.clone());
    signed("payload that is text", &header, "\"x\"", no_payload.clone());
    signed("payload that is empty", &header, "", no_payload);
    let twice = format!(r#"{{"alg":"none","alg":"RS256","kid":"{}"}}"#, world.rsa.id);
    signed("duplicate alg", &twice, &text, no_header);
}

fn oidc(rows: &mut Rows, world: &World) {
    let claims = || world.oidc_claims();
    let rsa = |claims: &Value| Request::bearer(&world.rsa.token(claims));
    let mut row = |name, config, claims: Value, expected| {
        rows.row(name, config, rsa(&claims), expected);
    };
    row("OIDC", OIDC, claims(), Ok("oidc:1234 [oidc:dev,oidc:ops,system:authenticated] by oidc"));
    row("OIDC without prefixes", OIDC_BARE, claims(), Ok("1234 [dev,ops,system:authenticated] by oidc"));
    row(
        "OIDC, one group as text",
        OIDC_BARE,
        change(claims(), "groups", json!("dev")),
        Ok("1234 [dev,system:authenticated] by oidc"),
    );
    row("OIDC, no groups", OIDC_BARE, without(claims(), "groups"), Ok("1234 [system:authenticated] by oidc"));
    row(
        "OIDC, groups twice",
        OIDC_BARE,
        change(claims(), "groups", json!(["a", "a"])),
        Ok("1234 [a,system:authenticated] by oidc"),
    );
    let claim = |name: &str| Err(Reason::Claim(name.into()));
    row("OIDC, groups that are numbers", OIDC_BARE, change(claims(), "groups", json!([1])), claim("groups"));
    row("OIDC, groups that are an object", OIDC_BARE, change(claims(), "groups", json!({})), claim("groups"));
    let masters = change(claims(), "groups", json!(["dev", "system:masters"]));
    row("system: groups from OIDC", OIDC_BARE, masters.clone(), Err(Reason::SystemName));
    row(
        "system: groups from OIDC under a prefix",
        OIDC,
        masters,
        Ok("oidc:1234 [oidc:dev,oidc:system:masters,system:authenticated] by oidc"),
    );
    row(
        "system: user from OIDC",
        OIDC_BARE,
        change(claims(), "sub", json!("system:admin")),
        Err(Reason::SystemName),
    );
    let named = change(claims(), "name", json!("alice"));
    let default = format!("{}/oidc#alice [system:authenticated] by oidc", world.stub.url);
    row("OIDC, the default prefix", OIDC_DEFAULT, named, Ok(default.as_str()));
    row("OIDC, no username", OIDC_DEFAULT, claims(), claim("name"));
    row("OIDC, empty username", OIDC_DEFAULT, change(claims(), "name", json!("")), claim("name"));
    row("OIDC, username that is a number", OIDC_DEFAULT, change(claims(), "name", json!(1)), claim("name"));
    let email = |verified: Value| change(claims(), "email_verified", verified);
    let alice = "alice@example.com [system:authenticated] by oidc";
    row("OIDC email, nothing said of it", OIDC_EMAIL, claims(), Ok(alice));
    row("OIDC email verified", OIDC_EMAIL, email(json!(true)), Ok(alice));
    row("OIDC email not verified", OIDC_EMAIL, email(json!(false)), Err(Reason::EmailNotVerified));
    row("OIDC email verified in words", OIDC_EMAIL, email(json!("true")), Err(Reason::EmailNotVerified));
    row(
        "OIDC email not asked for",
        OIDC_BARE,
        email(json!(false)),
        Ok("1234 [dev,ops,system:authenticated] by oidc"),
    );
    let tenant = |value: Value| change(claims(), "tenant", value);
    row(
        "OIDC, required claim",
        OIDC_REQUIRED,
        tenant(json!("acme")),
        Ok("1234 [system:authenticated] by oidc"),
    );
    row("OIDC, required claim of another value", OIDC_REQUIRED, tenant(json!("evil")), claim("tenant"));
    row("OIDC, required claim in a list", OIDC_REQUIRED, tenant(json!(["acme"])), claim("tenant"));
    row("OIDC, required claim missing", OIDC_REQUIRED, claims(), claim("tenant"));
    row("OIDC, wrong audience", OIDC, change(claims(), "aud", json!("vault")), Err(Reason::Audience));
    row(
        "OIDC, another client of ours",
        OIDC_BARE,
        change(claims(), "aud", json!(["web"])),
        Ok("1234 [dev,ops,system:authenticated] by oidc"),
    );
    row(
        "OIDC, wrong issuer",
        OIDC,
        change(claims(), "iss", json!("https://elsewhere")),
        Err(Reason::Unrecognized),
    );
    row("OIDC, expired", OIDC, change(claims(), "exp", json!(NOW - 1)), Err(Reason::Expired));
    row("OIDC, not yet valid", OIDC, change(claims(), "nbf", json!(NOW + 60)), Err(Reason::NotYetValid));
    row(
        "OIDC, user with a newline",
        OIDC_BARE,
        change(claims(), "sub", json!("a\r\nb: c")),
        Err(Reason::ControlCharacters),
    );
    row("a service account's token for OIDC", OIDC, world.account_claims(), Err(Reason::Unrecognized));
    row("an OIDC token for service accounts", ACCOUNTS, claims(), Err(Reason::Unrecognized));
    let liar = format!("{}/liar", world.stub.url);
    let says = format!("{liar}/.well-known/openid-configuration is about another issuer");
    rows.row(
        "OIDC discovery of another issuer",
        OIDC_LIAR,
        rsa(&change(claims(), "iss", json!(liar))),
        Err(Reason::Unavailable(says)),
    );
    let unknown = Request::bearer(&world.rotated.token(&claims()));
    rows.row("OIDC, unknown key", OIDC, unknown, Err(Reason::UnknownKey));
    let pem = world::hmac_token(&world.rsa.pem(), &json!({"alg": "HS256", "kid": world.rsa.id}), &claims());
    rows.row("OIDC, RS/HS confusion", OIDC, Request::bearer(&pem), Err(Reason::Algorithm));
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
    row("webhook refuses", WEBHOOK, "mallory-token", Err(Reason::Refused));
    row("webhook has an error", WEBHOOK, "error-token", Err(Reason::Refused));
    row("webhook with our audience", WEBHOOK_API, "aud-token", Ok("alice [system:authenticated] by webhook"));
    row("webhook with another audience", WEBHOOK_API, "other-aud-token", Err(Reason::Audience));
    row(
        "webhook that knows no audiences",
        WEBHOOK_API,
        "alice-token",
        Ok("alice uid=1 [dev,ops,system:authenticated] {example.com/scope=read|write} by webhook"),
    );
    row("webhook names nobody", WEBHOOK, "nameless-token", Err(Reason::NoName));
    row("webhook names one with a newline", WEBHOOK, "newline-token", Err(Reason::ControlCharacters));
    row("webhook names one too large", WEBHOOK, "large-token", Err(Reason::UserTooLarge));
    rows.row("webhook without a token", WEBHOOK, Request::default(), Err(Reason::NoCredential));
}

fn anonymous(rows: &mut Rows, world: &World) {
    let nobody = Ok("system:anonymous [system:unauthenticated] by anonymous");
    let mut row = |name, config, request, expected| {
        rows.row(name, config, request, expected);
    };
    row("anonymous on a listed path", ANONYMOUS, Request::to("/healthz"), nobody.clone());
    row("anonymous with a query", ANONYMOUS, Request::to("/readyz?verbose"), nobody.clone());
    row("anonymous elsewhere", ANONYMOUS, Request::to("/api"), Err(Reason::NoCredential));
    for (name, path) in [
        ("anonymous below a listed path", "/healthz/etcd"),
        ("anonymous with a slash more", "/healthz/"),
        ("anonymous with two slashes", "//healthz"),
        ("anonymous with dots", "/healthz/../api"),
        ("anonymous with an escape", "/health%7a"),
        ("anonymous in capitals", "/HEALTHZ"),
        ("anonymous at the root", "/"),
    ] {
        row(name, ANONYMOUS, Request::to(path), Err(Reason::NoCredential));
    }
    row("anonymous is off by default", NONE, Request::to("/healthz"), Err(Reason::NoCredential));
    row("anonymous is off unless configured", TOKENS, Request::to("/healthz"), Err(Reason::NoCredential));
    let bad = Request::to("/healthz").header("authorization", "Bearer mallory-token");
    row("a bad token is not anonymous", ANONYMOUS, bad.clone(), Err(Reason::Unrecognized));
    row("a bad token beside other authenticators is not anonymous", SEVERAL, bad, Err(Reason::Refused));
    let foreign = vec![world::leaf(&world.other_ca, "alice", |_| {})];
    let foreign = Request { path: Some("/healthz"), certificates: foreign, ..Request::default() };
    row("a bad certificate is not anonymous", SEVERAL, foreign, Err(Reason::CertificateIssuer));
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
        Err(vec![Reason::CertificateIssuer, Reason::Refused]);
    rows.row("token file before webhook", SEVERAL, Request::bearer("alice-token"), ALICE);
    rows.row(
        "a service account among several",
        SEVERAL,
        Request::bearer(&world.rsa.token(&world.account_claims())),
        WEB,
    );
    let expired = change(world.account_claims(), "exp", json!(NOW - 1));
    rows.row("each says what is wrong", SEVERAL, Request::bearer(&world.rsa.token(&expired)), ALICE)
        .expected = Err(vec![Reason::Expired, Reason::Refused]);
    rows.row("a bootstrap token among several", SEVERAL, Request::bearer("noneid.0123456789abcdef"), ALICE)
        .expected = Err(vec![Reason::UnknownBootstrapToken, Reason::Refused]);
    rows.row("no authenticator", NONE, Request::bearer("alice-token"), Err(Reason::Unrecognized));
}
