//! Tokens that are signed: those of service accounts and of OIDC providers.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::Algorithm;
use serde_json::{Value, json};

use super::{
    ACCOUNTS, ACCOUNTS_JWKS, ACCOUNTS_ROTATING, ACCOUNTS_RSA, ACCOUNTS_URL, OIDC, OIDC_BARE, OIDC_DEFAULT,
    OIDC_EMAIL, OIDC_LIAR, OIDC_REQUIRED, Rows,
};
use crate::authn::{
    FailureReason,
    tests::{
        Request,
        world::{self, NOW, World, change, without},
    },
};

pub(super) const WEB: Result<&str, FailureReason> = Ok("system:serviceaccount:apps:web uid=sa-uid \
    [system:serviceaccounts,system:serviceaccounts:apps,system:authenticated] \
    {credential-id=JTI=id-1,node-name=node-1,node-uid=node-uid,pod-name=web-0,pod-uid=pod-uid} by service_account");
const WEB_BARE: Result<&str, FailureReason> = Ok("system:serviceaccount:apps:web \
    [system:serviceaccounts,system:serviceaccounts:apps,system:authenticated] by service_account");

pub(super) fn accounts(rows: &mut Rows, world: &World) {
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
    rows.row("key set that is gone", unreachable, rsa(&claims()), Err(FailureReason::Unavailable(gone)));
    let no_kid = |signer: &world::Signer| Request::bearer(&signer.token_with(json!({}), &claims()));
    rows.row("no kid: all keys are tried, the first", ACCOUNTS, no_kid(&world.rsa), WEB);
    rows.row("no kid: all keys are tried, the last", ACCOUNTS, no_kid(&world.ed25519), WEB);
    rows.row("no kid and an unknown key", ACCOUNTS, no_kid(&world.rotated), Err(FailureReason::Signature));
    rows.row(
        "unknown kid",
        ACCOUNTS,
        Request::bearer(&world.rotated.token(&claims())),
        Err(FailureReason::UnknownKey),
    );
    let rotated = Request::bearer(&world.rotated.token(&claims()));
    rows.row("unknown kid then rotated in", ACCOUNTS_ROTATING, rotated.clone(), WEB).before =
        Some(rsa(&claims()));
    rows.row("unknown kid and not rotated in", ACCOUNTS_URL, rotated, Err(FailureReason::UnknownKey))
        .before = Some(rsa(&claims()));
    let odd = |kid: &str| Request::bearer(&world.rsa.token_with(json!({"kid": kid}), &claims()));
    rows.row(
        "kid with odd bytes",
        ACCOUNTS,
        odd("../../etc/passwd\0\r\n\u{202e}' OR 1=1"),
        Err(FailureReason::UnknownKey),
    );
    rows.row("kid that is empty", ACCOUNTS, odd(""), Err(FailureReason::UnknownKey));
    let id = Err(FailureReason::Malformed("its key ID is not a short text"));
    rows.row("kid too long", ACCOUNTS, odd(&"k".repeat(257)), id.clone());
    let number = Request::bearer(&world.rsa.token_with(json!({"kid": 1}), &claims()));
    rows.row("kid that is a number", ACCOUNTS, number, id.clone());
    let list = Request::bearer(&world.rsa.token_with(json!({"kid": [world.rsa.id]}), &claims()));
    rows.row("kid that is a list", ACCOUNTS, list, id);

    let mut with = |name, field: &str, value: Value, expected| {
        rows.row(name, ACCOUNTS, rsa(&change(claims(), field, value)), expected);
    };
    with("the other issuer", "iss", json!("https://old-cluster"), WEB);
    with("wrong issuer", "iss", json!("https://elsewhere"), Err(FailureReason::Unrecognized));
    with("issuer with a slash more", "iss", json!("https://cluster/"), Err(FailureReason::Unrecognized));
    with("issuer that is a list", "iss", json!(["https://cluster"]), Err(FailureReason::Unrecognized));
    with("legacy token", "iss", json!("kubernetes/serviceaccount"), Err(FailureReason::Legacy));
    with("audience that is a text", "aud", json!("other-api"), WEB);
    with("one audience of several", "aud", json!(["vault", "api"]), WEB);
    with("wrong audience", "aud", json!(["vault"]), Err(FailureReason::Audience));
    with("empty audiences", "aud", json!([]), Err(FailureReason::Audience));
    with("audience that is a number", "aud", json!(["api", 1]), Err(FailureReason::Audience));
    with("expired", "exp", json!(NOW), Err(FailureReason::Expired));
    with("expired a second later", "exp", json!(NOW + 1), WEB);
    with("expiry with a fraction", "exp", json!(NOW as f64 + 60.5), WEB);
    with("expiry that is text", "exp", json!("2000000000"), Err(FailureReason::Claim("exp".into())));
    with("expiry that is negative", "exp", json!(-1), Err(FailureReason::Claim("exp".into())));
    with("expiry beyond all time", "exp", json!(u64::MAX), WEB);
    with("expiry beyond all numbers", "exp", json!(1e300), Err(FailureReason::Claim("exp".into())));
    with("not valid before, within leeway", "nbf", json!(NOW + 10), WEB);
    with("not yet valid", "nbf", json!(NOW + 11), Err(FailureReason::NotYetValid));
    with("issued in the future", "iat", json!(NOW + 11), Err(FailureReason::NotYetValid));
    with("subject that is no service account", "sub", json!("admin"), Err(FailureReason::Subject));
    with("subject that is a node", "sub", json!("system:node:n1"), Err(FailureReason::Subject));
    with("subject without a name", "sub", json!("system:serviceaccount:apps:"), Err(FailureReason::Subject));
    with(
        "subject with parts more",
        "sub",
        json!("system:serviceaccount:apps:web:x"),
        Err(FailureReason::Subject),
    );
    with("subject with a slash", "sub", json!("system:serviceaccount:apps:a/b"), Err(FailureReason::Subject));
    with(
        "subject of another namespace",
        "sub",
        json!("system:serviceaccount:kube-system:web"),
        Err(FailureReason::Contradiction),
    );
    with(
        "subject of another name",
        "sub",
        json!("system:serviceaccount:apps:admin"),
        Err(FailureReason::Contradiction),
    );
    with(
        "subject that is a list",
        "sub",
        json!(["system:serviceaccount:apps:web"]),
        Err(FailureReason::Claim("sub".into())),
    );
    with(
        "Kubernetes' claims that are text",
        "kubernetes.io",
        json!("apps"),
        Err(FailureReason::Claim("kubernetes.io.namespace".into())),
    );
    with(
        "UID that is a number",
        "kubernetes.io",
        json!({"serviceaccount": {"uid": 7}}),
        Err(FailureReason::Claim("kubernetes.io.serviceaccount.uid".into())),
    );
    with(
        "pod's name with a newline",
        "kubernetes.io",
        json!({"pod": {"name": "a\nb"}}),
        Err(FailureReason::ControlCharacters),
    );
    rows.row("no expiry", ACCOUNTS, rsa(&without(claims(), "exp")), Err(FailureReason::NoExpiry));
    rows.row("no audience", ACCOUNTS, rsa(&without(claims(), "aud")), Err(FailureReason::Audience));
    rows.row("no subject", ACCOUNTS, rsa(&without(claims(), "sub")), Err(FailureReason::Claim("sub".into())));
    rows.row("no issuer", ACCOUNTS, rsa(&without(claims(), "iss")), Err(FailureReason::Unrecognized));
    rows.row(
        "no claims of Kubernetes",
        ACCOUNTS,
        rsa(&without(without(claims(), "kubernetes.io"), "jti")),
        WEB_BARE,
    );
}

pub(super) fn hostile_tokens(rows: &mut Rows, world: &World) {
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
        row(name, ACCOUNTS, &format!("{head}.{payload}.{signature}"), Err(FailureReason::Algorithm));
    }
    row(
        "alg missing",
        ACCOUNTS,
        &format!("{}.{payload}.{signature}", encode("{}")),
        Err(FailureReason::Algorithm),
    );
    row(
        "alg that is a list",
        ACCOUNTS,
        &format!("{}.{payload}.{signature}", encode(r#"{"alg":["RS256"]}"#)),
        Err(FailureReason::Algorithm),
    );
    let pem = world.rsa.pem();
    let confused = |secret: &str, header: Value| world::hmac_token(secret, &header, &claims);
    row(
        "RS/HS confusion: HS256 with the public key's PEM",
        ACCOUNTS_RSA,
        &confused(&pem, json!({"alg": "HS256", "kid": world.rsa.id})),
        Err(FailureReason::Algorithm),
    );
    row(
        "RS/HS confusion without a kid",
        ACCOUNTS_RSA,
        &confused(&pem, json!({"alg": "HS256"})),
        Err(FailureReason::Algorithm),
    );
    row(
        "RS/HS confusion against a key set",
        ACCOUNTS_JWKS,
        &confused(pem.trim(), json!({"alg": "HS256", "kid": world.rsa.id})),
        Err(FailureReason::Algorithm),
    );
    row(
        "HMAC that calls itself RS256",
        ACCOUNTS_RSA,
        &confused(&pem, json!({"alg": "RS256", "kid": world.rsa.id})),
        Err(FailureReason::Signature),
    );
    row(
        "HS256 with an empty secret",
        ACCOUNTS,
        &confused("", json!({"alg": "HS256"})),
        Err(FailureReason::Algorithm),
    );
    let kid = |signer: &world::Signer, of: &world::Signer| signer.token_with(json!({"kid": of.id}), &claims);
    row(
        "wrong key type: ES256 under an RSA key's ID",
        ACCOUNTS,
        &kid(&world.p256, &world.rsa),
        Err(FailureReason::Algorithm),
    );
    row(
        "wrong key type: RS256 under an EC key's ID",
        ACCOUNTS,
        &kid(&world.rsa, &world.p256),
        Err(FailureReason::Algorithm),
    );
    row(
        "wrong key type: EdDSA under a P-384 key's ID",
        ACCOUNTS,
        &kid(&world.ed25519, &world.p384),
        Err(FailureReason::Algorithm),
    );
    row(
        "wrong curve: ES384 under a P-256 key's ID",
        ACCOUNTS,
        &kid(&world.p384, &world.p256),
        Err(FailureReason::Algorithm),
    );
    row(
        "another key under a known ID",
        ACCOUNTS,
        &kid(&world.rotated, &world.rsa),
        Err(FailureReason::Signature),
    );
    row(
        "another kind of key where there is only RSA",
        ACCOUNTS_RSA,
        &world.p256.token_with(json!({}), &claims),
        Err(FailureReason::Algorithm),
    );
    let own = world.rotated.token_with(
        json!({"kid": world.rsa.id, "jwk": world::jwks(&[&world.rotated])["keys"][0], "jku": format!("{}/own", world.stub.url)}),
        &claims,
    );
    row("a key that the token brings along", ACCOUNTS, &own, Err(FailureReason::Signature));
    let critical = world.rsa.token_with(json!({"kid": world.rsa.id, "crit": ["b64"], "b64": false}), &claims);
    row(
        "critical extensions",
        ACCOUNTS,
        &critical,
        Err(FailureReason::Malformed("its header has critical extensions")),
    );

    let forged =
        encode(&change(claims.clone(), "sub", json!("system:serviceaccount:kube-system:admin")).to_string());
    row("payload changed", ACCOUNTS, &format!("{head}.{forged}.{signature}"), Err(FailureReason::Signature));
    let head_with = encode(&json!({"alg": "RS256", "kid": world.rsa.id, "x": 1}).to_string());
    row(
        "header changed",
        ACCOUNTS,
        &format!("{head_with}.{payload}.{signature}"),
        Err(FailureReason::Signature),
    );
    row("signature missing", ACCOUNTS, &format!("{message}."), Err(FailureReason::Signature));
    row("signature cut", ACCOUNTS, &good[..good.len() - 4], Err(FailureReason::Signature));
    row("signature padded", ACCOUNTS, &format!("{good}=="), Err(FailureReason::Signature));
    row("signature that is no base64", ACCOUNTS, &format!("{message}.!!!!"), Err(FailureReason::Signature));
    let zeros = URL_SAFE_NO_PAD.encode([0; 64]);
    let elliptic = world.p256.token(&claims);
    let elliptic = elliptic.rsplit_once('.').unwrap().0;
    row("ES256 signature of zeros", ACCOUNTS, &format!("{elliptic}.{zeros}"), Err(FailureReason::Signature));
    row("two parts", ACCOUNTS, message, Err(FailureReason::Unrecognized));
    row("four parts", ACCOUNTS, &format!("{good}.x"), Err(FailureReason::Unrecognized));
    row(
        "five parts, as encrypted tokens have",
        ACCOUNTS,
        &format!("{good}.x.y"),
        Err(FailureReason::Unrecognized),
    );
    let (no_header, no_payload) = (
        Err(FailureReason::Malformed("its header is not a JSON object")),
        Err(FailureReason::Malformed("its payload is not a JSON object")),
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
        Err(FailureReason::Malformed("its header is too long")),
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

pub(super) fn oidc(rows: &mut Rows, world: &World) {
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
    let claim = |name: &str| Err(FailureReason::Claim(name.into()));
    row("OIDC, groups that are numbers", OIDC_BARE, change(claims(), "groups", json!([1])), claim("groups"));
    row("OIDC, groups that are an object", OIDC_BARE, change(claims(), "groups", json!({})), claim("groups"));
    let masters = change(claims(), "groups", json!(["dev", "system:masters"]));
    row("system: groups from OIDC", OIDC_BARE, masters.clone(), Err(FailureReason::SystemName));
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
        Err(FailureReason::SystemName),
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
    row("OIDC email not verified", OIDC_EMAIL, email(json!(false)), Err(FailureReason::EmailNotVerified));
    row(
        "OIDC email verified in words",
        OIDC_EMAIL,
        email(json!("true")),
        Err(FailureReason::EmailNotVerified),
    );
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
    row("OIDC, wrong audience", OIDC, change(claims(), "aud", json!("vault")), Err(FailureReason::Audience));
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
        Err(FailureReason::Unrecognized),
    );
    row("OIDC, expired", OIDC, change(claims(), "exp", json!(NOW - 1)), Err(FailureReason::Expired));
    row(
        "OIDC, not yet valid",
        OIDC,
        change(claims(), "nbf", json!(NOW + 60)),
        Err(FailureReason::NotYetValid),
    );
    row(
        "OIDC, user with a newline",
        OIDC_BARE,
        change(claims(), "sub", json!("a\r\nb: c")),
        Err(FailureReason::ControlCharacters),
    );
    row("a service account's token for OIDC", OIDC, world.account_claims(), Err(FailureReason::Unrecognized));
    row("an OIDC token for service accounts", ACCOUNTS, claims(), Err(FailureReason::Unrecognized));
    let liar = format!("{}/liar", world.stub.url);
    let says = format!("{liar}/.well-known/openid-configuration is about another issuer");
    rows.row(
        "OIDC discovery of another issuer",
        OIDC_LIAR,
        rsa(&change(claims(), "iss", json!(liar))),
        Err(FailureReason::Unavailable(says)),
    );
    let unknown = Request::bearer(&world.rotated.token(&claims()));
    rows.row("OIDC, unknown key", OIDC, unknown, Err(FailureReason::UnknownKey));
    let pem = world::hmac_token(&world.rsa.pem(), &json!({"alg": "HS256", "kid": world.rsa.id}), &claims());
    rows.row("OIDC, RS/HS confusion", OIDC, Request::bearer(&pem), Err(FailureReason::Algorithm));
}
