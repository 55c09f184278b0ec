//! The reflectors against an API server in memory, in paused time.

mod api_server;

use std::path::Path;

use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::*;
use api_server::{ApiServer, Asked, Events};

const STALE_AFTER: Duration = Duration::from_secs(20);
const NOWHERE: &str = "no route to";

/// Targets, and what is part of their routes.
type Expected<'a> = &'a [(&'a str, &'a str)];

struct World {
    api: ApiServer,
    routes: Arc<SharedRoutes>,
    watches: Arc<Watches>,
    tasks: Tasks,
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

impl World {
    /// Follows all kinds.
    fn start(accounts: bool) -> Self {
        let (api, client) = ApiServer::start();
        let routes = Arc::new(SharedRoutes::new("cluster.local".to_owned()));
        let watches = Watches::new(routes.clone(), STALE_AFTER, accounts);
        let tasks = Tasks::new();
        watches.start(&client, &tasks, &Handle::current());
        Self { api, routes, watches, tasks }
    }

    /// Follows all kinds, with one node in version 10 whose watch has begun, and no other object.
    async fn with_a_node() -> (Self, Events) {
        let mut world = Self::start(false);
        for plural in ["pods", "services", "endpointslices"] {
            world.api.list(plural).await.list("10", &[]);
            world.api.watch(plural, "10").await.stay();
        }
        world.api.list("nodes").await.list("10", &[node("n1", "10.77.1.2")]);
        let events = world.api.watch("nodes", "10").await.begin();
        settle().await;
        (world, events)
    }

    /// `NODE TARGET: REASON` for each way, or why there is none.
    fn route(&self, target: &str) -> String {
        let found = self.routes.read(|routes| routes.find(&target.parse().unwrap()));
        match found {
            Ok(route) => {
                let ways: Vec<String> =
                    route.hops.iter().map(|hop| format!("{:?} {}", hop.via, hop.target)).collect();
                format!("{}: {}", ways.join(", "), route.reason)
            }
            Err(error) => error.to_string(),
        }
    }

    fn leads(&self, after: &str, expected: Expected<'_>) {
        for (target, want) in expected {
            let route = self.route(target);
            assert!(route.contains(want), "after {after}: {target} is {route:?}, not {want:?}");
        }
    }

    fn status(&self, kind: &str) -> WatchStatus {
        self.watches.status().into_iter().find(|status| status.kind == kind).unwrap()
    }
}

impl Asked {
    /// A watch that says nothing and does not end.
    fn stay(self) {
        std::mem::forget(self.begin());
    }
}

fn node(name: &str, address: &str) -> Value {
    json!({
        "metadata": {"name": name, "uid": format!("uid-{name}"), "resourceVersion": "11"},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    })
}

/// Lets all tasks do what they can do now.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(10)).await;
}

async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn a_watch_goes_on_where_the_last_one_ended() {
    let (mut world, events) = World::with_a_node().await;
    let mut changed = world.watches.nodes_changed();
    let mut n2 = node("n2", "10.77.2.2");
    n2["metadata"]["resourceVersion"] = json!("12");
    events.send("ADDED", n2);
    settle().await;
    assert!(changed.has_changed().unwrap());
    changed.mark_unchanged();
    world.leads("ADDED", &[("n1:1", "node name n1"), ("10.77.2.2:1", "address of node n2")]);
    pass(60).await;
    drop(events);
    let watch = world.api.watch("nodes", "12").await;
    assert_eq!(watch.parameter("timeoutSeconds"), Some("60"));
    let events = watch.begin();
    let bookmark = json!({"kind": "Node", "apiVersion": "v1", "metadata": {"resourceVersion": "20"}});
    events.send("BOOKMARK", bookmark);
    pass(60).await;
    drop(events);
    world.api.watch("nodes", "20").await.stay();
    settle().await;
    assert!(!changed.has_changed().unwrap());
    let status = world.status("nodes");
    assert_eq!((status.objects, status.listed, status.errors, status.stale_seconds), (2, true, 0, None));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_forgotten_while_the_api_server_is_away() {
    let (mut world, events) = World::with_a_node().await;
    pass(5).await;
    events.cut();
    let before = [("n1:1", "node name n1"), ("10.77.1.2:1", "address of node n1")];
    let away = Instant::now();
    let mut attempts = 0;
    let mut told = [false; 2];
    while away.elapsed() < Duration::from_secs(60) {
        drop(world.api.asked("nodes").await);
        attempts += 1;
        settle().await;
        world.leads("an absence", &before);
        let status = world.status("nodes");
        let seconds = status.stale_seconds.unwrap();
        assert_eq!(seconds, away.elapsed().as_secs());
        match world.watches.ready() {
            Ok(remarks) => {
                assert!(seconds < STALE_AFTER.as_secs(), "{seconds} s: {remarks:?}");
                assert!(remarks[0].starts_with(&format!("nodes are {seconds} s old: ")), "{remarks:?}");
                told[0] = true;
            }
            Err(late) => {
                assert!(seconds >= STALE_AFTER.as_secs(), "{seconds} s: {late}");
                assert!(late.starts_with("nodes are "), "{late}");
                told[1] = true;
            }
        }
    }
    assert_eq!(told, [true, true]);
    assert!((6..=30).contains(&attempts), "{attempts} attempts in a minute");
    // What has changed meanwhile is in the next list.
    loop {
        let asked = world.api.asked("nodes").await;
        if asked.parameter("watch").is_none() {
            asked.list("30", &[node("n1", "10.77.1.2"), node("n7", "10.77.7.2")]);
            break;
        }
    }
    world.api.watch("nodes", "30").await.stay();
    settle().await;
    world.leads("the return", &before);
    world.leads("the return", &[("n7:1", "node name n7")]);
    assert_eq!(world.status("nodes").stale_seconds, None);
    assert!(world.status("nodes").errors >= attempts);
}

#[tokio::test(start_paused = true)]
async fn a_version_that_is_gone_is_answered_with_a_list() {
    let (mut world, events) = World::with_a_node().await;
    events.send("ADDED", node("n7", "10.77.7.2"));
    pass(5).await;
    // As an event, and the next list has no n7.
    events.send("ERROR", json!({"kind": "Status", "apiVersion": "v1", "code": 410, "message": "too old"}));
    let list = world.api.list("nodes").await;
    world.leads("410", &[("n7:1", "node name n7")]);
    assert!(world.status("nodes").error.unwrap().starts_with("410 Gone"));
    list.list("40", &[node("n1", "10.77.1.2")]);
    // As an answer, again and again: each time a list, less and less often.
    let began = Instant::now();
    for _ in 0..8 {
        world.api.watch("nodes", "40").await.fail(StatusCode::GONE);
        let list = world.api.list("nodes").await;
        world.leads("the list", &[("n7:1", NOWHERE), ("n1:1", "node name n1")]);
        list.list("40", &[node("n1", "10.77.1.2")]);
    }
    assert!(began.elapsed() > Duration::from_secs(15), "{:?}", began.elapsed());
    world.api.watch("nodes", "40").await.stay();
    pass(3).await;
    assert_eq!(world.status("nodes").stale_seconds, None, "a watch that stands is good");
}

#[tokio::test(start_paused = true)]
async fn an_object_that_cannot_be_read_leaves_its_former_version() {
    let (world, events) = World::with_a_node().await;
    events.send("MODIFIED", json!({"metadata": {"name": "n1"}, "status": {"addresses": "many"}}));
    events.send("ADDED", json!({"metadata": {"name": "N_0"}, "spec": {"podCIDRs": ["0.0.0.0/0"]}}));
    events.send("ADDED", json!({"metadata": {"name": 5}}));
    events.send(
        "ADDED",
        json!({"metadata": {"name": "n8"}, "spec": {"podCIDRs": ["x", "10.8.0.0/99"]}, "status": {"addresses": [
            {"type": "InternalIP", "address": "127.0.0.1"}, {"type": "InternalIP", "address": "x"}]}}),
    );
    settle().await;
    world.leads("garbage", &[("10.77.1.2:1", "address of node n1"), ("n8:1", "node name n8")]);
    world.leads("garbage", &[("127.0.0.1:22", NOWHERE), ("8.8.8.8:1", NOWHERE), ("10.8.0.1:1", NOWHERE)]);
    let status = world.status("nodes");
    assert_eq!((status.objects, status.errors, status.stale_seconds), (2, 0, None));
    let unreadable = status.unreadable.unwrap();
    assert!(unreadable.starts_with("2 can't be read, the last: "), "{unreadable}");
    assert_eq!(world.watches.ready().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_the_api_server_says_is_cut_short() {
    let (world, events) = World::with_a_node().await;
    let long = "x".repeat(100_000);
    events.send("MODIFIED", json!({"metadata": {"name": "n1"}, "status": {"addresses": long}}));
    settle().await;
    assert!(world.status("nodes").unreadable.unwrap().len() < 1000);
    events.send("ERROR", json!({"kind": "Status", "apiVersion": "v1", "code": 500, "message": long}));
    settle().await;
    let error = world.status("nodes").error.unwrap();
    assert!(error.starts_with("xxx") && error.len() < 1000, "{} bytes", error.len());
}

/// Many objects that are gone take several steps, between which dials go on.
#[tokio::test(start_paused = true)]
async fn a_list_without_many_objects_removes_all_of_them() {
    let (mut world, events) = World::with_a_node().await;
    let name = |i: u32| format!("m{i}");
    let many = (0..500).map(|i| node(&name(i), &format!("10.78.{}.{}", i / 200, i % 200 + 1)));
    let many: Vec<Value> = many.chain([node("n1", "10.77.1.2")]).collect();
    events.send("ERROR", json!({"code": 410}));
    world.api.list("nodes").await.list("20", &many);
    world.api.watch("nodes", "20").await.begin().send("ERROR", json!({"code": 410}));
    settle().await;
    assert_eq!(world.status("nodes").objects, 501);
    world.api.list("nodes").await.list("30", &many[450..]);
    world.api.watch("nodes", "30").await.stay();
    settle().await;
    assert_eq!(world.status("nodes").objects, 51);
    world.leads("the list", &[("m449:1", NOWHERE), ("10.78.0.1:1", NOWHERE), ("m450:1", "node name m450")]);
}

#[tokio::test(start_paused = true)]
async fn an_address_that_is_listed_twice_belongs_to_nobody_once_it_is_gone() {
    let (world, events) = World::with_a_node().await;
    let with = |addresses: &[&str]| {
        let kinds = ["InternalIP", "ExternalIP"];
        let addresses: Vec<Value> = addresses
            .iter()
            .zip(kinds)
            .map(|(address, kind)| json!({"type": kind, "address": address}))
            .collect();
        json!({"metadata": {"name": "n1"}, "status": {"addresses": addresses}})
    };
    let (a, b) = ("10.77.5.1", "10.77.5.2");
    let (at_a, at_b) = (format!("{a}:1"), format!("{b}:1"));
    let owned = "address of node n1";
    for (addresses, of_a, of_b) in
        [(&[a, a][..], owned, NOWHERE), (&[a], owned, NOWHERE), (&[b], NOWHERE, owned)]
    {
        events.send("MODIFIED", with(addresses));
        settle().await;
        world.leads(&format!("{addresses:?}"), &[(at_a.as_str(), of_a), (at_b.as_str(), of_b)]);
    }
    events.send("ADDED", node("n2", a));
    events.send("MODIFIED", with(&[b, b]));
    events.send("DELETED", with(&[b, b]));
    settle().await;
    world.leads("the end", &[(at_a.as_str(), "address of node n2"), (at_b.as_str(), NOWHERE)]);
}

#[tokio::test(start_paused = true)]
async fn bytes_that_are_no_events_and_answers_that_are_no_lists_change_nothing() {
    let (mut world, events) = World::with_a_node().await;
    pass(5).await;
    events.bytes("\0\u{1}nonsense\n{\"type\": 5}\n[]\n");
    // The watch goes on from where it was; after the third failure, all is listed again.
    for _ in 0..2 {
        world.api.watch("nodes", "10").await.begin().bytes("nonsense\n");
    }
    for body in [json!({"items": 5}), json!("x"), json!({"kind": "List", "apiVersion": "v1", "items": []})] {
        world.api.list("nodes").await.answer(StatusCode::OK, &body);
        settle().await;
        world.leads("nonsense", &[("n1:1", "node name n1"), ("10.77.1.2:1", "address of node n1")]);
        assert!(world.status("nodes").stale_seconds.is_some(), "{body}");
    }
    world.api.list("nodes").await.fail(StatusCode::INTERNAL_SERVER_ERROR);
    world.api.list("nodes").await.list("50", &[node("n1", "10.77.1.2")]);
    world.api.watch("nodes", "50").await.stay();
    pass(3).await;
    assert_eq!(world.watches.ready(), Ok(vec![]));
}

#[tokio::test(start_paused = true)]
async fn an_empty_list_is_believed_unless_it_is_of_nodes() {
    let (mut world, events) = World::with_a_node().await;
    events.send("ERROR", json!({"code": 410}));
    world.api.list("nodes").await.list("20", &[]);
    settle().await;
    let error = world.status("nodes").error.unwrap();
    assert!(error.contains("no nodes any more"), "{error}");
    world.leads("an empty list", &[("n1:1", "node name n1")]);
    // A node that is deleted goes, the last one, too.
    world.api.list("nodes").await.list("30", &[node("n1", "10.77.1.2")]);
    world.api.watch("nodes", "30").await.begin().send("DELETED", node("n1", "10.77.1.2"));
    settle().await;
    world.leads("DELETED", &[("n1:1", NOWHERE), ("10.77.1.2:1", NOWHERE)]);

    let mut world = World::start(false);
    let web = json!({"metadata": {"name": "web", "namespace": "default"},
        "spec": {"clusterIP": "10.0.0.118", "ports": [{"port": 80}]}});
    world.api.list("services").await.list("10", &[web]);
    let events = world.api.watch("services", "10").await.begin();
    settle().await;
    world.leads("a list", &[("10.0.0.118:80", "service default/web has no ready endpoint")]);
    events.send("ERROR", json!({"code": 410}));
    world.api.list("services").await.list("20", &[]);
    world.api.watch("services", "20").await.stay();
    settle().await;
    world.leads("an empty list", &[("10.0.0.118:80", NOWHERE)]);
}

#[tokio::test(start_paused = true)]
async fn a_list_in_pages_removes_nothing_before_its_last_page() {
    let (mut world, events) = World::with_a_node().await;
    events.send("ERROR", json!({"code": 410}));
    let page = world.api.list("nodes").await;
    assert_eq!((page.parameter("limit"), page.parameter("continue")), (Some("500"), None));
    page.page("20", &[node("n2", "10.77.2.2")], "more");
    world.api.list("nodes").await.fail(StatusCode::INTERNAL_SERVER_ERROR);
    settle().await;
    world.leads("half a list", &[("n1:1", "node name n1"), ("n2:1", "node name n2")]);
    world.api.list("nodes").await.page("20", &[node("n2", "10.77.2.2")], "more");
    let page = world.api.list("nodes").await;
    assert_eq!((page.parameter("limit"), page.parameter("continue")), (Some("500"), Some("more")));
    page.list("20", &[node("n3", "10.77.3.2")]);
    world.api.watch("nodes", "20").await.stay();
    settle().await;
    world.leads("the list", &[("n1:1", NOWHERE), ("n2:1", "node name n2"), ("n3:1", "node name n3")]);
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_does_not_answer_is_given_up() {
    let mut world = World::start(false);
    let began = Instant::now();
    let unanswered = world.api.list("nodes").await;
    let late = world.watches.ready().unwrap_err();
    assert!(late.contains("nodes have not been listed yet: not asked yet"), "{late}");
    world.api.list("nodes").await.list("10", &[node("n1", "10.77.1.2")]);
    assert!(began.elapsed() >= PATIENCE);
    drop(unanswered);
    let unanswered = world.api.watch("nodes", "10").await;
    // The list was good, so this is not known yet.
    assert_eq!(world.status("nodes").error, None);
    let began = Instant::now();
    let events = world.api.watch("nodes", "10").await.begin();
    assert!(began.elapsed() >= PATIENCE);
    assert_eq!(world.status("nodes").error.as_deref(), Some("no answer to a watch"));
    drop(unanswered);
    // A watch says nothing while nothing changes, but the API server ends it after its time.
    pass(3).await;
    assert_eq!(world.status("nodes").error, None);
    let began = Instant::now();
    // It is the third failure in a row, so all is listed again.
    let list = world.api.list("nodes").await;
    let silent = began.elapsed();
    assert!(silent >= WATCH && silent < WATCH + PATIENCE + Duration::from_secs(1), "{silent:?}");
    assert_eq!(world.status("nodes").error.as_deref(), Some("the watch went silent"));
    drop((list, events));
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_ends_as_it_begins_is_not_begun_again_at_once() {
    let (mut world, events) = World::with_a_node().await;
    drop(events);
    let began = Instant::now();
    for attempt in 1..30 {
        let asked = world.api.asked("nodes").await;
        if asked.parameter("watch").is_none() {
            assert_eq!(attempt % 3, 0, "all is listed again after the third failure");
            asked.list("10", &[node("n1", "10.77.1.2")]);
            drop(world.api.watch("nodes", "10").await.begin());
        } else {
            drop(asked.begin());
        }
    }
    assert!(began.elapsed() > Duration::from_secs(10), "{:?}", began.elapsed());
    world.leads("many short watches", &[("n1:1", "node name n1")]);
}

/// What tokens are bound to exists by its metadata alone, and only while its watch stands.
#[tokio::test(start_paused = true)]
async fn objects_exist_by_their_metadata_while_their_watch_stands() {
    use access::authn::cluster::{BoundKind, BoundObject, Existence, Objects as _, Uid};
    let mut world = World::start(true);
    let existing = world.watches.existing().unwrap();
    let look = |uid: &str| {
        let account = BoundObject { kind: BoundKind::ServiceAccount, key: "a/web".into(), uid: Uid::of(uid) };
        existing.check(&[account], 1_800_000_000)
    };
    let account =
        |uid: &str| json!({"metadata": {"name": "web", "namespace": "a", "uid": uid}, "secrets": 7});
    assert_eq!(look("1"), Existence::Unknown);
    world.api.list("serviceaccounts").await.list("10", &[account("1")]);
    let events = world.api.watch("serviceaccounts", "10").await.begin();
    settle().await;
    assert_eq!((look("1"), look("2")), (Existence::Exist, Existence::Missing));
    events.send("MODIFIED", account("2"));
    settle().await;
    assert_eq!((look("1"), look("2")), (Existence::Missing, Existence::Exist));
    pass(5).await;
    events.cut();
    let watch = world.api.asked("serviceaccounts").await;
    assert_eq!((look("1"), look("2")), (Existence::Missing, Existence::Unknown));
    let events = watch.begin();
    pass(3).await;
    assert_eq!(look("2"), Existence::Exist);
    events.send("DELETED", account("2"));
    settle().await;
    assert_eq!(look("2"), Existence::Missing);
}

/// The answers of a real API server, event by event.
#[tokio::test(start_paused = true)]
async fn the_recorded_answers_give_the_right_routes_after_every_event() {
    let mut world = World::start(false);
    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/kubernetes");
    let read = |name: String| std::fs::read_to_string(recorded.join(name)).unwrap();
    let mut watches = std::collections::HashMap::new();
    for plural in ["nodes", "pods", "services", "endpointslices"] {
        let list: Value = serde_json::from_str(&read(format!("{plural}.list.json"))).unwrap();
        world.api.list(plural).await.answer(StatusCode::OK, &list);
        let version = list["metadata"]["resourceVersion"].as_str().unwrap();
        let events = world.api.watch(plural, version).await.begin();
        let lines = read(format!("{plural}.watch.jsonl"));
        let lines: std::collections::VecDeque<String> =
            lines.lines().map(|line| format!("{line}\n")).collect();
        watches.insert(plural, (events, lines));
    }
    settle().await;
    let mut step = |plural: &str| -> Option<String> {
        let (events, lines) = watches.get_mut(plural).unwrap();
        let line = lines.pop_front()?;
        events.bytes(&line);
        let event: Value = serde_json::from_str(&line).unwrap();
        let name = event["object"]["metadata"]["name"].as_str().unwrap();
        Some(format!("{} {name}", event["type"].as_str().unwrap()))
    };
    let n1 = "address of node n1";
    world.leads(
        "the lists",
        &[
            ("n1:10250", "node name n1"),
            ("10.77.1.2:10250", n1),
            ("10.244.1.9:80", "CIDR 10.244.1.0/24 of node n1"),
            ("10.244.2.9:80", NOWHERE),
            ("n2:10250", NOWHERE),
            ("10.0.0.118:80", "10.77.1.2:8080: service default/web"),
            ("web.default.svc:80", "10.77.1.2:8080: service default/web"),
            ("web.default.svc.cluster.local:80", "10.77.1.2:8080: service default/web"),
            ("10.0.0.118:81", "service default/web has no such TCP port"),
            // Its endpoint is the API server's address, which is on no node.
            ("10.0.0.1:443", "AnyNode 10.0.0.1:443"),
            ("10.0.0.85:53", NOWHERE),
        ],
    );
    let of_nodes: [(&str, Expected<'_>); 4] = [
        (
            "ADDED n2",
            &[
                ("n2:10250", "node name n2"),
                ("10.244.2.9:80", "CIDR 10.244.2.0/24 of node n2"),
                ("[fd00:10:244:2::7]:80", "CIDR fd00:10:244:2::/64 of node n2"),
                ("10.77.2.2:1", NOWHERE),
            ],
        ),
        (
            "MODIFIED n2",
            &[
                ("10.77.2.2:1", "address of node n2"),
                ("198.51.100.7:1", "address of node n2"),
                ("[fd00:77::2]:1", "address of node n2"),
            ],
        ),
        ("MODIFIED n1", &[("10.77.1.2:10250", n1), ("10.77.2.2:1", "address of node n2")]),
        (
            "DELETED n2",
            &[
                ("n2:10250", NOWHERE),
                ("10.77.2.2:1", NOWHERE),
                ("10.244.2.9:80", NOWHERE),
                ("[fd00:10:244:2::7]:80", NOWHERE),
                ("10.77.1.2:10250", n1),
            ],
        ),
    ];
    for (event, expected) in of_nodes {
        assert_eq!(step("nodes").as_deref(), Some(event));
        settle().await;
        world.leads(event, expected);
    }
    // All pods are on their host's network, so the node keeps its address throughout.
    while let Some(event) = step("pods") {
        settle().await;
        world.leads(&event, &[("10.77.1.2:10250", n1)]);
    }
    let dns: [(&str, &str); 2] = [
        ("10.0.0.85:53", "10.244.1.5:5353: service kube-system/dns port dns-tcp"),
        ("dns.kube-system.svc:9153", "10.244.1.5:9153: service kube-system/dns port metrics"),
    ];
    let of_services: [(&str, &str, Expected<'_>); 4] = [
        ("services", "ADDED dns", &[("10.0.0.85:53", "service kube-system/dns has no ready endpoint")]),
        ("endpointslices", "ADDED dns-1", &dns),
        ("endpointslices", "MODIFIED dns-1", &dns),
        ("services", "DELETED dns", &[("10.0.0.85:53", NOWHERE), ("dns.kube-system.svc:53", NOWHERE)]),
    ];
    for (plural, event, expected) in of_services {
        assert_eq!(step(plural).as_deref(), Some(event));
        settle().await;
        world.leads(event, expected);
    }
    for plural in ["nodes", "pods", "services", "endpointslices"] {
        assert_eq!(step(plural), None, "{plural}");
    }
    assert_eq!(world.watches.ready(), Ok(vec![]));
}
