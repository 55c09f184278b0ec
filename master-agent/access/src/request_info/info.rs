//! The attributes of a request, which say what it asks for.

use super::{
    path::{Segment, segments},
    query::{FieldRequirement, ListQuery, field_requirements, list_query},
    unreadable::Unreadable,
};

/// The API group of the resources that the master-agent itself serves, such as
/// `/apis/master-agent/v1/nodes/NAME/link`. No CustomResourceDefinition can have this group, as it has no dot.
pub const OWN_GROUP: &str = "master-agent";

/// Subresources that open a connection when a request upgrades.
const CONNECTING: [&str; 4] = ["attach", "exec", "portforward", "proxy"];

/// The attributes of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestInfo {
    /// Whether the request is for an API resource. Otherwise the fields after `path` are empty.
    pub is_resource: bool,
    /// The Kubernetes verb. For a path that is no resource, this is the method in lower case. It is empty for a method
    /// without a verb.
    pub verb: String,
    /// The HTTP method, or `POST` if the request upgrades to something that needs `create`.
    pub method: String,
    /// The path, decoded except for what follows a `proxy` subresource.
    pub path: String,
    /// The API group, which is empty for the core group.
    pub group: String,
    pub version: String,
    /// The namespace, which is empty for requests about all namespaces and for cluster-scoped resources.
    pub namespace: String,
    pub resource: String,
    pub subresource: String,
    /// The object's name, which is empty if no single object is named.
    pub name: String,
    /// The path after the subresource, as the caller wrote it. It is empty or begins with `/`.
    pub tail: String,
    /// The field selector of a list, watch or deletecollection.
    pub field_selector: Vec<FieldRequirement>,
}

impl RequestInfo {
    /// Reads a request. `upgrade` says that the connection is to change its protocol, by `Connection: upgrade` with
    /// an `Upgrade` header or by an extended CONNECT, which is read as the GET that it stands for.
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

    /// Returns `RESOURCE` or `RESOURCE/SUBRESOURCE`, as RBAC rules name it.
    pub fn combined_resource(&self) -> String {
        match self.subresource.as_str() {
            "" => self.resource.clone(),
            subresource => format!("{}/{subresource}", self.resource),
        }
    }

    /// Returns the path up to `/proxy` and the path that follows it, for a request to a `proxy` subresource.
    pub fn proxied(&self) -> Option<(&str, &str)> {
        if self.subresource != "proxy" {
            return None;
        }
        let (own, tail) = self.path.split_at_checked(self.path.len().checked_sub(self.tail.len())?)?;
        Some(own.strip_suffix('/').map_or((own, tail), |own| (own, "/")))
    }

    /// Whether the field selector requires that `field` is `value`.
    pub fn selects(&self, field: &str, value: &str) -> bool {
        self.field_selector.iter().any(|r| r.equal && r.field == field && r.value == value)
    }

    fn of(method: &str, segments: &[Segment<'_>], query: Option<&str>) -> Result<Self, Unreadable> {
        let mut info = Self { method: method.to_owned(), ..Self::default() };
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
            Some(_) | None => {
                info.verb = method.to_ascii_lowercase();
                return Ok(info);
            }
        }
        info.version = take().map(Segment::text).transpose()?.unwrap_or_default();
        info.is_resource = true;

        let special = rest.first().map(|s| &*s.decoded).filter(|s| matches!(*s, "proxy" | "watch"));
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
            // The subresources of a namespace are not resources in it.
            if below.first().is_some_and(|s| !matches!(&*s.decoded, "status" | "finalize")) {
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

    /// Reads a request for a collection: whether it is a list, watch or deletecollection, and its field selector.
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
            // kube-apiserver does not take other values as the name of an object.
            let named = |name: &&str| !matches!(*name, "." | "..") && !name.contains(['/', '%']);
            self.name = name.map(|r| r.value.as_str()).filter(named).unwrap_or_default().to_owned();
        }
        self.field_selector = selector;
        Ok(())
    }

    /// Returns the path in the form that authorizers compare.
    fn decoded_path(&self, path: &str, segments: &[Segment<'_>]) -> Result<String, Unreadable> {
        let (own, tail) = match self.subresource.as_str() {
            "proxy" => path.split_at_checked(path.len() - self.tail.len()).unwrap_or((path, "")),
            _ => (path, ""),
        };
        let mut decoded = String::with_capacity(path.len());
        for segment in segments.iter().take_while(|s| s.from_here.len() > tail.len()) {
            decoded.push('/');
            decoded.push_str(segment.as_text()?);
        }
        if decoded.is_empty() || (own.len() > 1 && own.ends_with('/') && tail.is_empty()) {
            decoded.push('/');
        }
        decoded.push_str(tail);
        Ok(decoded)
    }
}
