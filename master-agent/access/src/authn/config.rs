//! The `authentication` and `authentication_cache` sections of the configuration.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use hyper::Uri;
use proto_config::{Alternative, At, Meanings, Section};
use proto_net::tls::ClientTls;

/// The configuration of authentication.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuthnConfig {
    /// The authenticators, in the order in which they are asked.
    pub authenticators: Vec<AuthenticatorConfig>,
    pub cache: CacheConfig,
}

/// An item of `authentication`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthenticatorConfig {
    X509(X509Config),
    TokenFile(PathBuf),
    BootstrapTokens(BootstrapConfig),
    ServiceAccount(ServiceAccountConfig),
    Oidc(OidcConfig),
    Webhook(TokenReviewConfig),
    /// The paths that may be used without a credential.
    Anonymous(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct X509Config {
    pub ca: PathBuf,
    pub crls: Vec<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapConfig {
    pub file: Option<PathBuf>,
    /// Whether tokens are also read from the Secrets of the cluster.
    pub cluster: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccountConfig {
    pub issuers: Vec<String>,
    pub audiences: Vec<String>,
    /// Files of public keys or certificates in PEM.
    pub key_files: Vec<PathBuf>,
    pub jwks: Option<KeysConfig>,
    /// Whether a token is accepted only while the objects exist to which it is bound. `None` means that this is so if
    /// there is a cluster.
    pub check_bound_objects: Option<bool>,
}

/// A JSON Web Key Set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeysConfig {
    File(PathBuf),
    Url {
        url: Uri,
        ca: Option<PathBuf>,
        /// The shortest time between two fetches.
        refresh_pause: Duration,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcConfig {
    pub issuer: String,
    /// The CA of the provider's certificate. `None` means the CAs of the system.
    pub ca: Option<PathBuf>,
    /// The audiences that are accepted.
    pub client_ids: Vec<String>,
    pub username_claim: String,
    pub username_prefix: String,
    /// `None` means that no groups are taken from tokens.
    pub groups_claim: Option<String>,
    pub groups_prefix: String,
    pub required_claims: BTreeMap<String, String>,
    /// The shortest time between two fetches of the keys.
    pub refresh_pause: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenReviewConfig {
    pub url: Uri,
    pub tls: ClientTls,
    pub audiences: Vec<String>,
    /// The longest time for one call, and for the wait until it can be made.
    pub timeout: Duration,
    pub max_in_flight: usize,
    /// The maximum number of remembered tokens, both of those that are known and of those that are not.
    pub cache_size: usize,
    pub authenticated_ttl: Duration,
    pub refused_ttl: Duration,
}

/// The lifetime and size of the cache of verified tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    pub ttl: Duration,
    pub size: usize,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { ttl: Duration::from_secs(10), size: 10_000 }
    }
}

const FIELDS: Meanings = &[
    (
        "authentication",
        "Who callers are: the authenticators, in the order in which they are asked. The first that \
         recognises a caller decides; without any, nobody is recognised. All files are followed.",
    ),
    ("authentication_cache", "Verified tokens of service accounts and OpenID Connect that are remembered."),
];

const CACHE_FIELDS: Meanings =
    &[("ttl", "How long a token is remembered."), ("size", "Tokens that are remembered.")];

impl AuthnConfig {
    /// Reads `authentication`, a list of items with one kind of credential each, and `authentication_cache`.
    pub fn read(section: &Section<'_>) -> Self {
        section.document(FIELDS);
        let items = section.items("authentication");
        let authenticators = items.iter().filter_map(|item| item.section(read_item));
        let authenticators: Vec<_> = authenticators.collect();
        let x509 = |one: &&AuthenticatorConfig| matches!(one, AuthenticatorConfig::X509(_));
        if authenticators.iter().filter(x509).count() > 1 {
            section.error("authentication", "has x509 twice: one file can hold several CAs");
        }
        let cache = section.section_or_default("authentication_cache", |section| {
            section.document(CACHE_FIELDS);
            let default = CacheConfig::default();
            CacheConfig {
                ttl: section.duration("ttl", default.ttl, Duration::ZERO..=Duration::from_secs(300)),
                size: section.number("size", default.size, 0..=1_000_000),
            }
        });
        Self { authenticators, cache }
    }

    pub fn service_accounts(&self) -> impl Iterator<Item = &ServiceAccountConfig> {
        self.authenticators.iter().filter_map(|one| match one {
            AuthenticatorConfig::ServiceAccount(config) => Some(config),
            AuthenticatorConfig::X509(_)
            | AuthenticatorConfig::TokenFile(_)
            | AuthenticatorConfig::BootstrapTokens(_)
            | AuthenticatorConfig::Oidc(_)
            | AuthenticatorConfig::Webhook(_)
            | AuthenticatorConfig::Anonymous(_) => None,
        })
    }

    /// Whether callers can be recognised by a certificate.
    pub fn asks_for_certificates(&self) -> bool {
        self.authenticators.iter().any(|one| matches!(one, AuthenticatorConfig::X509(_)))
    }

    /// Whether bootstrap tokens are read from the cluster.
    pub fn needs_cluster(&self) -> bool {
        let needs = |one: &_| matches!(one, AuthenticatorConfig::BootstrapTokens(config) if config.cluster);
        self.authenticators.iter().any(needs)
    }
}

impl AuthenticatorConfig {
    /// Returns the name in the configuration.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::X509(_) => "x509",
            Self::TokenFile(_) => "token_file",
            Self::BootstrapTokens(_) => "bootstrap_tokens",
            Self::ServiceAccount(_) => "service_account",
            Self::Oidc(_) => "oidc",
            Self::Webhook(_) => "webhook",
            Self::Anonymous(_) => "anonymous",
        }
    }
}

const KINDS: [Alternative<AuthenticatorConfig>; 7] = [
    ("x509", |at| at.section(read_x509).map(AuthenticatorConfig::X509)),
    ("token_file", |at| at.private_file().map(AuthenticatorConfig::TokenFile)),
    ("bootstrap_tokens", |at| at.section(read_bootstrap).map(AuthenticatorConfig::BootstrapTokens)),
    ("service_account", |at| at.section(read_service_account).map(AuthenticatorConfig::ServiceAccount)),
    ("oidc", |at| at.section(read_oidc).map(AuthenticatorConfig::Oidc)),
    ("webhook", |at| at.section(read_webhook).map(AuthenticatorConfig::Webhook)),
    ("anonymous", |at| at.section(read_anonymous).map(AuthenticatorConfig::Anonymous)),
];

const KIND_FIELDS: Meanings = &[
    ("x509", "A client certificate. Its common name is the user, and its organizations are the groups."),
    ("token_file", "A file with lines TOKEN,USER,UID,\"GROUP1,GROUP2\", with mode 0600 or 0640."),
    ("bootstrap_tokens", "Bootstrap tokens, with which hosts join. It needs a file, or cluster: true."),
    ("service_account", "Tokens of service accounts. It needs key_files or jwks."),
    ("oidc", "ID tokens of an OpenID Connect provider."),
    ("webhook", "A TokenReview, which another server answers."),
    ("anonymous", "Paths that need no credential. All others do."),
];

fn read_item(kinds: &Section<'_>) -> Option<AuthenticatorConfig> {
    kinds.document(KIND_FIELDS);
    kinds.one_of(&KINDS).unwrap_or_else(|_| {
        let names = KINDS.map(|(name, _)| name).join(", ");
        kinds.section_error(format!("an item has exactly one of {names}"));
        None
    })
}

const X509_FIELDS: Meanings =
    &[("ca", "The CAs of callers' certificates."), ("crls", "Files of certificate revocation lists.")];

fn read_x509(section: &Section<'_>) -> Option<X509Config> {
    section.document(X509_FIELDS);
    let crls = section.list("crls");
    Some(X509Config { ca: section.required_file("ca")?, crls })
}

const BOOTSTRAP_FIELDS: Meanings = &[
    ("file", "A file of tokens, with mode 0600 or 0640."),
    ("cluster", "Also accepts the tokens in the cluster's Secrets. This needs a section kubernetes."),
];

fn read_bootstrap(section: &Section<'_>) -> Option<BootstrapConfig> {
    section.document(BOOTSTRAP_FIELDS);
    let config =
        BootstrapConfig { file: section.private_file("file"), cluster: section.or("cluster", false) };
    if config.file.is_none() && !config.cluster {
        section.section_error("needs a file, or cluster: true");
    }
    Some(config)
}

const SERVICE_ACCOUNT_FIELDS: Meanings = &[
    ("issuers", "The issuers that are accepted."),
    ("audiences", "The audiences that are accepted."),
    (
        "key_files",
        "Files of public keys or certificates, in PEM, as kube-apiserver's --service-account-key-file has \
         them.",
    ),
    ("jwks", "A JSON Web Key Set: a file or a url."),
    (
        "check_bound_objects",
        "Accepts a token only while the account, pod, node or Secret exists that it is bound to. Default: \
         true if there is a section kubernetes.",
    ),
];

fn read_service_account(section: &Section<'_>) -> Option<ServiceAccountConfig> {
    section.document(SERVICE_ACCOUNT_FIELDS);
    let config = ServiceAccountConfig {
        issuers: some(section, "issuers"),
        audiences: some(section, "audiences"),
        key_files: section.list("key_files"),
        jwks: section.section("jwks", read_jwks),
        check_bound_objects: section.optional("check_bound_objects"),
    };
    if config.key_files.is_empty() && section.at("jwks").is_none() {
        section.section_error("needs key_files or jwks");
    }
    Some(config)
}

/// Reads a list that must not be empty.
fn some(section: &Section<'_>, name: &'static str) -> Vec<String> {
    let list = section.list(name);
    if section.required_at(name).is_some_and(|at| at.is_empty_list()) {
        section.error(name, "is empty");
    }
    list
}

const JWKS_FIELDS: Meanings = &[
    ("file", "The file of the key set."),
    ("url", "The URL of the key set, which begins with https://."),
    ("ca", "The CA of the server's certificate. By default, the CAs of the system."),
    ("refresh_pause", "The shortest time between two fetches of the keys."),
];

fn read_jwks(section: &Section<'_>) -> Option<KeysConfig> {
    section.document(JWKS_FIELDS);
    let file = section.file("file");
    let url = section.at("url").and_then(|at| https(&at));
    let (ca, refresh_pause) = (section.file("ca"), refresh_pause(section));
    match (section.at("file"), section.at("url")) {
        (Some(_), None) if ca.is_some() => {
            section.error("ca", "belongs to a url");
            None
        }
        (Some(_), None) => file.map(KeysConfig::File),
        (None, Some(_)) => url.map(|url| KeysConfig::Url { url, ca, refresh_pause }),
        (Some(_), Some(_)) | (None, None) => {
            section.section_error("needs either a file or a url");
            None
        }
    }
}

fn refresh_pause(section: &Section<'_>) -> Duration {
    let range = Duration::from_secs(1)..=Duration::from_secs(3600);
    section.duration("refresh_pause", Duration::from_secs(10), range)
}

/// Reads a URL that begins with `https://`.
fn https(at: &At<'_>) -> Option<Uri> {
    let text = at.text()?;
    let uri: Option<Uri> = text.parse().ok();
    let uri = uri.filter(|uri| uri.scheme_str() == Some("https") && uri.host().is_some());
    uri.or_else(|| at.complain(text, "expected a URL that begins with https://"))
}

const OIDC_FIELDS: Meanings = &[
    ("issuer", "The URL of the provider, which begins with https://."),
    ("ca", "The CA of the provider's certificate. By default, the CAs of the system."),
    ("client_ids", "The audiences that are accepted."),
    ("username_claim", "The claim that has the user's name."),
    (
        "username_prefix",
        "What precedes the user's name; - is nothing. By default, nothing for the claim email, and the \
         issuer and # for all others.",
    ),
    ("groups_claim", "The claim that has the groups. By default, no groups are taken from tokens."),
    ("groups_prefix", "What precedes each group."),
    ("required_claims", "Claims that a token must have."),
    ("refresh_pause", "The shortest time between two fetches of the keys."),
];

fn read_oidc(section: &Section<'_>) -> Option<OidcConfig> {
    section.document(OIDC_FIELDS);
    let issuer = section.required_at("issuer").and_then(|at| {
        https(&at)?;
        at.text().map(str::to_owned)
    });
    let client_ids = some(section, "client_ids");
    let username_claim = section.or("username_claim", "sub".to_owned());
    let username_prefix: Option<String> = section.optional("username_prefix");
    let groups_claim: Option<String> = section.optional("groups_claim");
    let groups_prefix: Option<String> = section.optional("groups_prefix");
    let required_claims =
        section.items("required_claims").into_iter().filter_map(|item| item.section(read_claim));
    let required_claims = required_claims.collect();
    let (ca, refresh_pause) = (section.file("ca"), refresh_pause(section));
    let issuer = issuer?;
    // These are the defaults of kube-apiserver. They keep two providers from naming the same user.
    let username_prefix = match username_prefix {
        Some(none) if none == "-" => String::new(),
        Some(prefix) => prefix,
        None if username_claim == "email" => String::new(),
        None => format!("{issuer}#"),
    };
    for (name, prefix) in
        [("username_prefix", Some(username_prefix.as_str())), ("groups_prefix", groups_prefix.as_deref())]
    {
        if prefix.is_some_and(|prefix| prefix.starts_with("system:")) {
            section.error(name, "can't begin with system:, which Kubernetes keeps for itself");
        }
    }
    Some(OidcConfig {
        issuer,
        ca,
        client_ids,
        username_claim,
        username_prefix,
        groups_claim,
        groups_prefix: groups_prefix.unwrap_or_default(),
        required_claims,
        refresh_pause,
    })
}

const CLAIM_FIELDS: Meanings =
    &[("claim", "The name of the claim."), ("value", "The value that it must have.")];

fn read_claim(section: &Section<'_>) -> Option<(String, String)> {
    section.document(CLAIM_FIELDS);
    let (claim, value) = (section.required("claim"), section.required("value"));
    Some((claim?, value?))
}

const WEBHOOK_FIELDS: Meanings = &[
    ("url", "The URL of the server, which begins with https://."),
    ("ca", "The CA of the server's certificate. By default, the CAs of the system."),
    ("client_cert", "A client certificate for the server. It needs client_key."),
    ("client_key", "The key of client_cert, with mode 0600 or 0640."),
    ("audiences", "The audiences that are asked for."),
    ("timeout", "Time for one call, and for waiting until it can be made."),
    ("max_in_flight", "Calls at once."),
    ("cache_size", "Tokens that are remembered."),
    ("authenticated_ttl", "How long an accepted token is remembered."),
    ("refused_ttl", "How long a rejected token is remembered."),
];

fn read_webhook(section: &Section<'_>) -> Option<TokenReviewConfig> {
    section.document(WEBHOOK_FIELDS);
    let seconds = |from, to| Duration::from_secs(from)..=Duration::from_secs(to);
    let url = section.required_at("url").and_then(|at| https(&at));
    let (cert, key) = (section.file("client_cert"), section.private_file("client_key"));
    if section.at("client_cert").is_some() != section.at("client_key").is_some() {
        section.section_error("needs client_cert and client_key, or neither");
    }
    let tls = ClientTls { ca: section.file("ca"), identity: cert.zip(key) };
    let audiences = section.list("audiences");
    let timeout = section.duration("timeout", Duration::from_secs(5), seconds(1, 60));
    let max_in_flight = section.number("max_in_flight", 64, 1..=10_000);
    let cache_size = section.number("cache_size", 10_000, 0..=1_000_000);
    let authenticated_ttl = section.duration("authenticated_ttl", Duration::from_secs(30), seconds(0, 3600));
    let refused_ttl = section.duration("refused_ttl", Duration::from_secs(10), seconds(0, 3600));
    Some(TokenReviewConfig {
        url: url?,
        tls,
        audiences,
        timeout,
        max_in_flight,
        cache_size,
        authenticated_ttl,
        refused_ttl,
    })
}

const ANONYMOUS_FIELDS: Meanings = &[("paths", "Exact paths, such as /healthz.")];

fn read_anonymous(section: &Section<'_>) -> Option<Vec<String>> {
    section.document(ANONYMOUS_FIELDS);
    let paths = some(section, "paths");
    for at in section.items("paths") {
        if let Some(path) = at.text()
            && (!path.starts_with('/') || path.contains(['?', '#', '*']))
        {
            at.error("expected an exact path such as /healthz");
        }
    }
    Some(paths)
}
