//! The node-agent's configuration file. `deploy/config/node-agent.yaml` shows every field.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use proto::{
    NodeName,
    call_home::Master,
    policy::{self, Policy, Rule},
};
use proto_config::{At, Errors, Log, Mode, Ports, Section, Source, Value};

use crate::https::CallHomeHttps;

/// A configuration without mistakes, its defaults filled in and its paths usable from the working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `None` leaves the name to the host certificate.
    pub node: Option<NodeName>,
    /// The host key, its certificate and the CAs that are trusted.
    pub state_dir: PathBuf,
    pub log: Log,
    pub admin: AdminConfig,
    /// Where masters and people may dial this node's SSH server.
    pub listen: Option<SocketAddr>,
    /// The masters to dial, for the same sessions over links made from here.
    pub call_home: Vec<Master>,
    /// How those are reached that are front ends.
    pub call_home_https: CallHomeHttps,
    /// The node's own addresses; empty leaves them to the host certificate, as far as they are this host's.
    pub addresses: Vec<IpAddr>,
    pub policy: PolicyConfig,
    /// Login names that may forward, besides the master; empty allows every name that a certificate lists.
    pub users: Vec<String>,
    /// `None` has no local endpoint.
    pub front_end: Option<LocalEndpointConfig>,
    pub limits: LimitsConfig,
    /// After one direction of a stream has ended, how long the other may be silent.
    pub half_closed_timeout: Duration,
    /// How long streams may go on after SIGTERM.
    pub shutdown_grace: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    /// Health and metrics, for scrapers. Loopback unless the file says `allow_remote: true`.
    pub listen: SocketAddr,
}

/// What [`Config::policy`] is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyConfig {
    /// Allowed on the node's own addresses; `None` allows no kubelet.
    pub kubelet_port: Option<u16>,
    /// Allowed with every port.
    pub pod_cidrs: Vec<IpNet>,
    /// Allowed with every port.
    pub service_cidrs: Vec<IpNet>,
    pub allow: Vec<AllowConfig>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowConfig {
    pub name: String,
    pub to: IpNet,
    pub ports: Ports,
}

/// Where callers on this node reach the master's front end through the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalEndpointConfig {
    pub tcp: Option<SocketAddr>,
    pub unix: Option<LocalUnixConfig>,
    /// Callers at once, over both.
    pub max_connections: usize,
    /// How long a caller is kept while there is no tunnel.
    pub wait: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalUnixConfig {
    pub path: PathBuf,
    pub mode: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitsConfig {
    /// Connections at once that have not authenticated yet.
    pub max_handshakes: usize,
    /// Sessions of people at once.
    pub max_sessions: usize,
    /// Streams of one session.
    pub max_streams: usize,
    pub handshake_timeout: Duration,
    /// For resolving and connecting to a target, and for connecting to a master.
    pub dial_timeout: Duration,
    pub keepalive_interval: Duration,
    /// Unanswered keep-alives after which a session is dead.
    pub keepalive_max: usize,
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// For waits: long enough for any network, and no accidental month.
const WAIT: RangeInclusive<Duration> = Duration::from_millis(10)..=DAY;
const COUNT: RangeInclusive<usize> = 1..=1_000_000;

/// Names of rules that are not `allow` entries.
const BUILT_IN: [&str; 3] = [KUBELET_RULE, "pod-cidr", "service-cidr"];
pub const KUBELET_RULE: &str = "kubelet";

impl Config {
    /// Reads the file and checks the files that it names.
    pub fn load(path: &Path) -> Result<Self, Errors> {
        proto_config::load(path, Self::read)
    }

    /// Reads a configuration from its text, shown in errors as the file `origin`, with paths relative to
    /// `base_dir`. The files that it names need not exist.
    pub fn parse(text: &str, origin: &str, base_dir: &Path) -> Result<Self, Errors> {
        proto_config::parse(text, Source { origin, base_dir, check_files: false }, Self::read)
    }

    /// The rules for a node that states these addresses: `kubelet` on each of them, `pod-cidr`, `service-cidr`, then
    /// the `allow` entries in their order.
    pub fn policy(&self, own_addresses: &[IpAddr]) -> Policy {
        let every_port = 1..=u16::MAX;
        let kubelet = self.policy.kubelet_port.into_iter().flat_map(|port| {
            let net = |address: &IpAddr| IpNet::from(address.to_canonical());
            let rule = move |net| Rule { name: KUBELET_RULE.into(), net, ports: port..=port };
            own_addresses.iter().map(net).map(rule)
        });
        let networks = |name: &'static str, nets: &[IpNet]| {
            let rule = |net: &IpNet| Rule { name: name.into(), net: *net, ports: every_port.clone() };
            nets.iter().map(rule).collect::<Vec<_>>()
        };
        let allow = self.policy.allow.iter().flat_map(|allow| {
            let rule = |ports: &RangeInclusive<u16>| Rule {
                name: allow.name.clone(),
                net: allow.to,
                ports: ports.clone(),
            };
            allow.ports.0.iter().map(rule)
        });
        let rules = kubelet
            .chain(networks("pod-cidr", &self.policy.pod_cidrs))
            .chain(networks("service-cidr", &self.policy.service_cidrs))
            .chain(allow)
            .collect();
        Policy { rules }
    }

    fn read(s: &Section<'_>) -> Option<Self> {
        let config = Self {
            node: s.optional("node"),
            state_dir: s.directory("state_dir", "/var/lib/node-agent"),
            log: s.section_or_default("log", Log::read),
            admin: s.section_or_default("admin", AdminConfig::read),
            listen: if s.at("listen").is_some() { s.listen("listen", None) } else { None },
            call_home: unique(s, "call_home"),
            call_home_https: s.section("call_home_https", CallHomeHttps::read).unwrap_or_default(),
            addresses: unique(s, "addresses").into_iter().map(|OwnAddress(address)| address).collect(),
            policy: s.section_or_default("policy", PolicyConfig::read),
            users: unique(s, "users"),
            front_end: s.section("front_end", LocalEndpointConfig::read),
            limits: s.section_or_default("limits", LimitsConfig::read),
            half_closed_timeout: s.duration("half_closed_timeout", secs(600), WAIT),
            shutdown_grace: s.duration("shutdown_grace", secs(30), Duration::ZERO..=DAY),
        };
        let none_given = s.at("listen").is_none() && s.at("call_home").is_none_or(|at| at.is_empty_list());
        if none_given {
            s.section_error("listen or call_home is required: without either no master reaches this node");
        }
        let https = config.call_home.iter().any(|master| matches!(master, Master::Https(_)));
        if https && !config.call_home_https.has_credential() {
            let message = "a front end takes calls home with a credential: give call_home_https cert and key, or token_file";
            s.error("call_home", message);
        }
        Some(config)
    }
}

impl AdminConfig {
    fn read(s: &Section<'_>) -> Self {
        let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9071);
        Self { listen: s.listen_local("listen", loopback) }
    }
}

impl PolicyConfig {
    fn read(s: &Section<'_>) -> Self {
        let allow: Vec<_> = s.items("allow");
        let mut names = Vec::new();
        Self {
            kubelet_port: Some(s.or("kubelet_port", 10250)).filter(|port| *port != 0),
            pod_cidrs: unique(s, "pod_cidrs"),
            service_cidrs: unique(s, "service_cidrs"),
            allow: allow.iter().filter_map(|at| at.section(|s| AllowConfig::read(s, &mut names))).collect(),
        }
    }
}

impl AllowConfig {
    fn read(s: &Section<'_>, names: &mut Vec<String>) -> Option<Self> {
        let name = s.required_at("name").and_then(|at| rule_name(&at, names));
        let to = s.required_at("to").and_then(|at| network_or_address(&at));
        let ports = s.required("ports");
        Some(Self { name: name?, to: to?, ports: ports? })
    }
}

impl LocalEndpointConfig {
    fn read(s: &Section<'_>) -> Option<Self> {
        let tcp = if s.at("tcp").is_some() { s.listen("tcp", None) } else { None };
        if let Some(address) = tcp.filter(|address| address.ip().is_unspecified()) {
            s.error("tcp", format!("{address}: give the one address that callers on this node use"));
        }
        let unix = s.section("unix", |s| {
            let path = s.listen_unix("path", "/run/node-agent-local/front-end.sock");
            Some(LocalUnixConfig { path, mode: s.or("mode", Mode(0o660)).0 })
        });
        if s.at("tcp").is_none() && s.at("unix").is_none() {
            s.section_error("has no listener: give it tcp, unix or both");
        }
        let max_connections = s.number("max_connections", 1024, COUNT);
        let wait = s.duration("wait", secs(5), Duration::ZERO..=secs(60));
        Some(Self { tcp, unix, max_connections, wait })
    }
}

impl LimitsConfig {
    fn read(s: &Section<'_>) -> Self {
        Self {
            max_handshakes: s.number("max_handshakes", 256, COUNT),
            max_sessions: s.number("max_sessions", 64, COUNT),
            max_streams: s.number("max_streams", 8192, COUNT),
            handshake_timeout: s.duration("handshake_timeout", secs(10), WAIT),
            dial_timeout: s.duration("dial_timeout", secs(10), WAIT),
            keepalive_interval: s.duration("keepalive_interval", secs(3), WAIT),
            keepalive_max: s.number("keepalive_max", 2, 1..=100),
        }
    }
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A list in which nothing stands twice.
fn unique<T: Value + PartialEq>(s: &Section<'_>, name: &'static str) -> Vec<T> {
    let mut values = Vec::new();
    for at in s.items(name) {
        match T::read(&at) {
            Some(value) if values.contains(&value) => at.error("is listed already"),
            Some(value) => values.push(value),
            None => {}
        }
    }
    values
}

/// An address that may be the node's own. Loopback may, for a kubelet that listens nowhere else.
#[derive(PartialEq)]
struct OwnAddress(IpAddr);

impl Value for OwnAddress {
    fn read(at: &At<'_>) -> Option<Self> {
        let address = IpAddr::read(at)?;
        if let Some(range) = policy::closed_range(address).filter(|range| range.name != "loopback") {
            at.error(format!(
                "{address} is no node's own address, as {} ({}) is closed: to allow it all the same, name it in \
                 policy.allow",
                range.net, range.name
            ));
        }
        Some(Self(address))
    }
}

fn rule_name(at: &At<'_>, names: &mut Vec<String>) -> Option<String> {
    let name = at.text()?;
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > 63 || !name.bytes().all(allowed) {
        return at.complain(name, "a rule's name has at most 63 of a-z, 0-9, '-', '_' and '.'");
    }
    if BUILT_IN.contains(&name) || policy::REFUSALS.contains(&name) {
        return at.complain(name, "is the name of a built-in rule");
    }
    if names.iter().any(|other| other == name) {
        return at.complain(name, "another rule has this name");
    }
    names.push(name.to_owned());
    Some(name.to_owned())
}

/// `10.0.0.5` is short for `10.0.0.5/32`.
fn network_or_address(at: &At<'_>) -> Option<IpNet> {
    match at.text()?.parse::<IpAddr>() {
        Ok(address) => Some(IpNet::from(address.to_canonical())),
        Err(_) => IpNet::read(at),
    }
}

#[cfg(test)]
mod tests {
    use proto::policy::Verdict;
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
        let policy = PolicyConfig {
            kubelet_port: Some(10250),
            pod_cidrs: vec![],
            service_cidrs: vec![],
            allow: vec![],
        };
        assert_eq!(config.policy, policy);
        let limits = &config.limits;
        assert_eq!((limits.max_handshakes, limits.max_sessions, limits.max_streams), (256, 64, 8192));
        assert_eq!((limits.handshake_timeout, limits.dial_timeout), (secs(10), secs(10)));
        assert_eq!((limits.keepalive_interval, limits.keepalive_max), (secs(3), 2));
        assert_eq!((config.half_closed_timeout, config.shutdown_grace), (secs(600), secs(30)));

        let config = parse("call_home: [master.example:2222]").unwrap();
        assert_eq!((config.listen, config.call_home.len()), (None, 1));
    }

    /// The sample shows the defaults, and examples where a default would be empty.
    #[test]
    fn the_sample_shows_the_defaults() {
        let text = sample("node-agent.yaml");
        let config = parse(&text).unwrap();
        let default = parse("listen: 0.0.0.0:22").unwrap();
        assert_eq!(config.policy.kubelet_port, default.policy.kubelet_port);
        assert_eq!(
            config.front_end,
            parse("listen: 0.0.0.0:22\nfront_end: {tcp: 127.0.0.1:6443, unix: {}}").unwrap().front_end
        );
        let examples = Config {
            node: None,
            call_home: vec![],
            call_home_https: CallHomeHttps::default(),
            addresses: vec![],
            policy: default.policy.clone(),
            users: vec![],
            front_end: None,
            ..config
        };
        assert_eq!(examples, default);
        for field in [
            "node",
            "state_dir",
            "log",
            "format",
            "level",
            "admin",
            "listen",
            "allow_remote",
            "call_home",
            "call_home_https",
            "ca",
            "cert",
            "key",
            "token_file",
            "server_name",
            "proxy",
            "proxy_password_file",
            "addresses",
            "policy",
            "kubelet_port",
            "pod_cidrs",
            "service_cidrs",
            "allow",
            "name",
            "to",
            "ports",
            "users",
            "front_end",
            "tcp",
            "unix",
            "path",
            "mode",
            "max_connections",
            "wait",
            "limits",
            "max_handshakes",
            "max_sessions",
            "max_streams",
            "handshake_timeout",
            "dial_timeout",
            "keepalive_interval",
            "keepalive_max",
            "half_closed_timeout",
            "shutdown_grace",
        ] {
            assert!(text.contains(&format!("{field}:")), "{field}");
        }
    }

    #[test]
    fn the_policy_follows_the_file_and_the_addresses() {
        let text = "
listen: 0.0.0.0:22
policy:
  pod_cidrs: [10.244.1.0/24, \"fd00:1::/64\"]
  service_cidrs: [10.96.0.0/12]
  allow:
  - {name: metrics, to: 10.0.0.5, ports: [9100, \"9200-9299\"]}
  - {name: wide, to: 0.0.0.0/0, ports: 8000}
  - {name: local-api, to: 127.0.0.1/32, ports: \"6443\"}
";
        let policy = parse(text).unwrap().policy(&["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()]);
        for (address, port, expected) in [
            ("10.0.0.5", 10250, Ok("kubelet")),
            ("fd00::5", 10250, Ok("kubelet")),
            ("10.0.0.6", 10250, Err("default-deny")),
            ("10.0.0.5", 22, Err("default-deny")),
            ("10.244.1.9", 1, Ok("pod-cidr")),
            ("fd00:1::9", 65535, Ok("pod-cidr")),
            ("10.100.0.1", 443, Ok("service-cidr")),
            ("10.0.0.5", 9100, Ok("metrics")),
            ("10.0.0.5", 9250, Ok("metrics")),
            ("10.0.0.5", 9300, Err("default-deny")),
            ("8.8.8.8", 8000, Ok("wide")),
            ("169.254.169.254", 8000, Err("link-local")),
            ("127.0.0.1", 8000, Err("loopback")),
            ("127.0.0.1", 6443, Ok("local-api")),
        ] {
            let verdict = match policy.decide(address.parse().unwrap(), port) {
                Verdict::Allow { rule } => Ok(rule),
                Verdict::Deny { rule, .. } => Err(rule),
            };
            assert_eq!(verdict, expected, "{address} {port}");
        }
    }

    #[test]
    fn kubelet_port_0_allows_no_kubelet() {
        let config = parse("listen: 0.0.0.0:22\npolicy: {kubelet_port: 0}").unwrap();
        assert_eq!(config.policy(&["10.0.0.5".parse().unwrap()]), Policy::default());
    }

    #[test]
    fn mistakes_are_shown_with_their_place() {
        let allow = "listen: 0.0.0.0:22\npolicy:\n  allow:\n  - ";
        let table: &[(&str, &str)] = &[
            ("log: {}", "1:1: listen or call_home is required"),
            ("call_home: []", "1:1: listen or call_home is required"),
            ("listen: \"22\"", "1:9: listen: \"22\": expected ADDRESS:PORT"),
            ("listen: 127.0.0.1:9071", "1:9: listen: the same address as admin.listen"),
            (
                "listen: 0.0.0.0:22\nadmin: {listen: 10.0.0.1:9071}",
                "2:17: admin.listen: 10.0.0.1:9071 has no auth",
            ),
            ("call_home: master:2222", "1:12: call_home: expected a list, found a single value"),
            ("call_home: [master]", "1:13: call_home[0]: \"master\": no port"),
            (
                "call_home: [master:0]",
                "1:13: call_home[0]: \"master:0\": the port is not a number from 1 to 65535",
            ),
            ("call_home: [a:1, b:2, A:1]", "1:23: call_home[2]: is listed already"),
            ("listen: 0.0.0.0:22\nnode: my_node", "2:7: node: \"my_node\" is not a node name"),
            (
                "listen: 0.0.0.0:22\nkubelet_port: 1",
                "2:1: kubelet_port: unknown field; known here: addresses, admin,",
            ),
            (
                "listen: 0.0.0.0:22\naddresses: [10.0.0.5/32]",
                "2:13: addresses[0]: \"10.0.0.5/32\": expected an IP",
            ),
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
            (&format!("{allow}{{to: 10.0.0.5, ports: 1}}"), "4:5: policy.allow[0].name: is required"),
            (&format!("{allow}{{name: a, ports: 1}}"), "4:5: policy.allow[0].to: is required"),
            (&format!("{allow}{{name: a, to: 10.0.0.5}}"), "4:5: policy.allow[0].ports: is required"),
            (
                &format!("{allow}{{name: kubelet, to: ::1, ports: 1}}"),
                "4:12: policy.allow[0].name: \"kubelet\": is the name of a built-in",
            ),
            (
                &format!("{allow}{{name: metadata, to: ::1, ports: 1}}"),
                "4:12: policy.allow[0].name: \"metadata\": is the name of a built-in",
            ),
            (
                &format!("{allow}{{name: A, to: ::1, ports: 1}}"),
                "4:12: policy.allow[0].name: \"A\": a rule's name has",
            ),
            (
                &format!("{allow}{{name: a, to: ::1, ports: 1}}\n  - {{name: a, to: ::1, ports: 2}}"),
                "5:12: policy.allow[1].name: \"a\": another rule has this name",
            ),
            (
                &format!("{allow}{{name: a, to: ::1, ports: 0}}"),
                "4:31: policy.allow[0].ports: \"0\": expected a port",
            ),
            (
                &format!("{allow}{{name: a, to: ::1, ports: 90-80}}"),
                "4:31: policy.allow[0].ports: \"90-80\": ends before",
            ),
            (
                &format!("{allow}{{name: a, to: ::1, ports: [80, http]}}"),
                "4:36: policy.allow[0].ports[1]: \"http\": expected a port",
            ),
            (
                &format!("{allow}{{name: a, to: ::1, ports: []}}"),
                "4:31: policy.allow[0].ports: \"[]\": names no port",
            ),
            (
                "listen: 0.0.0.0:22\nlimits:\n  max_streams: 0",
                "3:16: limits.max_streams: 0 is not in the range",
            ),
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
            (
                "listen: 0.0.0.0:22\ncall_home_https: {cert: a}",
                "2:1: call_home_https: cert and key go together",
            ),
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
        for (text, expected) in table {
            let shown = parse(text).expect_err(text).to_string();
            let found = shown.lines().any(|line| line.starts_with(&format!("node.yaml:{expected}")));
            assert!(found, "{text}\nexpected {expected}\ngot {shown}");
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
}
