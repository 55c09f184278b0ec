//! The node-agent's configuration file. `deploy/config/node-agent.yaml` shows every field. Sections stand beside the
//! features that they configure; this file puts them together.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use proto::{NodeName, call_home::Master, policy};
use proto_config::{At, Errors, Field, Log, Meanings, Section, Shape, Source, Value};
use proto_net::handover::hangup::Configuration;

use crate::{
    fields::{DAY, WAIT, secs, unique},
    https::CallHomeHttps,
    local_endpoint::config::LocalEndpointConfig,
    policy::PolicyConfig,
    session::config::LimitsConfig,
};

/// A configuration without mistakes, with its defaults filled in and its paths usable from the working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `None` leaves the name to the host certificate.
    pub node: Option<NodeName>,
    /// Holds the host key, its certificate and the CAs that are trusted.
    pub state_dir: PathBuf,
    pub log: Log,
    pub admin: AdminConfig,
    /// Where masters and people may dial this node's SSH server.
    pub listen: Option<SocketAddr>,
    /// The masters that this node dials.
    pub call_home: Vec<Master>,
    /// How front ends among them are reached.
    pub call_home_https: CallHomeHttps,
    /// The node's own addresses. Empty leaves them to the host certificate, as far as this host has them.
    pub addresses: Vec<IpAddr>,
    pub policy: PolicyConfig,
    /// Login names that may forward, besides the master. Empty allows every name that a certificate lists.
    pub users: Vec<String>,
    /// `None` has no local endpoint.
    pub front_end: Option<LocalEndpointConfig>,
    pub limits: LimitsConfig,
    /// After one direction of a stream has ended, how long the other may be silent.
    pub half_closed_timeout: Duration,
    /// How long streams may go on after SIGTERM.
    pub shutdown_grace: Duration,
    /// How long streams may go on in a process that another one has replaced.
    pub drain_timeout: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    /// Health and metrics, for scrapers. Loopback unless the file says `allow_remote: true`.
    pub listen: SocketAddr,
    /// The socket that the commands use.
    pub socket: PathBuf,
}

const FIELDS: Meanings = &[
    ("node", "The node's name, as in the Kubernetes Node. By default, the name in the host certificate."),
    (
        "state_dir",
        "The directory of the host key, its certificate and the trusted CAs, which `node-agent join` fills.",
    ),
    ("log", "What is logged, and how."),
    ("admin", "Health and metrics, over HTTP."),
    (
        "listen",
        "The address that masters, and people with a certificate, dial. A port below 1024 needs \
         deploy/systemd/privileged-port.conf. This or call_home is required.",
    ),
    ("call_home", "The masters that this node dials: HOST:PORT, or https://HOST[:PORT] for a front end."),
    (
        "call_home_https",
        "How to reach the front ends (https://) in call_home. The files are read again for every link.",
    ),
    (
        "addresses",
        "The node's own addresses. By default, those in the host certificate that an interface of this host \
         has. List them if the host is behind NAT, or if the kubelet listens on loopback only. \
         Addresses in other closed ranges never count.",
    ),
    ("policy", "What may be reached through this node. Everything else is refused."),
    (
        "users",
        "Login names that may use `ssh -L` and `ssh -W`, besides the master. An empty list allows every login \
         name in a valid certificate.",
    ),
    (
        "front_end",
        "The local endpoint, at which callers on this node (the kubelet, pods) reach a master's front end \
         through the tunnel. TLS goes through from end to end.",
    ),
    ("limits", "What sessions and their streams may use."),
    ("half_closed_timeout", "How long a stream may be silent after one direction has ended."),
    ("shutdown_grace", "How long streams may go on after SIGTERM."),
    ("drain_timeout", "How long streams may go on in a process that `reload` has replaced."),
];

impl Config {
    /// Reads the file and checks the files that it names.
    pub fn load(path: &Path) -> Result<Self, Errors> {
        proto_config::load(path, Self::read)
    }

    /// Reads a configuration from its text. Errors show it as the file `origin`, and paths are relative to `base_dir`.
    /// The files that it names need not exist.
    pub fn parse(text: &str, origin: &str, base_dir: &Path) -> Result<Self, Errors> {
        proto_config::parse(text, Source { origin, base_dir, check_files: false }, Self::read)
    }

    /// Every field of the file.
    pub fn describe() -> Vec<Field> {
        proto_config::describe(Self::read)
    }

    fn read(s: &Section<'_>) -> Option<Self> {
        s.document(FIELDS);
        let config = Self {
            node: s.optional("node"),
            state_dir: s.directory("state_dir", "/var/lib/node-agent"),
            log: s.section_or_default("log", Log::read),
            admin: s.section_or_default("admin", AdminConfig::read),
            listen: s.optional_listen("listen"),
            call_home: unique(s, "call_home"),
            call_home_https: s.section("call_home_https", CallHomeHttps::read).unwrap_or_default(),
            addresses: unique(s, "addresses").into_iter().map(|OwnAddress(address)| address).collect(),
            policy: s.section_or_default("policy", PolicyConfig::read),
            users: unique(s, "users"),
            front_end: s.section("front_end", LocalEndpointConfig::read),
            limits: s.section_or_default("limits", LimitsConfig::read),
            half_closed_timeout: s.duration("half_closed_timeout", secs(600), WAIT),
            shutdown_grace: s.duration("shutdown_grace", secs(30), Duration::ZERO..=DAY),
            drain_timeout: s.duration("drain_timeout", secs(3600), Duration::ZERO..=7 * DAY),
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

impl Configuration for Config {
    fn load(file: &Path) -> Result<Self, Errors> {
        proto_config::load(file, Self::read)
    }

    fn differences(&self, other: &Self) -> Vec<&'static str> {
        let Self {
            node,
            state_dir,
            log,
            admin,
            listen,
            call_home,
            call_home_https,
            addresses,
            policy,
            users,
            front_end,
            limits,
            half_closed_timeout,
            shutdown_grace,
            drain_timeout,
        } = self;
        let same = [
            ("node", *node == other.node),
            ("state_dir", *state_dir == other.state_dir),
            ("log", *log == other.log),
            ("admin", *admin == other.admin),
            ("listen", *listen == other.listen),
            ("call_home", *call_home == other.call_home),
            ("call_home_https", *call_home_https == other.call_home_https),
            ("addresses", *addresses == other.addresses),
            ("policy", *policy == other.policy),
            ("users", *users == other.users),
            ("front_end", *front_end == other.front_end),
            ("limits", *limits == other.limits),
            ("half_closed_timeout", *half_closed_timeout == other.half_closed_timeout),
            ("shutdown_grace", *shutdown_grace == other.shutdown_grace),
            ("drain_timeout", *drain_timeout == other.drain_timeout),
        ];
        same.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
    }
}

const ADMIN_FIELDS: Meanings = &[
    ("listen", "The address of /livez, /readyz and /metrics."),
    ("allow_remote", "Permits a listen address that is not loopback. Callers are not authenticated."),
    ("socket", "The socket for `reload`, which asks the running agent. Its mode is 0600."),
];

impl AdminConfig {
    fn read(s: &Section<'_>) -> Self {
        s.document(ADMIN_FIELDS);
        let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9071);
        Self {
            listen: s.listen_local("listen", loopback),
            socket: s.listen_unix("socket", "/run/node-agent/admin.sock"),
        }
    }
}

/// An address that may be the node's own. Loopback may, for a kubelet that listens nowhere else.
#[derive(PartialEq)]
struct OwnAddress(IpAddr);

impl Value for OwnAddress {
    const SHAPE: Shape = IpAddr::SHAPE;

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

#[cfg(test)]
mod tests;
