//! Routes as a table, and properties of all tables.

use std::path::Path;

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use super::{
    cluster::{Endpoint, EndpointSlice, Node, Object, Pod, Service, ServicePort},
    *,
};

const INVENTORY: &str = "
nodes:
- {name: edge, addresses: [192.0.2.1, 'fd00:9::1'], cidrs: [10.0.0.0/8, 'fd00::/16'], connections: 1}
- {name: n1, dial: '10.77.1.2:22', addresses: [10.77.1.2]}
- {name: lab, cidrs: [10.244.1.128/25, 172.16.0.0/12]}
service_cidrs: [10.96.0.0/12, 'fd00:96::/112', 172.16.1.0/24]
";

fn node(name: &str, created: i64, addresses: &[&str], cidrs: &[&str]) -> Object {
    Object::Node(Node {
        name: name.parse().unwrap(),
        created,
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        cidrs: cidrs.iter().map(|c| c.parse().unwrap()).collect(),
        kubelet_port: 10250,
    })
}

fn pod(key: &str, created: i64, on: &str, addresses: &[&str]) -> Pod {
    Pod {
        key: key.into(),
        created,
        node: (!on.is_empty()).then(|| on.parse().unwrap()),
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        host_network: false,
        ended: false,
        first_port: None,
    }
}

fn service(key: &str, addresses: &[&str], ports: &[(&str, u16)]) -> Service {
    Service {
        key: key.into(),
        created: 1,
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        ports: ports.iter().map(|(name, port)| ServicePort { name: (*name).into(), port: *port }).collect(),
        external_name: None,
    }
}

/// Endpoints as `ADDRESS NODE` (ready), `ADDRESS NODE !` (not ready), `ADDRESS - HOSTNAME`.
fn slice(key: &str, of: &str, ports: &[(&str, u16)], endpoints: &[&str]) -> Object {
    let endpoint = |text: &&str| {
        let mut words = text.split(' ');
        let address = words.next().unwrap().parse().unwrap();
        let node = words.next().filter(|n| *n != "-").map(|n| n.parse().unwrap());
        let last = words.next();
        let hostname = last.filter(|w| *w != "!").map(str::to_owned);
        Endpoint { address, node, hostname, ready: last != Some("!") }
    };
    Object::EndpointSlice(EndpointSlice {
        key: key.into(),
        service: of.into(),
        ports: ports.iter().map(|(name, port)| ((*name).into(), Some(*port))).collect(),
        endpoints: endpoints.iter().map(endpoint).collect(),
    })
}

fn cluster() -> Vec<Object> {
    let web = [("http", 8080), ("metrics", 9153)];
    vec![
        node("n1", 10, &["10.77.1.2", "fd00:77::2"], &["10.244.1.0/24", "fd00:244:1::/64"]),
        node("n2", 20, &["10.77.2.2", "fd00:77:2::2"], &["10.244.2.0/24", "fd00:244:2::/64"]),
        // Claims what others have had for longer.
        node(
            "evil",
            99,
            &[
                "10.77.2.2",
                "10.77.1.2",
                "10.77.66.6",
                "10.96.0.10",
                "10.96.0.66",
                "10.244.1.66",
                "10.244.1.5",
            ],
            &["10.244.2.0/24", "10.244.2.64/26"],
        ),
        Object::Pod(pod("default/web-1", 30, "n1", &["10.244.1.5", "fd00:244:1::5"])),
        Object::Pod(pod("default/web-2", 31, "n2", &["10.244.2.5"])),
        // Its address lies in another node's CIDR, as with an IPAM of the network's own.
        Object::Pod(pod("default/roamer", 32, "n2", &["10.244.1.200"])),
        Object::Pod(pod("default/thief", 90, "evil", &["10.244.1.5"])),
        Object::Pod(pod("default/service-thief", 91, "evil", &["10.96.0.11", "10.96.0.67"])),
        node("web.default.svc", 98, &[], &[]),
        Object::Pod(pod("default/pending", 33, "", &["10.244.7.7"])),
        Object::Pod(Pod { host_network: true, ..pod("kube-system/proxy", 34, "n2", &["10.77.2.2"]) }),
        Object::Pod(Pod { ended: true, ..pod("default/job", 35, "n1", &["10.244.9.9"]) }),
        Object::Pod(pod("default/far", 36, "n2", &["198.51.100.7"])),
        Object::Service(service(
            "default/web",
            &["10.96.0.10", "fd00:96::10"],
            &[("http", 80), ("metrics", 9090)],
        )),
        slice("default/web-a", "default/web", &web, &["10.244.1.5 n1", "10.244.2.5 n2 !"]),
        slice("default/web-6", "default/web", &web, &["fd00:244:1::5 n1 !"]),
        Object::Service(service("default/down", &["10.96.0.11"], &[("", 80)])),
        slice("default/down-a", "default/down", &[("", 80)], &["10.244.2.5 n2 !"]),
        Object::Service(service("default/empty", &["10.96.0.12"], &[("", 80)])),
        Object::Service(service("default/kubernetes", &["10.96.0.1"], &[("https", 443)])),
        slice("default/kubernetes", "default/kubernetes", &[("https", 6443)], &["203.0.113.5 -"]),
        Object::Service(service("default/db", &[], &[("sql", 5432)])),
        slice("default/db-a", "default/db", &[("sql", 5432)], &["10.244.1.9 n1 db-0", "10.244.2.9 n2 db-1"]),
        Object::Service(service("default/lost", &[], &[("x", 1)])),
        slice("default/lost-a", "default/lost", &[("x", 1)], &["203.0.113.9 -"]),
        Object::Service(service("default/nonode", &["10.96.0.14"], &[("", 80)])),
        slice("default/nonode-a", "default/nonode", &[("", 8000)], &["10.244.2.77 -"]),
        Object::Service(Service {
            external_name: Some("example.org".into()),
            ..service("default/alias", &[], &[("", 443)])
        }),
        Object::Service(service("default/odd", &["172.16.1.9"], &[("", 80)])),
        slice("default/odd-a", "default/odd", &[("", 81)], &["10.244.1.6 n1"]),
    ]
}

fn routes(inventory: &str, objects: Vec<Object>) -> Routes {
    let inventory = Inventory::parse(inventory, "inventory.yaml", Path::new("/")).unwrap();
    let mut routes = Routes {
        inventory: InventoryRoutes::new(&inventory),
        cluster_domain: "cluster.local".into(),
        ..Routes::default()
    };
    for object in objects {
        routes.cluster.apply(object);
    }
    routes
}

/// Puts a whole list in the place of what is known.
fn listed(routes: &mut Routes, kind: cluster::Kind, keys: &std::collections::HashSet<cluster::Key>) {
    routes.cluster.settle(kind);
    for key in routes.cluster.unlisted(kind, keys) {
        routes.cluster.remove(kind, &key);
    }
}

/// `NODE: REASON`, or `NODE TARGET: REASON` where the node is asked for something else; `!` and what is wrong.
fn show(routes: &Routes, target: &str) -> String {
    let target: Target = target.parse().unwrap();
    match routes.find(&target) {
        Ok(route) => {
            let hops: Vec<_> = route
                .hops
                .iter()
                .map(|hop| {
                    let node = match &hop.via {
                        Via::Node(node) => node.to_string(),
                        Via::AnyNode => "any".to_owned(),
                    };
                    if hop.target == target { node } else { format!("{node} {}", hop.target) }
                })
                .collect();
            format!("{}: {}", hops.join(" | "), route.reason)
        }
        Err(e) => format!("!{}: {e}", e.fault()),
    }
}

#[test]
fn the_table() {
    let default = "nodes: [{name: gate, default_route: true}]";
    let table: &[(&str, &[(&str, &str)])] = &[
        (
            INVENTORY,
            &[
                // Nodes, by name and address, of the inventory and of the cluster.
                ("n1:10250", "n1: node name n1"),
                ("N1:10250", "n1: node name n1"),
                ("n2:22", "n2: node name n2"),
                ("edge:1", "edge: node name edge"),
                ("lab:1", "lab: node name lab"),
                ("evil:1", "evil: node name evil"),
                ("n3:1", "!route: no route to n3:1"),
                ("10.77.1.2:10250", "n1: address of node n1"),
                ("[::ffff:10.77.1.2]:10250", "n1: address of node n1"),
                ("[fd00:77::2]:10250", "n1: address of node n1"),
                ("10.77.2.2:10250", "n2: address of node n2"),
                ("[fd00:77:2::2]:1", "n2: address of node n2"),
                ("10.77.66.6:1", "evil: address of node evil"),
                ("192.0.2.1:80", "edge: address of node edge"),
                ("[fd00:9::1]:80", "edge: address of node edge"),
                // Pods.
                ("10.244.1.5:8080", "n1: pod default/web-1 on node n1"),
                ("[fd00:244:1::5]:8080", "n1: pod default/web-1 on node n1"),
                ("10.244.2.5:1", "n2: pod default/web-2 on node n2"),
                ("10.244.1.200:1", "n2: pod default/roamer on node n2"),
                ("198.51.100.7:1", "n2: pod default/far on node n2"),
                // What is a service's, or another node's network, is no node's address, and no pod's.
                ("10.96.0.66:1", "any: service CIDR 10.96.0.0/12, any connected node"),
                ("10.244.2.99:1", "evil: CIDR 10.244.2.64/26 of node evil"),
                ("10.244.1.66:1", "n1: CIDR 10.244.1.0/24 of node n1"),
                ("10.96.0.67:1", "any: service CIDR 10.96.0.0/12, any connected node"),
                ("10-244-1-5.default.pod:80", "n1 10.244.1.5:80: pod default/web-1 on node n1"),
                ("10-244-1-5.default.pod.cluster.local:80", "n1 10.244.1.5:80: pod default/web-1 on node n1"),
                ("fd00-244-1--5.default.pod:80", "n1 [fd00:244:1::5]:80: pod default/web-1 on node n1"),
                ("web-1.default.pod:80", "!route: no route"),
                // What has no address of its own, or not any more, is reached as the rest of its network.
                ("10.244.7.7:1", "edge: CIDR 10.0.0.0/8 of node edge"),
                ("10.244.9.9:1", "edge: CIDR 10.0.0.0/8 of node edge"),
                // CIDRs, the longest first, of either source.
                ("10.244.1.77:1", "n1: CIDR 10.244.1.0/24 of node n1"),
                ("10.244.1.129:1", "lab: CIDR 10.244.1.128/25 of node lab"),
                ("10.244.2.9:1", "n2: CIDR 10.244.2.0/24 of node n2"),
                ("10.244.2.65:1", "evil: CIDR 10.244.2.64/26 of node evil"),
                ("10.244.3.1:1", "edge: CIDR 10.0.0.0/8 of node edge"),
                ("[fd00:244:1::77]:1", "n1: CIDR fd00:244:1::/64 of node n1"),
                ("[fd00:244:9::1]:1", "edge: CIDR fd00::/16 of node edge"),
                ("172.16.9.1:1", "lab: CIDR 172.16.0.0/12 of node lab"),
                ("11.0.0.1:1", "!route: no route"),
                ("[fd01::1]:1", "!route: no route"),
                ("169.254.169.254:80", "!route: no route"),
                // Services: cluster IPs and names, ports, ready endpoints only.
                ("10.96.0.10:80", "n1 10.244.1.5:8080: service default/web port http"),
                ("10.96.0.10:9090", "n1 10.244.1.5:9153: service default/web port metrics"),
                ("[fd00:96::10]:80", "n1 10.244.1.5:8080: service default/web port http"),
                ("web.default.svc:80", "n1 10.244.1.5:8080: service default/web port http"),
                ("WEB.Default.svc:80", "n1 10.244.1.5:8080: service default/web port http"),
                (
                    "web.default.svc.cluster.local:9090",
                    "n1 10.244.1.5:9153: service default/web port metrics",
                ),
                ("web.default.svc.cluster.local.:80", "n1 10.244.1.5:8080: service default/web port http"),
                ("web.default.svc.other.local:80", "!route: no route"),
                ("web.default:80", "!route: no route"),
                ("web.other.svc:80", "!route: no route"),
                ("svc:80", "!route: no route"),
                ("default.svc:80", "!route: no route"),
                ("a.b.web.default.svc:80", "!route: no route"),
                (
                    "10.96.0.10:81",
                    "!route: no route to 10.96.0.10:81: service default/web has no such TCP port",
                ),
                (
                    "web.default.svc:8080",
                    "!route: no route to web.default.svc:8080: service default/web has no",
                ),
                ("10.96.0.11:80", "!target: 10.96.0.11:80: service default/down has no ready endpoint"),
                ("10.96.0.12:80", "!target: 10.96.0.12:80: service default/empty has no ready endpoint"),
                ("172.16.1.9:80", "n1 10.244.1.6:81: service default/odd"),
                // Endpoints that are on no node: whoever forwards to services reaches them.
                ("10.96.0.1:443", "any: service default/kubernetes port https"),
                ("10.96.0.14:80", "evil 10.244.2.77:8000: service default/nonode"),
                // Headless services: endpoints by name, each endpoint by its own, any port.
                (
                    "db.default.svc:5432",
                    "n1 10.244.1.9:5432 | n2 10.244.2.9:5432: service default/db port sql",
                ),
                ("db-1.db.default.svc:5432", "n2 10.244.2.9:5432: service default/db port sql"),
                ("db-1.db.default.svc.cluster.local:9999", "n2 10.244.2.9:9999: headless service default/db"),
                (
                    "db-7.db.default.svc:5432",
                    "!target: db-7.db.default.svc:5432: service default/db has no ready",
                ),
                (
                    "web-9.web.default.svc:80",
                    "!target: web-9.web.default.svc:80: service default/web has no ready",
                ),
                (
                    "lost.default.svc:1",
                    "!route: no route to lost.default.svc:1: the endpoints of service default/lost",
                ),
                (
                    "alias.default.svc:443",
                    "!route: no route to alias.default.svc:443: service default/alias is only a name for example.org",
                ),
                // Service networks without a service.
                ("10.96.9.9:80", "any: service CIDR 10.96.0.0/12, any connected node"),
                ("[fd00:96::99]:80", "any: service CIDR fd00:96::/112, any connected node"),
                ("172.16.1.7:80", "any: service CIDR 172.16.1.0/24, any connected node"),
            ],
        ),
        (
            default,
            &[
                ("n1:1", "n1: node name n1"),
                ("gate:1", "gate: node name gate"),
                ("10.244.1.5:1", "n1: pod default/web-1 on node n1"),
                ("10.244.1.77:1", "n1: CIDR 10.244.1.0/24 of node n1"),
                ("11.0.0.1:1", "gate: default route gate"),
                ("example.org:443", "gate: default route gate"),
                ("10.96.0.1:443", "any: service default/kubernetes port https"),
                ("10.96.0.11:80", "!target: 10.96.0.11:80: service default/down has no ready endpoint"),
                ("nobody.default.svc:1", "gate: default route gate"),
            ],
        ),
        (
            "",
            &[
                ("n1:1", "n1: node name n1"),
                ("192.0.2.1:1", "!route: no route"),
                ("gate:1", "!route: no route"),
            ],
        ),
    ];
    let mut rows = 0;
    for (inventory, expected) in table {
        let routes = routes(inventory, cluster());
        for (target, want) in *expected {
            let got = show(&routes, target);
            assert!(
                got == *want || got.starts_with(want) && want.starts_with('!'),
                "{target}: {got}, not {want}"
            );
            rows += 1;
        }
    }
    assert!(rows >= 60, "{rows}");
}

/// Without the inventory, and without the cluster, each alone.
#[test]
fn either_source_will_do() {
    let alone = routes(INVENTORY, vec![]);
    assert_eq!(show(&alone, "n1:1"), "n1: node name n1");
    assert!(show(&alone, "n2:1").starts_with("!route"));
    assert_eq!(show(&alone, "10.244.1.5:1"), "edge: CIDR 10.0.0.0/8 of node edge");
    assert_eq!(show(&alone, "10.96.0.10:80"), "any: service CIDR 10.96.0.0/12, any connected node");
    assert_eq!(Routes::default().find(&"a:1".parse().unwrap()).unwrap_err().kind(), "no_route");
}

#[test]
fn an_object_can_change_and_go() {
    let mut routes = routes("", cluster());
    let web = |routes: &Routes| show(routes, "10.96.0.10:80");
    assert_eq!(web(&routes), "n1 10.244.1.5:8080: service default/web port http");
    let ready = [("http", 8080), ("metrics", 9153)];
    routes.cluster.apply(slice(
        "default/web-a",
        "default/web",
        &ready,
        &["10.244.1.5 n1 !", "10.244.2.5 n2"],
    ));
    assert_eq!(web(&routes), "n2 10.244.2.5:8080: service default/web port http");
    // A slice may change hands.
    routes.cluster.apply(slice("default/web-a", "default/down", &[("", 80)], &["10.244.2.5 n2"]));
    assert!(web(&routes).starts_with("!target"));
    assert_eq!(show(&routes, "10.96.0.11:80"), "n2 10.244.2.5:80: service default/down");
    // The older pod goes, and its address is the other's.
    routes.cluster.remove(cluster::Kind::Pods, "default/web-1");
    assert_eq!(show(&routes, "10.244.1.5:1"), "evil: pod default/thief on node evil");
    routes.cluster.remove(cluster::Kind::Pods, "default/thief");
    assert_eq!(show(&routes, "10.244.1.5:1"), "n1: CIDR 10.244.1.0/24 of node n1");
    // A node that leaves takes its routes along, and the next in line has what it had.
    routes.cluster.remove(cluster::Kind::Nodes, "n2");
    assert!(show(&routes, "n2:1").starts_with("!route"));
    assert_eq!(show(&routes, "10.77.2.2:1"), "evil: address of node evil");
    // A list that no longer has them removes all.
    for kind in cluster::Kind::ALL {
        listed(&mut routes, kind, &Default::default());
        assert_eq!(routes.cluster.count(kind), 0);
    }
    for target in ["n1:1", "10.244.1.5:1", "10.244.1.77:1", "10.96.0.10:80", "web.default.svc:80"] {
        assert!(show(&routes, target).starts_with("!route"), "{target}");
    }
}

/// After the first list nobody takes what another has, however old the thief is.
#[test]
fn a_claim_of_later_takes_nothing() {
    let mut routes = routes("", vec![]);
    let settle = |routes: &mut Routes| {
        let nodes = ["n1", "evil"].map(cluster::Key::from).into_iter().collect();
        listed(routes, cluster::Kind::Nodes, &nodes);
        let pods = ["a/web", "a/old"].map(cluster::Key::from).into_iter().collect();
        listed(routes, cluster::Kind::Pods, &pods);
    };
    routes.cluster.apply(node("evil", 1, &["10.77.6.6"], &[]));
    routes.cluster.apply(node("n1", 50, &["10.77.1.2"], &["10.1.0.0/24"]));
    routes.cluster.apply(Object::Pod(pod("a/old", 1, "evil", &["10.2.0.9"])));
    routes.cluster.apply(Object::Pod(pod("a/web", 50, "n1", &["10.9.0.5"])));
    settle(&mut routes);
    let theft = [
        node("evil", 1, &["10.77.6.6", "10.77.1.2"], &["10.1.0.0/24"]),
        Object::Pod(pod("a/old", 1, "evil", &["10.2.0.9", "10.9.0.5"])),
    ];
    for object in theft {
        routes.cluster.apply(object);
    }
    assert_eq!(show(&routes, "10.77.1.2:1"), "n1: address of node n1");
    assert_eq!(show(&routes, "10.1.0.7:1"), "n1: CIDR 10.1.0.0/24 of node n1");
    assert_eq!(show(&routes, "10.9.0.5:1"), "n1: pod a/web on node n1");
    // An update of the owner's does not open a gap.
    routes.cluster.apply(node("n1", 50, &["10.77.1.2", "10.77.1.3"], &["10.1.0.0/24"]));
    routes.cluster.apply(Object::Pod(pod("a/web", 50, "n1", &["10.9.0.5", "fd00::5"])));
    assert_eq!(show(&routes, "10.77.1.2:1"), "n1: address of node n1");
    assert_eq!(show(&routes, "10.9.0.5:1"), "n1: pod a/web on node n1");
}

fn settled(routes: &mut Routes) {
    let names = |of: Vec<cluster::Key>| of.into_iter().collect::<std::collections::HashSet<_>>();
    let nodes = names(routes.cluster.nodes().map(|node| node.name.as_str().into()).collect());
    listed(routes, cluster::Kind::Nodes, &nodes);
    let pods = ["a/web", "a/squatter", "a/roamer"].map(cluster::Key::from);
    listed(routes, cluster::Kind::Pods, &names(pods.to_vec()));
}

/// Kubelets write what they like into the status of their pods.
#[test]
fn a_pod_is_dialled_only_where_its_own_node_is() {
    let mut routes = routes(INVENTORY, cluster());
    let at = |routes: &Routes, reported: &Pod| match routes.pod_address(reported) {
        Ok(address) => Ok(address.to_string()),
        Err(error) => Err(format!("{}: {error}", error.kind())),
    };
    for key in ["default/web-1", "default/web-2", "default/roamer", "default/far"] {
        let pod = routes.cluster.pod(key).unwrap();
        assert_eq!(at(&routes, pod), Ok(pod.addresses[0].to_string()));
    }
    let on_host = routes.cluster.pod("kube-system/proxy").unwrap();
    assert_eq!(at(&routes, on_host), Ok("10.77.2.2".to_owned()));
    for (address, owner) in [
        ("10.77.1.2", "address of node n1"),
        ("fd00:77::2", "address of node n1"),
        ("192.0.2.1", "address of node edge"),
        ("10.244.1.5", "pod default/web-1 on node n1"),
        ("fd00:244:1::5", "pod default/web-1 on node n1"),
        ("10.96.0.10", "service default/web has no such TCP port"),
        ("10.96.0.99", "service CIDR 10.96.0.0/12"),
    ] {
        for host_network in [false, true] {
            let liar = Pod { host_network, ..pod("default/liar", 95, "evil", &[address]) };
            routes.cluster.apply(Object::Pod(liar.clone()));
            let error = at(&routes, &liar).unwrap_err();
            assert!(error.starts_with("unreachable: ") && error.contains(owner), "{address}: {error}");
            assert!(error.contains("pod default/liar on node evil reports the address"), "{error}");
        }
    }
    // The bridge of another node's pods, and what lies behind a gateway: no pod has these, but the node would be led to.
    for address in ["10.244.1.1", "172.16.9.1", "8.8.8.8"] {
        let liar = Pod { host_network: true, ..pod("default/liar", 95, "evil", &[address]) };
        routes.cluster.apply(Object::Pod(liar.clone()));
        assert!(at(&routes, &liar).is_err(), "{address}");
    }
    // Whom the lie named is dialled as before.
    for (key, address) in [("default/web-1", "10.244.1.5"), ("kube-system/proxy", "10.77.2.2")] {
        assert_eq!(at(&routes, routes.cluster.pod(key).unwrap()), Ok(address.to_owned()));
    }
    assert!(at(&routes, routes.cluster.pod("default/job").unwrap()).unwrap_err().contains("has ended"));
    assert!(at(&routes, routes.cluster.pod("default/pending").unwrap()).unwrap_err().contains("on no node"));
}

/// Who reports an address early, in the hope that it will be somebody's, loses it to the node whose network holds it.
#[test]
fn of_pods_that_claim_an_address_the_one_at_home_has_it() {
    let squatter = Object::Pod(pod("a/squatter", 1, "evil", &["10.1.0.5"]));
    let web = Object::Pod(pod("a/web", 50, "n1", &["10.1.0.5"]));
    let dialled = |routes: &Routes, key: &str| routes.pod_address(routes.cluster.pod(key).unwrap()).is_ok();
    for nodes_first in [true, false] {
        let mut routes = routes("", vec![]);
        let nodes = [node("n1", 50, &[], &["10.1.0.0/24"]), node("evil", 1, &[], &["10.2.0.0/24"])];
        if nodes_first {
            nodes.iter().for_each(|node| routes.cluster.apply(node.clone()));
        }
        routes.cluster.apply(squatter.clone());
        settled(&mut routes);
        if !nodes_first {
            nodes.iter().for_each(|node| routes.cluster.apply(node.clone()));
        }
        assert_eq!(show(&routes, "10.1.0.5:1"), "evil: pod a/squatter on node evil");
        routes.cluster.apply(web.clone());
        assert_eq!(show(&routes, "10.1.0.5:1"), "n1: pod a/web on node n1");
        assert!(dialled(&routes, "a/web") && !dialled(&routes, "a/squatter"));
        // A second network that holds the address changes who is at home to nobody, and the first has it.
        routes.cluster.apply(node("evil", 1, &[], &["10.2.0.0/24", "10.1.0.0/30", "10.1.0.4/30"]));
        assert_eq!(show(&routes, "10.1.0.5:1"), "evil: pod a/squatter on node evil");
        routes.cluster.apply(node("evil", 1, &[], &["10.2.0.0/24"]));
        routes.cluster.remove(cluster::Kind::Pods, "a/web");
        assert_eq!(show(&routes, "10.1.0.5:1"), "evil: pod a/squatter on node evil");
    }
    // Without pod networks, and where they overlap, who came first stays.
    for (n1, evil) in
        [(&[][..], &[][..]), (&["10.1.0.0/24"], &["10.1.0.4/30"]), (&["10.1.0.0/24"], &["10.1.0.0/16"])]
    {
        let mut routes = routes("", vec![node("n1", 50, &[], n1), node("evil", 1, &[], evil), web.clone()]);
        settled(&mut routes);
        routes.cluster.apply(squatter.clone());
        assert_eq!(show(&routes, "10.1.0.5:1"), "n1: pod a/web on node n1", "{n1:?} {evil:?}");
        assert!(dialled(&routes, "a/web") && !dialled(&routes, "a/squatter"));
    }
}

/// A kubelet writes its Node's addresses, too.
#[test]
fn a_node_takes_no_address_that_a_pod_of_another_has() {
    let mut routes =
        routes("", vec![node("n1", 50, &["10.77.1.2"], &[]), node("evil", 1, &["10.77.6.6"], &[])]);
    routes.cluster.apply(Object::Pod(pod("a/web", 50, "n1", &["10.9.0.5"])));
    settled(&mut routes);
    routes.cluster.apply(node("evil", 1, &["10.77.6.6", "10.9.0.5", "10.9.0.6"], &[]));
    assert_eq!(show(&routes, "10.9.0.5:1"), "n1: pod a/web on node n1");
    assert!(routes.pod_address(routes.cluster.pod("a/web").unwrap()).is_ok());
    assert_eq!(routes.node_addresses("evil").len(), 2, "{:?}", routes.node_addresses("evil"));
    // Nor does a pod of another take what a node has; and a node that is gone keeps nothing through its pods.
    routes.cluster.apply(Object::Pod(pod("a/squatter", 1, "evil", &["10.77.1.2"])));
    assert_eq!(show(&routes, "10.77.1.2:1"), "n1: address of node n1");
    routes.cluster.remove(cluster::Kind::Nodes, "n1");
    assert_eq!(show(&routes, "10.9.0.5:1"), "evil: address of node evil");
    assert_eq!(show(&routes, "10.9.0.6:1"), "evil: address of node evil");
}

#[test]
fn many_endpoints_all_get_their_turn() {
    let endpoints: Vec<String> = (0..100).map(|i| format!("10.244.1.{i} n1")).collect();
    let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
    let many = vec![
        Object::Service(service("a/b", &["10.96.0.1"], &[("", 80)])),
        slice("a/b-1", "a/b", &[("", 80)], &endpoints[..60]),
        slice("a/b-2", "a/b", &[("", 80)], &endpoints[60..]),
    ];
    let routes = routes("", many);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..500 {
        let route = routes.find(&"b.a.svc:80".parse().unwrap()).unwrap();
        assert_eq!(route.hops.len(), ENDPOINTS);
        assert_eq!(route.last.unwrap().target.to_string(), "10.96.0.1:80");
        seen.extend(route.hops.into_iter().map(|hop| hop.target.to_string()));
    }
    assert_eq!(seen.len(), 100);
}

/// Slices are of any size, and a service that is rolled out has many endpoints that are not ready in a row.
#[test]
fn ready_endpoints_are_equally_likely_wherever_they_are() {
    let text = |i: usize| {
        let ready = if (100..400).contains(&i) { " !" } else { "" };
        format!("10.{}.{}.1 n1{ready}", i / 200, i % 200)
    };
    let texts: Vec<String> = (0..500).map(text).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let mut objects = vec![Object::Service(service("a/b", &["10.96.0.1"], &[("", 80)]))];
    for (number, range) in [0..1, 1..50, 50..150, 150..350, 350..495, 495..500].into_iter().enumerate() {
        objects.push(slice(&format!("a/b-{number}"), "a/b", &[("", 80)], &texts[range]));
    }
    objects.push(slice("a/b-empty", "a/b", &[("", 80)], &[]));
    // A slice with another port has no endpoints of this port.
    objects.push(slice("a/b-other", "a/b", &[("other", 81)], &["10.9.9.9 n1"]));
    let routes = routes("", objects);
    let (draws, mut drawn) = (20_000_u32, HashMap::<String, u32>::new());
    for _ in 0..draws {
        let route = routes.find(&"b.a.svc:80".parse().unwrap()).unwrap();
        assert_eq!(route.hops.len(), ENDPOINTS);
        for hop in route.hops {
            *drawn.entry(hop.target.to_string()).or_default() += 1;
        }
    }
    assert_eq!(drawn.len(), 200, "all that are ready");
    let expected = f64::from(draws) * ENDPOINTS as f64 / 200.0;
    for (target, times) in drawn {
        let share = f64::from(times) / expected;
        // More than five times the standard deviation.
        assert!((0.86..1.14).contains(&share), "{target} comes {times} times, not about {expected}");
    }
}

/// A Node may report an address as its InternalIP and as its ExternalIP.
#[test]
fn an_address_that_is_reported_twice_is_given_up_at_once() {
    let mut routes =
        routes("", vec![node("n1", 50, &["10.77.1.2", "10.77.1.2"], &["10.1.0.0/24", "10.1.0.0/24"])]);
    listed(&mut routes, cluster::Kind::Nodes, &[cluster::Key::from("n1")].into_iter().collect());
    routes.cluster.apply(node("n1", 50, &["10.77.1.2"], &["10.1.0.0/24"]));
    assert_eq!(show(&routes, "10.77.1.2:1"), "n1: address of node n1");
    routes.cluster.apply(node("n1", 50, &["10.77.1.3"], &[]));
    assert!(show(&routes, "10.77.1.2:1").starts_with("!route"));
    assert!(show(&routes, "10.1.0.9:1").starts_with("!route"));
    routes.cluster.apply(node("n2", 60, &["10.77.1.2"], &["10.1.0.0/24"]));
    assert_eq!(show(&routes, "10.77.1.2:1"), "n2: address of node n2");
    assert_eq!(show(&routes, "10.1.0.9:1"), "n2: CIDR 10.1.0.0/24 of node n2");
    routes.cluster.remove(cluster::Kind::Nodes, "n2");
    assert!(show(&routes, "10.77.1.2:1").starts_with("!route"));
}

/// Whatever the cluster, the node found has the longest of all prefixes that hold the address, and an address that
/// none holds has no route.
#[test]
fn the_longest_prefix_wins_and_nothing_else_routes() {
    let mut rng = StdRng::seed_from_u64(3);
    for _ in 0..300 {
        let mut prefixes: Vec<(IpNet, String)> = Vec::new();
        let mut objects = Vec::new();
        for i in 0..rng.random_range(1..40) {
            let name = format!("n{i}");
            let mut cidrs = Vec::new();
            for _ in 0..rng.random_range(0..4) {
                // Few bits, so that many overlap.
                let net = if rng.random() {
                    let bits: u32 = rng.random::<u32>() & 0x0f0f_0303 | 0x0a00_0000;
                    IpNet::new(IpAddr::V4(bits.into()), rng.random_range(4..=32)).unwrap().trunc()
                } else {
                    let bits: u128 = 0xfd00 << 112
                        | u128::from(rng.random::<u8>() & 3) << 64
                        | u128::from(rng.random::<u8>() & 7);
                    IpNet::new(IpAddr::V6(bits.into()), rng.random_range(8..=128)).unwrap().trunc()
                };
                if prefixes.iter().all(|(other, _)| *other != net) {
                    prefixes.push((net, name.clone()));
                    cidrs.push(net.to_string());
                }
            }
            let cidrs: Vec<&str> = cidrs.iter().map(String::as_str).collect();
            objects.push(node(&name, i, &[], &cidrs));
        }
        let mut routes = routes("", objects);
        if rng.random()
            && let Some((net, gone)) = prefixes.choose(&mut rng).cloned()
        {
            let _ = net;
            routes.cluster.remove(cluster::Kind::Nodes, &gone);
            prefixes.retain(|(_, owner)| *owner != gone);
        }
        for _ in 0..100 {
            let address = if rng.random() {
                IpAddr::V4((rng.random::<u32>() & 0x0f0f_0303 | 0x0a00_0000).into())
            } else {
                IpAddr::V6(
                    (0xfd00 << 112
                        | u128::from(rng.random::<u8>() & 3) << 64
                        | u128::from(rng.random::<u8>() & 7))
                    .into(),
                )
            };
            let best = prefixes
                .iter()
                .filter(|(net, _)| net.contains(&address))
                .max_by_key(|(net, _)| net.prefix_len());
            let found = routes.find(&Target::new(Host::Addr(address), 80));
            match (best, found) {
                (Some((_, owner)), Ok(route)) => {
                    assert_eq!(route.hops[0].via, Via::Node(owner.parse().unwrap()))
                }
                (None, Err(e)) => assert_eq!(e.kind(), "no_route"),
                (best, found) => panic!("{address}: {best:?}, {found:?}"),
            }
        }
    }
}
