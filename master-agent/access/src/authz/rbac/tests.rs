use super::*;
use crate::authz::tests::{request, shown, user};

const OBJECTS: &str = r#"
# An empty document comes first.
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader, labels: {aggregate-to-view: "true", tier: a}, annotations: {x: y}}
rules:
- {apiGroups: [""], resources: [pods, pods/log], verbs: [get, list, watch]}
- {nonResourceURLs: [/healthz, "/livez/*"], verbs: [get]}
---
apiVersion: v1
kind: List
items:
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRole
  metadata: {name: scaler, labels: {aggregate-to-view: "true", tier: b}}
  rules: [{apiGroups: ["*"], resources: ["*/scale"], verbs: [update]}]
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRole
  metadata: {name: admin}
  rules:
  - {apiGroups: ["*"], resources: ["*"], verbs: ["*"]}
  - {nonResourceURLs: ["*"], verbs: ["*"]}
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRole
  metadata: {name: view, labels: {aggregate-to-all: "true"}}
  aggregationRule: {clusterRoleSelectors: [{matchLabels: {aggregate-to-view: "true"}}]}
  # Kubernetes overwrites these.
  rules: [{apiGroups: [""], resources: [secrets], verbs: [get]}]
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRole
  metadata: {name: all, labels: {aggregate-to-all: "true", aggregate-to-view: "false"}}
  aggregationRule: {clusterRoleSelectors: [{matchExpressions: [{key: aggregate-to-all, operator: Exists}]}]}
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRole
  metadata: {name: some}
  aggregationRule:
    clusterRoleSelectors:
    - {matchExpressions: [{key: tier, operator: In, values: [b]}, {key: aggregate-to-all, operator: DoesNotExist}]}
  rules: null
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRole
  metadata: {name: named}
  rules:
  - {apiGroups: [""], resources: [configmaps], resourceNames: [one, two], verbs: ["*"]}
  - {apiGroups: [""], resources: [nodes/proxy], resourceNames: ["n", "https:n:10250"], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: editor, namespace: a}
rules: [{apiGroups: [""], resources: [pods, pods/exec, "services/*"], verbs: [create, delete, deletecollection]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: editor, namespace: b}
rules: [{apiGroups: [apps], resources: [deployments], verbs: [create]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: readers}
subjects:
- {kind: User, name: alice, apiGroup: rbac.authorization.k8s.io}
- {kind: Group, name: dev}
- {kind: ServiceAccount, name: bot, namespace: ci}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: admins}
subjects: [{kind: Group, name: "system:masters"}]
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: admin}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: editors, namespace: a}
subjects: [{kind: User, name: alice}, {kind: ServiceAccount, name: local}]
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: editor}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: admin-of-b, namespace: b}
subjects: [{kind: User, name: bob}]
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: admin}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: viewers}
subjects: [{kind: User, name: viewer}]
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: alls}
subjects: [{kind: User, name: aller}]
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: all}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: somes}
subjects: [{kind: User, name: somer}]
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: some}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: names}
subjects: [{kind: User, name: namer}]
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: named}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: dangling, namespace: b}
subjects: [{kind: User, name: carol}]
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: nobody}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: admin}
"#;

fn policy(text: &str) -> anyhow::Result<Policy> {
    let mut objects = Objects::default();
    objects.add(text, "test.yaml")?;
    Ok(objects.policy())
}

fn decided(policy: &Policy, who: &str, what: &str) -> String {
    let (user, request) = (user(who), request(what));
    shown(&policy.decide(&Attributes { user: &user, request: &request }))
}

#[test]
fn decisions() {
    let policy = policy(OBJECTS).unwrap();
    let reader = |to: &str| format!(r#"allow ClusterRoleBinding "readers" of ClusterRole "reader" to {to}"#);
    let rows: Vec<(&str, &str, bool)> = vec![
        ("alice", "GET /api/v1/pods", true),
        ("alice", "GET /api/v1/namespaces/z/pods/p", true),
        ("alice", "GET /api/v1/namespaces/z/pods?watch=1", true),
        ("alice", "GET /api/v1/namespaces/z/pods/p/log", true),
        ("alice", "GET /api/v1/namespaces/z/pods/p/status", false),
        ("alice", "GET /apis/metrics.k8s.io/v1beta1/pods", false),
        ("alice", "GET /api/v1/secrets", false),
        ("alice", "OPTIONS /api/v1/pods", false),
        ("alice", "GET /healthz", true),
        ("alice", "GET /healthz/", false),
        ("alice", "HEAD /healthz", false),
        ("alice", "POST /healthz", false),
        ("alice", "GET /livez/ping", true),
        ("alice", "GET /livez", false),
        ("Alice", "GET /api/v1/pods", false),
        ("x,dev", "GET /api/v1/pods", true),
        ("dev", "GET /api/v1/pods", false),
        ("x,alice", "GET /api/v1/pods", false),
        ("system:serviceaccount:ci:bot", "GET /api/v1/pods", true),
        ("system:serviceaccount:other:bot", "GET /api/v1/pods", false),
        ("bot", "GET /api/v1/pods", false),
        // A role binding is of its namespace.
        ("alice", "POST /api/v1/namespaces/a/pods", true),
        ("alice", "DELETE /api/v1/namespaces/a/pods", true),
        ("alice", "POST /api/v1/namespaces/b/pods", false),
        ("alice", "POST /api/v1/pods", false),
        ("alice", "POST /apis/apps/v1/namespaces/b/deployments", false),
        ("alice", "^GET /api/v1/namespaces/a/pods/p/exec", true),
        ("alice", "GET /api/v1/namespaces/a/pods/p/exec", false),
        ("alice", "^GET /api/v1/namespaces/b/pods/p/exec", false),
        ("alice", "POST /api/v1/namespaces/a/services/s/proxy/x", false),
        ("system:serviceaccount:a:local", "POST /api/v1/namespaces/a/pods", true),
        ("system:serviceaccount:b:local", "POST /api/v1/namespaces/a/pods", false),
        ("bob", "PATCH /apis/apps/v1/namespaces/b/deployments/d/scale", true),
        ("bob", "GET /api/v1/namespaces/b", true),
        ("bob", "GET /api/v1/namespaces/a", false),
        ("bob", "GET /api/v1/nodes", false),
        ("bob", "GET /healthz", false),
        ("root,system:masters", "DELETE /api/v1/nodes/n", true),
        ("root,system:masters", "OPTIONS /api/v1/nodes/n", true),
        ("root,system:masters", "PATCH /any/path", true),
        // Aggregation.
        ("viewer", "GET /api/v1/pods", true),
        ("viewer", "PUT /apis/apps/v1/namespaces/a/deployments/d/scale", true),
        ("viewer", "PUT /apis/apps/v1/namespaces/a/deployments/d", false),
        ("viewer", "PUT /apis/apps/v1/namespaces/a/deployments/d/scaled", false),
        ("viewer", "GET /api/v1/namespaces/a/secrets/s", false),
        ("aller", "GET /api/v1/pods", true),
        ("aller", "GET /api/v1/namespaces/a/secrets/s", false),
        ("somer", "PUT /apis/apps/v1/namespaces/a/deployments/d/scale", true),
        ("somer", "GET /api/v1/pods", false),
        // Names.
        ("namer", "GET /api/v1/namespaces/a/configmaps/one", true),
        ("namer", "GET /api/v1/namespaces/a/configmaps/three", false),
        ("namer", "DELETE /api/v1/namespaces/a/configmaps/two", true),
        ("namer", "POST /api/v1/namespaces/a/configmaps", false),
        ("namer", "DELETE /api/v1/namespaces/a/configmaps", false),
        ("namer", "GET /api/v1/namespaces/a/configmaps", false),
        ("namer", "GET /api/v1/namespaces/a/configmaps?fieldSelector=metadata.name=one", true),
        ("namer", "GET /api/v1/namespaces/a/configmaps?fieldSelector=metadata.name!=one", false),
        ("namer", "GET /api/v1/nodes/n/proxy/healthz", true),
        ("namer", "GET /api/v1/nodes/https:n:10250/proxy/healthz", true),
        ("namer", "GET /api/v1/nodes/https:m:10250/proxy/healthz", false),
        ("namer", "^GET /api/v1/nodes/n/proxy/exec", false),
        // Nothing to grant.
        ("carol", "GET /api/v1/namespaces/b/pods", false),
        ("", "GET /api/v1/pods", false),
    ];
    for (who, what, allowed) in &rows {
        assert_eq!(decided(&policy, who, what).starts_with("allow"), *allowed, "{who} {what}");
    }
    assert_eq!(rows.len(), 63);
    assert_eq!(decided(&policy, "alice", "GET /api/v1/pods"), reader(r#"User "alice""#));
    assert_eq!(decided(&policy, "x,dev", "GET /api/v1/pods"), reader(r#"Group "dev""#));
    assert_eq!(
        decided(&policy, "bob", "GET /api/v1/namespaces/b/pods"),
        r#"allow RoleBinding "admin-of-b" in "b" of ClusterRole "admin" to User "bob""#
    );
    assert_eq!(policy.warnings.len(), 1);
    assert!(
        policy.warnings[0]
            .contains(r#"RoleBinding "dangling" in "b" of Role "reader": there is no such role"#)
    );
}

#[test]
fn many_objects() {
    let binding = |i: usize| {
        format!(
            "---\nkind: ClusterRoleBinding\napiVersion: rbac.authorization.k8s.io/v1\nmetadata: {{name: b{i}}}\n\
             subjects: [{{kind: User, name: u{i}}}]\nroleRef: {{kind: ClusterRole, name: reader}}\n"
        )
    };
    let text = OBJECTS.to_owned() + &(0..3000).map(binding).collect::<String>();
    let policy = policy(&text).unwrap();
    assert_eq!(policy.users["u2999"][""].len(), 1, "a caller's own grants only");
    assert!(decided(&policy, "u2999", "GET /healthz").starts_with("allow"));
    assert_eq!(decided(&policy, "u3000", "GET /healthz"), "-");
}

#[test]
fn what_is_refused() {
    let api = "apiVersion: rbac.authorization.k8s.io/v1\n";
    let meta = "metadata: {name: x}\n";
    let reference = "roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: r}\n";
    let rows = [
        ("kind: Pod\napiVersion: v1\n".to_owned(), "none of Role, ClusterRole"),
        ("just text\n".to_owned(), "none of Role, ClusterRole"),
        (format!("kind: ClusterRole\napiVersion: rbac.authorization.k8s.io/v1beta1\n{meta}"), "none of Role"),
        (format!("kind: ClusterRoles\n{api}{meta}"), "none of Role"),
        (format!("kind: ClusterRole\n{api}{meta}rule: []\n"), "unknown field `rule`"),
        (format!("kind: ClusterRole\n{api}{meta}kind: Role\n"), "duplicate"),
        (format!("kind: ClusterRole\n{api}metadata: {{}}\n"), "missing field `name`"),
        (format!("kind: ClusterRole\n{api}metadata: {{name: x, namespace: n}}\n"), "has a namespace"),
        (format!("kind: Role\n{api}{meta}"), "has no namespace"),
        (
            format!("kind: ClusterRole\n{api}{meta}rules: [{{verbs: [get], apiGroup: ['']}}]\n"),
            "unknown field",
        ),
        (
            format!(
                "kind: ClusterRole\n{api}{meta}rules: [{{verbs: [], apiGroups: [''], resources: [a]}}]\n"
            ),
            "has no verbs",
        ),
        (
            format!("kind: ClusterRole\n{api}{meta}rules: [{{verbs: [get], resources: [pods]}}]\n"),
            "needs apiGroups",
        ),
        (
            format!(
                "kind: ClusterRole\n{api}{meta}rules: [{{verbs: [get], apiGroups: [''], resources: [a], nonResourceURLs: [/x]}}]\n"
            ),
            "both resources and nonResourceURLs",
        ),
        (
            format!(
                "kind: Role\n{api}metadata: {{name: x, namespace: n}}\nrules: [{{verbs: [get], nonResourceURLs: [/x]}}]\n"
            ),
            "a Role can't grant",
        ),
        (
            format!(
                "kind: Role\n{api}metadata: {{name: x, namespace: n}}\naggregationRule: {{clusterRoleSelectors: []}}\n"
            ),
            "is for ClusterRoles",
        ),
        (
            format!("kind: ClusterRole\n{api}{meta}---\nkind: ClusterRole\n{api}{meta}"),
            "document 2: role \"x\" is defined twice",
        ),
        (format!("kind: ClusterRoleBinding\n{api}{meta}"), "missing field `roleRef`"),
        (
            format!("kind: ClusterRoleBinding\n{api}{meta}roleRef: {{kind: Role, name: r}}\n"),
            "can only refer to a ClusterRole",
        ),
        (
            format!("kind: ClusterRoleBinding\n{api}{meta}roleRef: {{kind: User, name: r}}\n"),
            "unknown variant",
        ),
        (
            format!("kind: ClusterRoleBinding\n{api}{meta}{reference}subjects: [{{kind: Robot, name: r}}]\n"),
            "unknown variant",
        ),
        (
            format!(
                "kind: ClusterRoleBinding\n{api}{meta}{reference}subjects: [{{kind: ServiceAccount, name: r}}]\n"
            ),
            "lacks a name or namespace",
        ),
        (
            format!(
                "kind: ClusterRoleBinding\n{api}{meta}{reference}subjects: [{{kind: User, name: r, namespace: n}}]\n"
            ),
            "can't have a namespace",
        ),
        (
            format!(
                "kind: ClusterRoleBinding\n{api}{meta}{reference}subjects: [{{kind: User, name: r, apiGroup: apps}}]\n"
            ),
            "has apiGroup \"apps\"",
        ),
        ("kind: List\napiVersion: v1\n".to_owned(), "a List without items"),
        (
            "kind: List\napiVersion: v1\nitems: [{kind: List, apiVersion: v1, items: []}]\n".to_owned(),
            "a List in a List",
        ),
        (
            "kind: List\napiVersion: v1\nitems: [{kind: Pod, apiVersion: v1}]\n".to_owned(),
            "document 1, item 1: kind \"Pod\"",
        ),
        (format!("kind: ClusterRole\n{api}{meta}---\n{{\n"), "document 2"),
    ];
    for (text, expected) in &rows {
        let error = format!("{:#}", policy(text).unwrap_err());
        assert!(error.starts_with("test.yaml, document "), "{error}");
        assert!(error.contains(expected), "{text}{error}");
    }
    assert_eq!(rows.len(), 27);
}

#[test]
fn files_and_directories_are_followed() {
    let dir = std::env::temp_dir().join(format!("rbac-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("d")).unwrap();
    let binding = |name: &str| {
        format!(
            "kind: ClusterRoleBinding\napiVersion: rbac.authorization.k8s.io/v1\nmetadata: {{name: {name}}}\n\
             subjects: [{{kind: User, name: {name}}}]\nroleRef: {{kind: ClusterRole, name: r}}\n"
        )
    };
    let role = "kind: ClusterRole\napiVersion: rbac.authorization.k8s.io/v1\nmetadata: {name: r}\n\
                rules: [{verbs: [get], nonResourceURLs: [/x]}]\n";
    std::fs::write(dir.join("role.yaml"), role).unwrap();
    std::fs::write(dir.join("d/a.yml"), binding("alice")).unwrap();
    std::fs::write(dir.join("d/.hidden.yaml"), "broken: [").unwrap();
    std::fs::write(dir.join("d/README"), "broken: [").unwrap();
    let rbac = Rbac::load(&[dir.join("role.yaml"), dir.join("d")]).unwrap();
    let watcher = rbac.watcher();
    let allowed = |who: &str| {
        watcher.poll();
        watcher.poll();
        decided(&rbac.0.get(), who, "GET /x").starts_with("allow")
    };
    assert!(allowed("alice") && !allowed("bob"));
    std::fs::write(dir.join("d/b.yaml"), binding("bob")).unwrap();
    assert!(allowed("alice") && allowed("bob"));
    std::fs::write(dir.join("d/c.yaml"), "kind: Pod\n").unwrap();
    assert!(allowed("alice") && allowed("bob"), "the last good one stays");
    std::fs::remove_file(dir.join("d/c.yaml")).unwrap();
    std::fs::remove_file(dir.join("d/a.yml")).unwrap();
    assert!(!allowed("alice") && allowed("bob"));
    let error = Rbac::load(&[dir.join("none.yaml")]).err().unwrap();
    assert!(format!("{error:#}").contains("none.yaml"), "{error:#}");
    std::fs::remove_dir_all(&dir).unwrap();
}
