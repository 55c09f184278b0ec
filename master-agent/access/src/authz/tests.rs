//! Tests of node restriction, path rules, the chain and the configuration. The tests of RBAC, the webhook and
//! impersonation are in other files.

use std::{path::Path, sync::Arc};

use futures_util::future::BoxFuture;
use proto_config::{Source, parse};

use super::{
    chain::NamedAuthorizer,
    config::{AuthorizerConfig, AuthzConfig},
    *,
};
use crate::{
    request_info::RequestInfo,
    user::{AUTHENTICATED, User},
};

/// `NAME` or `NAME,GROUP,…`; everyone is in `system:authenticated`.
pub(super) fn user(text: &str) -> User {
    let mut parts = text.split(',').map(str::to_owned);
    let name = parts.next().unwrap();
    User { name, groups: parts.chain([AUTHENTICATED.to_owned()]).collect(), ..User::default() }
}

/// `METHOD TARGET`, with `^` before it for an upgrade.
pub(super) fn request(text: &str) -> RequestInfo {
    let upgrade = text.starts_with('^');
    let (method, target) = text.trim_start_matches('^').split_once(' ').unwrap();
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    RequestInfo::resolve(method, path, query, upgrade).unwrap()
}

/// `allow RULE`, `deny RULE` or `-`.
pub(super) fn shown(decision: &Decision) -> String {
    match decision {
        Decision::Allow { rule } => format!("allow {rule}"),
        Decision::Deny { rule, .. } => format!("deny {rule}"),
        Decision::NoOpinion { .. } => "-".to_owned(),
    }
}

pub(super) fn config(text: &str) -> Result<AuthzConfig, String> {
    let source = Source { origin: "test", base_dir: Path::new("/etc"), check_files: false };
    parse(text, source, |section| Some(AuthzConfig::read(section, "authorization")))
        .map_err(|e| e.to_string())
}

async fn decided(authorizer: &dyn Authorizer, who: &str, what: &str) -> String {
    let (user, request) = (user(who), request(what));
    shown(&authorizer.authorize(&Attributes { user: &user, request: &request }).await)
}

const NODE: &str = "system:node:n,system:nodes";

#[tokio::test]
async fn a_node_reaches_its_own() {
    let rows = [
        ("GET /api/v1/nodes/n/proxy/healthz", "allow own", "allow own"),
        ("GET /api/v1/nodes/n:10250/proxy/", "allow own", "allow own"),
        ("^GET /api/v1/nodes/https:n:10250/proxy/exec/a/b/c", "allow own", "allow own"),
        ("GET /api/v1/nodes/https:n:/proxy/", "allow own", "allow own"),
        ("GET /api/v1/nodes/m/proxy/healthz", "deny not-its-own", "deny not-its-own"),
        ("GET /api/v1/nodes/n:x:1/proxy/", "deny not-its-own", "deny not-its-own"),
        ("GET /api/v1/nodes/https:m:n/proxy/", "deny not-its-own", "deny not-its-own"),
        ("GET /api/v1/nodes/ftp:n:1/proxy/", "deny not-its-own", "deny not-its-own"),
        ("GET /api/v1/nodes/a:b:n:1/proxy/", "deny not-its-own", "deny not-its-own"),
        ("GET /api/v1/nodes/n.evil/proxy/", "deny not-its-own", "deny not-its-own"),
        ("GET /api/v1/nodes/N/proxy/", "deny not-its-own", "deny not-its-own"),
        ("GET /api/v1/proxy/nodes/n/healthz", "deny not-its-own", "deny not-its-own"),
        ("^GET /apis/master-agent/v1/nodes/n/link", "allow own", "allow own"),
        ("POST /apis/master-agent/v1/nodes/n/join", "allow own", "allow own"),
        ("^GET /apis/master-agent/v1/nodes/m/link", "deny not-its-own", "deny not-its-own"),
        ("POST /apis/master-agent/v1/nodes/m/join", "deny not-its-own", "deny not-its-own"),
        ("GET /apis/master-agent/v1/nodes/n/link", "deny not-its-own", "deny not-its-own"),
        ("POST /apis/master-agent/v1/namespaces/a/nodes/n/link", "deny not-its-own", "deny not-its-own"),
        ("POST /apis/master-agent/v1/namespaces/a/nodes/n/join", "deny not-its-own", "deny not-its-own"),
        ("GET /apis/master-agent/v1/status", "-", "-"),
        ("GET /api/v1/nodes/n", "allow own", "allow own"),
        ("GET /api/v1/nodes?watch=1&fieldSelector=metadata.name=n", "allow own", "allow own"),
        ("PATCH /api/v1/nodes/n/status", "allow own", "allow own"),
        ("PUT /api/v1/nodes/n", "allow own", "allow own"),
        ("POST /api/v1/nodes", "allow create", "allow create"),
        ("GET /api/v1/nodes", "deny not-its-own", "deny not-its-own"),
        ("GET /api/v1/nodes/m", "deny not-its-own", "deny not-its-own"),
        ("PATCH /api/v1/nodes/m/status", "deny not-its-own", "deny not-its-own"),
        ("DELETE /api/v1/nodes/n", "deny not-its-own", "deny not-its-own"),
        ("DELETE /api/v1/nodes", "deny not-its-own", "deny not-its-own"),
        ("GET /apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n", "allow own", "allow own"),
        (
            "POST /apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases",
            "allow create",
            "allow create",
        ),
        (
            "PUT /apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/m",
            "deny not-its-own",
            "deny not-its-own",
        ),
        (
            "GET /apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases",
            "deny not-its-own",
            "deny not-its-own",
        ),
        ("PUT /apis/coordination.k8s.io/v1/namespaces/kube-system/leases/n", "-", "-"),
        ("PATCH /apis/storage.k8s.io/v1/csinodes/n", "allow own", "allow own"),
        ("PATCH /apis/storage.k8s.io/v1/csinodes/m", "deny not-its-own", "deny not-its-own"),
        (
            "POST /apis/certificates.k8s.io/v1/certificatesigningrequests",
            "allow certificates",
            "allow certificates",
        ),
        (
            "GET /apis/certificates.k8s.io/v1/certificatesigningrequests/c",
            "allow certificates",
            "allow certificates",
        ),
        ("PUT /apis/certificates.k8s.io/v1/certificatesigningrequests/c/approval", "-", "-"),
        ("DELETE /apis/certificates.k8s.io/v1/certificatesigningrequests/c", "-", "-"),
        ("GET /api/v1/pods", "-", "-"),
        ("GET /api/v1/pods?fieldSelector=spec.nodeName=n", "-", "allow apiserver-decides"),
        ("GET /api/v1/pods?fieldSelector=spec.nodeName!=n", "-", "-"),
        ("GET /api/v1/pods?fieldSelector=spec.nodeName=m", "-", "-"),
        ("GET /api/v1/namespaces/a/pods/p", "-", "allow apiserver-decides"),
        ("PATCH /api/v1/namespaces/a/pods/p/status", "-", "allow apiserver-decides"),
        ("POST /api/v1/namespaces/a/pods/p/eviction", "-", "allow apiserver-decides"),
        ("^GET /api/v1/namespaces/a/pods/p/exec", "-", "-"),
        ("GET /api/v1/namespaces/a/pods/p/proxy/x", "-", "-"),
        ("GET /api/v1/namespaces/a/secrets/s", "-", "allow apiserver-decides"),
        ("GET /api/v1/namespaces/a/secrets", "-", "-"),
        ("GET /api/v1/secrets?fieldSelector=metadata.name=s", "-", "-"),
        ("PUT /api/v1/namespaces/a/secrets/s", "-", "-"),
        ("POST /api/v1/namespaces/a/serviceaccounts/s/token", "-", "allow apiserver-decides"),
        (
            "GET /apis/resource.k8s.io/v1/resourceslices?fieldSelector=nodeName=n",
            "-",
            "allow apiserver-decides",
        ),
        ("GET /apis/resource.k8s.io/v1/resourceslices", "-", "-"),
        ("GET /api/v1/services?watch=1", "-", "allow apiserver-decides"),
        ("POST /api/v1/namespaces/a/events", "-", "allow apiserver-decides"),
        ("POST /apis/apps/v1/namespaces/a/deployments", "-", "-"),
        ("GET /healthz", "-", "-"),
    ];
    let strict = node::NodeAuthorizer::new(&config::NodeConfig::default());
    let deferring = node::NodeAuthorizer::new(&config::NodeConfig { defer_to_apiserver: true });
    for (what, alone, deferred) in rows {
        assert_eq!(decided(&strict, NODE, what).await, alone, "{what}");
        assert_eq!(decided(&deferring, NODE, what).await, deferred, "{what}, deferred");
        for other in ["alice", "system:node:n", "x,system:nodes", "system:node:,system:nodes"] {
            assert_eq!(decided(&deferring, other, what).await, "-", "{what}, {other}");
        }
    }
    assert_eq!(rows.len(), 61);
}

#[tokio::test]
async fn path_rules() {
    let text = r#"
authorization:
- paths:
    rules:
    - {name: no-metrics, paths: [/metrics], effect: deny}
    - {name: mallory, users: [mallory], paths: ["/*"], effect: deny}
    - {name: health, groups: ["system:authenticated"], methods: [GET, HEAD], paths: [/healthz, "/livez/*"], effect: allow}
    - {name: metrics, users: [prometheus], paths: [/metrics], effect: allow}
    - {name: proxy, users: [bob], groups: [ops], methods: [GET], paths: ["/api/v1/nodes/*"], effect: allow}
    - {paths: ["/logs*"], users: [bob], effect: allow}
"#;
    let Ok(AuthzConfig(items)) = config(text) else { panic!("{:?}", config(text)) };
    let [AuthorizerConfig::Paths(rules)] = items.as_slice() else { panic!("{items:?}") };
    let paths = paths::Paths::new(rules.clone());
    let rows = [
        ("alice", "GET /healthz", "allow health"),
        ("alice", "GET /healthz/", "allow health"),
        ("alice", "HEAD /healthz", "allow health"),
        ("alice", "POST /healthz", "-"),
        ("alice", "GET /healthz/etcd", "-"),
        ("alice", "GET /health%7A", "allow health"),
        ("alice", "GET /Healthz", "-"),
        ("alice", "GET /livez/ping", "allow health"),
        ("alice", "GET /livez/", "allow health"),
        ("alice", "GET /livez", "-"),
        ("alice", "GET /livezx", "-"),
        ("mallory", "GET /healthz", "deny mallory"),
        ("mallory", "GET /", "deny mallory"),
        ("prometheus", "GET /metrics", "deny no-metrics"),
        ("prometheus", "GET /metrics/", "deny no-metrics"),
        ("prometheus", "GET /metric%73", "deny no-metrics"),
        ("bob", "GET /api/v1/nodes/n/proxy/x", "allow proxy"),
        ("carol,ops", "GET /api/v1/nodes/n/proxy/x", "allow proxy"),
        ("carol,ops", "POST /api/v1/nodes/n/proxy/x", "-"),
        ("carol,ops", "^GET /api/v1/nodes/n/proxy/exec", "-"),
        ("carol,op", "GET /api/v1/nodes/n/proxy/x", "-"),
        ("bob", "DELETE /logs", "allow rules[5]"),
        ("bob", "GET /logs-of-others", "allow rules[5]"),
        ("alice", "GET /logs", "-"),
    ];
    for (who, what, expected) in rows {
        assert_eq!(decided(&paths, who, what).await, expected, "{who} {what}");
    }
    assert_eq!(rows.len(), 24);
}

struct Fixed(Decision);

impl Authorizer for Fixed {
    fn authorize<'a>(&'a self, _: &'a Attributes<'a>) -> BoxFuture<'a, Decision> {
        Box::pin(std::future::ready(self.0.clone()))
    }
}

#[tokio::test]
async fn the_first_word_counts_and_silence_denies() {
    let allow = || Decision::Allow { rule: "a".into() };
    let deny = || Decision::Deny { rule: "d".into(), reason: "because".into() };
    let none = |reason: &str| Decision::NoOpinion { reason: reason.into() };
    let chain = |decisions: Vec<Decision>| {
        let names = ["first", "second", "third"];
        let fixed = |(name, d)| NamedAuthorizer { name, authorizer: Arc::new(Fixed(d)) };
        Authorizers::new(names.into_iter().zip(decisions).map(fixed).collect())
    };
    let (alice, pods) = (user("al\"ice"), request("GET /api/v1/namespaces/y/pods/p/log"));
    let attributes = Attributes { user: &alice, request: &pods };
    let cannot = r#"User "al\"ice" cannot get resource "pods/log" in API group "" in the namespace "y""#;

    let rows = [
        (vec![], (false, None, "", cannot.to_owned())),
        (vec![none(""), none("")], (false, None, "", cannot.to_owned())),
        (vec![none("x"), none(""), none("z")], (false, None, "", format!("{cannot}: x, z"))),
        (vec![allow(), deny()], (true, Some("first"), "a", String::new())),
        (vec![deny(), allow()], (false, Some("first"), "d", format!("{cannot}: because"))),
        (vec![none("x"), allow()], (true, Some("second"), "a", String::new())),
        (vec![none("x"), deny(), allow()], (false, Some("second"), "d", format!("{cannot}: x, because"))),
    ];
    for (decisions, (allowed, authorizer, rule, reason)) in rows {
        let verdict = chain(decisions.clone()).decide(&attributes).await;
        let rule = rule.to_owned();
        assert_eq!(verdict, Verdict { allowed, authorizer, rule, reason }, "{decisions:?}");
    }
    let cluster = request("POST /apis/apps/v1/deployments");
    let text = Attributes { user: &alice, request: &cluster }.to_string();
    assert!(
        text.ends_with(r#"cannot create resource "deployments" in API group "apps" at the cluster scope"#)
    );
    let path = request("GET /healthz");
    let text = Attributes { user: &alice, request: &path }.to_string();
    assert_eq!(text, r#"User "al\"ice" cannot get path "/healthz""#);
}

#[test]
fn the_configuration_is_strict() {
    let full = r#"
authorization:
- node: {}
- rbac: {files: [rbac, /other/roles.yaml]}
- webhook:
    url: https://authz.example/review
    ca: ca.pem
    client_cert: c.pem
    client_key: k.pem
    timeout: 3s
    allow_ttl: 1m
    deny_ttl: 0s
    cache_entries: 7
    max_in_flight: 2
    failure_policy: deny
- node: {defer_to_apiserver: true}
- paths: {rules: [{paths: ["/*"], effect: deny}]}
"#;
    let AuthzConfig(items) = config(full).unwrap();
    let names: Vec<_> = items.iter().map(AuthorizerConfig::name).collect();
    assert_eq!(names, ["node", "rbac", "webhook", "node", "paths"]);
    assert_eq!(items[0], AuthorizerConfig::Node(config::NodeConfig { defer_to_apiserver: false }));
    let files = vec!["/etc/rbac".into(), "/other/roles.yaml".into()];
    assert_eq!(items[1], AuthorizerConfig::Rbac(config::RbacConfig { files }));
    let AuthorizerConfig::Webhook(webhook) = &items[2] else { panic!() };
    assert_eq!((webhook.cache_entries, webhook.max_in_flight, webhook.failure_denies), (7, 2, true));
    assert_eq!(webhook.tls.files().len(), 3);
    assert!(config("{}").unwrap().0.is_empty());

    let rows = [
        ("- {}", "has no authorizer"),
        ("- {node: {}, rbac: {files: [a]}}", "has more than one authorizer"),
        ("- {rbacs: {files: [a]}}", "unknown field; did you mean rbac"),
        ("- rbac: {}", "names no file"),
        ("- rbac: {files: []}", "names no file"),
        ("- rbac: {file: a}", "unknown field; did you mean files"),
        ("- node: {defer: true}", "unknown field"),
        ("- webhook: {}", "is required"),
        ("- webhook: {url: http://a/}", "is not an HTTPS URL"),
        ("- webhook: {url: https://a/, client_cert: c}", "go together"),
        ("- webhook: {url: https://a/, failure_policy: allow}", "expected no_opinion or deny"),
        ("- webhook: {url: https://a/, max_in_flight: 0}", "is not in the range"),
        ("- paths: {}", "is required"),
        ("- paths: {rules: []}", "has no rule"),
        ("- paths: {rules: [{paths: [/x], effect: maybe}]}", "expected allow or deny"),
        ("- paths: {rules: [{paths: [/x], users: [a]}]}", "is required"),
        ("- paths: {rules: [{effect: deny}]}", "names no path"),
        ("- paths: {rules: [{paths: [x], effect: deny}]}", "is not a path"),
        ("- paths: {rules: [{paths: [\"/*/x\"], effect: deny}]}", "is not a path"),
        ("- paths: {rules: [{paths: [\"/x**\"], effect: deny}]}", "is not a path"),
        ("- paths: {rules: [{paths: [\"/a%2fb\"], effect: deny}]}", "has an escape"),
        ("- paths: {rules: [{paths: [/a/../b], effect: deny}]}", "has an escape"),
        ("- paths: {rules: [{paths: [//a], effect: deny}]}", "has an escape"),
        ("- paths: {rules: [{paths: [/x], methods: [get], effect: deny}]}", "is not an HTTP method"),
        ("- paths: {rules: [{paths: [/x], effect: allow}]}", "allows without users or groups"),
        ("- always_allow: {}", "unknown field"),
    ];
    for (item, expected) in rows {
        let error = config(&format!("authorization:\n{item}\n")).unwrap_err();
        assert!(error.contains(expected), "{item}: {error}");
    }
}

#[tokio::test]
async fn all_of_them_from_files() {
    let dir = std::env::temp_dir().join(format!("authz-{:016x}", rand::random::<u64>()));
    std::fs::create_dir_all(&dir).unwrap();
    let objects = r#"{"kind": "List", "apiVersion": "v1", "items": [
        {"kind": "ClusterRole", "apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "proxy"},
         "rules": [{"apiGroups": [""], "resources": ["nodes/proxy"], "verbs": ["get", "create"]},
                   {"apiGroups": [""], "resources": ["users"], "resourceNames": ["ops"], "verbs": ["impersonate"]}]},
        {"kind": "ClusterRoleBinding", "apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "proxies"},
         "subjects": [{"kind": "Group", "name": "dev"}, {"kind": "Group", "name": "system:nodes"}],
         "roleRef": {"kind": "ClusterRole", "name": "proxy"}}]}"#;
    std::fs::write(dir.join("rbac.json"), objects).unwrap();
    let text = format!(
        "authorization:\n- node: {{}}\n- rbac: {{files: [{}]}}\n- paths: {{rules: [{{paths: [/healthz], \
         groups: [\"system:authenticated\"], effect: allow}}]}}\n",
        dir.display()
    );
    let (authorizers, follow) = Authorizers::load(&config(&text).unwrap()).unwrap();
    assert_eq!(follow.len(), 1);
    let rows = [
        ("alice,dev", "GET /api/v1/nodes/n/proxy/x", Some("rbac"), true),
        ("alice,dev", "^GET /api/v1/nodes/n/proxy/x", Some("rbac"), true),
        ("alice,dev", "DELETE /api/v1/nodes/n/proxy/x", None, false),
        ("alice", "GET /api/v1/nodes/n/proxy/x", None, false),
        ("alice", "GET /healthz", Some("paths"), true),
        (NODE, "GET /api/v1/nodes/n/proxy/x", Some("node"), true),
        (NODE, "GET /api/v1/nodes/m/proxy/x", Some("node"), false),
        (NODE, "GET /healthz", Some("paths"), true),
        (NODE, "GET /api/v1/secrets", None, false),
        ("", "GET /", None, false),
    ];
    for (who, what, authorizer, allowed) in rows {
        let (user, request) = (user(who), request(what));
        let verdict = authorizers.decide(&Attributes { user: &user, request: &request }).await;
        assert_eq!((verdict.authorizer, verdict.allowed), (authorizer, allowed), "{who} {what}");
    }
    let missing = config("authorization: [{rbac: {files: [/nonexistent/rbac.yaml]}}]").unwrap();
    let error = format!("{:#}", Authorizers::load(&missing).err().unwrap());
    assert!(error.contains("/nonexistent/rbac.yaml"), "{error}");
    std::fs::remove_dir_all(&dir).unwrap();
}
