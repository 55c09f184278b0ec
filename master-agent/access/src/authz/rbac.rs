//! The authorizer by RBAC objects in files, which have the same form and meaning as in Kubernetes.
//!
//! A file contains `Role`, `ClusterRole`, `RoleBinding` and `ClusterRoleBinding` objects of
//! rbac.authorization.k8s.io/v1, in several documents or in a `List`, as `kubectl get … -o yaml` writes them. Unknown
//! kinds and fields are errors that name the file and the document. A ClusterRole with an `aggregationRule` has the
//! rules of the roles that it selects and none of its own. A binding to a role that does not exist grants nothing and
//! causes a warning.
//!
//! Bindings are indexed by subject and namespace, so a decision only examines the caller's own grants.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};
use futures_util::future::BoxFuture;
use proto_net::file_watcher::{FileWatcher, Watcher};
use serde::Deserialize;
use serde_json::Value;

use super::authorizer::{Attributes, Authorizer, Decision};
use crate::{request_info::RequestInfo, user::ServiceAccountName};

/// The largest file, in bytes.
const MAX_FILE: u64 = 16 << 20;
/// The most files of a directory.
const MAX_FILES: usize = 1000;

const API: &str = "rbac.authorization.k8s.io";

pub struct Rbac(Arc<FileWatcher<Policy>>);

impl Rbac {
    /// Reads files, and all `.yaml`, `.yml` and `.json` files of directories that are not hidden.
    pub fn load(files: &[PathBuf]) -> anyhow::Result<Self> {
        let given = files.to_vec();
        Ok(Self(FileWatcher::load("the RBAC files", files.to_vec(), move || {
            let policy = Policy::read(&given)?;
            for warning in &policy.warnings {
                tracing::warn!(warning, "an RBAC binding grants nothing");
            }
            Ok(policy)
        })?))
    }

    /// Returns the watcher of the files.
    pub fn watcher(&self) -> Arc<dyn Watcher> {
        self.0.clone()
    }
}

impl Authorizer for Rbac {
    fn authorize<'a>(&'a self, attributes: &'a Attributes<'a>) -> BoxFuture<'a, Decision> {
        Box::pin(std::future::ready(self.0.get().decide(attributes)))
    }
}

/// The rights that all roles and bindings grant.
#[derive(Debug, Default)]
pub struct Policy {
    users: HashMap<String, Grants>,
    groups: HashMap<String, Grants>,
    pub warnings: Vec<String>,
}

/// Grants by namespace. Those of the empty namespace apply everywhere.
type Grants = HashMap<String, Vec<Grant>>;

#[derive(Debug)]
struct Grant {
    rules: Arc<[Rule]>,
    /// The description of the binding in audit records.
    binding: Arc<str>,
}

impl Policy {
    pub fn read(files: &[PathBuf]) -> anyhow::Result<Self> {
        let mut objects = Objects::default();
        for file in expand(files)? {
            let origin = file.display().to_string();
            let size = std::fs::metadata(&file).with_context(|| format!("can't read {origin}"))?.len();
            if size > MAX_FILE {
                bail!("{origin} is larger than {} MiB", MAX_FILE >> 20);
            }
            let text = std::fs::read_to_string(&file).with_context(|| format!("can't read {origin}"))?;
            objects.add(&text, &origin)?;
        }
        Ok(objects.policy())
    }

    pub fn decide(&self, Attributes { user, request }: &Attributes<'_>) -> Decision {
        let resource = request.combined_resource();
        let as_user = self.users.get(&user.name).map(|grants| (grants, "User", user.name.as_str()));
        let as_groups = user.groups.iter().filter_map(|group| {
            let grants = self.groups.get(group)?;
            Some((grants, "Group", group.as_str()))
        });
        for (grants, kind, subject) in as_user.into_iter().chain(as_groups) {
            let namespaces = [Some(""), Some(request.namespace.as_str()).filter(|n| !n.is_empty())];
            let grants =
                namespaces.into_iter().flatten().filter_map(|namespace| grants.get(namespace)).flatten();
            for grant in grants {
                if grant.rules.iter().any(|rule| rule.allows(request, &resource)) {
                    let rule = format!("{} to {kind} {subject:?}", grant.binding);
                    return Decision::Allow { rule };
                }
            }
        }
        Decision::none()
    }
}

/// The objects of all files.
#[derive(Default)]
struct Objects {
    /// Roles by namespace and name. The namespace of a cluster role is empty.
    roles: BTreeMap<(String, String), Role>,
    bindings: BTreeMap<(String, String), Binding>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Role {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    metadata: Metadata,
    #[serde(default)]
    rules: Option<Vec<Rule>>,
    #[serde(default)]
    aggregation_rule: Option<AggregationRule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Binding {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    kind: String,
    metadata: Metadata,
    #[serde(default)]
    subjects: Option<Vec<Subject>>,
    role_ref: RoleRef,
}

/// The metadata that matters here. Other fields are ignored.
#[derive(Deserialize)]
struct Metadata {
    name: String,
    #[serde(default)]
    namespace: Option<String>,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    verbs: Vec<String>,
    #[serde(default)]
    api_groups: Vec<String>,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    resource_names: Vec<String>,
    #[serde(default, rename = "nonResourceURLs")]
    non_resource_urls: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AggregationRule {
    #[serde(default)]
    cluster_role_selectors: Vec<Selector>,
}

/// A label selector. An empty one selects everything.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Selector {
    #[serde(default)]
    match_labels: BTreeMap<String, String>,
    #[serde(default)]
    match_expressions: Vec<Expression>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expression {
    key: String,
    operator: Operator,
    #[serde(default)]
    values: Vec<String>,
}

#[derive(Clone, Copy, Deserialize)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Subject {
    kind: SubjectKind,
    name: String,
    #[serde(default)]
    namespace: Option<String>,
    #[serde(default)]
    api_group: Option<String>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
enum SubjectKind {
    User,
    Group,
    ServiceAccount,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RoleRef {
    kind: RoleKind,
    name: String,
    #[serde(default)]
    api_group: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
enum RoleKind {
    Role,
    ClusterRole,
}

impl Objects {
    fn add(&mut self, text: &str, origin: &str) -> anyhow::Result<()> {
        let mut bytes = text.as_bytes();
        let options = serde_saphyr::options! {
            // As in Kubernetes, `n` and the like are strings.
            strict_booleans: true,
            // The size of the file bounds these.
            budget: serde_saphyr::budget! { max_documents: 1_000_000, max_nodes: 8_000_000, max_events: 16_000_000 },
        };
        for (i, document) in serde_saphyr::read_with_options::<_, Value>(&mut bytes, options).enumerate() {
            let place = format!("{origin}, document {}", i + 1);
            let document =
                document.map_err(|e| anyhow::anyhow!("{place}: {}", first_line(&e.to_string())))?;
            self.document(document, &place)?;
        }
        Ok(())
    }

    fn document(&mut self, document: Value, place: &str) -> anyhow::Result<()> {
        if document.is_null() {
            return Ok(());
        }
        let field = |name| document.get(name).and_then(Value::as_str).unwrap_or_default();
        match (field("apiVersion"), field("kind")) {
            ("v1", "List") => {
                let Value::Object(mut list) = document else { return Ok(()) };
                let Some(Value::Array(items)) = list.remove("items") else {
                    bail!("{place}: a List without items");
                };
                for (i, item) in items.into_iter().enumerate() {
                    let place = format!("{place}, item {}", i + 1);
                    if item.get("kind").and_then(Value::as_str) == Some("List") {
                        bail!("{place}: a List in a List");
                    }
                    self.document(item, &place)?;
                }
                Ok(())
            }
            ("rbac.authorization.k8s.io/v1", "Role" | "ClusterRole") => {
                self.role(document).with_context(|| place.to_owned())
            }
            ("rbac.authorization.k8s.io/v1", "RoleBinding" | "ClusterRoleBinding") => {
                self.binding(document).with_context(|| place.to_owned())
            }
            (version, kind) => bail!(
                "{place}: kind {kind:?} of apiVersion {version:?} is none of Role, ClusterRole, RoleBinding and \
                 ClusterRoleBinding of {API}/v1, or List of v1"
            ),
        }
    }

    fn role(&mut self, document: Value) -> anyhow::Result<()> {
        let cluster = document.get("kind").and_then(Value::as_str) == Some("ClusterRole");
        let role: Role = serde_json::from_value(document)?;
        let (namespace, name) = role.metadata.key(cluster)?;
        if !cluster && role.aggregation_rule.is_some() {
            bail!("Role {name:?} has an aggregationRule, which is for ClusterRoles");
        }
        for (i, rule) in role.rules.iter().flatten().enumerate() {
            rule.check(cluster).with_context(|| format!("role {name:?}, rule {}", i + 1))?;
        }
        if self.roles.insert((namespace, name.clone()), role).is_some() {
            bail!("role {name:?} is defined twice");
        }
        Ok(())
    }

    fn binding(&mut self, document: Value) -> anyhow::Result<()> {
        let cluster = document.get("kind").and_then(Value::as_str) == Some("ClusterRoleBinding");
        let binding: Binding = serde_json::from_value(document)?;
        let (namespace, name) = binding.metadata.key(cluster)?;
        if cluster && binding.role_ref.kind == RoleKind::Role {
            bail!("ClusterRoleBinding {name:?} refers to a Role: it can only refer to a ClusterRole");
        }
        if binding.role_ref.api_group.as_deref().is_some_and(|group| !matches!(group, "" | API)) {
            bail!("binding {name:?}: its roleRef is not of {API}");
        }
        for subject in binding.subjects.iter().flatten() {
            let of_service_account = subject.kind == SubjectKind::ServiceAccount;
            let group = subject.api_group.as_deref().unwrap_or_default();
            if !(group.is_empty() || group == API && !of_service_account) {
                bail!("binding {name:?}: subject {:?} has apiGroup {group:?}", subject.name);
            }
            let namespaced = subject.namespace.as_deref().is_some_and(|namespace| !namespace.is_empty());
            if subject.name.is_empty() || (of_service_account && cluster && !namespaced) {
                bail!("binding {name:?}: subject {:?} lacks a name or namespace", subject.name);
            }
            if namespaced && !of_service_account {
                bail!("binding {name:?}: subject {:?} can't have a namespace", subject.name);
            }
        }
        if self.bindings.insert((namespace, name.clone()), binding).is_some() {
            bail!("binding {name:?} is defined twice");
        }
        Ok(())
    }

    fn policy(&self) -> Policy {
        let mut policy = Policy::default();
        let mut rules = HashMap::new();
        for ((namespace, name), Binding { kind, subjects, role_ref, .. }) in &self.bindings {
            let RoleRef { kind: role_kind, name: role_name, .. } = role_ref;
            let role_namespace = match role_kind {
                RoleKind::Role => namespace.clone(),
                RoleKind::ClusterRole => String::new(),
            };
            let key = (role_namespace, role_name.clone());
            let place = if namespace.is_empty() { String::new() } else { format!(" in {namespace:?}") };
            let binding = format!("{kind} {name:?}{place} of {role_kind:?} {role_name:?}");
            if !self.roles.contains_key(&key) {
                policy.warnings.push(format!("{binding}: there is no such role"));
                continue;
            }
            let rules = rules.entry(key).or_insert_with_key(|key| self.rules(key));
            let binding: Arc<str> = binding.into();
            let mut granted = BTreeSet::new();
            for subject in subjects.iter().flatten() {
                let (index, name) = match subject.kind {
                    SubjectKind::User => (&mut policy.users, subject.name.clone()),
                    SubjectKind::Group => (&mut policy.groups, subject.name.clone()),
                    SubjectKind::ServiceAccount => {
                        let own = subject.namespace.as_deref().filter(|own| !own.is_empty());
                        let of = own.unwrap_or(namespace);
                        let account = ServiceAccountName { namespace: of, name: &subject.name };
                        (&mut policy.users, account.to_string())
                    }
                };
                if granted.insert((subject.kind == SubjectKind::Group, name.clone())) {
                    let grant = Grant { rules: rules.clone(), binding: binding.clone() };
                    index.entry(name).or_default().entry(namespace.clone()).or_default().push(grant);
                }
            }
        }
        policy
    }

    /// The rules of a role, or of all roles that it aggregates directly or through others.
    fn rules(&self, key: &(String, String)) -> Arc<[Rule]> {
        let mut rules = Vec::new();
        let (mut seen, mut next) = (BTreeSet::from([key]), vec![key]);
        while let Some(role) = next.pop().and_then(|key| self.roles.get(key)) {
            let Some(aggregation) = &role.aggregation_rule else {
                rules.extend(role.rules.iter().flatten().cloned());
                continue;
            };
            let selected = self.roles.iter().filter(|((namespace, _), role)| {
                namespace.is_empty() && aggregation.cluster_role_selectors.iter().any(|s| s.selects(role))
            });
            next.extend(selected.map(|(key, _)| key).filter(|key| seen.insert(key)));
        }
        rules.into()
    }
}

impl Metadata {
    /// Returns the namespace and the name.
    fn key(&self, cluster: bool) -> anyhow::Result<(String, String)> {
        let namespace = self.namespace.clone().unwrap_or_default();
        if self.name.is_empty() {
            bail!("has no name");
        }
        match (cluster, namespace.is_empty()) {
            (true, false) => bail!("{:?} has a namespace, which its kind can't have", self.name),
            (false, true) => bail!("{:?} has no namespace", self.name),
            (true, true) | (false, false) => Ok((namespace, self.name.clone())),
        }
    }
}

impl Selector {
    fn selects(&self, role: &Role) -> bool {
        let label = |key| role.metadata.labels.as_ref().and_then(|labels| labels.get(key));
        self.match_labels.iter().all(|(key, value)| label(key) == Some(value))
            && self.match_expressions.iter().all(|Expression { key, operator, values }| {
                let label = label(key);
                match operator {
                    Operator::In => label.is_some_and(|label| values.contains(label)),
                    Operator::NotIn => label.is_none_or(|label| !values.contains(label)),
                    Operator::Exists => label.is_some(),
                    Operator::DoesNotExist => label.is_none(),
                }
            })
    }
}

impl Rule {
    /// Performs the checks of kube-apiserver's validation.
    fn check(&self, cluster: bool) -> anyhow::Result<()> {
        let of_resources =
            !(self.api_groups.is_empty() && self.resources.is_empty() && self.resource_names.is_empty());
        if self.verbs.is_empty() {
            bail!("has no verbs");
        }
        if !self.non_resource_urls.is_empty() {
            if !cluster {
                bail!("has nonResourceURLs, which a Role can't grant");
            }
            if of_resources {
                bail!("has both resources and nonResourceURLs");
            }
        } else if self.api_groups.is_empty() || self.resources.is_empty() {
            bail!("needs apiGroups and resources, or nonResourceURLs");
        }
        Ok(())
    }

    /// Whether the rule allows a request. `combined` is its resource with the subresource.
    fn allows(&self, request: &RequestInfo, combined: &str) -> bool {
        let has = |list: &[String], wanted: &str| list.iter().any(|one| one == "*" || one == wanted);
        if !has(&self.verbs, &request.verb) {
            return false;
        }
        if !request.is_resource {
            return self.non_resource_urls.iter().any(|url| {
                url == "*"
                    || *url == request.path
                    || (url.ends_with('*') && request.path.starts_with(url.trim_end_matches('*')))
            });
        }
        has(&self.api_groups, &request.group)
            && self.resources.iter().any(|resource| {
                let any_of_subresource = || {
                    let of = resource.strip_prefix("*/");
                    !request.subresource.is_empty() && of == Some(request.subresource.as_str())
                };
                resource == "*" || resource == combined || any_of_subresource()
            })
            && (self.resource_names.is_empty() || self.resource_names.contains(&request.name))
    }
}

/// Replaces directories with their files.
fn expand(files: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for file in files {
        if !file.is_dir() {
            all.push(file.clone());
            continue;
        }
        let what = || format!("can't read {}", file.display());
        let entries = std::fs::read_dir(file).with_context(what)?;
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.with_context(what)?.path();
            if is_yaml(&path) && path.is_file() {
                found.push(path);
            }
            if found.len() > MAX_FILES {
                bail!("{} has more than {MAX_FILES} files", file.display());
            }
        }
        found.sort();
        all.extend(found);
    }
    Ok(all)
}

fn is_yaml(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let extension = path.extension().and_then(|extension| extension.to_str());
    !hidden && matches!(extension, Some("yaml" | "yml" | "json"))
}

/// Returns the first line of a parser's message. The other lines show the text around the mistake.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests;
