//! The subresources of pods that kubectl uses. The stub passes them to a kubelet, on the paths and with the parameters
//! that kube-apiserver turns them into.

use std::borrow::Cow;

use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proto_net::tasks::Tasks;
use serde_json::{Value, json};

use super::{Body, failure, not_found};
use crate::http::{Base, parameters};

/// The groups, versions and resources that kubectl finds its way by.
pub(super) fn discovery(path: &str) -> Option<Value> {
    let resource = |name: &str, kind: &str, namespaced: bool, verbs: &[&str]| json!({"name": name, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": verbs});
    let list = |group: &str, resources: &[Value]| json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": resources});
    let read = ["get", "list", "watch"];
    let slices = json!({"groupVersion": "discovery.k8s.io/v1", "version": "v1"});
    Some(match path {
        "/api" => json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        "/apis" => json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [
            {"name": "discovery.k8s.io", "versions": [slices], "preferredVersion": slices},
        ]}),
        "/api/v1" => list(
            "v1",
            &[
                resource("nodes", "Node", false, &read),
                resource("services", "Service", true, &read),
                resource("pods", "Pod", true, &read),
                resource("pods/log", "Pod", true, &["get"]),
                resource("pods/exec", "PodExecOptions", true, &["create", "get"]),
                resource("pods/attach", "PodAttachOptions", true, &["create", "get"]),
                resource("pods/portforward", "PodPortForwardOptions", true, &["create", "get"]),
            ],
        ),
        "/apis/discovery.k8s.io/v1" => {
            list("discovery.k8s.io/v1", &[resource("endpointslices", "EndpointSlice", true, &read)])
        }
        _ => return None,
    })
}

/// A path of one pod: `/api/v1/namespaces/NAMESPACE/pods/NAME`, perhaps with a subresource behind.
#[derive(Debug)]
pub(super) struct PodPath<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub subresource: Option<&'a str>,
}

impl<'a> PodPath<'a> {
    pub fn parse(path: &'a str) -> Option<Self> {
        let mut segments = path.strip_prefix("/api/v1/namespaces/")?.split('/');
        let namespace = segments.next()?;
        (segments.next()? == "pods").then_some(())?;
        let (name, subresource) = (segments.next()?, segments.next());
        segments.next().is_none().then_some(Self { namespace, name, subresource })
    }

    /// What the kubelet is asked for in its place, for a pod as it is. `None` is no subresource of a pod.
    fn at_kubelet(&self, pod: &Value, query: &str) -> Option<String> {
        let mut query = parameters(query);
        let container = query.iter().find(|(name, _)| name == "container").map(|(_, value)| value.clone());
        let container =
            container.or_else(|| Some(pod["spec"]["containers"][0]["name"].as_str()?.to_owned()))?;
        query.retain(|(name, _)| name != "container");
        let verb = match self.subresource? {
            "log" => "containerLogs",
            "portforward" => "portForward",
            verb @ ("exec" | "attach") => {
                query = query.into_iter().filter_map(stream_parameter).collect();
                verb
            }
            _ => return None,
        };
        let mut path = format!("/{verb}/{}/{}", self.namespace, self.name);
        if verb != "portForward" {
            path = format!("{path}/{container}");
        }
        let query: Vec<String> =
            query.iter().map(|(name, value)| format!("{}={}", encode(name), encode(value))).collect();
        Some(if query.is_empty() { path } else { format!("{path}?{}", query.join("&")) })
    }
}

/// A parameter of exec and attach as kubelets name it.
fn stream_parameter((name, value): (String, String)) -> Option<(String, String)> {
    let name = match name.as_str() {
        "stdin" => "input",
        "stdout" => "output",
        "stderr" => "error",
        "tty" => "tty",
        "command" => return Some((name, value)),
        _ => return None,
    };
    matches!(value.as_str(), "1" | "true").then(|| (name.to_owned(), "1".to_owned()))
}

fn encode(text: &str) -> Cow<'_, str> {
    utf8_percent_encode(text, NON_ALPHANUMERIC).into()
}

/// Answers a subresource of a pod with what its kubelet answers; upgraded connections are carried by `tasks`.
pub(super) async fn forward(
    path: &PodPath<'_>,
    pod: &Value,
    kubelet: Option<Base>,
    mut request: Request<Incoming>,
    tasks: &Tasks,
) -> Response<Body> {
    if request.method() != Method::GET && request.method() != Method::POST {
        return failure(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", "only GET and POST are served");
    }
    let Some(target) = path.at_kubelet(pod, request.uri().query().unwrap_or_default()) else {
        return not_found();
    };
    let Some(kubelet) = kubelet else {
        return failure(
            StatusCode::SERVICE_UNAVAILABLE,
            "ServiceUnavailable",
            "no kubelet was given to the stub",
        );
    };
    let client = hyper::upgrade::on(&mut request);
    let (mut head, body) = request.into_parts();
    head.headers.remove(header::AUTHORIZATION);
    head.uri = match target.parse() {
        Ok(uri) => uri,
        Err(error) => return failure(StatusCode::BAD_REQUEST, "BadRequest", &format!("{target}: {error}")),
    };
    let mut response = match kubelet.send(Request::from_parts(head, body)).await {
        Ok(response) => response,
        Err(error) => {
            let message = format!("error dialing backend: {error:#}");
            return failure(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", &message);
        }
    };
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let kubelet = hyper::upgrade::on(&mut response);
        tasks.spawn(async move {
            let (client, kubelet) = tokio::try_join!(client, kubelet)?;
            // Either end may leave: the other sees it.
            let _ =
                tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(kubelet)).await;
            Ok::<_, hyper::Error>(())
        });
    }
    response.map(|body| UnsyncBoxBody::new(body.map_err(std::io::Error::other)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_parameters_become_those_of_a_kubelet() {
        let pod = json!({"spec": {"containers": [{"name": "c"}, {"name": "d"}]}});
        let at_kubelet = |subresource: &str, query| {
            PodPath::parse(&format!("/api/v1/namespaces/ns/pods/web/{subresource}"))?.at_kubelet(&pod, query)
        };
        let cases = [
            ("log", "follow=true&tailLines=5", Some("/containerLogs/ns/web/c?follow=true&tailLines=5")),
            ("log", "container=d", Some("/containerLogs/ns/web/d")),
            (
                "exec",
                "command=echo&command=a+b%26&container=d&stdin=true&stdout=1&stderr=false",
                Some("/exec/ns/web/d?command=echo&command=a%20b%26&input=1&output=1"),
            ),
            ("attach", "tty=true&stderr=true", Some("/attach/ns/web/c?tty=1&error=1")),
            ("portforward", "ports=80", Some("/portForward/ns/web?ports=80")),
            ("status", "", None),
            ("log/more", "", None),
        ];
        for (subresource, query, expected) in cases {
            assert_eq!(at_kubelet(subresource, query).as_deref(), expected, "{subresource}?{query}");
        }
    }
}
