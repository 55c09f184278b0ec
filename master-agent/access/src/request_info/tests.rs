//! Tests of the attributes of requests, most of them in one table.

use super::{RequestInfo, Unreadable};

/// A resource is shown as `VERB GROUP/VERSION NAMESPACE RESOURCE/SUBRESOURCE NAME TAIL` with `-` for an empty field,
/// any other path as `VERB PATH`, and a request that is rejected with the reason.
fn shown(method: &str, target: &str, upgrade: bool) -> String {
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    match RequestInfo::resolve(method, path, query, upgrade) {
        Ok(info) if info.is_resource => [
            info.verb.clone(),
            format!("{}/{}", info.group, info.version),
            info.namespace.clone(),
            info.combined_resource(),
            info.name.clone(),
            info.tail.clone(),
        ]
        .map(|field| if field.is_empty() { "-".to_owned() } else { field })
        .join(" "),
        Ok(info) => format!("{} {}", info.verb, info.path),
        Err(Unreadable(why)) => format!("refused: {why}"),
    }
}

const EMPTY: &str = "refused: path has an empty segment";
const DOTS: &str = "refused: path has a segment that is . or ..";
const ESCAPED: &str = "refused: path has an escaped slash, backslash, percent sign or control character";
const BROKEN: &str = "refused: path has a malformed escape";
const RAW: &str = "refused: path has characters that must be escaped";
const QUERY: &str = "refused: query has a semicolon or a malformed escape";
const TWICE: &str = "refused: query has watch or fieldSelector twice";

#[test]
fn what_requests_are_about() {
    let rows: &[(&str, &str, &str)] = &[
        // Not resources.
        ("GET", "/", "get /"),
        ("GET", "/healthz", "get /healthz"),
        ("HEAD", "/healthz", "head /healthz"),
        ("GET", "/healthz/etcd", "get /healthz/etcd"),
        ("GET", "/healthz/", "get /healthz/"),
        ("GET", "/health%7a", "get /healthz"),
        ("GET", "/api", "get /api"),
        ("GET", "/api/v1", "get /api/v1"),
        ("GET", "/api/v1/", "get /api/v1/"),
        ("GET", "/apis", "get /apis"),
        ("GET", "/apis/apps", "get /apis/apps"),
        ("GET", "/apis/apps/v1", "get /apis/apps/v1"),
        ("POST", "/version", "post /version"),
        ("GET", "/openapi/v3/apis/apps/v1", "get /openapi/v3/apis/apps/v1"),
        ("GET", "/apiv1/v1/pods", "get /apiv1/v1/pods"),
        ("GET", "/API/v1/pods", "get /API/v1/pods"),
        // Collections.
        ("GET", "/api/v1/pods", "list /v1 - pods - -"),
        ("GET", "/api/v1/pods/", "list /v1 - pods - -"),
        ("HEAD", "/api/v1/pods", "list /v1 - pods - -"),
        ("GET", "/%61pi/v1/pods", "list /v1 - pods - -"),
        ("GET", "/api/v1/pods?watch=true", "watch /v1 - pods - -"),
        ("GET", "/api/v1/pods?watch=1", "watch /v1 - pods - -"),
        ("GET", "/api/v1/pods?watch", "watch /v1 - pods - -"),
        ("GET", "/api/v1/pods?watch=", "watch /v1 - pods - -"),
        ("GET", "/api/v1/pods?watch=no", "watch /v1 - pods - -"),
        ("GET", "/api/v1/pods?wat%63h=yes", "watch /v1 - pods - -"),
        ("GET", "/api/v1/pods?watch=0", "list /v1 - pods - -"),
        ("GET", "/api/v1/pods?watch=False", "list /v1 - pods - -"),
        ("GET", "/api/v1/pods?Watch=1", "list /v1 - pods - -"),
        ("POST", "/api/v1/namespaces/a/pods", "create /v1 a pods - -"),
        ("DELETE", "/api/v1/namespaces/a/pods", "deletecollection /v1 a pods - -"),
        ("DELETE", "/api/v1/pods?fieldSelector=metadata.name=x", "deletecollection /v1 - pods - -"),
        ("GET", "/api/v1/watch/pods", "watch /v1 - pods - -"),
        ("GET", "/api/v1/watch/namespaces/a/pods/p", "watch /v1 a pods p -"),
        ("POST", "/api/v1/watch/pods", "watch /v1 - pods - -"),
        ("GET", "/apis/apps/v1/namespaces/a/deployments", "list apps/v1 a deployments - -"),
        ("GET", "/apis/apps/v1/watch/deployments", "watch apps/v1 - deployments - -"),
        // Field selectors.
        ("GET", "/api/v1/pods?fieldSelector=metadata.name%3Dx", "list /v1 - pods x -"),
        ("GET", "/api/v1/pods?fieldSelector=metadata.name==x", "list /v1 - pods x -"),
        ("GET", "/api/v1/pods?watch=1&fieldSelector=metadata.name=x", "watch /v1 - pods x -"),
        ("GET", "/api/v1/pods?fieldSelector=spec.nodeName=n,metadata.name=x", "list /v1 - pods x -"),
        ("GET", "/api/v1/pods?fieldSelector=metadata.name!=x", "list /v1 - pods - -"),
        ("GET", "/api/v1/pods?fieldSelector=metadata.name=a/b", "list /v1 - pods - -"),
        ("GET", "/api/v1/pods?fieldSelector=metadata.name=..", "list /v1 - pods - -"),
        ("GET", "/api/v1/pods?fieldSelector=metadata.name=", "list /v1 - pods - -"),
        ("GET", "/api/v1/watch/pods?fieldSelector=metadata.name=x", "watch /v1 - pods - -"),
        // Objects.
        ("GET", "/api/v1/nodes/n", "get /v1 - nodes n -"),
        ("HEAD", "/api/v1/nodes/n", "get /v1 - nodes n -"),
        ("GET", "/api/v1/nodes/n?watch=1", "get /v1 - nodes n -"),
        ("PUT", "/api/v1/nodes/n", "update /v1 - nodes n -"),
        ("PATCH", "/api/v1/nodes/n/status", "patch /v1 - nodes/status n -"),
        ("DELETE", "/api/v1/namespaces/a/pods/p", "delete /v1 a pods p -"),
        ("OPTIONS", "/api/v1/nodes/n", "- /v1 - nodes n -"),
        ("GET", "/api/v1/namespaces", "list /v1 - namespaces - -"),
        ("GET", "/api/v1/namespaces/a", "get /v1 a namespaces a -"),
        ("PUT", "/api/v1/namespaces/a/finalize", "update /v1 a namespaces/finalize a -"),
        ("PUT", "/api/v1/namespaces/a/status", "update /v1 a namespaces/status a -"),
        ("GET", "/api/v1/namespaces/a/pods/p/log", "get /v1 a pods/log p -"),
        ("GET", "/api/v1/namespaces/a/pods/p/ephemeral/x/y", "get /v1 a pods/ephemeral p /x/y"),
        (
            "GET",
            "/apis/rbac.authorization.k8s.io/v1/clusterroles/system%3Anode",
            "get rbac.authorization.k8s.io/v1 - clusterroles system:node -",
        ),
        (
            "GET",
            "/apis/certificates.k8s.io/v1/certificatesigningrequests/c/approval",
            "get certificates.k8s.io/v1 - certificatesigningrequests/approval c -",
        ),
        // Proxies.
        ("GET", "/api/v1/nodes/n/proxy", "get /v1 - nodes/proxy n -"),
        ("GET", "/api/v1/nodes/n/proxy/", "get /v1 - nodes/proxy n -"),
        (
            "POST",
            "/api/v1/nodes/https:n:10250/proxy/run/a/b",
            "create /v1 - nodes/proxy https:n:10250 /run/a/b",
        ),
        ("GET", "/api/v1/nodes/n/proxy/a%2Fb//c", "get /v1 - nodes/proxy n /a%2Fb//c"),
        ("GET", "/api/v1/nodes/n/proxy/%ff%00", "get /v1 - nodes/proxy n /%ff%00"),
        ("DELETE", "/api/v1/namespaces/a/services/s:http/proxy/x", "delete /v1 a services/proxy s:http /x"),
        ("GET", "/api/v1/proxy/nodes/n/logs", "proxy /v1 - nodes n /logs"),
        ("GET", "/api/v1/proxy/namespaces/a/pods/p", "proxy /v1 a pods p -"),
        ("GET", "/apis/master-agent/v1/nodes/n/link", "get master-agent/v1 - nodes/link n -"),
        // Hostile.
        ("GET", "//api/v1/pods", EMPTY),
        ("GET", "/api//v1/pods", EMPTY),
        ("GET", "/api/v1//pods", EMPTY),
        ("GET", "/api/v1/namespaces//pods", EMPTY),
        ("GET", "/api/v1/pods//", EMPTY),
        ("GET", "//", EMPTY),
        ("GET", "/healthz//", EMPTY),
        ("GET", "/api/v1/namespaces/a/pods/p/log//x", EMPTY),
        ("GET", "/api/v1/./pods", DOTS),
        ("GET", "/api/v1/pods/../secrets", DOTS),
        ("GET", "/api/v1/pods/%2e%2E/secrets", DOTS),
        ("GET", "/api/v1/nodes/n/proxy/../../m/proxy", DOTS),
        ("GET", "/api/v1/nodes/n/proxy/%2e./x", DOTS),
        ("GET", "/healthz/..", DOTS),
        ("GET", "/api/v1/namespaces/a%2Fsecrets/pods", ESCAPED),
        ("GET", "/api/v1/nodes%2fn/proxy", ESCAPED),
        ("GET", "/api/v1/nodes/n%2Fproxy", ESCAPED),
        ("GET", "/api/v1/nodes/n/proxy%2Fx", ESCAPED),
        ("GET", "/api%2Fv1/pods", ESCAPED),
        ("GET", "/healthz%2F", ESCAPED),
        ("GET", "/api/v1/nodes/n%252F", ESCAPED),
        ("GET", "/api/v1/nodes/n%5Cx", ESCAPED),
        ("GET", "/api/v1/nodes/n%0d%0aX-Remote-User:%20x", ESCAPED),
        ("GET", "/api/v1/nodes/n%00", ESCAPED),
        ("GET", "/api/v1/nodes/%ff", "refused: path is not UTF-8 text"),
        ("GET", "/api/v1/nodes/%", BROKEN),
        ("GET", "/api/v1/nodes/%4", BROKEN),
        ("GET", "/api/v1/nodes/%zz", BROKEN),
        ("GET", "/api/v1/nodes/n/proxy/%g0", BROKEN),
        ("GET", "/api/v1/nodes/a b", RAW),
        ("GET", "/api/v1/nodes/a\\b", RAW),
        ("GET", "/api/v1/nodes/\u{e9}", RAW),
        ("GET", "/api/v1/nodes/a#b", RAW),
        ("GET", "api/v1/pods", "refused: path does not begin with a slash"),
        ("GET", "", "refused: path does not begin with a slash"),
        ("OPTIONS", "*", "refused: path does not begin with a slash"),
        ("GET", "/api/v1/watch", "refused: path names no resource"),
        ("GET", "/api/v1/proxy/", "refused: path names no resource"),
        ("GET", "/api/v1/pods?watch=0;x&watch=1", QUERY),
        ("GET", "/api/v1/pods?watch=%", QUERY),
        ("GET", "/api/v1/pods?watch=0&watch=1", TWICE),
        ("GET", "/api/v1/pods?watch=0&%77atch=1", TWICE),
        ("GET", "/api/v1/pods?fieldSelector=a=b&fieldSelector=metadata.name=x", TWICE),
        (
            "GET",
            "/api/v1/pods?fieldSelector=metadata.name=a,metadata.name=b",
            "refused: field selector has more than one metadata.name",
        ),
        (
            "GET",
            "/api/v1/pods?fieldSelector=a=b%5C,metadata.name=x",
            "refused: field selector has a backslash",
        ),
        ("GET", "/api/v1/pods?fieldSelector=metadata.name", "refused: field selector has a term without ="),
        (
            "GET",
            "/api/v1/pods?fieldSelector=a=b=c",
            "refused: field selector has a term with more than one =",
        ),
        ("GET", "/api/v1/pods?fieldSelector=%ff", "refused: query is not UTF-8 text"),
        ("get", "/healthz", "refused: method is not in capital letters"),
        ("", "/healthz", "refused: method is not in capital letters"),
        ("CONNECT", "/api/v1/pods", "refused: method is CONNECT, which is for proxies"),
    ];
    for (method, target, expected) in rows {
        assert_eq!(shown(method, target, false), *expected, "{method} {target}");
    }
    assert_eq!(rows.len(), 121);
}

#[test]
fn upgrades_need_create_whatever_their_method() {
    let rows = [
        ("GET", "/api/v1/namespaces/a/pods/p/exec", "create /v1 a pods/exec p -"),
        ("POST", "/api/v1/namespaces/a/pods/p/exec", "create /v1 a pods/exec p -"),
        ("HEAD", "/api/v1/namespaces/a/pods/p/attach", "create /v1 a pods/attach p -"),
        ("PUT", "/api/v1/namespaces/a/pods/p/portforward", "create /v1 a pods/portforward p -"),
        ("CONNECT", "/api/v1/namespaces/a/pods/p/exec", "create /v1 a pods/exec p -"),
        ("GET", "/api/v1/nodes/n/proxy/exec/a/b/c", "create /v1 - nodes/proxy n /exec/a/b/c"),
        ("GET", "/api/v1/namespaces/a/services/s/proxy/", "create /v1 a services/proxy s -"),
        ("GET", "/api/v1/watch/namespaces/a/pods/p/exec", "create /v1 a pods/exec p -"),
        ("GET", "/api/v1/proxy/nodes/n/exec", "create /v1 - nodes n /exec"),
        ("GET", "/apis/master-agent/v1/nodes/n/link", "create master-agent/v1 - nodes/link n -"),
        ("GET", "/api/v1/pods?watch=1", "watch /v1 - pods - -"),
        ("CONNECT", "/api/v1/pods?watch=1", "watch /v1 - pods - -"),
        ("GET", "/api/v1/namespaces/a/pods/p/log", "get /v1 a pods/log p -"),
        ("GET", "/healthz", "get /healthz"),
    ];
    for (method, target, expected) in rows {
        assert_eq!(shown(method, target, true), expected, "{method} {target}");
    }
    let exec = RequestInfo::resolve("GET", "/api/v1/namespaces/a/pods/p/exec", None, true).unwrap();
    assert_eq!(exec.method, "POST");
}

#[test]
fn paths_are_decoded_except_behind_a_proxy() {
    let path = |path| RequestInfo::resolve("GET", path, None, false).unwrap().path;
    assert_eq!(path("/%61pi/v1/nodes/system%3An/proxy/a%2Fb//"), "/api/v1/nodes/system:n/proxy/a%2Fb//");
    assert_eq!(path("/api/v1/nodes/n/proxy/"), "/api/v1/nodes/n/proxy/");
    assert_eq!(path("/api/v1/pod%73/"), "/api/v1/pods/");
    assert_eq!(path("/"), "/");
}

/// Requests are put together at random from the parts of paths and queries, with a fixed seed.
#[test]
fn no_request_panics_or_is_read_in_two_ways() {
    let pieces = [
        "/",
        "//",
        ".",
        "..",
        "%2f",
        "%2e",
        "%",
        "%c3",
        "%A9",
        "api",
        "apis",
        "v1",
        "pods",
        "nodes",
        "proxy",
        "watch",
        "namespaces",
        "exec",
        "status",
        "a",
        ":",
        "?",
        "=",
        "&",
        "watch=1",
        "fieldSelector=",
        "metadata.name=x",
        ",",
        ";",
        "\\",
        "\u{e9}",
        "\0",
        " ",
        "+",
    ];
    let methods = ["GET", "POST", "DELETE", "CONNECT", "get", "X-Y", ""];
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |bound: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % bound as u64).unwrap()
    };
    let mut read = 0;
    for _ in 0..200_000 {
        let mut target = String::from("/");
        if next(2) == 0 {
            target.push_str("api/v1/");
        }
        for _ in 0..next(9) {
            target.push_str(pieces[next(pieces.len())]);
        }
        let (path, query) = target.split_once('?').map_or((&*target, None), |(p, q)| (p, Some(q)));
        let Ok(info) = RequestInfo::resolve(methods[next(methods.len())], path, query, next(2) == 0) else {
            continue;
        };
        read += 1;
        for field in [&info.group, &info.version, &info.namespace, &info.resource, &info.subresource] {
            assert!(!field.contains(['/', '%']) && !matches!(&**field, "." | ".."), "{target}: {info:?}");
        }
        assert!(!info.is_resource || !info.resource.is_empty(), "{target}: {info:?}");
        // A path that was read is read in the same way again.
        if info.tail.is_empty() && info.path.is_ascii() && !info.path.contains([' ', '?', '#']) {
            let again = RequestInfo::resolve("GET", &info.path, None, false).unwrap();
            assert_eq!((&again.resource, &again.namespace), (&info.resource, &info.namespace), "{target}");
        }
    }
    assert!(read > 10_000, "{read}");
}
