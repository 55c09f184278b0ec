//! Defaults, the sample file, and mistakes with their places.

use std::os::unix::fs::PermissionsExt;

use proto_net::telemetry::LogFormat;

use super::*;
use crate::{
    fields::{UnixConfig, any, loopback},
    front_end::{audit::AuditConfig, upstream::UpstreamConfig},
    kubernetes::config::WatchedNodes,
};
use proto_net::tls::ClientTls;

fn parse(text: &str) -> Result<Config, Errors> {
    Config::parse(text, "master.yaml", Path::new("/etc/master-agent"))
}

fn sample(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config").join(name);
    fs::read_to_string(path).unwrap()
}

#[test]
fn everything_has_a_default() {
    let config = parse("").unwrap();
    assert_eq!(config.state_dir, Path::new("/var/lib/master-agent"));
    assert_eq!(config.log, Log { format: LogFormat::Text, level: "info".into() });
    assert_eq!(config.admin.listen, "127.0.0.1:9070".parse().unwrap());
    assert_eq!(config.admin.socket, Path::new("/run/master-agent/admin.sock"));
    assert_eq!((&config.http_connect.unix, &config.http_connect.tls), (&None, &None));
    assert_eq!(config.http_connect.head_timeout, secs(10));
    assert_eq!(config.http_connect.max_connections, 16384);
    assert_eq!((&config.konnectivity.unix, &config.konnectivity.tls), (&None, &None));
    assert_eq!(config.konnectivity.head_timeout, secs(10));
    assert_eq!((config.konnectivity.max_connections, config.konnectivity.max_dials), (16384, 8192));
    assert_eq!((&config.socks5, &config.proxy_urls), (&None, &None));
    assert_eq!((&config.call_home, &config.inventory), (&None, &None));
    assert_eq!((config.tunnels.keepalive_interval, config.tunnels.keepalive_max), (secs(7), 1));
    assert_eq!((config.tunnels.handshake_timeout, config.tunnels.dial_timeout), (secs(10), secs(9)));
    assert_eq!((config.tunnels.max_streams_per_tunnel, config.tunnels.max_streams_per_node), (8192, 8192));
    assert_eq!(config.tunnels.backoff_min, Duration::from_millis(200));
    assert_eq!(config.tunnels.backoff_max, secs(2));
    assert_eq!((config.certificates.user_ttl, config.certificates.host_ttl), (DAY, 30 * DAY));
    assert_eq!((config.shutdown_grace, config.drain_timeout), (secs(30), secs(3600)));
}

#[test]
fn bound_objects_are_checked_where_there_is_a_cluster_to_ask() {
    let parse = |check: &str, more: &str| {
        parse(&format!(
            "front_end: {{certificates: [{{cert: a, key: b}}], upstream: {{servers: ['http://127.0.0.1']}}, \
             authentication: [{{service_account: {{issuers: [i], audiences: [a], key_files: [k]{check}}}}}]}}\n{more}"
        ))
    };
    let (on, off) = (", check_bound_objects: true", ", check_bound_objects: false");
    for (check, more, checked) in [
        ("", "kubernetes: {}", true),
        (on, "kubernetes: {}", true),
        (off, "kubernetes: {}", false),
        ("", "", false),
        (off, "", false),
    ] {
        let config = parse(check, more).unwrap();
        assert_eq!(config.checks_bound_objects(), checked, "{check} {more}");
        assert_eq!(config.notes().len(), usize::from(!checked), "{check} {more}");
    }
    let errors = parse(on, "").unwrap_err().to_string();
    assert!(errors.contains("check_bound_objects: true needs a section kubernetes"), "{errors}");
    assert!(Config::parse("", "config", Path::new("/")).unwrap().notes().is_empty());
}

/// The sample shows the defaults, except for sections that are off unless they are given.
#[test]
fn the_sample_shows_the_defaults() {
    let mut sample = parse(&sample("master-agent.yaml")).unwrap();
    assert_eq!(sample.http_connect.unix.take(), Some(default_unix()));
    let tls = sample.http_connect.tls.take().unwrap();
    assert_eq!(tls.listen, any(8131));
    assert_eq!(tls.key, Path::new("/etc/master-agent/tls.key"));
    let unix = sample.konnectivity.unix.take().unwrap();
    assert_eq!(unix.path, Path::new("/run/master-agent-egress/konnectivity.sock"));
    assert_eq!(sample.konnectivity.tls.take().unwrap().listen, any(8132));
    let (mut socks5, mut urls) = (sample.socks5.take().unwrap(), sample.proxy_urls.take().unwrap());
    for (unix, path) in [(&mut socks5.unix, "socks5.sock"), (&mut urls.unix, "proxy-urls.sock")] {
        let default = UnixConfig { path: Path::new("/run/master-agent-people").join(path), ..default_unix() };
        assert_eq!(unix.take(), Some(default));
    }
    let users_file = socks5.tcp.as_mut().unwrap().users_file.take();
    assert_eq!(users_file.as_deref(), Some(Path::new("/etc/master-agent/socks5-users")));
    assert_eq!(Some(socks5), parse("socks5: {tcp: {}}").unwrap().socks5);
    assert!(urls.kubelet_ca.take().is_some() && urls.target_ca.take().is_some());
    assert!(urls.kubelet_client.take().is_some());
    assert_eq!(Some(urls), parse("proxy_urls: {tcp: {}}").unwrap().proxy_urls);
    let front_end = sample.front_end.take().unwrap();
    let kinds: Vec<_> = front_end.authn.authenticators.iter().map(|one| one.kind()).collect();
    let all = ["x509", "service_account", "bootstrap_tokens", "token_file", "oidc", "webhook", "anonymous"];
    assert_eq!(kinds, all);
    let text = "front_end: {certificates: [{cert: a, key: b}], upstream: {servers: ['http://127.0.0.1']}}";
    let defaults = parse(text).unwrap().front_end.unwrap();
    let upstream = |of: &FrontEndConfig| UpstreamConfig {
        servers: Vec::new(),
        tls: ClientTls::default(),
        ..of.upstream.clone()
    };
    assert_eq!(upstream(&front_end), upstream(&defaults));
    let audit = AuditConfig { file: None, ..front_end.audit.clone() };
    assert_eq!((front_end.listen, audit), (defaults.listen, defaults.audit.clone()));
    assert_eq!((&front_end.limits, front_end.authn.cache), (&defaults.limits, defaults.authn.cache));
    let switches = |of: &FrontEndConfig| (of.authorize_everything, of.serve_proxy_urls);
    assert_eq!((switches(&front_end), switches(&defaults)), ((false, false), (false, false)));
    assert_eq!(sample.call_home.take().unwrap(), CallHomeConfig { listen: any(2222), max_handshakes: 256 });
    assert_eq!(sample.inventory.take().unwrap(), Path::new("/etc/master-agent/inventory.yaml"));
    let kubernetes = sample.kubernetes.take().unwrap();
    assert_eq!(kubernetes.kubeconfig.unwrap(), Path::new("/etc/master-agent/kubeconfig"));
    let nodes = kubernetes.nodes.unwrap();
    assert_eq!(nodes.key_file.as_deref(), Some(Path::new("/etc/master-agent/id_ed25519")));
    let defaults = parse("kubernetes: {nodes: {}}").unwrap().kubernetes.unwrap();
    assert_eq!(nodes.front_end_listen, Some(loopback(6443)));
    assert_eq!(
        WatchedNodes { key_file: None, front_end_listen: None, ..nodes },
        defaults.nodes.clone().unwrap()
    );
    assert_eq!(
        KubernetesConfig { kubeconfig: None, nodes: None, ..kubernetes },
        KubernetesConfig { nodes: None, ..defaults }
    );
    let traces = sample.traces.take().unwrap();
    assert!(traces.headers_file.is_some() && traces.tls.ca.is_some() && traces.tls.identity.is_some());
    let defaults = parse(&format!("traces: {{endpoint: '{}'}}", traces.endpoint)).unwrap().traces.unwrap();
    let (tls, headers_file) = (defaults.tls.clone(), defaults.headers_file.clone());
    assert_eq!(TracesConfig { tls, headers_file, ..traces }, defaults);
    assert_eq!(sample, parse("").unwrap());
}

fn default_unix() -> UnixConfig {
    parse("http_connect: {unix: {}}").unwrap().http_connect.unix.unwrap()
}

#[test]
fn paths_are_relative_to_the_file() {
    let text = "state_dir: state\ninventory: inv.yaml\nadmin: {socket: /run/x.sock}\n";
    let config = parse(text).unwrap();
    assert_eq!(config.state_dir, Path::new("/etc/master-agent/state"));
    assert_eq!(config.inventory.unwrap(), Path::new("/etc/master-agent/inv.yaml"));
    assert_eq!(config.admin.socket, Path::new("/run/x.sock"));
}

#[test]
fn mistakes_are_shown_with_their_place() {
    let tls = "http_connect:\n  tls: {cert: a, key: b, client_ca: c, listen: ";
    let table: &[(&str, &str)] = &[
        (
            "kubernetes: {nodes: {dial_port: 99999}}",
            "1:33: kubernetes.nodes.dial_port: 99999 is not in the range",
        ),
        (
            "kubernetes: {nodes: {host_keys: {pins: [x]}}}",
            "1:34: kubernetes.nodes.host_keys.pins: unknown field; known here: first_use, known_hosts",
        ),
        ("kubernetes: {node: {}}", "1:14: kubernetes.node: unknown field; did you mean nodes?"),
        ("stat_dir: /x", "1:1: stat_dir: unknown field; did you mean state_dir?"),
        ("log:\n  level: info\n  color: true", "3:3: log.color: unknown field; known here: format, level"),
        ("log: {format: yaml}", "1:15: log.format: \"yaml\": expected text or json"),
        ("log: {level: \"a=b=c\"}", "1:14: log.level: is no log level or filter"),
        ("log: [text]", "1:6: log: expected a section of fields, found a list"),
        ("admin:\n  listen: 9070", "2:11: admin.listen: \"9070\": expected ADDRESS:PORT"),
        ("admin:\n  listen: localhost:9070", "2:11: admin.listen: \"localhost:9070\": expected ADDRESS:PORT"),
        ("admin:\n  listen: 0.0.0.0:9070", "2:11: admin.listen: 0.0.0.0:9070 has no authentication"),
        ("admin: {allow_remote: \"true\"}", "1:23: admin.allow_remote: \"true\": expected true or false"),
        (
            "http_connect:\n  unix: {mode: 660}",
            "2:16: http_connect.unix.mode: \"660\": expected a mode as four",
        ),
        (
            "http_connect:\n  unix: {mode: \"0990\"}",
            "2:16: http_connect.unix.mode: \"0990\": expected a mode",
        ),
        (
            "http_connect: {unix: {owner: no-such-user}}",
            "1:30: http_connect.unix.owner: \"no-such-user\": no such user",
        ),
        (
            "http_connect: {unix: {group: no-such-group}}",
            "1:30: http_connect.unix.group: \"no-such-group\": no such group",
        ),
        ("http_connect:\n  tls:\n    cert: a", "2:3: http_connect.tls.key: is required"),
        ("http_connect:\n  unix:\n", "2:3: http_connect.unix: has no value"),
        (
            &format!("{tls}127.0.0.1:9070}}"),
            "2:48: http_connect.tls.listen: the same address as admin.listen",
        ),
        (&format!("{tls}\"[::]:9070\"}}"), "2:48: http_connect.tls.listen: the same address as admin.listen"),
        (
            &format!("{tls}0.0.0.0:1}}\ncall_home: {{listen: 1.2.3.4:1}}"),
            "3:21: call_home.listen: the same address",
        ),
        (
            "admin: {socket: /s}\nhttp_connect: {unix: {path: /s}}",
            "2:29: http_connect.unix.path: the same address",
        ),
        (
            &format!("admin: {{socket: /{}}}", "s".repeat(107)),
            "1:17: admin.socket: is longer than the 98 bytes",
        ),
        ("tunnels:\n  dial_timeout: 10", "2:17: tunnels.dial_timeout: \"10\": has no unit"),
        ("tunnels:\n  dial_timeout: soon", "2:17: tunnels.dial_timeout: \"soon\": expected a duration"),
        ("tunnels:\n  dial_timeout: 0s", "2:17: tunnels.dial_timeout: 0s is not in the range 10ms to 1day"),
        ("tunnels:\n  backoff_min: 5s", "2:16: tunnels.backoff_min: 5s is longer than backoff_max, 2s"),
        ("tunnels: {keepalive_max: 0}", "1:26: tunnels.keepalive_max: 0 is not in the range 1 to 100"),
        (
            "tunnels: {max_streams_per_node: -1}",
            "1:33: tunnels.max_streams_per_node: \"-1\": expected a whole",
        ),
        (
            "tunnels: {max_streams_per_node: \"5\"}",
            "1:33: tunnels.max_streams_per_node: \"5\": expected a whole",
        ),
        ("call_home: {max_handshakes: 0}", "1:29: call_home.max_handshakes: 0 is not in the range"),
        ("socks5: {}", "1:1: socks5: has no listener: give it unix, tcp or both"),
        (
            "socks5:\n  tcp: {listen: 0.0.0.0:1080}",
            "2:17: socks5.tcp.listen: 0.0.0.0:1080 must be a loopback address unless users_file says who may call",
        ),
        (
            "socks5:\n  tcp: {listen: \"[::]:1080\", allow_remote: true}",
            "2:30: socks5.tcp.allow_remote: unknown field",
        ),
        ("proxy_urls: {}", "1:13: proxy_urls: has no listener: give it unix, tcp or both"),
        (
            "proxy_urls:\n  tcp: {listen: 10.0.0.1:8130}",
            "2:17: proxy_urls.tcp.listen: 10.0.0.1:8130 has no authentication, so it must be a loopback address",
        ),
        (
            "proxy_urls:\n  tcp: {}\n  kubelet_client_cert: a",
            "1:1: proxy_urls: kubelet_client_cert and kubelet_client_key go together: give both or none",
        ),
        (
            "proxy_urls: {tcp: {}, insecure_skip_verify: [all]}",
            "1:46: proxy_urls.insecure_skip_verify[0]: \"all\": expected kubelet or targets",
        ),
        (
            "front_end: {certificates: [], upstream: {servers: ['http://10.0.0.1:8080'], ca: c}}",
            "1:27: front_end.certificates: needs at least one {cert: FILE, key: FILE}",
        ),
        (
            "front_end: {certificates: [{cert: a, key: b}], upstream: {servers: ['http://10.0.0.1:8080']}}",
            "1:69: front_end.upstream.servers[0]: \"http://10.0.0.1:8080\": must be https://",
        ),
        (
            "front_end: {certificates: [{cert: a, key: b}], upstream: {servers: ['https://a']}}",
            "1:48: front_end.upstream.ca: is required for https:// servers",
        ),
        (
            "front_end: {certificates: [{cert: a, key: b}], serve_proxy_urls: true, upstream: {servers: ['http://[::1]:1']}}",
            "1:12: front_end: serve_proxy_urls needs a section proxy_urls",
        ),
        ("front_end: {certificates: [{cert: a, key: b}]}", "1:1: front_end.upstream: is required"),
        (
            "front_end: {certificates: [{cert: a, key: b}], authentication: [{bootstrap_tokens: {cluster: true}}], upstream: {servers: ['http://[::1]:1']}}",
            "1:12: front_end: bootstrap_tokens with cluster: true needs a section kubernetes",
        ),
        (
            "front_end: {certificates: [{cert: a, key: b}], upstream: {servers: ['http://[::1]:1']}, local: {tcp: {listen: 0.0.0.0:8080}, user: u}}",
            "1:111: front_end.local.tcp.listen: 0.0.0.0:8080 has no authentication, so it must be a loopback address",
        ),
        (
            "front_end: {certificates: [{cert: a, key: b}], upstream: {servers: ['http://[::1]:1']}, local: {tcp: {}}}",
            "1:89: front_end.local.user: is required",
        ),
        ("inventory: [a]", "1:12: inventory: expected a text, found a list"),
        (
            "shutdown_grace: 30s\nshutdown_grace: 40s",
            "2:1: \"shutdown_grace\" is given twice, first on line 1",
        ),
        ("log: {level: info", "1:6: not YAML: unclosed bracket"),
    ];
    for (text, expected) in table {
        let shown = parse(text).expect_err(text).to_string();
        let found = shown.lines().any(|line| line.starts_with(&format!("master.yaml:{expected}")));
        assert!(found, "{text}\nexpected {expected}\ngot {shown}");
    }
}

#[test]
fn every_mistake_is_shown_at_once_and_in_order() {
    let text = "\
state_dirs: /x
log: {format: xml}
http_connect:
  tls:
    listen: here
    allowed_names: kube-apiserver
  head_timeout: 5
tunnels:
  keepalive_max: many
  backoff_min: 9s
";
    let shown = parse(text).unwrap_err().to_string();
    let places: Vec<_> =
        shown.lines().map(|line| line.split(": ").take(2).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        places,
        [
            "master.yaml:1:1 state_dirs",
            "master.yaml:2:15 log.format",
            "master.yaml:4:3 http_connect.tls.cert",
            "master.yaml:4:3 http_connect.tls.key",
            "master.yaml:4:3 http_connect.tls.client_ca",
            "master.yaml:5:13 http_connect.tls.listen",
            "master.yaml:6:20 http_connect.tls.allowed_names",
            "master.yaml:7:17 http_connect.head_timeout",
            "master.yaml:9:18 tunnels.keepalive_max",
            "master.yaml:10:16 tunnels.backoff_min",
        ],
        "{shown}"
    );
}

#[test]
fn named_files_must_be_readable_valid_and_keys_private() {
    let dir = std::env::temp_dir().join(format!("master-agent-config-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let path = dir.join("master.yaml");
    fs::write(dir.join("tls.crt"), "").unwrap();
    fs::write(dir.join("tls.key"), "").unwrap();
    fs::set_permissions(dir.join("tls.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let text = "state_dir: tls.crt\nhttp_connect:\n  tls: {cert: tls.crt, key: tls.key, client_ca: .}\ninventory: gone.yaml\n";
    fs::write(&path, text).unwrap();
    let shown = Config::load(&path).unwrap_err().to_string();
    let tail = |line: &str| line.split_once("master.yaml:").unwrap().1.replace(dir.to_str().unwrap(), "");
    let lines: Vec<_> = shown.lines().map(tail).collect();
    assert_eq!(
        lines,
        [
            "1:12: state_dir: /tls.crt is not a directory",
            "3:29: http_connect.tls.key: /tls.key holds secrets and has mode 0644, open to others: chmod 600 /tls.key",
            "3:49: http_connect.tls.client_ca: /. is not a file",
            "4:12: inventory: /gone.yaml can't be read: No such file or directory (os error 2)",
        ]
    );
    fs::write(dir.join("gone.yaml"), "nodes: [{}]").unwrap();
    let shown = Config::load(&path).unwrap_err().to_string();
    assert_eq!(shown.lines().count(), 4, "{shown}");
    assert!(shown.ends_with("gone.yaml:1:9: nodes[0].name: is required"), "{shown}");
    fs::remove_file(dir.join("gone.yaml")).unwrap();
    assert!(Config::load(&dir.join("gone.yaml")).unwrap_err().to_string().contains("can't be read"));
    fs::remove_dir_all(dir).unwrap();
}
