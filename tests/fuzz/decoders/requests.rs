//! Requests: what a path addresses, and which trace a request is part of.

use access::request_info::{RequestInfo, read_alike};
use hyper::{
    HeaderMap,
    header::{HeaderName, HeaderValue},
};
use master_agent::{
    egress::proxy_urls::path::{self, Port, Subject},
    traces,
};

/// A request line without the version, such as `GET /api/v1/pods?watch=1`: it is read as kube-apiserver reads it, or
/// refused.
pub fn request_info(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Some((method, target)) = text.split_once(' ') else { return };
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    let resolve = |method, upgrade| RequestInfo::resolve(method, path, query, upgrade);
    assert_eq!(resolve("CONNECT", true), resolve("GET", true));
    let plain = resolve(method, false);
    if method != "CONNECT" {
        assert_eq!(resolve(method, true), plain.clone().map(upgraded));
    }
    let Ok(info) = plain else { return };

    assert_eq!(percent_decoded(&info.path), percent_decoded(path), "the path is another");
    assert!(path.ends_with(&info.tail));
    if let Some((own, tail)) = info.proxied() {
        assert!(own.ends_with("/proxy") && format!("{own}{tail}") == info.path);
    }
    if let Some(decoded) = read_alike(&info.tail) {
        assert_eq!(percent_decoded(&info.tail), decoded.as_bytes());
        assert_eq!(percent_decoded(&decoded), decoded.as_bytes(), "a second decoding changes it");
    }
    let mut expected = kubernetes_reading(method, path, query.unwrap_or_default())
        .expect("what kube-apiserver refuses is refused here");
    if expected.name.is_empty() && !info.name.is_empty() {
        assert!(matches!(info.verb.as_str(), "list" | "watch"));
        let selector = form_value(query.unwrap_or_default(), "fieldSelector").unwrap_or_default();
        let terms = [format!("metadata.name={}", info.name), format!("metadata.name=={}", info.name)];
        assert!(selector.split(',').any(|term| terms.iter().any(|named| named == term)), "{selector}");
        expected.name.clone_from(&info.name);
    }
    let RequestInfo { path, tail, field_selector, .. } = info.clone();
    assert_eq!(info, RequestInfo { path, tail, field_selector, ..expected });
}

/// The same request if it upgrades.
fn upgraded(mut info: RequestInfo) -> RequestInfo {
    let connects = matches!(info.subresource.as_str(), "attach" | "exec" | "portforward" | "proxy");
    if connects || info.verb == "proxy" || info.group == "master-agent" {
        (info.verb, info.method) = ("create".to_owned(), "POST".to_owned());
    }
    info
}

/// `RequestInfoFactory.NewRequestInfo` of k8s.io/apiserver, which decodes the path before it splits it, without the field
/// selector; `None` for its errors.
fn kubernetes_reading(method: &str, path: &str, query: &str) -> Option<RequestInfo> {
    let path = String::from_utf8_lossy(&percent_decoded(path)).into_owned();
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let mut info = RequestInfo {
        method: method.to_owned(),
        verb: method.to_ascii_lowercase(),
        ..RequestInfo::default()
    };
    let mut parts = match parts.as_slice() {
        ["api", version, rest @ ..] if !rest.is_empty() => {
            info.version = (*version).to_owned();
            rest
        }
        ["apis", group, version, rest @ ..] if !rest.is_empty() => {
            info.group = (*group).to_owned();
            info.version = (*version).to_owned();
            rest
        }
        _ => return Some(info),
    };
    info.is_resource = true;
    if matches!(parts[0], "proxy" | "watch") {
        info.verb = parts[0].to_owned();
        parts = &parts[1..];
        parts.first()?;
    } else {
        let verb = match method {
            "POST" => "create",
            "GET" | "HEAD" => "get",
            "PUT" => "update",
            "PATCH" => "patch",
            "DELETE" => "delete",
            _ => "",
        };
        info.verb = verb.to_owned();
    }
    if parts[0] == "namespaces" && parts.len() > 1 {
        info.namespace = parts[1].to_owned();
        if parts.len() > 2 && !matches!(parts[2], "status" | "finalize") {
            parts = &parts[2..];
        }
    }
    let part = |at: usize| parts.get(at).copied().unwrap_or_default().to_owned();
    (info.resource, info.name) = (part(0), part(1));
    if info.verb != "proxy" {
        info.subresource = part(2);
    }
    if info.name.is_empty() && info.verb == "get" {
        let watch = form_value(query, "watch").map(|value| value.to_ascii_lowercase());
        let watches = watch.is_some_and(|value| value != "false" && value != "0");
        info.verb = if watches { "watch" } else { "list" }.to_owned();
    } else if info.name.is_empty() && info.verb == "delete" {
        info.verb = "deletecollection".to_owned();
    }
    Some(info)
}

/// The first value of a key in a query.
fn form_value(query: &str, key: &str) -> Option<String> {
    let decoded =
        |text: &str| String::from_utf8_lossy(&percent_decoded(&text.replace('+', " "))).into_owned();
    let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.find(|(name, _)| decoded(name) == key).map(|(_, value)| decoded(value))
}

fn percent_decoded(text: &str) -> Vec<u8> {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let (bytes, mut decoded, mut at) = (text.as_bytes(), Vec::new(), 0);
    while let Some(byte) = bytes.get(at) {
        match (byte, digit(bytes.get(at + 1)), digit(bytes.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                decoded.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                decoded.push(*byte);
                at += 1;
            }
        }
    }
    decoded
}

/// The path of a proxy URL. What is reached is what the same path is authorized for.
pub fn proxy_path(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(found) = path::parse(text) else { return };
    assert_eq!(format!("{}{}", found.prefix, found.rest), text);
    assert!(found.prefix.ends_with("/proxy"));
    assert!(found.rest.is_empty() || found.rest.starts_with('/'));
    let Ok(info) = RequestInfo::resolve("GET", text, None, false) else { return };

    let (resource, namespace, name) = match &found.subject {
        Subject::Node(name) => ("nodes", "", name.as_str()),
        Subject::Pod { namespace, name } => ("pods", namespace.as_str(), name.as_str()),
        Subject::Service { namespace, name } => ("services", namespace.as_str(), name.as_str()),
    };
    assert_eq!((info.group.as_str(), info.version.as_str()), ("", "v1"));
    assert_eq!((info.combined_resource(), info.namespace.as_str()), (format!("{resource}/proxy"), namespace));
    let (authorized, port) = match info.name.split(':').collect::<Vec<_>>().as_slice() {
        [name] => (*name, ""),
        [name, port] | [_, name, port] => (*name, *port),
        parts => panic!("{parts:?}"),
    };
    assert_eq!(authorized, name);
    match &found.port {
        Port::Default => assert_eq!(port, ""),
        Port::Number(number) => assert_eq!(port.parse(), Ok(*number)),
        Port::Name(name) => assert_eq!(port, name),
    }
    assert!(info.tail == found.rest || info.tail.is_empty() && found.rest == "/");
}

/// The values of `traceparent` headers, one a line. Only a single one of the form that W3C Trace Context gives counts, and
/// it names the same trace when it is sent on.
pub fn traceparent(bytes: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n').take(4) {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(HeaderName::from_static("traceparent"), value);
        }
    }
    let values: Vec<&HeaderValue> = headers.values().collect();
    let expected = match values.as_slice() {
        [only] => std::str::from_utf8(only.as_bytes()).ok().and_then(trace_and_span),
        _ => None,
    };
    let parent = traces::parent(&headers);
    assert_eq!(parent.as_ref().map(traces::ids), expected);
    if let Some(parent) = parent {
        let mut sent = HeaderMap::new();
        traces::inject(&parent, &mut sent);
        assert_eq!(traces::parent(&sent), Some(parent));
    }
}

/// The identifiers of the trace and the span in a `traceparent`.
fn trace_and_span(text: &str) -> Option<(String, String)> {
    let parts: Vec<&str> = text.split('-').collect();
    let [version, trace, span, flags, more @ ..] = parts.as_slice() else { return None };
    let lengths = [version, trace, span, flags].map(|part| part.len());
    let hex = |part: &&str| part.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
    let formed = lengths == [2, 32, 16, 2] && [version, trace, span, flags].into_iter().all(hex);
    let known = match *version {
        "00" => more.is_empty(),
        "ff" => false,
        _ => true,
    };
    let zero = |part: &str| part.bytes().all(|byte| byte == b'0');
    (formed && known && text.is_ascii() && !zero(trace) && !zero(span))
        .then(|| ((*trace).to_owned(), (*span).to_owned()))
}
