//! The master-agent's configuration file, which composes the sections of the features. `deploy/config/master-agent.yaml`
//! shows every field.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use access::authn::ServiceAccountConfig;
use proto_config::{Errors, Field, Log, Meanings, Section, Source};
use proto_net::handover::hangup::Configuration;

use crate::{
    admin::config::AdminConfig,
    egress::config::{HttpConnectConfig, KonnectivityConfig, ProxyUrlsConfig, Socks5Config},
    fields::{DAY, NO_LISTENER, secs},
    front_end::config::FrontEndConfig,
    identity::config::CertificatesConfig,
    kubernetes::config::KubernetesConfig,
    metrics::MetricsConfig,
    routing::inventory::Inventory,
    traces::TracesConfig,
    tunnels::config::{CallHomeConfig, TunnelsConfig},
};

/// A valid configuration, with its defaults filled in and its paths usable from the working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The directory of the certificate authorities' keys and the store.
    pub state_dir: PathBuf,
    pub log: Log,
    pub admin: AdminConfig,
    pub http_connect: HttpConnectConfig,
    pub konnectivity: KonnectivityConfig,
    /// `None` serves no SOCKS5.
    pub socks5: Option<Socks5Config>,
    /// `None` serves no proxy URLs.
    pub proxy_urls: Option<ProxyUrlsConfig>,
    /// Where nodes call home; `None` if nowhere.
    pub call_home: Option<CallHomeConfig>,
    pub tunnels: TunnelsConfig,
    pub certificates: CertificatesConfig,
    /// `None` serves no HTTPS front end.
    pub front_end: Option<FrontEndConfig>,
    /// `None` sends no traces.
    pub traces: Option<TracesConfig>,
    /// How long streams may go on after SIGTERM.
    pub shutdown_grace: Duration,
    /// How long streams may go on in a process that `reload` has replaced.
    pub drain_timeout: Duration,
    /// The file of the [`Inventory`].
    pub inventory: Option<PathBuf>,
    /// The API server whose cluster is followed; `None` if only the inventory is known.
    pub kubernetes: Option<KubernetesConfig>,
    pub metrics: MetricsConfig,
}

const FIELDS: Meanings = &[
    (
        "state_dir",
        "The directory of the certificate authorities' keys and the database. Back it up and keep it \
         private.",
    ),
    ("log", "What is logged, and how."),
    (
        "admin",
        "Health, metrics and the page over HTTP, and the socket of commands that ask the running agent.",
    ),
    (
        "http_connect",
        "The egress listener for kube-apiserver and people, which serves HTTP CONNECT. Certificates, keys \
         and CAs follow their files: changes take effect for new connections within two seconds.",
    ),
    ("konnectivity", "The egress listener for an egress selector in GRPC mode: Konnectivity's ProxyService."),
    (
        "socks5",
        "The egress listener for clients of SOCKS5 proxies. Only CONNECT is served, and nodes resolve names. \
         It needs unix, tcp or both.",
    ),
    (
        "proxy_urls",
        "The egress listener for the proxy URLs of kube-apiserver. There is no authentication: every caller \
         can do what kubelets allow this master's certificate.",
    ),
    ("call_home", "The listener for nodes that call home and hosts that join."),
    (
        "front_end",
        "The front end: the HTTPS port for calls from kubelets, pods and people to kube-apiserver.",
    ),
    ("tunnels", "The SSH tunnels to nodes."),
    ("certificates", "The SSH certificates that this master issues."),
    ("traces", "Spans of requests and streams, for an OpenTelemetry collector."),
    ("shutdown_grace", "How long streams may go on after SIGTERM."),
    ("drain_timeout", "How long streams may go on in a process that `reload` has replaced."),
    ("inventory", "The file of the static inventory, which is read again when it changes and on SIGHUP."),
    (
        "kubernetes",
        "The cluster whose nodes, pods, services and endpoints are followed. It may be an empty section: {}.",
    ),
    ("metrics", "Which optional series /metrics contains."),
];

impl Config {
    /// Reads the file and checks the files that it names. The errors are those of the configuration and of the
    /// inventory that it names.
    pub fn load(path: &Path) -> Result<Self, Errors> {
        let mut inventory = None;
        let loaded = proto_config::load(path, |s| {
            let config = Self::read(s)?;
            inventory = config.inventory.clone();
            Some(config)
        });
        // A file that cannot be opened has been reported at the line that names it.
        let inventory = inventory.filter(|path| path.is_file() && fs::File::open(path).is_ok());
        match (loaded, inventory.map(|path| Inventory::load(&path))) {
            (loaded, None | Some(Ok(_))) => loaded,
            (Ok(_), Some(Err(errors))) => Err(errors),
            (Err(errors), Some(Err(more))) => Err(errors.and(more)),
        }
    }

    /// Reads the file, and none of the files that it names.
    pub fn load_alone(path: &Path) -> Result<Self, Errors> {
        proto_config::load_alone(path, Self::read)
    }

    /// Reads a configuration from its text. Errors call the file `origin`, and paths are relative to `base_dir`. The files
    /// that it names need not exist.
    pub fn parse(text: &str, origin: &str, base_dir: &Path) -> Result<Self, Errors> {
        proto_config::parse(text, Source { origin, base_dir, check_files: false }, Self::read)
    }

    /// Whether nodes call home, and hosts join, over the front end's port.
    pub fn calls_over_https(&self) -> bool {
        let home = self.call_home.is_some();
        self.front_end.as_ref().is_some_and(|front_end| front_end.call_home.unwrap_or(home))
    }

    /// Whether a token of a service account is valid only while the objects exist that it is bound to.
    pub fn checks_bound_objects(&self) -> bool {
        let checks = |one: &ServiceAccountConfig| one.check_bound_objects.unwrap_or(true);
        self.kubernetes.is_some() && self.has_service_account(checks)
    }

    /// Notes for the operator about a valid configuration.
    pub fn notes(&self) -> Vec<&'static str> {
        if self.kubernetes.is_none() && self.has_service_account(|_| true) {
            return vec![NO_CLUSTER];
        }
        if self.has_service_account(|one| one.check_bound_objects == Some(false)) {
            return vec![NOT_CHECKED];
        }
        Vec::new()
    }

    /// Every field of the file.
    pub fn describe() -> Vec<Field> {
        proto_config::describe(Self::read)
    }

    fn read(s: &Section<'_>) -> Option<Self> {
        s.document(FIELDS);
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
            drain_timeout: s.duration("drain_timeout", secs(3600), Duration::ZERO..=7 * DAY),
            inventory: s.file("inventory"),
            kubernetes: s.section("kubernetes", |s| Some(KubernetesConfig::read(s))),
            metrics: s.section_or_default("metrics", MetricsConfig::read),
        };
        config.check_cluster(s);
        config.check_proxy_urls(s);
        Some(config)
    }

    /// Reports what the front end wants of a cluster that is not configured.
    fn check_cluster(&self, s: &Section<'_>) {
        let needs_cluster = self.front_end.as_ref().is_some_and(|front_end| front_end.authn.needs_cluster());
        if needs_cluster && s.at("kubernetes").is_none() {
            let message =
                "bootstrap_tokens with cluster: true needs a section kubernetes, which may be empty: {}";
            s.error("front_end", message);
        }
        if self.kubernetes.is_none() && self.has_service_account(|one| one.check_bound_objects == Some(true))
        {
            let message =
                "check_bound_objects: true needs a section kubernetes, which names the API server to ask";
            s.error("front_end", message);
        }
    }

    /// Reports proxy URLs that nobody serves, and a front end that has none to serve.
    fn check_proxy_urls(&self, s: &Section<'_>) {
        let through_front_end = self.front_end.as_ref().is_some_and(|f| f.serve_proxy_urls);
        match &self.proxy_urls {
            Some(urls) if urls.unix.is_none() && urls.tcp.is_none() && !through_front_end => {
                s.error("proxy_urls", NO_LISTENER);
            }
            None if through_front_end => {
                s.error("front_end", "serve_proxy_urls needs a section proxy_urls, which may be empty: {}");
            }
            Some(_) | None => {}
        }
    }

    fn has_service_account(&self, that: impl Fn(&ServiceAccountConfig) -> bool) -> bool {
        self.front_end.as_ref().is_some_and(|front_end| front_end.authn.service_accounts().any(that))
    }
}

/// Notes for the operator.
const NO_CLUSTER: &str = "tokens of service accounts are accepted until they expire, even if the account, pod, node or \
    Secret that they are bound to has been deleted; a section kubernetes makes the agent check this";
const NOT_CHECKED: &str = "check_bound_objects: false: tokens of service accounts are accepted until they expire, even if \
    the account, pod, node or Secret that they are bound to has been deleted";

impl Configuration for Config {
    fn load(file: &Path) -> Result<Self, Errors> {
        proto_config::load(file, Self::read)
    }

    fn differences(&self, other: &Self) -> Vec<&'static str> {
        let Self {
            state_dir,
            log,
            admin,
            http_connect,
            konnectivity,
            socks5,
            proxy_urls,
            call_home,
            tunnels,
            certificates,
            front_end,
            traces,
            shutdown_grace,
            drain_timeout,
            inventory,
            kubernetes,
            metrics,
        } = self;
        let same = [
            ("state_dir", *state_dir == other.state_dir),
            ("log", *log == other.log),
            ("admin", *admin == other.admin),
            ("http_connect", *http_connect == other.http_connect),
            ("konnectivity", *konnectivity == other.konnectivity),
            ("socks5", *socks5 == other.socks5),
            ("proxy_urls", *proxy_urls == other.proxy_urls),
            ("call_home", *call_home == other.call_home),
            ("tunnels", *tunnels == other.tunnels),
            ("certificates", *certificates == other.certificates),
            ("front_end", *front_end == other.front_end),
            ("traces", *traces == other.traces),
            ("shutdown_grace", *shutdown_grace == other.shutdown_grace),
            ("drain_timeout", *drain_timeout == other.drain_timeout),
            ("inventory", *inventory == other.inventory),
            ("kubernetes", *kubernetes == other.kubernetes),
            ("metrics", *metrics == other.metrics),
        ];
        same.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
    }
}

#[cfg(test)]
mod tests;
