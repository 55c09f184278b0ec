use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use hyper::header::{HeaderName, HeaderValue};

use super::*;
use crate::authz::{Authorizer, Decision, chain::NamedAuthorizer, tests::user};

fn headers(lines: &[(&str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in lines {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        map.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    map
}

#[test]
fn who_is_meant_and_what_it_takes() {
    let check = |info: &RequestInfo| {
        assert_eq!((info.verb.as_str(), info.is_resource), ("impersonate", true));
        format!("{}/{} {} {}", info.group, info.combined_resource(), info.namespace, info.name)
    };
    type Row<'a> = (&'a [(&'a str, &'a str)], &'a str, &'a [&'a str], &'a [&'a str]);
    let rows: &[Row<'_>] = &[
        (&[("Impersonate-User", "bob")], "bob", &["system:authenticated"], &["/users  bob"]),
        (
            &[("impersonate-user", "bob"), ("Impersonate-Group", "dev"), ("Impersonate-Group", "ops")],
            "bob",
            &["dev", "ops", "system:authenticated"],
            &["/users  bob", "/groups  dev", "/groups  ops"],
        ),
        (
            &[("Impersonate-User", "bob"), ("Impersonate-Group", "system:unauthenticated")],
            "bob",
            &["system:unauthenticated"],
            &["/users  bob", "/groups  system:unauthenticated"],
        ),
        (
            &[("Impersonate-User", "system:anonymous")],
            "system:anonymous",
            &["system:unauthenticated"],
            &["/users  system:anonymous"],
        ),
        (
            &[("Impersonate-User", "system:serviceaccount:ns:sa.x")],
            "system:serviceaccount:ns:sa.x",
            &["system:serviceaccounts", "system:serviceaccounts:ns", "system:authenticated"],
            &["/serviceaccounts ns sa.x"],
        ),
        (
            &[("Impersonate-User", "system:serviceaccount:ns:sa"), ("Impersonate-Group", "g")],
            "system:serviceaccount:ns:sa",
            &["g", "system:authenticated"],
            &["/serviceaccounts ns sa", "/groups  g"],
        ),
        (
            &[("Impersonate-User", "system:serviceaccount:NS:sa")],
            "system:serviceaccount:NS:sa",
            &["system:authenticated"],
            &["/users  system:serviceaccount:NS:sa"],
        ),
        (
            &[("Impersonate-User", "system:serviceaccount:ns:a:b")],
            "system:serviceaccount:ns:a:b",
            &["system:authenticated"],
            &["/users  system:serviceaccount:ns:a:b"],
        ),
        (
            &[
                ("Impersonate-User", "bob"),
                ("Impersonate-Uid", "7"),
                ("Impersonate-Extra-Scopes", "view"),
                ("Impersonate-Extra-Scopes", "edit"),
                ("Impersonate-Extra-example.com%2Fkey_x", "v"),
            ],
            "bob",
            &["system:authenticated"],
            &[
                "/users  bob",
                "authentication.k8s.io/userextras/example.com/key_x  v",
                "authentication.k8s.io/userextras/scopes  view",
                "authentication.k8s.io/userextras/scopes  edit",
                "authentication.k8s.io/uids  7",
            ],
        ),
    ];
    for (lines, name, groups, checks) in rows {
        let found = Impersonation::requested(&headers(lines)).unwrap().unwrap();
        assert_eq!(found.user.name, *name);
        assert_eq!(found.user.groups, *groups, "{lines:?}");
        assert_eq!(found.checks.iter().map(check).collect::<Vec<_>>(), *checks, "{lines:?}");
    }
    assert_eq!(rows.len(), 9);
    let none = Impersonation::requested(&headers(&[("X-Impersonate-User", "a"), ("Accept", "b")]));
    assert_eq!(none, Ok(None));
}

#[test]
fn what_is_refused() {
    let bob = ("Impersonate-User", "bob");
    let rows: &[(&[(&str, &str)], &str)] = &[
        (&[("Impersonate-Group", "g")], "without Impersonate-User"),
        (&[("Impersonate-Uid", "7")], "without Impersonate-User"),
        (&[("Impersonate-Extra-X", "7")], "without Impersonate-User"),
        (&[bob, ("impersonate-user", "bob")], "twice"),
        (&[bob, ("Impersonate-Uid", "1"), ("Impersonate-Uid", "2")], "twice"),
        (&[("Impersonate-User", "")], "empty"),
        (&[bob, ("Impersonate-Group", "")], "empty"),
        (&[bob, ("Impersonate-Roles", "x")], "not known"),
        (&[bob, ("Impersonate-Extra", "x")], "not known"),
        (&[bob, ("Impersonate-Extra-", "x")], "key is malformed"),
        (&[bob, ("Impersonate-Extra-%zz", "x")], "key is malformed"),
        (&[bob, ("Impersonate-Extra-%4", "x")], "key is malformed"),
        (&[bob, ("Impersonate-Extra-%41", "x")], "key is malformed"),
        (&[bob, ("Impersonate-Extra-a%00", "x")], "key is malformed"),
        (&[bob, ("Impersonate-Extra-%ff", "x")], "not UTF-8"),
        (&[("Impersonate_User", "bob")], "underscore"),
        (&[bob, ("impersonate_group", "system:masters")], "underscore"),
        (&[bob, ("Impersonate-Extra_x", "1")], "not known"),
    ];
    for (lines, expected) in rows {
        let error = Impersonation::requested(&headers(lines)).unwrap_err().to_string();
        assert!(error.contains(expected), "{lines:?}: {error}");
    }
    assert_eq!(rows.len(), 18);
    let mut map = headers(&[bob]);
    map.append("impersonate-group", HeaderValue::from_bytes(b"\xff").unwrap());
    assert!(Impersonation::requested(&map).unwrap_err().to_string().contains("not UTF-8"));
    let of = |groups: usize, extra: usize| {
        let groups = (0..groups).map(|_| ("Impersonate-Group", "g"));
        let lines: Vec<_> = groups.chain((0..extra).map(|_| ("Impersonate-Extra-X", "x"))).collect();
        Impersonation::requested(&headers(&[&[("Impersonate-Uid", "7"), bob], lines.as_slice()].concat()))
    };
    assert_eq!(of(MAX_VALUES / 2, MAX_VALUES / 2).unwrap().unwrap().checks.len(), MAX_VALUES + 2);
    for (groups, extra) in [(MAX_VALUES + 1, 0), (0, MAX_VALUES + 1), (MAX_VALUES, 1), (1, MAX_VALUES)] {
        assert!(of(groups, extra).unwrap_err().to_string().contains("too many"));
    }
}

/// Allows all but one name.
struct AllBut(&'static str, Mutex<Vec<String>>);

impl Authorizer for Arc<AllBut> {
    fn authorize<'a>(&'a self, attributes: &'a Attributes<'a>) -> BoxFuture<'a, Decision> {
        self.1.lock().unwrap().push(format!("{} {}", attributes.user.name, attributes.request.name));
        Box::pin(std::future::ready(match attributes.request.name == self.0 {
            true => Decision::none(),
            false => Decision::Allow { rule: String::new() },
        }))
    }
}

#[tokio::test]
async fn everything_must_be_allowed() {
    let lines = [("Impersonate-User", "bob"), ("Impersonate-Group", "g"), ("Impersonate-Uid", "7")];
    let requested = Impersonation::requested(&headers(&lines)).unwrap().unwrap();
    for refused in ["bob", "g", "7", ""] {
        let all_but = Arc::new(AllBut(refused, Mutex::default()));
        let authorizers =
            Authorizers::new(vec![NamedAuthorizer { name: "test", authorizer: Arc::new(all_but.clone()) }]);
        let result = requested.clone().allowed(&user("alice"), &authorizers).await;
        match refused {
            "" => assert_eq!(result.unwrap().name, "bob"),
            _ => {
                assert!(result.unwrap_err().reason.starts_with("User \"alice\" cannot impersonate resource"))
            }
        }
        assert!(all_but.1.lock().unwrap().iter().all(|asked| asked.starts_with("alice ")));
    }
    let nobody = requested.allowed(&user("alice"), &Authorizers::default()).await;
    assert!(nobody.is_err());
}
