//! The authorizer by path rules, an ordered list of which the first matching rule decides.
//!
//! Paths are compared decoded, and with or without one slash at the end, as kube-apiserver interprets both alike. The
//! part after `/proxy/` is also interpreted by other servers, and they may interpret it differently. A rule that
//! depends on such an ambiguous part never allows a request, and denies it if the rule denies. Path rules know nothing
//! of resources: one object can have several paths (such as `/api/v1/watch/…`), so rights over resources belong in
//! RBAC. An upgrade to exec, attach, port-forward or a proxy counts as `POST`, whatever its method is.

use futures_util::future::BoxFuture;

use super::authorizer::{Attributes, Authorizer, Decision};
use crate::request_info::{RequestInfo, read_alike};

/// A rule that allows or denies paths for users.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathRule {
    /// The name in audit records.
    pub name: String,
    pub users: Vec<String>,
    /// The groups to whose members the rule applies, besides `users`. If both lists are empty, it applies to everyone.
    pub groups: Vec<String>,
    /// The HTTP methods to which the rule applies. An empty list means all.
    pub methods: Vec<String>,
    /// The paths to which the rule applies: exact paths, or prefixes with a `*` at the end.
    pub paths: Vec<String>,
    pub allow: bool,
}

pub struct Paths(Vec<PathRule>);

impl Paths {
    pub fn new(rules: Vec<PathRule>) -> Self {
        Self(rules)
    }

    fn decide(&self, attributes: &Attributes<'_>) -> Decision {
        let path = Path::of(attributes.request);
        let mut unclear = None;
        for rule in self.0.iter().filter(|rule| rule.concerns(attributes)) {
            let name = &rule.name;
            match (path.fits(rule), rule.allow) {
                (Fit::No, _) => {}
                (Fit::Yes, true) => return Decision::Allow { rule: name.clone() },
                (Fit::Yes, false) => {
                    let reason = format!("denied by path rule {name:?}");
                    return Decision::Deny { rule: name.clone(), reason };
                }
                (Fit::Unclear, true) => {
                    unclear.get_or_insert_with(|| format!("path rule {name:?} does not allow {UNCLEAR}"));
                }
                (Fit::Unclear, false) => {
                    let reason = format!("path rule {name:?} denies {UNCLEAR}");
                    return Decision::Deny { rule: name.clone(), reason };
                }
            }
        }
        Decision::NoOpinion { reason: unclear.unwrap_or_default() }
    }
}

const UNCLEAR: &str =
    "what is behind the proxy in this path, because servers could interpret it in different ways";

/// The path of a request in the form in which it is compared.
struct Path<'a> {
    /// The path, decoded except for what follows a proxy.
    path: &'a str,
    proxied: Option<Proxied<'a>>,
}

struct Proxied<'a> {
    /// The path up to `/proxy`.
    own: &'a str,
    /// The whole decoded path. `None` means that servers could interpret it differently.
    decoded: Option<String>,
}

enum Fit {
    Yes,
    No,
    Unclear,
}

impl<'a> Path<'a> {
    fn of(request: &'a RequestInfo) -> Self {
        let proxied = request
            .proxied()
            .map(|(own, tail)| Proxied { own, decoded: read_alike(tail).map(|tail| format!("{own}{tail}")) });
        Self { path: &request.path, proxied }
    }

    fn fits(&self, rule: &PathRule) -> Fit {
        let mut unclear = false;
        for pattern in &rule.paths {
            let path = match self.proxied.as_ref().filter(|proxied| reaches_behind(pattern, proxied.own)) {
                None => Some(self.path),
                Some(Proxied { decoded, .. }) => decoded.as_deref(),
            };
            match path.map(|path| matches(pattern, path)) {
                Some(true) => return Fit::Yes,
                Some(false) => {}
                None => unclear = true,
            }
        }
        if unclear { Fit::Unclear } else { Fit::No }
    }
}

/// Whether a pattern's match depends on the path behind the proxy at `own`.
fn reaches_behind(pattern: &str, own: &str) -> bool {
    let behind = pattern.strip_prefix(own).filter(|behind| behind.starts_with('/'));
    behind.is_some_and(|behind| behind != "/*")
}

fn matches(pattern: &str, path: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(beginning) => path.starts_with(beginning),
        None => without_slash(pattern) == without_slash(path),
    }
}

fn without_slash(path: &str) -> &str {
    path.strip_suffix('/').unwrap_or(path)
}

impl Authorizer for Paths {
    fn authorize<'a>(&'a self, attributes: &'a Attributes<'a>) -> BoxFuture<'a, Decision> {
        Box::pin(std::future::ready(self.decide(attributes)))
    }
}

impl PathRule {
    /// Whether the rule applies to this caller and method.
    fn concerns(&self, Attributes { user, request }: &Attributes<'_>) -> bool {
        let everyone = self.users.is_empty() && self.groups.is_empty();
        let who = everyone
            || self.users.contains(&user.name)
            || self.groups.iter().any(|group| user.in_group(group));
        who && (self.methods.is_empty() || self.methods.contains(&request.method))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::user::User;

    /// The result of a rule with one pattern: `fits`, `no` or `unclear`, or the reason why the request was rejected
    /// before.
    fn shown(pattern: &str, path: &str) -> String {
        let request = match RequestInfo::resolve("GET", path, None, false) {
            Ok(request) => request,
            Err(error) => return error.to_string(),
        };
        let user = User { name: "jane".to_owned(), ..User::default() };
        let attributes = Attributes { user: &user, request: &request };
        let decide = |allow| {
            let rule = PathRule {
                name: "r".to_owned(),
                paths: vec![pattern.to_owned()],
                allow,
                ..PathRule::default()
            };
            Paths::new(vec![rule]).decide(&attributes)
        };
        match (decide(true), decide(false)) {
            (Decision::Allow { .. }, Decision::Deny { reason, .. }) => {
                assert_eq!(reason, "denied by path rule \"r\"");
                "fits".to_owned()
            }
            (Decision::NoOpinion { reason }, Decision::NoOpinion { .. }) => {
                assert_eq!(reason, "");
                "no".to_owned()
            }
            (Decision::NoOpinion { reason }, Decision::Deny { reason: denied, .. }) => {
                assert!(reason.contains("behind the proxy") && denied.contains("behind the proxy"));
                "unclear".to_owned()
            }
            other => panic!("{pattern} {path}: {other:?}"),
        }
    }

    #[test]
    fn a_path_behind_a_proxy_counts_only_if_all_servers_read_it_alike() {
        const DOTS: &str = "the request's path has a segment that is . or ..";
        const BROKEN: &str = "the request's path has a malformed escape";
        const RAW: &str = "the request's path has characters that must be escaped";
        const ESCAPED: &str =
            "the request's path has an escaped slash, backslash, percent sign or control character";
        let health = "/api/v1/nodes/n/proxy/healthz*";
        let exec = "/api/v1/nodes/n/proxy/exec/*";
        let all = "/api/v1/nodes/n/proxy/*";
        let rows = [
            // Unambiguous paths, with and without escapes.
            (health, "/healthz", "fits"),
            (health, "/healthz/", "fits"),
            (health, "/healthz/ping", "fits"),
            (health, "/healthz-ping", "fits"),
            (health, "/%68ealthz", "fits"),
            (health, "/healthz/%70ing", "fits"),
            (health, "/healthz/a:b@c=d,e~f", "fits"),
            (health, "/healthz/...", "fits"),
            (health, "/healthz/.well-known", "fits"),
            (health, "/Healthz", "no"),
            (health, "/exec/a/b/c", "no"),
            (health, "/", "no"),
            (health, "", "no"),
            (exec, "/exec/a/b/c", "fits"),
            (exec, "/%65xec/a/b/c", "fits"),
            (exec, "/e%78%65c/a", "fits"),
            (exec, "/execute", "no"),
            (exec, "/metrics", "no"),
            // Dot segments in all spellings.
            (health, "/../exec", DOTS),
            (health, "/healthz/../exec", DOTS),
            (health, "/healthz/..", DOTS),
            (health, "/healthz/%2e%2e/exec", DOTS),
            (health, "/healthz/%2E%2e/exec", DOTS),
            (health, "/healthz/.%2e/exec", DOTS),
            (health, "/healthz/%2e./exec", DOTS),
            (health, "/healthz/./ping", DOTS),
            (health, "/healthz/%2e/ping", DOTS),
            (health, "/healthz%2f..%2fexec", "unclear"),
            (health, "/healthz%2F%2e%2e%2Fexec", "unclear"),
            (health, "/healthz/..%2fexec", "unclear"),
            (health, "/healthz%2f../exec", "unclear"),
            (health, "/healthz/%252e%252e/exec", "unclear"),
            (health, "/healthz/.%252e/exec", "unclear"),
            (health, "/healthz/%25252e%25252e/exec", "unclear"),
            (health, "/healthz/..;/exec", "unclear"),
            (health, "/healthz/..;a=b/exec", "unclear"),
            (health, "/healthz/%2e%2e%3b/exec", "unclear"),
            (health, "/healthz/..%00/exec", "unclear"),
            (health, "/healthz/..%20/exec", "unclear"),
            (health, "/healthz/..%23/exec", "unclear"),
            (health, "/healthz/..%3f/exec", "unclear"),
            (health, "/healthz/%c0%ae%c0%ae/exec", "unclear"),
            (health, "/healthz/%ef%bc%8e%ef%bc%8e/exec", "unclear"),
            (health, "/healthz/%e0%80%ae./exec", "unclear"),
            // Backslashes, escaped slashes, empty segments.
            (health, "/healthz/..\\exec", RAW),
            (health, "/healthz/..%5cexec", "unclear"),
            (health, "/healthz%5C..%5Cexec", "unclear"),
            (health, "/healthz%255c..%255cexec", "unclear"),
            (health, "/healthz%252f..%252fexec", "unclear"),
            (health, "/healthz%2fping", "unclear"),
            (health, "//healthz", "unclear"),
            (health, "/healthz//ping", "unclear"),
            (health, "/healthz//", "unclear"),
            (health, "/healthz%0d%0a", "unclear"),
            (health, "/healthz%u002e", BROKEN),
            (health, "/healthz%2", BROKEN),
            // Paths that a denial must not miss.
            (exec, "//exec/a", "unclear"),
            (exec, "/exec//a", "unclear"),
            (exec, "/exec%2fa", "unclear"),
            (exec, "/%2fexec/a", "unclear"),
            (exec, "/x%2f..%2fexec/a", "unclear"),
            (exec, "/exec;x/a", "unclear"),
            (exec, "/%2565xec/a", "unclear"),
            (exec, "\\exec/a", RAW),
            (exec, "/x/%2e%2e/exec/a", DOTS),
            // A pattern for the whole path behind the proxy, or for none of it, does not depend on that path.
            (all, "/a%2f..%2fb", "fits"),
            (all, "/a//b%5c", "fits"),
            (all, "/", "fits"),
            (all, "", "no"),
            (all, "/../x", DOTS),
            ("/api/v1/nodes/*", "/a%2fb", "fits"),
            ("/api/v1/nodes/n/proxy*", "/a%2fb", "fits"),
            ("/api/v1/nodes/n/proxy", "/a%2fb", "no"),
            ("/api/v1/nodes/n/proxy", "/", "fits"),
            ("/api/v1/nodes/n/proxy/", "/", "fits"),
            ("/api/v1/nodes/n/proxy/", "/%2f", "unclear"),
            ("/api/v1/nodes/m/proxy/a", "/a%2fb", "no"),
            ("/api/v1/nodes/n/proxyx*", "/a%2fb", "no"),
            ("/healthz", "/a%2fb", "no"),
            ("/api/v1/nodes/n/proxy/metrics", "/metrics/", "fits"),
            ("/api/v1/nodes/n/proxy/metrics/", "/metrics", "fits"),
            ("/api/v1/nodes/n/proxy/metrics/", "/metrics/cadvisor", "no"),
            // An escaped slash before the end of `/proxy` is rejected at once.
            (health, "%2fhealthz", ESCAPED),
        ];
        for (pattern, tail, expected) in rows {
            let path = format!("/api/v1/nodes/n/proxy{tail}");
            assert_eq!(shown(pattern, &path), expected, "{pattern} {path}");
        }
        assert!(rows.len() >= 80);
        for (pattern, path, expected) in [
            (
                "/api/v1/namespaces/a/pods/p/proxy/x*",
                "/api/v1/namespaces/a/pods/p/proxy/x%2f..%2fy",
                "unclear",
            ),
            ("/api/v1/namespaces/a/pods/p/proxy/x*", "/api/v1/namespaces/a/pods/p/proxy/%78y", "fits"),
            (
                "/api/v1/namespaces/a/services/s:http/proxy/x",
                "/api/v1/namespaces/a/services/s%3Ahttp/proxy/x",
                "fits",
            ),
            ("/apis/g/v1/things/t/proxy/x", "/apis/g/v1/things/t/proxy/x%2fy", "unclear"),
            ("/api/v1/proxy/nodes/n/x*", "/api/v1/proxy/nodes/n/x%2f..%2fy", ESCAPED),
            ("/healthz*", "/healthz%2f..%2fmetrics", ESCAPED),
            ("/healthz*", "/healthz/../metrics", DOTS),
            ("/healthz*", "/healthz\\..\\metrics", RAW),
        ] {
            assert_eq!(shown(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn rules_after_an_unclear_one_still_decide() {
        let request = RequestInfo::resolve("GET", "/api/v1/nodes/n/proxy/api/a%2fb", None, false).unwrap();
        let user = User { name: "jane".to_owned(), ..User::default() };
        let rule = |paths: &str, allow| PathRule {
            name: paths.to_owned(),
            paths: vec![paths.to_owned()],
            allow,
            ..PathRule::default()
        };
        let (some, all) = ("/api/v1/nodes/n/proxy/api*", "/api/v1/nodes/*");
        for (rules, allowed) in [
            ([rule(some, true), rule(all, true)], true),
            ([rule(some, true), rule(all, false)], false),
            ([rule(some, false), rule(all, true)], false),
            ([rule(all, true), rule(some, false)], true),
        ] {
            let shown = format!("{rules:?}");
            let decision = Paths::new(rules.into()).decide(&Attributes { user: &user, request: &request });
            assert_eq!(matches!(decision, Decision::Allow { .. }), allowed, "{shown}");
        }
    }
}
