//! The `authorization` section of the configuration.

use std::{path::PathBuf, time::Duration};

use hyper::Uri;
use proto_config::{Alternative, At, Meanings, Section};
use proto_net::tls::ClientTls;

use super::paths::PathRule;

/// The authorizers, in the order in which they are asked. Without an authorizer, everything is denied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuthzConfig(pub Vec<AuthorizerConfig>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthorizerConfig {
    Rbac(RbacConfig),
    Node(NodeConfig),
    Webhook(Box<SubjectAccessReviewConfig>),
    Paths(Vec<PathRule>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbacConfig {
    /// The files, and the directories of `.yaml`, `.yml` and `.json` files.
    pub files: Vec<PathBuf>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeConfig {
    /// Whether to allow requests about which only kube-apiserver's node authorizer can decide, as it knows which pods
    /// run on a node.
    pub defer_to_apiserver: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubjectAccessReviewConfig {
    pub url: Uri,
    pub tls: ClientTls,
    /// The longest time for a whole call, including the wait until it can be made.
    pub timeout: Duration,
    /// How long an answer that allows a request is remembered. With zero, the webhook is asked every time.
    pub allow_ttl: Duration,
    /// How long any other answer is remembered.
    pub deny_ttl: Duration,
    pub cache_entries: usize,
    /// The maximum number of concurrent calls.
    pub max_in_flight: usize,
    /// Whether a failure of the webhook denies the request instead of leaving it to the next authorizers.
    pub failure_denies: bool,
}

impl AuthzConfig {
    /// Reads the field `name`, a list of items that each have exactly one key.
    pub fn read(section: &Section<'_>, name: &'static str) -> Self {
        Self(
            section
                .items(name)
                .iter()
                .filter_map(|at| at.section(|item| AuthorizerConfig::read(item)))
                .collect(),
        )
    }
}

impl AuthorizerConfig {
    /// Returns the name in audit records, which is the key of the item.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Rbac(_) => "rbac",
            Self::Node(_) => "node",
            Self::Webhook(_) => "webhook",
            Self::Paths(_) => "paths",
        }
    }

    fn read(item: &Section<'_>) -> Option<Self> {
        item.document(KIND_FIELDS);
        item.one_of(&KINDS).unwrap_or_else(|given| {
            item.section_error(match given {
                0 => "has no authorizer: rbac, node, webhook or paths",
                _ => "has more than one authorizer: give each an item of its own",
            });
            None
        })
    }
}

const KINDS: [Alternative<AuthorizerConfig>; 4] = [
    ("rbac", |at| at.section(read_rbac).map(AuthorizerConfig::Rbac)),
    ("node", |at| at.section(read_node).map(AuthorizerConfig::Node)),
    ("webhook", |at| at.section(read_webhook).map(AuthorizerConfig::Webhook)),
    ("paths", |at| at.section(read_paths).map(AuthorizerConfig::Paths)),
];

const KIND_FIELDS: Meanings = &[
    ("rbac", "The rules of RBAC objects in files."),
    ("node", "What kube-apiserver's node authorizer allows kubelets."),
    ("webhook", "A SubjectAccessReview, which another server answers."),
    ("paths", "Rules for paths. The first rule that matches decides."),
];

const NODE_FIELDS: Meanings = &[(
    "defer_to_apiserver",
    "Allows what only kube-apiserver's node authorizer can decide, as it knows which pods run on a node.",
)];

fn read_node(section: &Section<'_>) -> Option<NodeConfig> {
    section.document(NODE_FIELDS);
    Some(NodeConfig { defer_to_apiserver: section.or("defer_to_apiserver", false) })
}

const RBAC_FIELDS: Meanings = &[("files", "Files, and directories of .yaml, .yml and .json files.")];

fn read_rbac(section: &Section<'_>) -> Option<RbacConfig> {
    section.document(RBAC_FIELDS);
    let files: Vec<PathBuf> = section.list("files");
    section.states_required("files");
    if files.is_empty() {
        section.error("files", "names no file or directory");
        return None;
    }
    Some(RbacConfig { files })
}

const WEBHOOK_FIELDS: Meanings = &[
    ("url", "The URL of the server, which begins with https://."),
    ("ca", "The CA of the server's certificate. By default, the CAs of the system."),
    ("client_cert", "A client certificate for the server. It needs client_key."),
    ("client_key", "The key of client_cert, with mode 0600 or 0640."),
    ("timeout", "Time for one call, including the wait until it can be made."),
    ("allow_ttl", "How long the answer that a request is allowed is remembered. Zero asks every time."),
    ("deny_ttl", "How long any other answer is remembered."),
    ("cache_entries", "Answers that are remembered."),
    ("max_in_flight", "Calls at once."),
    (
        "failure_policy",
        "What a failure of the server means: no_opinion leaves the request to the next authorizers, deny \
         denies it.",
    ),
];

fn read_webhook(section: &Section<'_>) -> Option<Box<SubjectAccessReviewConfig>> {
    section.document(WEBHOOK_FIELDS);
    let url = section.required::<String>("url").and_then(|text| match text.parse::<Uri>() {
        Ok(url) if url.scheme_str() == Some("https") && url.host().is_some() => Some(url),
        Ok(_) | Err(_) => {
            section.error("url", "is not an HTTPS URL");
            None
        }
    });
    let ca = section.file("ca");
    let identity = match (section.file("client_cert"), section.private_file("client_key")) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => {
            section.section_error("client_cert and client_key go together");
            None
        }
    };
    let seconds = Duration::from_secs;
    let failure_denies = section.word("failure_policy", &["no_opinion", "deny"]) == Some("deny");
    section.states_default("failure_policy", "no_opinion");
    Some(Box::new(SubjectAccessReviewConfig {
        tls: ClientTls { ca, identity },
        timeout: section.duration("timeout", seconds(5), Duration::from_millis(100)..=seconds(60)),
        allow_ttl: section.duration("allow_ttl", seconds(300), Duration::ZERO..=seconds(3600)),
        deny_ttl: section.duration("deny_ttl", seconds(30), Duration::ZERO..=seconds(3600)),
        cache_entries: section.number("cache_entries", 10_000, 1..=1_000_000),
        max_in_flight: section.number("max_in_flight", 64, 1..=10_000),
        failure_denies,
        url: url?,
    }))
}

const PATHS_FIELDS: Meanings = &[("rules", "The rules, in the order in which they are tried.")];

fn read_paths(section: &Section<'_>) -> Option<Vec<PathRule>> {
    section.document(PATHS_FIELDS);
    if section.required_at("rules").is_none_or(|at| at.is_empty_list()) {
        section.error("rules", "has no rule");
        return None;
    }
    let rules = section.items("rules");
    Some(rules.iter().enumerate().filter_map(|(i, at)| at.section(|rule| read_rule(rule, i))).collect())
}

const RULE_FIELDS: Meanings = &[
    ("name", "The rule's name in audit records. By default, its place in the list."),
    ("effect", "What happens to a request that matches."),
    ("users", "The users whom the rule is for."),
    ("groups", "The groups that the rule is for."),
    ("methods", "The HTTP methods, in capital letters. An empty list matches all."),
    ("paths", "The paths, with * at the end of a path at most."),
];

fn read_rule(rule: &Section<'_>, index: usize) -> Option<PathRule> {
    rule.document(RULE_FIELDS);
    let name = rule.optional("name").unwrap_or_else(|| format!("rules[{index}]"));
    let (users, groups): (Vec<String>, Vec<String>) = (rule.list("users"), rule.list("groups"));
    let checked = |name: &'static str, wrong: fn(&str) -> bool, message: &str| {
        let texts = rule.items(name).into_iter().filter_map(|at: At<'_>| {
            let text = at.text()?;
            if wrong(text) {
                at.error(message);
            }
            Some(text.to_owned())
        });
        texts.collect::<Vec<_>>()
    };
    let methods = checked(
        "methods",
        |m| m.is_empty() || !m.bytes().all(|b| b.is_ascii_uppercase() || b == b'-'),
        "is not an HTTP method in capital letters",
    );
    let paths = checked(
        "paths",
        |p| !p.starts_with('/') || p.trim_end_matches('*').contains('*') || p.ends_with("**"),
        "is not a path that begins with / and has * only at its end",
    );
    if paths.iter().any(|path| path.contains(['%', '\\']) || path.contains("/../") || path.contains("//")) {
        rule.error(
            "paths",
            "has an escape, a backslash, .. or an empty part: paths are compared decoded, so that fits no request",
        );
    }
    if paths.is_empty() {
        rule.error("paths", "names no path");
    }
    rule.states_required("paths");
    rule.required_at("effect")?;
    let allow = rule.word("effect", &["allow", "deny"])? == "allow";
    if allow && users.is_empty() && groups.is_empty() {
        rule.section_error(
            "allows without users or groups: for everyone with a name, groups: [\"system:authenticated\"]",
        );
    }
    Some(PathRule { name, users, groups, methods, paths, allow })
}
