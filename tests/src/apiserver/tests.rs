//! Lists and watches as recorded, versions that go on or are forgotten, ordered failures and refused connections.

use hyper::body::Incoming;
use tokio::net::TcpStream;

use super::*;

/// A request on a connection of its own.
async fn ask(api: &ApiServer, uri: &str, token: &str) -> anyhow::Result<Response<Incoming>> {
    let request = Request::get(uri)
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .body(Full::<Bytes>::default())?;
    Base::new(&api.url(), Some(&api.ca()))?.send(request).await
}

async fn get(api: &ApiServer, uri: &str) -> (StatusCode, Value) {
    let response = ask(api, uri, &api.token()).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap())
}

async fn list(api: &ApiServer, kind: Kind) -> (Vec<String>, String) {
    let (status, list) = get(api, kind.path()).await;
    assert_eq!(status, StatusCode::OK, "{list}");
    assert_eq!(list["kind"], format!("{}List", kind.singular()));
    let names = list["items"].as_array().unwrap().iter().map(|i| text(&i["metadata"]["name"])).collect();
    (names, text(&list["metadata"]["resourceVersion"]))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// A watch, read event by event.
struct Events {
    body: Incoming,
    read: Vec<u8>,
}

impl Events {
    async fn from(api: &ApiServer, kind: Kind, version: &str) -> Self {
        let uri = format!("{}?watch=1&resourceVersion={version}&allowWatchBookmarks=true", kind.path());
        let response = ask(api, &uri, &api.token()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        Self { body: response.into_body(), read: Vec::new() }
    }

    /// `None` at the end in good order, an error where the answer breaks off.
    async fn line(&mut self) -> Result<Option<Vec<u8>>, hyper::Error> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                return Ok(Some(self.read.drain(..=end).collect()));
            }
            match self.body.frame().await {
                Some(frame) => self.read.extend_from_slice(&frame?.into_data().unwrap()),
                None => return Ok(None),
            }
        }
    }

    /// An event's type, and its object's name.
    async fn next(&mut self) -> (String, String) {
        let event: Value = serde_json::from_slice(&self.line().await.unwrap().unwrap()).unwrap();
        let name = event["object"]["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        (text(&event["type"]), name)
    }
}

fn event(kind: &str, name: &str) -> (String, String) {
    (kind.to_owned(), name.to_owned())
}

#[tokio::test]
async fn recorded_lists_and_events_are_served_as_they_were_recorded() {
    let api = ApiServer::start().await.unwrap();
    for kind in Kind::ALL {
        let file =
            |end: &str| format!("{}/data/kubernetes/{}.{end}", env!("CARGO_MANIFEST_DIR"), kind.plural());
        let response = ask(&api, kind.path(), &api.token()).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, std::fs::read(file("list.json")).unwrap());

        let mut events = Events::from(&api, kind, "239").await;
        for line in std::fs::read(file("watch.jsonl")).unwrap().split_inclusive(|b| *b == b'\n') {
            let sent = api.step(kind).unwrap();
            assert_eq!(events.line().await.unwrap().unwrap(), line);
            assert_eq!(serde_json::from_slice::<Value>(line).unwrap(), sent);
        }
        assert_eq!(api.step(kind), None);
        assert_eq!((api.count(kind, Verb::List), api.count(kind, Verb::Watch), api.watches(kind)), (1, 1, 1));
    }
    assert_eq!(get(&api, "/version").await.1["minor"], "36");
}

#[tokio::test]
async fn a_list_shows_what_has_happened_and_a_watch_goes_on_from_any_version() {
    let api = ApiServer::start().await.unwrap();
    assert_eq!(list(&api, Kind::Nodes).await, (vec!["n1".to_owned()], "239".to_owned()));
    api.step(Kind::Nodes);
    assert_eq!(list(&api, Kind::Nodes).await.0, ["n1", "n2"]);
    let sent = api.send(Kind::Nodes, "ADDED", json!({"metadata": {"name": "n3"}}));
    assert_eq!(sent["kind"], "Node");
    api.send(Kind::Nodes, "DELETED", json!({"metadata": {"name": "n2"}}));
    let (names, version) = list(&api, Kind::Nodes).await;
    assert_eq!(names, ["n1", "n3"]);

    let mut old = Events::from(&api, Kind::Nodes, "239").await;
    assert_eq!(old.next().await, event("ADDED", "n2"));
    let mut new = Events::from(&api, Kind::Nodes, "242").await;
    let mut current = Events::from(&api, Kind::Nodes, &version).await;
    let mut all = Events::from(&api, Kind::Nodes, "0").await;
    assert_eq!(all.next().await, event("ADDED", "n1"));
    assert_eq!(all.next().await, event("ADDED", "n3"));
    for events in [&mut old, &mut new] {
        assert_eq!(events.next().await, event("ADDED", "n3"));
        assert_eq!(events.next().await, event("DELETED", "n2"));
    }
    api.bookmark(Kind::Nodes);
    api.send(Kind::Nodes, "MODIFIED", json!({"metadata": {"name": "n1"}}));
    api.send_bytes(Kind::Nodes, "no JSON\n");
    for events in [&mut old, &mut new, &mut current, &mut all] {
        assert_eq!(events.next().await, event("BOOKMARK", ""));
        assert_eq!(events.next().await, event("MODIFIED", "n1"));
        assert_eq!(events.line().await.unwrap().unwrap(), b"no JSON\n");
    }

    // What is forgotten is 410, within the answer.
    api.compact(Kind::Nodes);
    for mut events in [old, new, current, all, Events::from(&api, Kind::Nodes, "239").await] {
        let error: Value = serde_json::from_slice(&events.line().await.unwrap().unwrap()).unwrap();
        assert_eq!((&error["type"], &error["object"]["code"]), (&json!("ERROR"), &json!(410)));
        assert_eq!(events.line().await.unwrap(), None);
    }
    let other = json!({"metadata": {"resourceVersion": "7"}, "items": [{"metadata": {"name": "x"}}],
        "kind": "NodeList", "apiVersion": "v1"});
    api.set_list(Kind::Nodes, &other).unwrap();
    assert_eq!(list(&api, Kind::Nodes).await, (vec!["x".to_owned()], "7".to_owned()));
    assert!(api.set_list(Kind::Nodes, &other).is_err());
}

#[tokio::test]
async fn watches_end_break_off_and_are_gone_with_their_client() {
    let api = ApiServer::start().await.unwrap();
    let mut ended = Events::from(&api, Kind::Pods, "239").await;
    api.end_watches();
    assert_eq!(ended.line().await.unwrap(), None);
    let mut cut = Events::from(&api, Kind::Pods, "239").await;
    api.wait_watched(Kind::Pods).await;
    api.cut_watches();
    assert!(cut.line().await.is_err());
    let mut initial = Events::from(&api, Kind::Pods, "&sendInitialEvents=true").await;
    assert_eq!(initial.next().await, event("ADDED", "web"));
    assert_eq!(initial.next().await, event("BOOKMARK", ""));
    assert_eq!(api.watches(Kind::Pods), 1);
    drop(initial);
    eventually("the watch has ended", SOON, async || (api.watches(Kind::Pods) == 0).then_some(())).await;
}

#[tokio::test]
async fn failures_are_as_ordered_and_no_token_no_answer() {
    let api = ApiServer::start().await.unwrap();
    let watch = format!("{}?watch=true&resourceVersion=239", Kind::Services.path());
    api.fail(Kind::Services, Verb::Watch, Some(Fault::Status(StatusCode::GONE)));
    let (status, body) = get(&api, &watch).await;
    assert_eq!((status, &body["reason"], &body["code"]), (StatusCode::GONE, &json!("Expired"), &json!(410)));
    assert_eq!(list(&api, Kind::Services).await.0, ["kubernetes", "web"]);
    api.fail(Kind::Services, Verb::List, Some(Fault::Body("[]".into())));
    assert_eq!(get(&api, Kind::Services.path()).await, (StatusCode::OK, json!([])));
    api.fail(Kind::Services, Verb::List, Some(Fault::Silence));
    let token = api.token();
    let silent = ask(&api, Kind::Services.path(), &token);
    assert!(tokio::time::timeout(Duration::from_millis(200), silent).await.is_err());
    api.fail(Kind::Services, Verb::List, None);
    assert_eq!(list(&api, Kind::Services).await.0, ["kubernetes", "web"]);

    let old = api.token();
    api.set_token("new").unwrap();
    assert_eq!(std::fs::read_to_string(api.directory().join("token")).unwrap(), "new");
    assert_eq!(list(&api, Kind::Services).await.0, ["kubernetes", "web"]);
    let refused = ask(&api, Kind::Services.path(), &old).await.unwrap();
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    let asked = api.take_asked();
    assert_eq!(asked.iter().filter(|a| !a.authorized).count(), 1);
    assert_eq!(asked[0].query["resourceVersion"], "239");
    assert!(asked[0].is_watch() && api.asked().is_empty());
    assert_eq!(get(&api, "/nothing").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn refused_connections_are_refused_and_open_ones_closed_until_it_listens_again() {
    let api = ApiServer::start().await.unwrap();
    let mut events = Events::from(&api, Kind::Nodes, "239").await;
    api.refuse().await;
    assert!(events.line().await.is_err());
    let error = TcpStream::connect(api.address()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    api.step(Kind::Nodes);
    api.accept().await.unwrap();
    let mut events = Events::from(&api, Kind::Nodes, "239").await;
    assert_eq!(events.next().await, event("ADDED", "n2"));
}
