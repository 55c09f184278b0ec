//! The `authorization` section of the configuration.

use std::{path::PathBuf, time::Duration};

use hyper::Uri;
use proto_config::{At, Section};
use proto_net::tls::ClientTls;

use super::paths::PathRule;

/// The authorizers, in the order in which they are asked. Without an authorizer, everything is denied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuthzConfig(pub Vec<AuthorizerConfig>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthorizerConfig {
    Rbac(RbacConfig),
    Node(NodeConfig),
    Webhook(Box<WebhookConfig>),
    Paths(Vec<PathRule>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbacConfig {
    /// Files, and directories of `.yaml`, `.yml` and `.json` files.
    pub files: Vec<PathBuf>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeConfig {
    /// Whether to allow what only kube-apiserver's node authorizer can decide, as it knows which pods run on a node.
    pub defer_to_apiserver: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookConfig {
    pub url: Uri,
    pub tls: ClientTls,
    /// The longest time for a whole call, including the wait until it can be made.
    pub timeout: Duration,
    /// How long the answer that a request is allowed is remembered. Zero asks every time.
    pub allow_ttl: Duration,
    /// How long any other answer is remembered.
    pub deny_ttl: Duration,
    pub cache_entries: usize,
    /// The most calls at once.
    pub max_in_flight: usize,
    /// Whether a failure of the webhook denies the request, rather than leaving it to the next authorizers.
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
    /// Its name in audit records, which is the key of its item.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Rbac(_) => "rbac",
            Self::Node(_) => "node",
            Self::Webhook(_) => "webhook",
            Self::Paths(_) => "paths",
        }
    }

    fn read(item: &Section<'_>) -> Option<Self> {
        let rbac = item.at("rbac").map(|at| at.section(read_rbac).map(Self::Rbac));
        let node = item.at("node").map(|at| {
            at.section(|s| Some(NodeConfig { defer_to_apiserver: s.or("defer_to_apiserver", false) }))
                .map(Self::Node)
        });
        let webhook = item.at("webhook").map(|at| at.section(read_webhook).map(Self::Webhook));
        let paths = item.at("paths").map(|at| at.section(read_paths).map(Self::Paths));
        let mut given = [rbac, node, webhook, paths].into_iter().flatten();
        match (given.next(), given.next()) {
            (Some(one), None) => one,
            (Some(_), Some(_)) => {
                item.section_error("has more than one authorizer: give each an item of its own");
                None
            }
            (None, _) => {
                item.section_error("has no authorizer: rbac, node, webhook or paths");
                None
            }
        }
    }
}

fn read_rbac(section: &Section<'_>) -> Option<RbacConfig> {
    let files: Vec<PathBuf> = section.list("files");
    if files.is_empty() {
        section.error("files", "names no file or directory");
        return None;
    }
    Some(RbacConfig { files })
}

fn read_webhook(section: &Section<'_>) -> Option<Box<WebhookConfig>> {
    let url = section.required::<String>("url").and_then(|text| match text.parse::<Uri>() {
        Ok(url) if url.scheme_str() == Some("https") && url.host().is_some() => Some(url),
        Ok(_) | Err(_) => {
            section.error("url", "is no HTTPS URL");
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
    let failure_denies = match section.or("failure_policy", "no_opinion".to_owned()).as_str() {
        "no_opinion" => false,
        "deny" => true,
        _ => {
            section.error("failure_policy", "expected no_opinion or deny");
            false
        }
    };
    Some(Box::new(WebhookConfig {
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

fn read_paths(section: &Section<'_>) -> Option<Vec<PathRule>> {
    if section.required_at("rules").is_none_or(|at| at.is_empty_list()) {
        section.error("rules", "has no rule");
        return None;
    }
    let rules = section.items("rules");
    Some(rules.iter().enumerate().filter_map(|(i, at)| at.section(|rule| read_rule(rule, i))).collect())
}

fn read_rule(rule: &Section<'_>, index: usize) -> Option<PathRule> {
    let name = rule.or("name", format!("rules[{index}]"));
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
        "is no HTTP method in capital letters",
    );
    let paths = checked(
        "paths",
        |p| !p.starts_with('/') || p.trim_end_matches('*').contains('*') || p.ends_with("**"),
        "is no path that begins with /, with * at its end at most",
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
    let allow = match rule.required::<String>("effect")?.as_str() {
        "allow" => true,
        "deny" => false,
        _ => {
            rule.error("effect", "expected allow or deny");
            return None;
        }
    };
    if allow && users.is_empty() && groups.is_empty() {
        rule.section_error(
            "allows without users or groups: for everyone with a name, groups: [\"system:authenticated\"]",
        );
    }
    Some(PathRule { name, users, groups, methods, paths, allow })
}
