//! The master-agent's configuration file. `deploy/config/master-agent.yaml` shows every field.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use proto::{
    Host, Target,
    config::{self, At, Errors, Log, Mode, Section, Source, Value},
};

use crate::{
    front_end::{authn::ServiceAccountConfig, config::FrontEndConfig},
    inventory::{DEFAULT_USER, HostTrust, Inventory, InventoryNode, front_end_listen, login_name},
    routing::cluster::Node,
    traces::TracesConfig,
};

/// A configuration without mistakes, its defaults filled in and its paths usable from the working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The certificate authorities' keys and the store.
    pub state_dir: PathBuf,
    pub log: Log,
    pub admin: AdminConfig,
    pub http_connect: HttpConnectConfig,
    pub konnectivity: KonnectivityConfig,
    /// `None` serves no SOCKS5.
    pub socks5: Option<Socks5Config>,
    /// `None` serves no proxy URLs.
    pub proxy_urls: Option<ProxyUrlsConfig>,
    /// Where nodes call home; `None` accepts none.
    pub call_home: Option<CallHomeConfig>,
    pub tunnels: TunnelsConfig,
    pub certificates: CertificatesConfig,
    /// `None` serves no HTTPS front end.
    pub front_end: Option<FrontEndConfig>,
    /// `None` keeps no traces.
    pub traces: Option<TracesConfig>,
    /// How long streams may go on after SIGTERM.
    pub shutdown_grace: Duration,
    /// The file of [`crate::inventory::Inventory`].
    pub inventory: Option<PathBuf>,
    /// The API server whose cluster is followed; `None` knows the inventory only.
    pub kubernetes: Option<KubernetesConfig>,
    pub metrics: MetricsConfig,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Serve some series of each node.
    pub per_node: bool,
    /// Also serve the names of a Konnectivity server.
    pub konnectivity_names: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesConfig {
    /// `None` uses the service account of the pod that this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// What cluster DNS appends to the names of services.
    pub cluster_domain: String,
    /// After how long without a word from the API server the agent is not ready any more.
    pub stale_after: Duration,
    /// Also serve the metrics, and name the health check, as kube-apiserver's own SSH tunneler did.
    pub legacy_names: bool,
    /// How nodes are reached that the inventory does not have; `None` leaves them alone.
    pub nodes: Option<WatchedNodes>,
}

/// What every Node of the cluster is taken for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchedNodes {
    /// The port of their SSH server; `None` for nodes that call home.
    pub dial_port: Option<u16>,
    pub user: String,
    /// A private key to log in with, in place of the master's certificate.
    pub key_file: Option<PathBuf>,
    pub connections: usize,
    pub trust: HostTrust,
    /// Where their sshd is to listen for callers of the front end; `None` for node-agents.
    pub front_end_listen: Option<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    /// Health and metrics, for scrapers. Loopback unless the file says `allow_remote: true`.
    pub listen: SocketAddr,
    /// Also the page, for whoever has `master-agent page` print a login.
    pub page: bool,
    /// What the command line talks to.
    pub socket: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpConnectConfig {
    pub unix: Option<UnixConfig>,
    pub tls: Option<TlsConfig>,
    /// How long a caller may take to send its request's head.
    pub head_timeout: Duration,
    /// After one direction of a stream has ended, how long the other may be silent.
    pub half_closed_timeout: Duration,
    /// Callers at once, over both listeners.
    pub max_connections: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KonnectivityConfig {
    pub unix: Option<UnixConfig>,
    pub tls: Option<TlsConfig>,
    /// How long a caller may take until its first gRPC call.
    pub head_timeout: Duration,
    /// HTTP/2 connections at once on each of the listeners.
    pub max_connections: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socks5Config {
    pub unix: Option<UnixConfig>,
    pub tcp: Option<Socks5TcpConfig>,
    /// How long a caller may take for the handshake.
    pub head_timeout: Duration,
    pub half_closed_timeout: Duration,
    /// Callers at once on each of the two.
    pub max_connections: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socks5TcpConfig {
    /// A loopback address, unless there is a users file.
    pub listen: SocketAddr,
    /// The file of [`crate::front_door::socks5::Users`].
    pub users_file: Option<PathBuf>,
}

/// Front door for apiserver-style proxy URLs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyUrlsConfig {
    pub unix: Option<UnixConfig>,
    /// A loopback address.
    pub tcp: Option<SocketAddr>,
    /// The CA of kubelets' serving certificates.
    pub kubelet_ca: Option<PathBuf>,
    /// The certificate that kubelets are shown, and its key.
    pub kubelet_client: Option<(PathBuf, PathBuf)>,
    /// The CA of certificates of pods, services and other ports of nodes.
    pub target_ca: Option<PathBuf>,
    pub insecure_skip_verify: Vec<Unverified>,
    /// How long a caller may take to send a request's head.
    pub head_timeout: Duration,
    /// How long a connection may wait for its next request.
    pub idle_timeout: Duration,
    pub half_closed_timeout: Duration,
    /// Callers at once on each of the two.
    pub max_connections: usize,
}

/// Whose certificates are not verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unverified {
    Kubelet,
    Targets,
}

impl Value for Unverified {
    fn read(at: &At<'_>) -> Option<Self> {
        match at.text()? {
            "kubelet" => Some(Self::Kubelet),
            "targets" => Some(Self::Targets),
            other => at.complain(other, "expected kubelet or targets"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixConfig {
    pub path: PathBuf,
    pub mode: u32,
    /// Numeric user of the socket file; `None` leaves it to the process.
    pub owner: Option<u32>,
    /// Numeric group of the socket file; `None` leaves it to the process.
    pub group: Option<u32>,
}

/// TLS that asks every caller for a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    pub listen: SocketAddr,
    pub cert: PathBuf,
    pub key: PathBuf,
    pub client_ca: PathBuf,
    /// Common names or subject alternative names that may call; empty allows every certificate of `client_ca`.
    pub allowed_names: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallHomeConfig {
    pub listen: SocketAddr,
    /// Connections at once that have not authenticated yet.
    pub max_handshakes: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelsConfig {
    pub keepalive_interval: Duration,
    /// Unanswered keep-alives after which a tunnel is dead.
    pub keepalive_max: usize,
    pub handshake_timeout: Duration,
    /// Between key exchanges of a tunnel.
    pub rekey_interval: Duration,
    /// For opening one stream, from the caller's request to the target's answer.
    pub dial_timeout: Duration,
    pub max_streams_per_tunnel: usize,
    pub max_streams_per_node: usize,
    pub backoff_min: Duration,
    pub backoff_max: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificatesConfig {
    /// Life of the master's own SSH user certificates.
    pub user_ttl: Duration,
    /// Life of nodes' host certificates.
    pub host_ttl: Duration,
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// For waits: long enough for any network, and no accidental month.
pub(crate) const WAIT: RangeInclusive<Duration> = Duration::from_millis(10)..=DAY;
pub(crate) const COUNT: RangeInclusive<usize> = 1..=1_000_000;

impl Config {
    /// Reads the file and checks the files that it names. The errors are those of the configuration and of the
    /// inventory that it names.
    pub fn load(path: &Path) -> Result<Self, Errors> {
        let mut inventory = None;
        let loaded = config::load(path, |s| {
            let config = Self::read(s)?;
            inventory = config.inventory.clone();
            Some(config)
        });
        // What can't be opened has been reported at the line that names it.
        let inventory = inventory.filter(|path| path.is_file() && fs::File::open(path).is_ok());
        match (loaded, inventory.map(|path| Inventory::load(&path))) {
            (loaded, None | Some(Ok(_))) => loaded,
            (Ok(_), Some(Err(errors))) => Err(errors),
            (Err(errors), Some(Err(more))) => Err(errors.and(more)),
        }
    }

    /// Reads the file and none that it names.
    pub fn load_alone(path: &Path) -> Result<Self, Errors> {
        config::load_alone(path, Self::read)
    }

    /// Reads a configuration from its text, shown in errors as the file `origin`, with paths relative to
    /// `base_dir`. The files that it names need not exist.
    pub fn parse(text: &str, origin: &str, base_dir: &Path) -> Result<Self, Errors> {
        config::parse(text, Source { origin, base_dir, check_files: false }, Self::read)
    }

    /// Whether nodes call home, and hosts join, over the front end's port.
    pub fn calls_over_https(&self) -> bool {
        let home = self.call_home.is_some();
        self.front_end.as_ref().is_some_and(|front_end| front_end.call_home.unwrap_or(home))
    }

    /// Whether tokens of service accounts are good only while what they are bound to exists.
    pub fn checks_bound_objects(&self) -> bool {
        let checks = |front_end: &FrontEndConfig| {
            front_end.authn.service_accounts().any(|one| one.check_bound_objects.unwrap_or(true))
        };
        self.kubernetes.is_some() && self.front_end.as_ref().is_some_and(checks)
    }

    /// Notes for the operator about a configuration that has no errors.
    pub fn notes(&self) -> Vec<&'static str> {
        let authn = self.front_end.as_ref().map(|front_end| &front_end.authn);
        let unchecked =
            |one: &ServiceAccountConfig| self.kubernetes.is_none() || one.check_bound_objects == Some(false);
        let mut notes = Vec::new();
        if authn.is_some_and(|authn| authn.service_accounts().any(unchecked)) {
            notes.push(if self.kubernetes.is_none() { NO_CLUSTER } else { NOT_CHECKED });
        }
        notes
    }

    fn read(s: &Section<'_>) -> Option<Self> {
        let config = Self {
            state_dir: s.directory("state_dir", "/var/lib/master-agent"),
            log: s.section_or_default("log", Log::read),
            admin: s.section_or_default("admin", AdminConfig::read),
            http_connect: s.section_or_default("http_connect", HttpConnectConfig::read),
            konnectivity: s.section_or_default("konnectivity", KonnectivityConfig::read),
            socks5: s.section("socks5", Socks5Config::read),
            proxy_urls: s.section("proxy_urls", ProxyUrlsConfig::read),
            call_home: s.section("call_home", |s| Some(CallHomeConfig::read(s))),
            front_end: s.section("front_end", FrontEndConfig::read),
            tunnels: s.section_or_default("tunnels", TunnelsConfig::read),
            certificates: s.section_or_default("certificates", CertificatesConfig::read),
            traces: s.section("traces", TracesConfig::read),
            shutdown_grace: s.duration("shutdown_grace", secs(30), Duration::ZERO..=DAY),
            inventory: s.file("inventory"),
            kubernetes: s.section("kubernetes", |s| Some(KubernetesConfig::read(s))),
            metrics: s.section_or_default("metrics", MetricsConfig::read),
        };
        if config.front_end.as_ref().is_some_and(|f| f.authn.needs_cluster()) && s.at("kubernetes").is_none()
        {
            let message =
                "bootstrap_tokens with cluster: true needs a section kubernetes, which may be empty: {}";
            s.error("front_end", message);
        }
        let through_front_end = config.front_end.as_ref().is_some_and(|f| f.serve_proxy_urls);
        match &config.proxy_urls {
            Some(urls) if urls.unix.is_none() && urls.tcp.is_none() && !through_front_end => {
                s.error("proxy_urls", NO_LISTENER);
            }
            None if through_front_end => {
                s.error("front_end", "serve_proxy_urls needs a section proxy_urls, which may be empty: {}");
            }
            Some(_) | None => {}
        }
        let wanted =
            |f: &FrontEndConfig| f.authn.service_accounts().any(|one| one.check_bound_objects == Some(true));
        if config.kubernetes.is_none() && config.front_end.as_ref().is_some_and(wanted) {
            s.error(
                "front_end",
                "check_bound_objects: true needs a section kubernetes, which says whom to ask",
            );
        }
        Some(config)
    }
}

/// Notes of the configuration.
const NO_CLUSTER: &str = "tokens of service accounts are accepted until they expire, also when the account, pod, node or \
    Secret that they are bound to has been deleted: with a section kubernetes this is checked";
const NOT_CHECKED: &str = "check_bound_objects: false: tokens of service accounts are accepted until they expire, also when \
    the account, pod, node or Secret that they are bound to has been deleted";

impl MetricsConfig {
    fn read(s: &Section<'_>) -> Self {
        Self { per_node: s.or("per_node", true), konnectivity_names: s.or("konnectivity_names", false) }
    }
}

impl KubernetesConfig {
    fn read(s: &Section<'_>) -> Self {
        Self {
            kubeconfig: s.file("kubeconfig"),
            cluster_domain: s.or("cluster_domain", "cluster.local".to_owned()),
            stale_after: s.duration("stale_after", secs(600), WAIT),
            legacy_names: s.or("legacy_names", false),
            nodes: s.section("nodes", |s| Some(WatchedNodes::read(s))),
        }
    }
}

impl WatchedNodes {
    fn read(s: &Section<'_>) -> Self {
        let dial_port = s.number("dial_port", 22, 0..=65535);
        let dial_port = u16::try_from(dial_port).ok().filter(|port| *port > 0);
        let user = s.at("user").and_then(|at| login_name(&at)).unwrap_or_else(|| DEFAULT_USER.to_owned());
        let trust = s.section("host_keys", |s| HostTrust::read_for_all(s, dial_port.is_some()));
        if s.at("key_file").is_some() && dial_port.is_none() {
            s.error("key_file", "needs dial_port: to nodes that call home the master shows its certificate");
        }
        Self {
            dial_port,
            user,
            key_file: s.at("key_file").and_then(|_| s.required_private_file("key_file")),
            connections: s.number("connections", 1, 1..=16),
            trust: trust.unwrap_or(HostTrust::HostCa),
            front_end_listen: front_end_listen(s),
        }
    }
}

impl AdminConfig {
    fn read(s: &Section<'_>) -> Self {
        let (listen, page) = (s.listen_local("listen", loopback(9070)), s.or("page", false));
        if page && !listen.ip().to_canonical().is_loopback() {
            let message = "is for a loopback address, as nothing is encrypted there; front_end.serve_page is for others";
            s.error("page", message);
        }
        Self { listen, page, socket: s.listen_unix("socket", "/run/master-agent/admin.sock") }
    }
}

impl HttpConnectConfig {
    fn read(s: &Section<'_>) -> Self {
        Self {
            unix: s.section("unix", |s| Some(UnixConfig::read(s, "/run/master-agent-egress/connect.sock"))),
            tls: s.section("tls", |s| TlsConfig::read(s, 8131)),
            head_timeout: s.duration("head_timeout", secs(10), WAIT),
            half_closed_timeout: s.duration("half_closed_timeout", secs(600), WAIT),
            max_connections: s.number("max_connections", 16384, COUNT),
        }
    }
}

impl KonnectivityConfig {
    fn read(s: &Section<'_>) -> Self {
        Self {
            unix: s
                .section("unix", |s| Some(UnixConfig::read(s, "/run/master-agent-egress/konnectivity.sock"))),
            tls: s.section("tls", |s| TlsConfig::read(s, 8132)),
            head_timeout: s.duration("head_timeout", secs(10), WAIT),
            max_connections: s.number("max_connections", 16384, COUNT),
        }
    }
}

impl Socks5Config {
    fn read(s: &Section<'_>) -> Option<Self> {
        let config = Self {
            unix: s.section("unix", |s| Some(UnixConfig::read(s, "/run/master-agent-people/socks5.sock"))),
            tcp: s.section("tcp", |s| Some(Socks5TcpConfig::read(s))),
            head_timeout: s.duration("head_timeout", secs(10), WAIT),
            half_closed_timeout: s.duration("half_closed_timeout", secs(600), WAIT),
            max_connections: s.number("max_connections", 4096, COUNT),
        };
        if config.unix.is_none() && config.tcp.is_none() {
            s.section_error(NO_LISTENER);
        }
        Some(config)
    }
}

impl Socks5TcpConfig {
    fn read(s: &Section<'_>) -> Self {
        let default = loopback(1080);
        let listen = s.listen("listen", Some(default)).unwrap_or(default);
        let authenticated = s.at("users_file").is_some();
        if !authenticated && !listen.ip().to_canonical().is_loopback() {
            s.error("listen", format!("{listen} must be a loopback address, or users_file say who may call"));
        }
        Self { listen, users_file: s.private_file("users_file") }
    }
}

impl ProxyUrlsConfig {
    fn read(s: &Section<'_>) -> Option<Self> {
        let client_cert = s.file("kubelet_client_cert");
        let client_key = s.private_file("kubelet_client_key");
        if client_cert.is_some() != client_key.is_some() {
            s.section_error("kubelet_client_cert and kubelet_client_key go together: give both or none");
        }
        let config = Self {
            unix: s
                .section("unix", |s| Some(UnixConfig::read(s, "/run/master-agent-people/proxy-urls.sock"))),
            tcp: s.section("tcp", |s| Some(listen_loopback(s, 8130))),
            kubelet_ca: s.file("kubelet_ca"),
            kubelet_client: client_cert.zip(client_key),
            target_ca: s.file("target_ca"),
            insecure_skip_verify: s.list("insecure_skip_verify"),
            head_timeout: s.duration("head_timeout", secs(10), WAIT),
            idle_timeout: s.duration("idle_timeout", secs(120), WAIT),
            half_closed_timeout: s.duration("half_closed_timeout", secs(600), WAIT),
            max_connections: s.number("max_connections", 4096, COUNT),
        };
        Some(config)
    }
}

impl UnixConfig {
    pub(crate) fn read(s: &Section<'_>, default_path: &str) -> Self {
        Self {
            path: s.listen_unix("path", default_path),
            mode: s.or("mode", Mode(0o660)).0,
            owner: s.at("owner").and_then(|at| account(&at, "/etc/passwd", "user")),
            group: s.at("group").and_then(|at| account(&at, "/etc/group", "group")),
        }
    }
}

impl TlsConfig {
    fn read(s: &Section<'_>, default_port: u16) -> Option<Self> {
        let listen = s.listen("listen", Some(any(default_port)));
        let cert = s.required_file("cert");
        let key = s.required_private_file("key");
        let client_ca = s.required_file("client_ca");
        let allowed_names = s.list("allowed_names");
        Some(Self { listen: listen?, cert: cert?, key: key?, client_ca: client_ca?, allowed_names })
    }
}

impl CallHomeConfig {
    fn read(s: &Section<'_>) -> Self {
        let default = any(2222);
        Self {
            listen: s.listen("listen", Some(default)).unwrap_or(default),
            max_handshakes: s.number("max_handshakes", 256, COUNT),
        }
    }
}

impl TunnelsConfig {
    fn read(s: &Section<'_>) -> Self {
        let tunnels = Self {
            keepalive_interval: s.duration("keepalive_interval", secs(3), WAIT),
            keepalive_max: s.number("keepalive_max", 2, 1..=100),
            handshake_timeout: s.duration("handshake_timeout", secs(10), WAIT),
            rekey_interval: s.duration("rekey_interval", secs(3600), secs(1)..=DAY),
            dial_timeout: s.duration("dial_timeout", secs(10), WAIT),
            max_streams_per_tunnel: s.number("max_streams_per_tunnel", 8192, COUNT),
            max_streams_per_node: s.number("max_streams_per_node", 8192, COUNT),
            backoff_min: s.duration("backoff_min", Duration::from_millis(200), WAIT),
            backoff_max: s.duration("backoff_max", secs(2), WAIT),
        };
        if tunnels.backoff_min > tunnels.backoff_max {
            let show = humantime::format_duration;
            let (min, max) = (show(tunnels.backoff_min), show(tunnels.backoff_max));
            s.error("backoff_min", format!("{min} is longer than backoff_max, {max}"));
        }
        tunnels
    }
}

impl CertificatesConfig {
    fn read(s: &Section<'_>) -> Self {
        Self {
            user_ttl: s.duration("user_ttl", DAY, secs(1)..=30 * DAY),
            host_ttl: s.duration("host_ttl", 30 * DAY, secs(1)..=3660 * DAY),
        }
    }
}

impl WatchedNodes {
    /// What a Node of the cluster is as an entry of the inventory.
    pub fn node(&self, node: &Node) -> InventoryNode {
        let address = node.addresses.first().copied();
        InventoryNode {
            name: node.name.clone(),
            dial: self.dial_port.zip(address).map(|(port, address)| Target::new(Host::Addr(address), port)),
            user: self.user.clone(),
            // Routes to it come from the cluster.
            addresses: Vec::new(),
            cidrs: Vec::new(),
            default_route: false,
            connections: self.connections,
            trust: self.trust.clone(),
            key_file: self.key_file.clone(),
            front_end_listen: self.front_end_listen,
        }
    }
}

pub(crate) const NO_LISTENER: &str = "has no listener: give it unix, tcp or both";

pub(crate) fn listen_loopback(s: &Section<'_>, default_port: u16) -> SocketAddr {
    let default = loopback(default_port);
    let address = s.listen("listen", Some(default)).unwrap_or(default);
    if !address.ip().to_canonical().is_loopback() {
        s.error("listen", format!("{address} has no authentication, so it must be a loopback address"));
    }
    address
}

pub(crate) fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

pub(crate) fn any(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)
}

/// The numeric id of a user or group, given as such or by its name in `table` (passwd(5), group(5)).
fn account(at: &At<'_>, table: &str, kind: &str) -> Option<u32> {
    let text = at.text()?;
    if let Ok(id) = text.parse() {
        return Some(id);
    }
    match fs::read_to_string(table) {
        Ok(accounts) => id_of(&accounts, text)
            .or_else(|| at.complain(text, &format!("no such {kind} in {table}; a numeric id will do, too"))),
        Err(error) => {
            at.complain(text, &format!("can't look up this {kind}, {table} can't be read: {error}"))
        }
    }
}

/// Both tables have the name first and the id third.
fn id_of(accounts: &str, name: &str) -> Option<u32> {
    let id = |line: &str| {
        let mut fields = line.split(':');
        let found = fields.next() == Some(name);
        fields.nth(1).filter(|_| found)?.parse().ok()
    };
    accounts.lines().find_map(id)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proto::io::telemetry::LogFormat;

    use super::*;
    use crate::front_end::{audit::AuditConfig, https_client::ClientTls, upstream::UpstreamConfig};

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
        assert_eq!(config.konnectivity.max_connections, 16384);
        assert_eq!((&config.socks5, &config.proxy_urls), (&None, &None));
        assert_eq!((&config.call_home, &config.inventory), (&None, &None));
        assert_eq!((config.tunnels.keepalive_interval, config.tunnels.keepalive_max), (secs(3), 2));
        assert_eq!((config.tunnels.handshake_timeout, config.tunnels.dial_timeout), (secs(10), secs(10)));
        assert_eq!(
            (config.tunnels.max_streams_per_tunnel, config.tunnels.max_streams_per_node),
            (8192, 8192)
        );
        assert_eq!(config.tunnels.backoff_min, Duration::from_millis(200));
        assert_eq!(config.tunnels.backoff_max, secs(2));
        assert_eq!((config.certificates.user_ttl, config.certificates.host_ttl), (DAY, 30 * DAY));
        assert_eq!(config.shutdown_grace, secs(30));
    }

    #[test]
    fn tokens_are_checked_where_there_is_a_cluster_to_ask() {
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

    /// The sample shows the defaults, besides the sections that are off without being named.
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
            let default =
                UnixConfig { path: Path::new("/run/master-agent-people").join(path), ..default_unix() };
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
        let all =
            ["x509", "service_account", "bootstrap_tokens", "token_file", "oidc", "webhook", "anonymous"];
        assert_eq!(kinds, all);
        let text =
            "front_end: {certificates: [{cert: a, key: b}], upstream: {servers: ['http://127.0.0.1']}}";
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
        assert_eq!(
            sample.call_home.take().unwrap(),
            CallHomeConfig { listen: any(2222), max_handshakes: 256 }
        );
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
        let defaults =
            parse(&format!("traces: {{endpoint: '{}'}}", traces.endpoint)).unwrap().traces.unwrap();
        let (tls, headers_file) = (defaults.tls.clone(), defaults.headers_file.clone());
        assert_eq!(TracesConfig { tls, headers_file, ..traces }, defaults);
        assert_eq!(sample, parse("").unwrap());
    }

    fn default_unix() -> UnixConfig {
        parse("http_connect: {unix: {}}").unwrap().http_connect.unix.unwrap()
    }

    #[test]
    fn the_sample_names_every_field() {
        let sample = sample("master-agent.yaml");
        for field in [
            "state_dir",
            "log",
            "format",
            "level",
            "admin",
            "listen",
            "socket",
            "allow_remote",
            "http_connect",
            "unix",
            "path",
            "mode",
            "owner",
            "group",
            "tls",
            "cert",
            "key",
            "client_ca",
            "allowed_names",
            "head_timeout",
            "half_closed_timeout",
            "max_connections",
            "konnectivity",
            "socks5",
            "tcp",
            "users_file",
            "proxy_urls",
            "kubelet_ca",
            "kubelet_client_cert",
            "kubelet_client_key",
            "target_ca",
            "insecure_skip_verify",
            "idle_timeout",
            "front_end",
            "certificates",
            "authentication",
            "x509",
            "ca",
            "crls",
            "service_account",
            "issuers",
            "audiences",
            "key_files",
            "jwks",
            "url",
            "refresh_pause",
            "bootstrap_tokens",
            "file",
            "cluster",
            "token_file",
            "oidc",
            "issuer",
            "client_ids",
            "username_claim",
            "username_prefix",
            "groups_claim",
            "groups_prefix",
            "required_claims",
            "claim",
            "value",
            "webhook",
            "client_cert",
            "client_key",
            "timeout",
            "max_in_flight",
            "cache_size",
            "authenticated_ttl",
            "refused_ttl",
            "anonymous",
            "paths",
            "authentication_cache",
            "ttl",
            "size",
            "authorization",
            "defer_to_apiserver",
            "rbac",
            "files",
            "rules",
            "name",
            "users",
            "groups",
            "methods",
            "effect",
            "allow_ttl",
            "deny_ttl",
            "cache_entries",
            "failure_policy",
            "authorize_everything",
            "serve_proxy_urls",
            "local",
            "through_tunnels",
            "call_home",
            "max_connections_per_node",
            "upstream",
            "servers",
            "http2",
            "health_path",
            "health_interval",
            "connect_timeout",
            "max_idle",
            "max_age",
            "limits",
            "max_connections_per_address",
            "request_timeout",
            "body_timeout",
            "max_body",
            "max_in_flight_per_user",
            "queue_per_user",
            "queue_timeout",
            "max_long_running",
            "long_running_per_user",
            "requests_per_second_per_user",
            "requests_per_second_per_address",
            "failures_per_second_per_address",
            "max_streams",
            "audit",
            "max_megabytes",
            "keep",
            "queue",
            "wait",
            "call_home",
            "max_handshakes",
            "tunnels",
            "keepalive_interval",
            "keepalive_max",
            "handshake_timeout",
            "rekey_interval",
            "dial_timeout",
            "max_streams_per_tunnel",
            "max_streams_per_node",
            "backoff_min",
            "backoff_max",
            "certificates",
            "user_ttl",
            "host_ttl",
            "shutdown_grace",
            "inventory",
            "kubernetes",
            "kubeconfig",
            "cluster_domain",
            "stale_after",
            "legacy_names",
            "nodes",
            "dial_port",
            "user",
            "key_file",
            "connections",
            "host_keys",
            "front_end_listen",
        ] {
            assert!(sample.contains(&format!("{field}:")), "{field}");
        }
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
                "1:40: kubernetes.nodes.host_keys.pins: a key is one node's",
            ),
            ("kubernetes: {node: {}}", "1:14: kubernetes.node: unknown field; did you mean nodes?"),
            ("stat_dir: /x", "1:1: stat_dir: unknown field; did you mean state_dir?"),
            (
                "log:\n  level: info\n  color: true",
                "3:3: log.color: unknown field; known here: format, level",
            ),
            ("log: {format: yaml}", "1:15: log.format: \"yaml\": expected text or json"),
            ("log: {level: \"a=b=c\"}", "1:14: log.level: is no log level or filter"),
            ("log: [text]", "1:6: log: expected a section of fields, found a list"),
            ("admin:\n  listen: 9070", "2:11: admin.listen: \"9070\": expected ADDRESS:PORT"),
            (
                "admin:\n  listen: localhost:9070",
                "2:11: admin.listen: \"localhost:9070\": expected ADDRESS:PORT",
            ),
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
            (
                &format!("{tls}\"[::]:9070\"}}"),
                "2:48: http_connect.tls.listen: the same address as admin.listen",
            ),
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
            (
                "tunnels:\n  dial_timeout: 0s",
                "2:17: tunnels.dial_timeout: 0s is not in the range 10ms to 1day",
            ),
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
                "2:17: socks5.tcp.listen: 0.0.0.0:1080 must be a loopback address, or users_file say who may call",
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

    #[test]
    fn account_tables_are_read_as_passwd_and_group_are() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nkube:x:1001:1002::/:/bin/false\nbad\n";
        assert_eq!(id_of(passwd, "kube"), Some(1001));
        assert_eq!(id_of(passwd, "bad"), None);
        assert_eq!(id_of("wheel:x:10:root,kube\n", "wheel"), Some(10));
    }
}
