//! What a request is about, as kube-apiserver's RequestInfo resolver reads it. Pure.
//!
//! Authorization here and in kube-apiserver must speak of the same thing, so a path or query that could be read in
//! two ways is refused ([`Unreadable`]) rather than guessed: empty and dot segments, encoded slashes, broken
//! escapes, queries that name what they select twice. What stands behind a `proxy` subresource belongs to the target
//! and is decoded by nobody before it; there, encoded slashes and empty segments pass.

use percent_encoding::percent_decode_str;

/// Longer paths are refused.
const MAX_PATH: usize = 16 * 1024;
/// Longer queries of lists and watches are refused.
const MAX_QUERY: usize = 16 * 1024;

/// The API group of what the master-agent itself serves beside proxy URLs, as
/// `/apis/master-agent/v1/nodes/NAME/link`. Without a dot no CustomResourceDefinition can have it.
pub const OWN_GROUP: &str = "master-agent";

/// Subresources that open a connection when a request upgrades.
const CONNECTING: [&str; 4] = ["attach", "exec", "portforward", "proxy"];

/// What a request asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestInfo {
    /// Whether it is for an API resource; what follows `path` is empty if not.
    pub is_resource: bool,
    /// The Kubernetes verb; for a path that is no resource, the method in lower case. Empty for a method that
    /// Kubernetes has no verb for.
    pub verb: String,
    /// The HTTP method; `POST` where the request upgrades to something that needs `create`.
    pub method: String,
    /// Decoded, but for what stands behind a `proxy` subresource.
    pub path: String,
    /// Empty for the core group.
    pub group: String,
    pub version: String,
    /// Empty for all namespaces, and for what has none.
    pub namespace: String,
    pub resource: String,
    pub subresource: String,
    /// Empty where no single object is named.
    pub name: String,
    /// Behind the subresource, as the caller wrote it: empty, or beginning with `/`.
    pub tail: String,
    /// What a list, watch or deletecollection is narrowed to.
    pub field_selector: Vec<FieldRequirement>,
}

/// One term of a field selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldRequirement {
    pub field: String,
    /// `=` or `==` against `!=`.
    pub equal: bool,
    pub value: String,
}

/// Why a request could be read in more than one way, or in none. It deserves 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request's {0}")]
pub struct Unreadable(&'static str);

impl RequestInfo {
    /// `upgrade` says that the connection is to become another protocol's: `Connection: upgrade` with an `Upgrade`
    /// header, or an extended CONNECT, which is read as the GET that it stands for.
    pub fn resolve(method: &str, path: &str, query: Option<&str>, upgrade: bool) -> Result<Self, Unreadable> {
        if method.is_empty() || !method.bytes().all(|b| b.is_ascii_uppercase() || b == b'-') {
            return Err(Unreadable("method is not in capital letters"));
        }
        let method = match (method, upgrade) {
            ("CONNECT", true) => "GET",
            ("CONNECT", false) => return Err(Unreadable("method is CONNECT, which is for proxies")),
            (method, _) => method,
        };
        let segments = segments(path)?;
        let mut info = Self::of(method, &segments, query)?;
        info.path = info.decoded_path(path, &segments)?;
        if upgrade
            && (CONNECTING.contains(&info.subresource.as_str())
                || info.verb == "proxy"
                || info.group == OWN_GROUP)
        {
            info.verb = "create".to_owned();
            info.method = "POST".to_owned();
        }
        Ok(info)
    }

    /// `RESOURCE` or `RESOURCE/SUBRESOURCE`, as rules name it.
    pub fn combined_resource(&self) -> String {
        match self.subresource.as_str() {
            "" => self.resource.clone(),
            subresource => format!("{}/{subresource}", self.resource),
        }
    }

    /// Of a request to a proxy, the path up to `/proxy`, and what stands behind it for the target.
    pub fn proxied(&self) -> Option<(&str, &str)> {
        if self.subresource != "proxy" {
            return None;
        }
        let (own, tail) = self.path.split_at_checked(self.path.len().checked_sub(self.tail.len())?)?;
        Some(own.strip_suffix('/').map_or((own, tail), |own| (own, "/")))
    }

    /// Whether a list is narrowed to objects whose `field` is `value`.
    pub fn selects(&self, field: &str, value: &str) -> bool {
        self.field_selector.iter().any(|r| r.equal && r.field == field && r.value == value)
    }

    fn of(method: &str, segments: &[Segment<'_>], query: Option<&str>) -> Result<Self, Unreadable> {
        let mut info =
            Self { method: method.to_owned(), verb: method.to_ascii_lowercase(), ..Self::default() };
        let mut rest = segments;
        let mut take = || -> Option<&Segment<'_>> {
            let (first, others) = rest.split_first()?;
            rest = others;
            Some(first)
        };
        match take() {
            Some(api) if api.decoded == "api" && segments.len() >= 3 => {}
            Some(apis) if apis.decoded == "apis" && segments.len() >= 4 => {
                info.group = take().map(Segment::text).transpose()?.unwrap_or_default();
            }
            Some(_) | None => return Ok(info),
        }
        info.version = take().map(Segment::text).transpose()?.unwrap_or_default();
        info.is_resource = true;

        let special = rest.first().map(|s| s.decoded.as_str()).filter(|s| matches!(*s, "proxy" | "watch"));
        if let Some(verb) = special {
            info.verb = verb.to_owned();
            rest =
                rest.get(1..).filter(|rest| !rest.is_empty()).ok_or(Unreadable("path names no resource"))?;
        } else {
            info.verb = match method {
                "POST" => "create",
                "GET" | "HEAD" => "get",
                "PUT" => "update",
                "PATCH" => "patch",
                "DELETE" => "delete",
                _ => "",
            }
            .to_owned();
        }
        if let [namespaces, namespace, below @ ..] = rest
            && namespaces.decoded == "namespaces"
        {
            info.namespace = namespace.text()?;
            // A namespace's own subresources are not resources in it.
            if below.first().is_some_and(|s| !matches!(s.decoded.as_str(), "status" | "finalize")) {
                rest = below;
            }
        }
        let mut parts = rest.iter();
        info.resource = parts.next().map(Segment::text).transpose()?.unwrap_or_default();
        info.name = parts.next().map(Segment::text).transpose()?.unwrap_or_default();
        if info.verb != "proxy" {
            info.subresource = parts.next().map(Segment::text).transpose()?.unwrap_or_default();
        }
        if let Some(first) = parts.next() {
            info.tail = first.from_here.to_owned();
        }
        if info.name.is_empty() && matches!(info.verb.as_str(), "get" | "delete") {
            info.collection(query.unwrap_or_default())?;
        }
        Ok(info)
    }

    /// Which of list, watch and deletecollection it is, and what of.
    fn collection(&mut self, query: &str) -> Result<(), Unreadable> {
        let ListQuery { watch, field_selector } = list_query(query)?;
        let selector = field_selector.map(|text| field_requirements(&text)).transpose()?.unwrap_or_default();
        if self.verb == "delete" {
            self.verb = "deletecollection".to_owned();
        } else {
            self.verb = if watch { "watch" } else { "list" }.to_owned();
            let mut names = selector.iter().filter(|r| r.equal && r.field == "metadata.name");
            let name = names.next();
            if names.next().is_some() {
                return Err(Unreadable("field selector has more than one metadata.name"));
            }
            // kube-apiserver takes no other names to be those of an object.
            let named = |name: &&str| !matches!(*name, "." | "..") && !name.contains(['/', '%']);
            self.name = name.map(|r| r.value.as_str()).filter(named).unwrap_or_default().to_owned();
        }
        self.field_selector = selector;
        Ok(())
    }

    /// The path with what authorizers look at decoded.
    fn decoded_path(&self, path: &str, segments: &[Segment<'_>]) -> Result<String, Unreadable> {
        let (own, tail) = match self.subresource.as_str() {
            "proxy" => path.split_at_checked(path.len() - self.tail.len()).unwrap_or((path, "")),
            _ => (path, ""),
        };
        let mut decoded = String::with_capacity(path.len());
        for segment in segments.iter().take_while(|s| s.from_here.len() > tail.len()) {
            decoded.push('/');
            decoded.push_str(&segment.text()?);
        }
        if decoded.is_empty() || (own.len() > 1 && own.ends_with('/') && tail.is_empty()) {
            decoded.push('/');
        }
        decoded.push_str(tail);
        Ok(decoded)
    }
}

/// What stands behind a proxy, decoded, if all servers read it alike. kube-apiserver itself decodes and then cleans it, and
/// targets may decode it twice, merge slashes, take `\` for `/`, or cut off what follows a `;`.
pub fn read_alike(tail: &str) -> Option<String> {
    let decoded = percent_decode_str(tail).decode_utf8().ok()?.into_owned();
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'%' | b'\\' | b';' | b'?' | b'#');
    let slashes = |text: &str| text.bytes().filter(|byte| *byte == b'/').count();
    let mut segments = decoded.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        if matches!(segment, "." | "..") || segment.is_empty() && segments.peek().is_some() {
            return None;
        }
    }
    (decoded.bytes().all(plain) && slashes(&decoded) == slashes(tail)).then_some(decoded)
}

/// A part of a path between slashes.
struct Segment<'a> {
    /// Lossy where it is no UTF-8 text; [`Segment::text`] refuses that.
    decoded: String,
    /// From the slash before it to the end of the path, as the caller wrote it.
    from_here: &'a str,
    /// Why it is nothing that may be interpreted.
    fault: Option<&'static str>,
}

impl Segment<'_> {
    /// For what is interpreted.
    fn text(&self) -> Result<String, Unreadable> {
        match self.fault {
            None => Ok(self.decoded.clone()),
            Some(fault) => Err(Unreadable(fault)),
        }
    }
}

/// Takes a path apart; one slash at its end means nothing.
fn segments(path: &str) -> Result<Vec<Segment<'_>>, Unreadable> {
    if path.len() > MAX_PATH {
        return Err(Unreadable("path is too long"));
    }
    if !path.starts_with('/') {
        return Err(Unreadable("path does not begin with a slash"));
    }
    if !path.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#' | b'\\')) {
        return Err(Unreadable("path has characters that must be escaped"));
    }
    if !escapes_are_whole(path) {
        return Err(Unreadable("path has an escape that is none"));
    }
    let mut segments = Vec::new();
    let mut at = 0;
    while let Some(from_here) = path.get(at..).filter(|rest| rest.starts_with('/')) {
        let raw = from_here.get(1..).unwrap_or_default().split('/').next().unwrap_or_default();
        at += 1 + raw.len();
        if raw.is_empty() && at == path.len() {
            break;
        }
        let bytes: Vec<u8> = percent_decode_str(raw).collect();
        if matches!(bytes.as_slice(), b"." | b"..") {
            return Err(Unreadable("path has a segment that is . or .."));
        }
        let (decoded, whole) = match String::from_utf8(bytes) {
            Ok(text) => (text, true),
            Err(error) => (String::from_utf8_lossy(error.as_bytes()).into_owned(), false),
        };
        let fault = if decoded.is_empty() {
            Some("path has an empty segment")
        } else if !whole {
            Some("path is not UTF-8 text")
        } else if decoded.contains(['/', '\\', '%']) || decoded.chars().any(char::is_control) {
            Some("path has an escaped slash, backslash, percent sign or control character")
        } else {
            None
        };
        segments.push(Segment { decoded, from_here, fault });
    }
    Ok(segments)
}

fn escapes_are_whole(text: &str) -> bool {
    text.split('%').skip(1).all(|after| {
        let mut digits = after.bytes().take(2);
        digits.next().is_some_and(|b| b.is_ascii_hexdigit())
            && digits.next().is_some_and(|b| b.is_ascii_hexdigit())
    })
}

struct ListQuery {
    watch: bool,
    field_selector: Option<String>,
}

/// What of a query decides what a list is. kube-apiserver's parser drops pairs that it can't read and takes the first
/// of several; neither is relied on.
fn list_query(query: &str) -> Result<ListQuery, Unreadable> {
    if query.len() > MAX_QUERY {
        return Err(Unreadable("query is too long"));
    }
    if query.contains(';') || !escapes_are_whole(query) {
        return Err(Unreadable("query has a semicolon or an escape that is none"));
    }
    let (mut watch, mut field_selector) = (None, None);
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let wanted = match decode_form(key)?.as_str() {
            "watch" => &mut watch,
            "fieldSelector" => &mut field_selector,
            _ => continue,
        };
        if wanted.replace(decode_form(value)?).is_some() {
            return Err(Unreadable("query has watch or fieldSelector twice"));
        }
    }
    // Every other value is true, the empty one as well.
    let watch = watch.is_some_and(|watch| !matches!(watch.to_ascii_lowercase().as_str(), "false" | "0"));
    Ok(ListQuery { watch, field_selector })
}

fn decode_form(text: &str) -> Result<String, Unreadable> {
    let spaced = text.replace('+', " ");
    let decoded = percent_decode_str(&spaced).decode_utf8();
    Ok(decoded.map_err(|_| Unreadable("query is not UTF-8 text"))?.into_owned())
}

fn field_requirements(selector: &str) -> Result<Vec<FieldRequirement>, Unreadable> {
    // Only values with a comma, an equals sign or a backslash have one, and no name has those.
    if selector.contains('\\') {
        return Err(Unreadable("field selector has a backslash"));
    }
    let terms = selector.split(',').filter(|term| !term.is_empty());
    terms
        .map(|term| {
            let (field, value) =
                term.split_once('=').ok_or(Unreadable("field selector has a term without ="))?;
            let (field, equal) = match field.strip_suffix('!') {
                Some(field) => (field, false),
                None => (field, true),
            };
            let value = if equal { value.strip_prefix('=').unwrap_or(value) } else { value };
            if value.contains('=') {
                return Err(Unreadable("field selector has a term with more than one ="));
            }
            Ok(FieldRequirement { field: field.to_owned(), equal, value: value.to_owned() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `VERB GROUP/VERSION NAMESPACE RESOURCE/SUBRESOURCE NAME TAIL`, `-` for empty; a path that is no resource as
    /// `VERB PATH`; else what is wrong.
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
    const BROKEN: &str = "refused: path has an escape that is none";
    const RAW: &str = "refused: path has characters that must be escaped";
    const QUERY: &str = "refused: query has a semicolon or an escape that is none";
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
            (
                "DELETE",
                "/api/v1/namespaces/a/services/s:http/proxy/x",
                "delete /v1 a services/proxy s:http /x",
            ),
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
            (
                "GET",
                "/api/v1/pods?fieldSelector=metadata.name",
                "refused: field selector has a term without =",
            ),
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
    fn paths_are_decoded_but_for_a_targets() {
        let path = |path| RequestInfo::resolve("GET", path, None, false).unwrap().path;
        assert_eq!(path("/%61pi/v1/nodes/system%3An/proxy/a%2Fb//"), "/api/v1/nodes/system:n/proxy/a%2Fb//");
        assert_eq!(path("/api/v1/nodes/n/proxy/"), "/api/v1/nodes/n/proxy/");
        assert_eq!(path("/api/v1/pod%73/"), "/api/v1/pods/");
        assert_eq!(path("/"), "/");
        let long = format!("/{}", "a".repeat(MAX_PATH));
        assert!(RequestInfo::resolve("GET", &long, None, false).is_err());
        let long = "a".repeat(MAX_QUERY + 1);
        assert!(RequestInfo::resolve("GET", "/api/v1/pods", Some(&long), false).is_err());
    }

    /// Made of what paths are made of, from a seed of its own.
    #[test]
    fn nothing_panics_and_nothing_is_read_in_two_ways() {
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
            let Ok(info) = RequestInfo::resolve(methods[next(methods.len())], path, query, next(2) == 0)
            else {
                continue;
            };
            read += 1;
            for field in [&info.group, &info.version, &info.namespace, &info.resource, &info.subresource] {
                assert!(!field.contains(['/', '%']) && !matches!(&**field, "." | ".."), "{target}: {info:?}");
            }
            assert!(!info.is_resource || !info.resource.is_empty(), "{target}: {info:?}");
            // What was read is read in the same way again.
            if info.tail.is_empty() && info.path.is_ascii() && !info.path.contains([' ', '?', '#']) {
                let again = RequestInfo::resolve("GET", &info.path, None, false).unwrap();
                assert_eq!(
                    (&again.resource, &again.namespace),
                    (&info.resource, &info.namespace),
                    "{target}"
                );
            }
        }
        assert!(read > 10_000, "{read}");
    }
}
