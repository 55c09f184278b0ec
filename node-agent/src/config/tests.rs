//! The defaults, the sample file, and the mistakes that a configuration can have.

use proto_net::telemetry::LogFormat;

use super::*;

fn parse(text: &str) -> Result<Config, Errors> {
    Config::parse(text, "node.yaml", Path::new("/etc/node-agent"))
}

fn sample(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config").join(name);
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn everything_but_the_way_in_has_a_default() {
    let config = parse("listen: 0.0.0.0:22").unwrap();
    assert_eq!(config.node, None);
    assert_eq!(config.state_dir, Path::new("/var/lib/node-agent"));
    assert_eq!(config.log, Log { format: LogFormat::Text, level: "info".into() });
    assert_eq!(config.admin.listen, "127.0.0.1:9071".parse().unwrap());
    assert_eq!(config.listen, Some("0.0.0.0:22".parse().unwrap()));
    assert_eq!((config.call_home.len(), config.addresses.len()), (0, 0));
    assert_eq!(config.users.len(), 0);
    let policy =
        PolicyConfig { kubelet_port: Some(10250), pod_cidrs: vec![], service_cidrs: vec![], allow: vec![] };
    assert_eq!(config.policy, policy);
    let limits = &config.limits;
    assert_eq!((limits.max_handshakes, limits.max_sessions, limits.max_streams), (256, 64, 8192));
    assert_eq!((limits.handshake_timeout, limits.dial_timeout), (secs(10), secs(10)));
    assert_eq!((limits.keepalive_interval, limits.keepalive_max), (secs(7), 1));
    assert_eq!((config.half_closed_timeout, config.shutdown_grace), (secs(600), secs(30)));

    let config = parse("call_home: [master.example:2222]").unwrap();
    assert_eq!((config.listen, config.call_home.len()), (None, 1));
}

#[test]
fn the_sample_shows_the_defaults() {
    let config = parse(&sample("node-agent.yaml")).unwrap();
    let default = parse("listen: 0.0.0.0:22").unwrap();
    assert_eq!(config.policy.kubelet_port, default.policy.kubelet_port);
    assert_eq!(
        config.front_end,
        parse("listen: 0.0.0.0:22\nfront_end: {tcp: 127.0.0.1:6443, unix: {}}").unwrap().front_end
    );
    // Where a default would be empty, the sample has an example.
    let without_examples = Config {
        node: None,
        call_home: vec![],
        call_home_https: CallHomeHttps::default(),
        addresses: vec![],
        policy: default.policy.clone(),
        users: vec![],
        front_end: None,
        ..config
    };
    assert_eq!(without_examples, default);
}

/// Texts, and the beginning of the error that each causes.
const MISTAKES: &[(&str, &str)] = &[
    ("log: {}", "1:1: listen or call_home is required"),
    ("call_home: []", "1:1: listen or call_home is required"),
    ("listen: \"22\"", "1:9: listen: \"22\": expected ADDRESS:PORT"),
    ("listen: 127.0.0.1:9071", "1:9: listen: the same address as admin.listen"),
    ("listen: 0.0.0.0:22\nadmin: {listen: 10.0.0.1:9071}", "2:17: admin.listen: 10.0.0.1:9071 has no auth"),
    ("call_home: master:2222", "1:12: call_home: expected a list, found a single value"),
    ("call_home: [master]", "1:13: call_home[0]: \"master\": no port"),
    ("call_home: [master:0]", "1:13: call_home[0]: \"master:0\": the port is not a number from 1 to 65535"),
    ("call_home: [a:1, b:2, A:1]", "1:23: call_home[2]: is listed already"),
    ("listen: 0.0.0.0:22\nnode: my_node", "2:7: node: \"my_node\" is not a node name"),
    (
        "listen: 0.0.0.0:22\nkubelet_port: 1",
        "2:1: kubelet_port: unknown field; known here: addresses, admin,",
    ),
    ("listen: 0.0.0.0:22\naddresses: [10.0.0.5/32]", "2:13: addresses[0]: \"10.0.0.5/32\": expected an IP"),
    (
        "listen: 0.0.0.0:22\naddresses: [127.0.0.1, 169.254.169.254]",
        "2:24: addresses[1]: 169.254.169.254 is no node's own address, as 169.254.0.0/16 (link-local) is closed",
    ),
    (
        "listen: 0.0.0.0:22\naddresses: ['::ffff:100.100.100.200']",
        "2:13: addresses[0]: 100.100.100.200 is no node's own address",
    ),
    (
        "listen: 0.0.0.0:22\npolicy: {kubelet_port: 70000}",
        "2:24: policy.kubelet_port: \"70000\": is not in the range",
    ),
    (
        "listen: 0.0.0.0:22\npolicy: {pod_cidr: []}",
        "2:10: policy.pod_cidr: unknown field; did you mean pod_cidrs?",
    ),
    (
        "listen: 0.0.0.0:22\npolicy:\n  pod_cidrs:\n  - 10.0.0.0",
        "4:5: policy.pod_cidrs[0]: \"10.0.0.0\": expected a network",
    ),
    ("listen: 0.0.0.0:22\nlimits:\n  max_streams: 0", "3:16: limits.max_streams: 0 is not in the range"),
    (
        "listen: 0.0.0.0:22\nlimits:\n  max-streams: 5",
        "3:3: limits.max-streams: unknown field; did you mean max_streams?",
    ),
    (
        "listen: 0.0.0.0:22\nfront_end: {wait: 1s}",
        "2:1: front_end: has no listener: give it tcp, unix or both",
    ),
    (
        "listen: 0.0.0.0:22\nfront_end: {tcp: 0.0.0.0:6443}",
        "2:18: front_end.tcp: 0.0.0.0:6443: give the one address",
    ),
    ("call_home: ['https://m']", "1:12: call_home: a front end takes calls home with a credential"),
    ("call_home: ['http://m']", "1:13: call_home[0]: \"http://m\": expected HOST:PORT, or https"),
    ("listen: 0.0.0.0:22\ncall_home_https: {cert: a}", "2:1: call_home_https: cert and key go together"),
    (
        "listen: 0.0.0.0:22\ncall_home_https: {proxy: 'http://u:p@h:1', proxy_password_file: f}",
        "2:65: call_home_https.proxy_password_file: needs `proxy: http://USER@HOST:PORT`, without a password",
    ),
    (
        "listen: 0.0.0.0:22\ncall_home_https: {proxy_password_file: f}",
        "2:40: call_home_https.proxy_password_file: needs `proxy: http://USER@HOST:PORT`, without a password",
    ),
    (
        "listen: 0.0.0.0:22\ncall_home_https: {proxy: 'socks5://u:p@h:1'}",
        "2:26: call_home_https.proxy: expected environment, none or an address: expected http://",
    ),
    ("listen: 0.0.0.0:22\nusers:\n", "2:1: users: has no value: give it one, or remove it"),
    ("listen: 0.0.0.0:22\nlimits:\n\tmax_streams: 5\n", "3:2: not YAML: tabs"),
];

/// The same for one entry of `policy.allow`.
const MISTAKES_IN_RULES: &[(&str, &str)] = &[
    ("{to: 10.0.0.5, ports: 1}", "4:5: policy.allow[0].name: is required"),
    ("{name: a, ports: 1}", "4:5: policy.allow[0].to: is required"),
    ("{name: a, to: 10.0.0.5}", "4:5: policy.allow[0].ports: is required"),
    (
        "{name: kubelet, to: ::1, ports: 1}",
        "4:12: policy.allow[0].name: \"kubelet\": is the name of a built-in",
    ),
    (
        "{name: metadata, to: ::1, ports: 1}",
        "4:12: policy.allow[0].name: \"metadata\": is the name of a built-in",
    ),
    ("{name: A, to: ::1, ports: 1}", "4:12: policy.allow[0].name: \"A\": a rule's name has"),
    (
        "{name: a, to: ::1, ports: 1}\n  - {name: a, to: ::1, ports: 2}",
        "5:12: policy.allow[1].name: \"a\": another rule has this name",
    ),
    ("{name: a, to: ::1, ports: 0}", "4:31: policy.allow[0].ports: \"0\": expected a port"),
    ("{name: a, to: ::1, ports: 90-80}", "4:31: policy.allow[0].ports: \"90-80\": ends before"),
    ("{name: a, to: ::1, ports: [80, http]}", "4:36: policy.allow[0].ports[1]: \"http\": expected a port"),
    ("{name: a, to: ::1, ports: []}", "4:31: policy.allow[0].ports: \"[]\": names no port"),
];

fn assert_error(text: &str, expected: &str) {
    let shown = parse(text).expect_err(text).to_string();
    let found = shown.lines().any(|line| line.starts_with(&format!("node.yaml:{expected}")));
    assert!(found, "{text}\nexpected {expected}\ngot {shown}");
}

#[test]
fn mistakes_are_shown_with_their_place() {
    for (text, expected) in MISTAKES {
        assert_error(text, expected);
    }
    for (rule, expected) in MISTAKES_IN_RULES {
        assert_error(&format!("listen: 0.0.0.0:22\npolicy:\n  allow:\n  - {rule}"), expected);
    }
}

#[test]
fn every_mistake_is_shown_at_once() {
    let text = "node: A\nadmin: {listen: x}\ncall_home: [y]\npolicy:\n  pods: []\n  allow: [{}]\nlimits: {dial_timeout: 3}\n";
    let errors = parse(text).unwrap_err();
    let places: Vec<_> = errors.iter().map(|e| (e.line, e.field.as_str())).collect();
    assert_eq!(
        places,
        [
            (1, "node"),
            (2, "admin.listen"),
            (3, "call_home[0]"),
            (5, "policy.pods"),
            (6, "policy.allow[0].name"),
            (6, "policy.allow[0].to"),
            (6, "policy.allow[0].ports"),
            (7, "limits.dial_timeout"),
        ]
    );
}
