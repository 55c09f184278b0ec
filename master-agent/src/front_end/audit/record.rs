//! The record of one request, and its line of JSON.
//!
//! A caller can't forge the end of a line or make a line long, and can't hide text in it, because control characters
//! and direction characters are escaped. A line never contains bodies, headers or tokens. The only values of a query
//! that it contains are those of parameters that are known to hold no secret.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
    time::{Duration, SystemTime},
};

use access::{request_info::RequestInfo, user::User};
use serde::{Serialize, Serializer};

/// The longest path with its query, in characters.
const MAX_PATH: usize = 2048;
/// The longest of all other texts, in characters.
const MAX_TEXT: usize = 256;
const MAX_GROUPS: usize = 16;

/// The query parameters whose values are recorded.
const PLAIN_PARAMETERS: [&str; 22] = [
    "allowWatchBookmarks",
    "container",
    "dryRun",
    "fieldManager",
    "follow",
    "gracePeriodSeconds",
    "limit",
    "ports",
    "pretty",
    "previous",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "sinceSeconds",
    "stderr",
    "stdin",
    "stdout",
    "tailLines",
    "timeout",
    "timeoutSeconds",
    "tty",
    "watch",
];

/// Identifies a request in the audit log, in other logs and upstream. Shown as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestId(u64);

impl RequestId {
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The decision about a request before its handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Allow,
    Deny,
    Unauthenticated,
    Limited,
    Error,
}

/// Everything that is recorded about a request. The streams that it opens have its ID in the origin of their records.
#[derive(Clone, Debug)]
pub struct Record<'a> {
    pub received: SystemTime,
    pub id: RequestId,
    pub source: &'a str,
    pub user: Option<&'a User>,
    /// The name of the authenticator that recognised the caller.
    pub authenticator: Option<&'a str>,
    pub impersonated: Option<&'a User>,
    pub method: &'a str,
    /// The path as the caller sent it.
    pub path: &'a str,
    pub query: Option<&'a str>,
    /// `None` if the request could not be understood.
    pub request: Option<&'a RequestInfo>,
    pub outcome: Outcome,
    pub authorizer: Option<&'a str>,
    pub rule: &'a str,
    /// The HTTP status of the response, or 0 if the caller left before.
    pub code: u16,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub duration: Duration,
    /// The node whose tunnel the request came or went through.
    pub node: Option<&'a str>,
    /// The trace that the request is part of.
    pub trace_id: Option<&'a str>,
}

/// The fields of a line, in their order.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(serialize_with = "shown")]
    ts: humantime::Rfc3339Timestamp,
    #[serde(serialize_with = "shown")]
    id: RequestId,
    user: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    groups: Vec<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    authenticator: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    impersonated: Option<Cow<'a, str>>,
    source: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verb: Option<Cow<'a, str>>,
    method: Cow<'a, str>,
    path: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resource: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subresource: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<Cow<'a, str>>,
    decision: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    authorizer: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<Cow<'a, str>>,
    code: u16,
    bytes_in: u64,
    bytes_out: u64,
    duration_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<&'a str>,
}

fn shown<S: Serializer>(value: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

impl<'a> Record<'a> {
    /// Returns the record as one line of JSON with its line feed.
    pub(super) fn line(&self) -> String {
        let text = |text| shortened(text, MAX_TEXT);
        let some = |part: &'a str| Some(part).filter(|part| !part.is_empty()).map(text);
        let of = |part: fn(&RequestInfo) -> &String| self.request.and_then(|request| some(part(request)));
        let path = recorded_path(self.path, self.query);
        let line = Line {
            ts: humantime::format_rfc3339_millis(self.received),
            id: self.id,
            user: self.user.map(|user| text(&user.name)),
            uid: self.user.and_then(|user| user.uid.as_deref()).map(text),
            groups: self.user.map(groups).unwrap_or_default(),
            authenticator: self.authenticator,
            impersonated: self.impersonated.map(|user| text(&user.name)),
            source: text(self.source),
            verb: of(|request| &request.verb),
            method: text(self.method),
            path: shortened(&path, MAX_PATH),
            group: of(|request| &request.group),
            resource: of(|request| &request.resource),
            subresource: of(|request| &request.subresource),
            namespace: of(|request| &request.namespace),
            name: of(|request| &request.name),
            decision: self.outcome,
            authorizer: self.authorizer,
            rule: some(self.rule),
            code: self.code,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            duration_ms: u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX),
            node: self.node.map(text),
            trace_id: self.trace_id,
        };
        let mut json = Vec::with_capacity(512);
        // Writing to memory can't fail, and JSON is text.
        let _ = serde_json::to_writer(&mut json, &line);
        let mut json = String::from_utf8(json).unwrap_or_default();
        if json.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
            json.push('\n');
            return json;
        }
        // JSON requires escapes for the first 32 characters only, so the others are escaped here.
        let mut plain = String::with_capacity(json.len() + 1);
        for c in json.chars() {
            if is_hidden(c) {
                let _ = write!(plain, "\\u{:04x}", u32::from(c));
            } else {
                plain.push(c);
            }
        }
        plain.push('\n');
        plain
    }
}

fn groups(user: &User) -> Vec<Cow<'_, str>> {
    let mut groups: Vec<_> =
        user.groups.iter().take(MAX_GROUPS).map(|group| shortened(group, MAX_TEXT)).collect();
    if let Some(more) = user.groups.len().checked_sub(MAX_GROUPS).filter(|more| *more > 0) {
        groups.push(format!("… {more} more").into());
    }
    groups
}

/// Whether a character is a control character, ends a line, or makes text look like other text. All of these are in the
/// basic multilingual plane, so one `\u` escape is enough for each.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}'
        )
}

fn shortened(text: &str, most: usize) -> Cow<'_, str> {
    // A text has at least as many bytes as characters.
    if text.len() <= most {
        return text.into();
    }
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()).into(),
        None => text.into(),
    }
}

/// Returns the path with those parts of the query that can't hold a secret.
fn recorded_path<'a>(path: &'a str, query: Option<&str>) -> Cow<'a, str> {
    let Some(query) = query else { return path.into() };
    let mut text = path.to_owned();
    for (i, pair) in query.split('&').enumerate() {
        if text.len() > MAX_PATH * 4 {
            break;
        }
        text.push(if i == 0 { '?' } else { '&' });
        match pair.split_once('=') {
            Some((key, value)) if PLAIN_PARAMETERS.contains(&key) && value.len() <= 128 => {
                let _ = write!(text, "{key}={value}");
            }
            None if PLAIN_PARAMETERS.contains(&pair) => text.push_str(pair),
            // A long key may be a secret itself, and so may a key without a value.
            Some((key, _)) if key.len() <= 40 => {
                let _ = write!(text, "{key}=***");
            }
            Some(_) | None => text.push_str("***"),
        }
    }
    text.into()
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::Value;

    use super::*;

    pub(in crate::front_end::audit) fn record<'a>() -> Record<'a> {
        Record {
            received: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            id: RequestId(0xab),
            source: "192.0.2.1:5000",
            user: None,
            authenticator: None,
            impersonated: None,
            method: "GET",
            path: "/healthz",
            query: None,
            request: None,
            outcome: Outcome::Unauthenticated,
            authorizer: None,
            rule: "",
            code: 401,
            bytes_in: 1,
            bytes_out: 2,
            duration: Duration::from_micros(3999),
            node: None,
            trace_id: None,
        }
    }

    #[test]
    fn a_line_has_its_fields_in_order() {
        let plain = record().line();
        assert_eq!(
            plain,
            "{\"ts\":\"2023-11-14T22:13:20.123Z\",\"id\":\"00000000000000ab\",\"user\":null,\"source\":\"192.0.2.1:5000\",\
             \"method\":\"GET\",\"path\":\"/healthz\",\"decision\":\"unauthenticated\",\"code\":401,\"bytes_in\":1,\
             \"bytes_out\":2,\"duration_ms\":3}\n"
        );
        let bob = User { name: "bob".into(), ..User::default() };
        let alice = User {
            name: "alice".into(),
            uid: Some("7".into()),
            groups: vec!["dev".into()],
            extra: [("token".to_owned(), vec!["hidden".to_owned()])].into(),
        };
        let path = "/apis/apps/v1/namespaces/a/deployments/d/scale";
        let info = RequestInfo::resolve("PUT", path, None, false).unwrap();
        let full = Record {
            user: Some(&alice),
            authenticator: Some("oidc"),
            impersonated: Some(&bob),
            method: "PUT",
            path,
            request: Some(&info),
            outcome: Outcome::Allow,
            authorizer: Some("rbac"),
            rule: "r",
            node: Some("n"),
            trace_id: Some("0af7651916cd43dd8448eb211c80319c"),
            code: 200,
            ..record()
        };
        let expected = serde_json::json!({
            "ts": "2023-11-14T22:13:20.123Z", "id": "00000000000000ab", "user": "alice", "uid": "7", "groups": ["dev"],
            "authenticator": "oidc", "impersonated": "bob", "source": "192.0.2.1:5000", "verb": "update", "method": "PUT",
            "path": path, "group": "apps", "resource": "deployments", "subresource": "scale", "namespace": "a", "name": "d",
            "decision": "allow", "authorizer": "rbac", "rule": "r", "code": 200, "bytes_in": 1, "bytes_out": 2,
            "duration_ms": 3, "node": "n", "trace_id": "0af7651916cd43dd8448eb211c80319c",
        });
        assert_eq!(serde_json::from_str::<Value>(&full.line()).unwrap(), expected);
    }

    #[test]
    fn nothing_forges_a_line_or_hides_in_one() {
        let forged = "x\"}\r\n{\"user\":\"root\"}\n\0\u{1b}[2J\u{7f}\u{85}\u{9b}\u{2028}\u{2029}\u{202e}\u{2066}\u{61c}\u{200b}\u{feff}";
        let user = User {
            name: forged.into(),
            uid: Some(forged.into()),
            groups: vec![forged.to_owned(); 100],
            ..User::default()
        };
        let info = RequestInfo {
            verb: forged.repeat(100),
            group: forged.into(),
            resource: forged.into(),
            subresource: forged.into(),
            namespace: forged.into(),
            name: "é".repeat(10_000),
            ..RequestInfo::default()
        };
        let path = format!("/{}", "p".repeat(100_000));
        let query = "a=b&".repeat(100_000);
        let line = Record {
            user: Some(&user),
            impersonated: Some(&user),
            method: forged,
            source: forged,
            path: &path,
            query: Some(&query),
            request: Some(&info),
            rule: forged,
            node: Some(forged),
            ..record()
        }
        .line();
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.ends_with("}\n"));
        assert!(!line.trim_end_matches('\n').chars().any(is_hidden), "{line:?}");
        assert!(line.len() < 40_000, "{}", line.len());
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["user"], forged, "and none of it is lost");
        assert_eq!(value["groups"].as_array().unwrap().len(), MAX_GROUPS + 1);
        assert_eq!(value["path"].as_str().unwrap().chars().count(), MAX_PATH + 1);
        assert_eq!(value["name"].as_str().unwrap().chars().count(), MAX_TEXT + 1);
    }

    #[test]
    fn a_query_keeps_only_what_is_no_secret() {
        let long = "k".repeat(41);
        let rows = [
            ("watch=true&follow=1&container=c", "?watch=true&follow=1&container=c"),
            ("token=abc&watch=1", "?token=***&watch=1"),
            ("access_token=abc", "?access_token=***"),
            ("command=cat&command=/etc/shadow", "?command=***&command=***"),
            ("Watch=1", "?Watch=***"),
            ("eyJhbGciOi", "?***"),
            ("watch", "?watch"),
            ("", "?***"),
            ("%77atch=1", "?%77atch=***"),
            (&format!("{long}=1"), "?***"),
            (&format!("container={}", "s".repeat(200)), "?container=***"),
            ("fieldSelector=metadata.name%3Dx", "?fieldSelector=***"),
        ];
        for (query, expected) in rows {
            assert_eq!(recorded_path("", Some(query)), expected, "{query}");
        }
        assert_eq!(recorded_path("/x", None), "/x");
    }
}
