//! Phase 3: reads what the request asks for as kube-apiserver does, and chooses its handler.

use std::sync::Arc;

use access::{
    peer::Peer,
    request_info::{OWN_GROUP, RequestInfo},
};
use hyper::{Version, body::Body};
use percent_encoding::percent_decode_str;
use proto::{NodeName, call_home::UNNAMED, name::InvalidNodeName};

use super::{
    call_home,
    rejection::Rejection,
    stages::{CallHomeRequest, Handler, Identified, Resolved},
};
use crate::{
    front_end::{connection::Connection, headers, recorder::Recorder},
    http::hop::Hop,
    tunnels::call_home::Purpose,
};

pub(super) fn resolve(
    connection: &Connection,
    request: Identified,
    record: &mut Recorder,
) -> Result<Resolved, Rejection> {
    let Identified { head, body, caller } = request;
    let mut hop = if head.version < Version::HTTP_2 { Hop::of(&head.headers) } else { Hop::default() };
    hop.upgrade = headers::known_upgrade(&hop).cloned();
    let (path, query) = (head.uri.path(), head.uri.query());
    let info = RequestInfo::resolve(head.method.as_str(), path, query, hop.upgrade.is_some())?;
    let info = Arc::new(info);
    record.resolved(&info);
    // A stolen credential must be rejected before it takes a seat of the node that it was stolen from.
    connection.reject_credential_of_other_node(&caller, record).map_err(Rejection::NotAuthorized)?;
    let handler = handler(connection, &info)?;
    if let Handler::CallHome(call_home) = &handler {
        if !call_home::asks_for_link(&head) || info.verb != "create" {
            return Err(Rejection::NoLinkRequested);
        }
        if !body.is_end_stream() {
            return Err(Rejection::CallHomeWithBody);
        }
        call_home::reject_caller_of_other_node(connection, call_home, &caller, &info, record)?;
    }
    let long_running = is_long_running(&info, query)
        || match &handler {
            Handler::CallHome(_) => true,
            Handler::Page(page) => page.is_long_running(&info.path),
            Handler::ProxyUrl(_) | Handler::Upstream => false,
        };
    Ok(Resolved { head, body, caller, info, hop, handler, long_running })
}

fn handler(connection: &Connection, info: &RequestInfo) -> Result<Handler, Rejection> {
    if let Some(call_home) = call_home(connection, info)? {
        return Ok(Handler::CallHome(call_home));
    }
    let front_end = &connection.front_end;
    if let Some(proxy_urls) = front_end.proxy_urls.as_ref().filter(|_| is_proxy_url(info)) {
        return Ok(Handler::ProxyUrl(proxy_urls.clone()));
    }
    if let Some(page) = front_end.page(&info.path).filter(|_| !info.is_resource) {
        return Ok(Handler::Page(page.clone()));
    }
    Ok(Handler::Upstream)
}

/// Returns the call home that the request makes, if it makes one and the front end takes such calls.
fn call_home(connection: &Connection, info: &RequestInfo) -> Result<Option<CallHomeRequest>, Rejection> {
    let Some(services) = connection.front_end.call_home() else { return Ok(None) };
    let Some(purpose) = purpose(info)? else { return Ok(None) };
    match connection.peer {
        Peer::Address(peer) => Ok(Some(CallHomeRequest { services: services.clone(), peer, purpose })),
        Peer::Node { .. } | Peer::Local(_) => Err(Rejection::CallHomeElsewhere),
    }
}

/// Returns the purpose of a request to the paths for calls home.
fn purpose(info: &RequestInfo) -> Result<Option<Purpose>, InvalidNodeName> {
    let kind = (info.group.as_str(), info.version.as_str(), info.resource.as_str());
    // Nodes are in no namespace, and the rights of one must not suffice for a call home.
    if kind != (OWN_GROUP, "v1", "nodes") || !info.namespace.is_empty() || !info.tail.is_empty() {
        return Ok(None);
    }
    Ok(match info.subresource.as_str() {
        "link" => Some(Purpose::Link(info.name.parse::<NodeName>()?)),
        "join" if info.name == UNNAMED => Some(Purpose::Join(None)),
        "join" => Some(Purpose::Join(Some(info.name.parse::<NodeName>()?))),
        _ => None,
    })
}

/// Whether a request is for the proxy URL of a node, pod or service.
fn is_proxy_url(info: &RequestInfo) -> bool {
    info.group.is_empty()
        && info.version == "v1"
        && info.subresource == "proxy"
        && ["nodes", "pods", "services"].contains(&info.resource.as_str())
}

/// Whether a request is long-running by kube-apiserver's own rules, except that a log which is not followed is short.
fn is_long_running(info: &RequestInfo, query: Option<&str>) -> bool {
    // kube-apiserver decodes the key, and takes every other value for true, even a missing one.
    let follows = || {
        query.unwrap_or_default().split('&').any(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            percent_decode_str(key).eq("follow".bytes()) && value != "false" && value != "0"
        })
    };
    info.verb == "watch"
        || info.subresource == "proxy"
        || info.verb == "proxy"
        || ["exec", "attach", "portforward"].contains(&info.subresource.as_str())
        || info.subresource == "log" && follows()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(path: &str, query: Option<&str>) -> RequestInfo {
        RequestInfo::resolve("GET", path, query, false).unwrap()
    }

    #[test]
    fn watches_followed_logs_and_connections_are_long_running() {
        for (path, query, long_running) in [
            ("/api/v1/pods", None, false),
            ("/api/v1/pods", Some("watch=1"), true),
            ("/api/v1/namespaces/a/pods/p/log", None, false),
            ("/api/v1/namespaces/a/pods/p/log", Some("follow=true"), true),
            ("/api/v1/namespaces/a/pods/p/log", Some("follow=false"), false),
            ("/api/v1/namespaces/a/pods/p/log", Some("tailLines=1&follow"), true),
            ("/api/v1/namespaces/a/pods/p/log", Some("%66ollow=true"), true),
            ("/api/v1/namespaces/a/pods/p/log", Some("followed=true"), false),
            ("/api/v1/namespaces/a/pods/p/exec", Some("command=ls"), true),
            ("/api/v1/nodes/n1/proxy/metrics", None, true),
            ("/healthz", None, false),
        ] {
            assert_eq!(is_long_running(&info(path, query), query), long_running, "{path} {query:?}");
        }
    }

    #[test]
    fn calls_home_are_for_nodes_in_no_namespace() {
        let n1: NodeName = "n1".parse().unwrap();
        for (path, purpose) in [
            ("/apis/master-agent/v1/nodes/n1/link", Some(Purpose::Link(n1.clone()))),
            ("/apis/master-agent/v1/nodes/n1/join", Some(Purpose::Join(Some(n1)))),
            ("/apis/master-agent/v1/nodes/-/join", Some(Purpose::Join(None))),
            ("/apis/master-agent/v1/namespaces/a/nodes/n1/link", None),
            ("/apis/master-agent/v1/namespaces/a/nodes/n1/join", None),
            ("/apis/master-agent/v1/nodes/n1/link/more", None),
            ("/apis/master-agent/v1/nodes/n1/status", None),
            ("/apis/master-agent/v2/nodes/n1/link", None),
            ("/api/v1/nodes/n1/link", None),
        ] {
            assert_eq!(super::purpose(&info(path, None)).unwrap(), purpose, "{path}");
        }
        assert!(super::purpose(&info("/apis/master-agent/v1/nodes/-/link", None)).is_err());
    }

    #[test]
    fn proxy_urls_are_those_of_nodes_pods_and_services() {
        for (path, is) in [
            ("/api/v1/nodes/n1/proxy/metrics", true),
            ("/api/v1/namespaces/a/pods/p/proxy/", true),
            ("/api/v1/namespaces/a/services/s/proxy", true),
            ("/api/v1/nodes/n1/status", false),
            ("/apis/example.org/v1/nodes/n1/proxy/metrics", false),
        ] {
            assert_eq!(is_proxy_url(&info(path, None)), is, "{path}");
        }
    }
}
