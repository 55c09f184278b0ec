//! The authorizer of nodes, which restricts a node to its own objects.
//!
//! A node is a user `system:node:NAME` in the group `system:nodes`. This authorizer has no opinion about other users.
//! About nodes, it decides what can be decided from the request alone:
//!
//! - **The node's own objects are allowed:** proxy URLs of its Node object; `nodes/link` and `nodes/join` of the group
//!   `master-agent` under its name (calling home, joining); its Node and its status; its lease in `kube-node-lease`;
//!   its CSINode; creating and watching CertificateSigningRequests. A request that creates an object does not contain
//!   the object's name, which Kubernetes' NodeRestriction admission compares.
//! - **Another node's objects are denied**, whatever the next authorizers would decide: the same objects under other
//!   names, and lists of all of them.
//! - **There is no opinion about the rest**, so another authorizer must allow it. The pods, secrets, config maps,
//!   volumes and claims that a kubelet needs depend on the pods that run on the node, which only kube-apiserver's node
//!   authorizer knows. With `defer_to_apiserver`, these requests and those that Kubernetes allows every node are
//!   allowed here, and kube-apiserver decides. This needs its `--authorization-mode=Node,…` and the NodeRestriction
//!   admission. Requests that its node authorizer would deny in any case are not passed on even then: a pod list must
//!   select the node itself, and no pod or service is proxied or entered.

use futures_util::future::BoxFuture;

use super::{
    authorizer::{Attributes, Authorizer, Decision},
    config::NodeConfig,
};
use crate::request_info::{OWN_GROUP, RequestInfo};

const LEASES: &str = "kube-node-lease";

/// Authorizes the requests of nodes.
pub struct NodeAuthorizer {
    defer_to_apiserver: bool,
}

impl NodeAuthorizer {
    pub fn new(config: &NodeConfig) -> Self {
        Self { defer_to_apiserver: config.defer_to_apiserver }
    }

    fn decide(&self, Attributes { user, request }: &Attributes<'_>) -> Decision {
        let Some(node) = user.node().filter(|_| request.is_resource) else { return Decision::none() };
        let kind = (request.group.as_str(), request.resource.as_str(), request.subresource.as_str());
        let verb = request.verb.as_str();
        let own = match kind {
            ("", "nodes", "proxy") => own(proxied(&request.name) == Some(node), "only proxy URLs of its own"),
            // The legacy form of a proxy URL.
            ("", "nodes", _) if verb == "proxy" => Err("cannot use the legacy proxy URLs"),
            // Nodes are in no namespace.
            (OWN_GROUP, "nodes", "link" | "join") => own(
                verb == "create" && request.name == node && request.namespace.is_empty(),
                "can only call home and join under its own name",
            ),
            ("", "nodes", "") => match verb {
                // The object contains its name.
                "create" => Ok("create"),
                "get" | "list" | "watch" | "update" | "patch" => {
                    own(request.name == node, "can only read and write its own Node object")
                }
                _ => Err("can only get, create, update or patch its own Node object"),
            },
            ("", "nodes", "status") => own(
                matches!(verb, "get" | "update" | "patch") && request.name == node,
                "can only update the status of its own Node object",
            ),
            ("", "nodes", _) => Err("cannot use this subresource of nodes"),
            ("coordination.k8s.io", "leases", "") if request.namespace == LEASES => {
                by_name(request, node, "can only get, create, update, patch or delete its own lease")
            }
            ("storage.k8s.io", "csinodes", "") => {
                by_name(request, node, "can only get, create, update, patch or delete its own CSINode")
            }
            ("certificates.k8s.io", "certificatesigningrequests", "")
                if matches!(verb, "create" | "get" | "list" | "watch") =>
            {
                Ok("certificates")
            }
            _ if self.defer_to_apiserver && apiserver_decides(request, node) => Ok("apiserver-decides"),
            _ => {
                let reason = "no rule of the node authorizer applies to this request".to_owned();
                return Decision::NoOpinion { reason };
            }
        };
        match own {
            Ok(rule) => Decision::Allow { rule: rule.to_owned() },
            Err(reason) => {
                Decision::Deny { rule: "not-its-own".to_owned(), reason: format!("node {node:?} {reason}") }
            }
        }
    }
}

impl Authorizer for NodeAuthorizer {
    fn authorize<'a>(&'a self, attributes: &'a Attributes<'a>) -> BoxFuture<'a, Decision> {
        Box::pin(std::future::ready(self.decide(attributes)))
    }
}

/// The rule that allows a request, or the reason to deny it.
type Own = Result<&'static str, &'static str>;

fn own(is: bool, reason: &'static str) -> Own {
    if is { Ok("own") } else { Err(reason) }
}

/// Decides about objects that have the name of their node.
fn by_name(request: &RequestInfo, node: &str, reason: &'static str) -> Own {
    match request.verb.as_str() {
        "create" => Ok("create"),
        "get" | "update" | "patch" | "delete" => own(request.name == node, reason),
        _ => Err(reason),
    }
}

/// Returns the node in `NAME`, `NAME:PORT` or `SCHEME:NAME:PORT`.
fn proxied(name: &str) -> Option<&str> {
    let mut parts = name.split(':');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(name), None, ..) | (Some(name), Some(_), None, _) => Some(name),
        (Some("http" | "https"), Some(name), Some(_), None) => Some(name),
        _ => None,
    }
}

/// Whether kube-apiserver's node authorizer and the NodeRestriction admission could allow a request.
fn apiserver_decides(request: &RequestInfo, node: &str) -> bool {
    let verb = request.verb.as_str();
    let read = matches!(verb, "get" | "list" | "watch");
    let named = !request.name.is_empty();
    match (request.group.as_str(), request.resource.as_str(), request.subresource.as_str()) {
        ("", "pods", "") => match verb {
            "get" => named,
            "list" | "watch" => named || request.selects("spec.nodeName", node),
            // A kubelet creates and deletes mirror pods.
            "create" | "delete" => true,
            _ => false,
        },
        ("", "pods", "status") | ("", "persistentvolumeclaims", "status") => {
            matches!(verb, "update" | "patch") && named
        }
        ("", "pods", "eviction") => verb == "create",
        ("", "secrets" | "configmaps", "") => read && named && !request.namespace.is_empty(),
        ("", "persistentvolumeclaims" | "persistentvolumes", "")
        | ("resource.k8s.io", "resourceclaims", "")
        | ("storage.k8s.io", "volumeattachments", "") => verb == "get" && named,
        ("", "serviceaccounts", "token") => verb == "create" && named,
        ("resource.k8s.io", "resourceslices", "") => match verb {
            "get" | "create" | "update" | "patch" | "delete" => true,
            _ => request.selects("nodeName", node),
        },
        ("", "services", "")
        | ("node.k8s.io", "runtimeclasses", "")
        | ("storage.k8s.io", "csidrivers", "")
        | ("certificates.k8s.io", "clustertrustbundles", "") => read,
        ("certificates.k8s.io", "podcertificaterequests", "") => read || verb == "create",
        ("", "endpoints", "") => verb == "get",
        ("", "events", "") | ("events.k8s.io", "events", "") => matches!(verb, "create" | "update" | "patch"),
        ("authentication.k8s.io", "tokenreviews", "")
        | ("authorization.k8s.io", "subjectaccessreviews" | "localsubjectaccessreviews", "") => {
            verb == "create"
        }
        _ => false,
    }
}
