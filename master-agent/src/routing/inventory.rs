//! The static inventory: which nodes there are, how to reach and recognise each, and what lies behind them.
//! `deploy/config/inventory.yaml` shows every field.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use ipnet::IpNet;
use proto::{NodeName, Target};
use proto_config::{At, Errors, Field, Meanings, Section, Source};
use proto_net::file_watcher::FileWatcher;

use crate::host_trust::HostTrust;

/// An inventory without contradictions: no name, address, network or pin belongs to two nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    nodes: Vec<InventoryNode>,
    service_cidrs: Vec<IpNet>,
    /// The positions in `nodes`.
    by_name: HashMap<NodeName, usize>,
    by_address: HashMap<IpAddr, usize>,
    pins: HashMap<String, NodeName>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InventoryNode {
    pub name: NodeName,
    /// Its SSH server; `None` for a node that calls home.
    pub dial: Option<Target>,
    /// The SSH user to log in as.
    pub user: String,
    pub addresses: Vec<IpAddr>,
    pub cidrs: Vec<IpNet>,
    /// Whether it takes what no other node or network claims. This holds for one node at most.
    pub default_route: bool,
    /// Tunnels to keep at once.
    pub connections: usize,
    pub trust: HostTrust,
    /// A private key to log in with, in place of the master's certificate.
    pub key_file: Option<PathBuf>,
    /// Where its sshd is to listen for callers of the master's front end.
    pub front_end_listen: Option<SocketAddr>,
}

/// The SSH user that nodes expect the master as.
pub const DEFAULT_USER: &str = "master-agent";

/// What has been claimed so far, with what an error about a second claim says of the first.
#[derive(Default)]
struct Claims {
    names: HashMap<NodeName, usize>,
    networks: HashMap<IpNet, (String, usize)>,
    pins: HashMap<String, String>,
    default_route: Option<String>,
}

const FIELDS: Meanings = &[
    ("nodes", "The nodes that the master knows, and what is reached through each."),
    ("service_cidrs", "Networks that are reached through any connected node-agent."),
];

const NODE_FIELDS: Meanings = &[
    ("name", "The name of the Kubernetes Node."),
    ("dial", "HOST:PORT of its SSH server. Without it, the node calls home."),
    ("user", "The SSH user to log in as."),
    ("addresses", "Its own addresses."),
    ("cidrs", "The networks of pods and whatever else lies behind it. The longest prefix wins."),
    ("default_route", "Targets that nothing else matches go to this node. At most one node may have it."),
    ("connections", "Tunnels to keep at once."),
    (
        "key_file",
        "A private key to log in with (Ed25519 or ECDSA, with mode 0600 or 0640). By default, the master's \
         certificate.",
    ),
    (
        "host_keys",
        "How its host key is verified: one of pins, known_hosts and first_use. By default, by a certificate \
         of the master's host CA.",
    ),
    (
        "front_end_listen",
        "For a plain sshd, ADDRESS:PORT, with a port from 1024, where it listens for callers of the front \
         end.",
    ),
];

const HOST_KEYS_FIELDS: Meanings = &[
    ("pins", "Fingerprints of host keys that are accepted, as `ssh-keygen -l` prints them."),
    ("known_hosts", "A file as ssh(1) keeps it. This needs dial."),
    ("first_use", "Remembers the first key that is seen, and refuses every other one. This needs dial."),
];

const HOST_KEYS_FOR_ALL_FIELDS: Meanings = &[
    ("known_hosts", "A file as ssh(1) keeps it. This needs dial_port."),
    ("first_use", "Remembers the first key that is seen, and refuses every other one. This needs dial_port."),
];

impl Inventory {
    /// If several nodes have the same name, address or pin, the first one has it.
    pub fn new(nodes: Vec<InventoryNode>, service_cidrs: Vec<IpNet>) -> Self {
        let mut inventory = Self { service_cidrs, ..Self::default() };
        inventory.extend(nodes);
        inventory
    }

    /// Appends nodes.
    pub fn extend(&mut self, nodes: impl IntoIterator<Item = InventoryNode>) {
        for node in nodes {
            let at = self.nodes.len();
            self.by_name.entry(node.name.clone()).or_insert(at);
            for address in &node.addresses {
                self.by_address.entry(*address).or_insert(at);
            }
            if let HostTrust::Pins(pins) = &node.trust {
                for pin in pins {
                    self.pins.entry(pin.clone()).or_insert_with(|| node.name.clone());
                }
            }
            self.nodes.push(node);
        }
    }

    pub fn nodes(&self) -> &[InventoryNode] {
        &self.nodes
    }

    /// Networks that are reached through any node.
    pub fn service_cidrs(&self) -> &[IpNet] {
        &self.service_cidrs
    }

    pub fn node(&self, name: &NodeName) -> Option<&InventoryNode> {
        self.nodes.get(*self.by_name.get(name)?)
    }

    pub fn node_with_address(&self, address: &IpAddr) -> Option<&InventoryNode> {
        self.nodes.get(*self.by_address.get(address)?)
    }

    /// The fingerprints of pinned host keys, each with its node.
    pub fn pins(&self) -> &HashMap<String, NodeName> {
        &self.pins
    }

    /// Reads the file for the first time, to be read again when it changes. This blocks.
    pub fn watch(path: PathBuf) -> anyhow::Result<Arc<FileWatcher<Self>>> {
        FileWatcher::load("the inventory", vec![path.clone()], move || Ok(Self::load(&path)?))
    }

    /// Reads the file and checks the files that it names.
    pub fn load(path: &Path) -> Result<Self, Errors> {
        proto_config::load(path, Self::read)
    }

    /// Reads an inventory from its text. Errors call it `origin`; paths are relative to `base_dir`. The files that it
    /// names need not exist.
    pub fn parse(text: &str, origin: &str, base_dir: &Path) -> Result<Self, Errors> {
        proto_config::parse(text, Source { origin, base_dir, check_files: false }, Self::read)
    }

    /// Every field of the file.
    pub fn describe() -> Vec<Field> {
        proto_config::describe(Self::read)
    }

    fn read(s: &Section<'_>) -> Option<Self> {
        s.document(FIELDS);
        let mut claims = Claims::default();
        let nodes = s.items("nodes");
        let nodes =
            nodes.iter().filter_map(|at| at.section(|s| InventoryNode::read(s, &mut claims))).collect();
        let service_cidrs = claims.networks(s, "service_cidrs", "service_cidrs");
        Some(Self::new(nodes, service_cidrs))
    }
}

impl InventoryNode {
    fn read(s: &Section<'_>, claims: &mut Claims) -> Option<Self> {
        s.document(NODE_FIELDS);
        let name = s.required_at("name").and_then(|at| claims.name(&at));
        let owner = match &name {
            Some(name) => format!("node {name}"),
            None => "a node".to_owned(),
        };
        let dial = s.optional("dial");
        let user = login_user(s);
        let addresses = s.items("addresses");
        let addresses = addresses.iter().filter_map(|at| claims.address(at, &owner)).collect();
        let cidrs = claims.networks(s, "cidrs", &owner);
        let default_route = s.or("default_route", false);
        if default_route {
            match &claims.default_route {
                Some(other) => s.error("default_route", format!("{other} is the default route already")),
                None => claims.default_route = Some(owner.clone()),
            }
        }
        let connections = s.number("connections", 1, 1..=16);
        let trust = s.section("host_keys", |s| HostTrust::read(s, dial.is_some(), &owner, claims));
        let trust = trust.unwrap_or(HostTrust::HostCa);
        let key_file = s.private_file("key_file");
        if key_file.is_some() && dial.is_none() {
            s.error("key_file", "needs dial: to a node that calls home the master shows its certificate");
        }
        let front_end_listen = front_end_listen(s);
        let name = name?;
        Some(Self {
            name,
            dial,
            user,
            addresses,
            cidrs,
            default_route,
            connections,
            trust,
            key_file,
            front_end_listen,
        })
    }
}

impl HostTrust {
    fn read(s: &Section<'_>, dialled: bool, owner: &str, claims: &mut Claims) -> Option<Self> {
        s.document(HOST_KEYS_FIELDS);
        let pins = s.at("pins").map(|at| {
            let items = at.items();
            if items.is_empty() {
                s.error("pins", "is empty, so no key would be accepted");
            }
            items.iter().filter_map(|at| claims.pin(at, owner)).collect()
        });
        Self::read_rest(s, pins, (!dialled).then_some("dial"))
    }

    /// Reads what holds for all nodes of a cluster, which can't share a pin.
    pub fn read_for_all(s: &Section<'_>, dialled: bool) -> Option<Self> {
        s.document(HOST_KEYS_FOR_ALL_FIELDS);
        Self::read_rest(s, None, (!dialled).then_some("dial_port"))
    }

    /// `missing` is the field that says how to dial, where nodes call home.
    fn read_rest(s: &Section<'_>, pins: Option<Vec<String>>, missing: Option<&str>) -> Option<Self> {
        let known_hosts = s.at("known_hosts").map(|_| s.file("known_hosts"));
        let first_use = s.or("first_use", false);
        for (field, given) in [("known_hosts", known_hosts.is_some()), ("first_use", first_use)] {
            if let Some(missing) = missing.filter(|_| given) {
                let why = "a node that calls home is recognised by a certificate or by a pin";
                s.error(field, format!("needs {missing}: {why}"));
            }
        }
        match (pins, known_hosts, first_use) {
            (None, None, false) => Some(Self::HostCa),
            (Some(pins), None, false) => Some(Self::Pins(pins)),
            (None, Some(known_hosts), false) => known_hosts.map(Self::KnownHosts),
            (None, None, true) => Some(Self::FirstUse),
            (Some(_), Some(_), _) | (Some(_), _, true) | (_, Some(_), true) => {
                s.section_error("pins, known_hosts and first_use exclude each other: give one");
                None
            }
        }
    }
}

impl Claims {
    fn name(&mut self, at: &At<'_>) -> Option<NodeName> {
        let name: NodeName = at.read()?;
        match self.names.entry(name.clone()) {
            Entry::Occupied(first) => {
                at.error(format!("there is a node {name} already, on line {}", first.get()));
                None
            }
            Entry::Vacant(free) => {
                free.insert(at.line());
                Some(name)
            }
        }
    }

    fn address(&mut self, at: &At<'_>, owner: &str) -> Option<IpAddr> {
        let address: IpAddr = at.read()?;
        if address.is_unspecified() || address.is_multicast() {
            at.error(format!("{address} is no address of a host"));
        }
        self.network(at, IpNet::from(address), owner, &address.to_string());
        Some(address)
    }

    fn networks(&mut self, s: &Section<'_>, name: &'static str, owner: &str) -> Vec<IpNet> {
        let read = |at: &At<'_>| {
            let net: IpNet = at.read()?;
            self.network(at, net, owner, &net.to_string());
            Some(net)
        };
        s.items(name).iter().filter_map(read).collect()
    }

    /// Networks of different lengths may overlap: the longest prefix decides.
    fn network(&mut self, at: &At<'_>, net: IpNet, owner: &str, shown: &str) {
        match self.networks.entry(net) {
            Entry::Occupied(first) => {
                let (other, line) = first.get();
                at.error(format!("{shown} is listed already, for {other} on line {line}"));
            }
            Entry::Vacant(free) => {
                free.insert((owner.to_owned(), at.line()));
            }
        }
    }

    fn pin(&mut self, at: &At<'_>, owner: &str) -> Option<String> {
        let text = at.text()?;
        let base64 = |c: u8| c.is_ascii_alphanumeric() || c == b'+' || c == b'/';
        let well_formed =
            text.strip_prefix("SHA256:").is_some_and(|hash| hash.len() == 43 && hash.bytes().all(base64));
        if !well_formed {
            return at.complain(
                text,
                "expected SHA256: and 43 base64 characters, as ssh-keygen -l -f HOSTKEY.pub prints",
            );
        }
        match self.pins.entry(text.to_owned()) {
            Entry::Occupied(first) => at.error(format!("is listed already, for {}", first.get())),
            Entry::Vacant(free) => {
                free.insert(owner.to_owned());
            }
        }
        Some(text.to_owned())
    }
}

/// An address that a plain sshd can be asked to listen on.
pub fn front_end_listen(s: &Section<'_>) -> Option<SocketAddr> {
    let address: SocketAddr = s.optional("front_end_listen")?;
    if address.ip().is_unspecified() || address.ip().is_multicast() {
        s.error("front_end_listen", format!("{address}: give the one address that callers on the node use"));
    }
    if address.port() < 1024 {
        s.error("front_end_listen", format!("{address}: sshd lets nobody but root listen below port 1024"));
    }
    Some(address)
}

/// The SSH user of a node or of all nodes of a cluster.
pub fn login_user(s: &Section<'_>) -> String {
    let user = s.at("user").and_then(|at| login_name(&at));
    s.states_default("user", DEFAULT_USER);
    user.unwrap_or_else(|| DEFAULT_USER.to_owned())
}

fn login_name(at: &At<'_>) -> Option<String> {
    let text = at.text()?;
    let allowed = |c: char| c.is_ascii_graphic() && !matches!(c, ':' | '/' | '"' | '\'' | '\\');
    if text.is_empty() || text.len() > 64 || text.starts_with('-') || !text.chars().all(allowed) {
        return at.complain(text, "is not a user name");
    }
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIN: &str = "SHA256:jDvYqkuiVBuJYzQPVwlVyZTdIAbEPi9vmP4kq1pPkW8";

    fn parse(text: &str) -> Result<Inventory, Errors> {
        Inventory::parse(text, "inventory.yaml", Path::new("/etc/master-agent"))
    }

    #[test]
    fn a_node_needs_only_a_name() {
        let inventory = parse("nodes:\n- name: n1\n").unwrap();
        let expected = InventoryNode {
            name: "n1".parse().unwrap(),
            dial: None,
            user: "master-agent".into(),
            addresses: vec![],
            cidrs: vec![],
            default_route: false,
            connections: 1,
            trust: HostTrust::HostCa,
            key_file: None,
            front_end_listen: None,
        };
        assert_eq!(inventory, Inventory::new(vec![expected], vec![]));
        assert_eq!(parse("").unwrap(), Inventory::default());
    }

    #[test]
    fn every_kind_of_trust_can_be_written() {
        let trust = |host_keys: &str| {
            let text = format!("nodes: [{{name: n1, dial: \"n1.example:22\", host_keys: {host_keys}}}]");
            parse(&text).unwrap().nodes()[0].trust.clone()
        };
        assert_eq!(trust("{}"), HostTrust::HostCa);
        assert_eq!(trust("{first_use: false}"), HostTrust::HostCa);
        assert_eq!(trust("{first_use: true}"), HostTrust::FirstUse);
        assert_eq!(trust(&format!("{{pins: [\"{PIN}\"]}}")), HostTrust::Pins(vec![PIN.into()]));
        assert_eq!(trust("{known_hosts: kh}"), HostTrust::KnownHosts("/etc/master-agent/kh".into()));
    }

    #[test]
    fn nodes_are_found_by_name_address_and_pin() {
        let text = format!(
            "nodes:\n- {{name: a, addresses: [10.0.0.1, 'fd00::1']}}\n- {{name: b, host_keys: {{pins: ['{PIN}']}}}}\n"
        );
        let mut inventory = parse(&text).unwrap();
        let (a, b): (NodeName, NodeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        let more =
            InventoryNode { dial: Some("x:1".parse().unwrap()), ..inventory.node(&a).unwrap().clone() };
        let c = InventoryNode { name: "c".parse().unwrap(), ..inventory.node(&b).unwrap().clone() };
        inventory.extend([more, c.clone()]);
        assert_eq!(inventory.nodes().len(), 4);
        assert_eq!(inventory.node(&a).unwrap().dial, None, "the first one has the name");
        assert_eq!(inventory.node(&c.name), Some(&c));
        assert_eq!(inventory.node(&"d".parse().unwrap()), None);
        assert_eq!(inventory.node_with_address(&"fd00::1".parse().unwrap()).unwrap().name, a);
        assert_eq!(inventory.node_with_address(&"10.0.0.2".parse().unwrap()), None);
        assert_eq!(inventory.pins(), &HashMap::from([(PIN.to_owned(), b)]));
    }

    #[test]
    fn overlapping_networks_of_different_lengths_are_fine() {
        let text = "nodes:\n- {name: a, cidrs: [10.0.0.0/8]}\n- {name: b, addresses: [10.1.0.1], cidrs: [10.1.0.0/16]}\nservice_cidrs: [10.0.0.0/12]\n";
        assert_eq!(parse(text).unwrap().nodes().len(), 2);
    }

    #[test]
    fn the_sample_loads_and_names_every_field() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config/inventory.yaml");
        let text = std::fs::read_to_string(path).unwrap();
        let inventory = parse(&text).unwrap();
        assert!(inventory.nodes().len() >= 3);
        assert!(inventory.nodes().iter().any(|node| node.trust == HostTrust::HostCa && node.dial.is_none()));
        for field in [
            "nodes",
            "name",
            "dial",
            "user",
            "addresses",
            "cidrs",
            "default_route",
            "connections",
            "host_keys",
            "pins",
            "known_hosts",
            "first_use",
            "service_cidrs",
            "key_file",
            "front_end_listen",
        ] {
            assert!(text.contains(&format!("{field}:")), "{field}");
        }
    }

    #[test]
    fn mistakes_are_shown_with_their_place() {
        let pinned = format!(
            "nodes:\n- {{name: a, host_keys: {{pins: [\"{PIN}\"]}}}}\n- {{name: b, host_keys: {{pins: [\"{PIN}\"]}}}}"
        );
        let both = format!(
            "nodes:\n- name: a\n  dial: a:22\n  host_keys:\n    pins: [\"{PIN}\"]\n    first_use: true"
        );
        let table: &[(&str, &str)] = &[
            ("node: []", "1:1: node: unknown field; did you mean nodes?"),
            ("nodes: {n1: {}}", "1:8: nodes: expected a list, found a section"),
            ("nodes:\n- n1", "2:3: nodes[0]: expected a section of fields, found a single value"),
            ("nodes:\n- dial: a:22", "2:3: nodes[0].name: is required"),
            ("nodes:\n- name: N1", "2:9: nodes[0].name: \"N1\" is not a node name"),
            (
                "nodes:\n- name: a\n- name: b\n- name: a",
                "4:9: nodes[2].name: there is a node a already, on line 2",
            ),
            ("nodes:\n- name: a\n  dial: a", "3:9: nodes[0].dial: \"a\": no port"),
            ("nodes:\n- name: a\n  port: 22", "3:3: nodes[0].port: unknown field; known here: addresses,"),
            ("nodes:\n- name: a\n  user: \"a b\"", "3:9: nodes[0].user: \"a b\": is not a user name"),
            (
                "nodes:\n- name: a\n  addresses: [10.0.0.300]",
                "3:15: nodes[0].addresses[0]: \"10.0.0.300\": expected an IP",
            ),
            (
                "nodes:\n- name: a\n  addresses: [0.0.0.0]",
                "3:15: nodes[0].addresses[0]: 0.0.0.0 is no address of a host",
            ),
            (
                "nodes:\n- name: a\n  addresses: 10.0.0.1",
                "3:14: nodes[0].addresses: expected a list, found a single",
            ),
            (
                "nodes:\n- {name: a, addresses: [10.0.0.1]}\n- {name: b, addresses: [\"::ffff:10.0.0.1\"]}",
                "3:25: nodes[1].addresses[0]: 10.0.0.1 is listed already, for node a on line 2",
            ),
            (
                "nodes:\n- {name: a, cidrs: [10.0.0.0/24]}\n- {name: b, cidrs: [10.0.0.0/24]}",
                "3:21: nodes[1].cidrs[0]: 10.0.0.0/24 is listed already, for node a on line 2",
            ),
            (
                "nodes:\n- {name: a, cidrs: [10.0.0.0/24]}\nservice_cidrs:\n- 10.0.0.0/24",
                "4:3: service_cidrs[0]: 10.0.0.0/24 is listed already, for node a",
            ),
            (
                "nodes:\n- name: a\n  cidrs: [10.0.0.5/24]",
                "3:11: nodes[0].cidrs[0]: \"10.0.0.5/24\": has bits beyond its prefix: write 10.0.0.0/24",
            ),
            (
                "nodes:\n- name: a\n  cidrs: [10.0.0.5]",
                "3:11: nodes[0].cidrs[0]: \"10.0.0.5\": expected a network",
            ),
            (
                "nodes:\n- name: a\n  cidrs: [\"::ffff:10.0.0.0/104\"]",
                "3:11: nodes[0].cidrs[0]: \"::ffff:10.0.0.0/104\": is an IPv4-mapped",
            ),
            (
                "nodes:\n- {name: a, default_route: true}\n- {name: b, default_route: true}",
                "3:28: nodes[1].default_route: node a is the default route already",
            ),
            (
                "nodes:\n- name: a\n  connections: 0",
                "3:16: nodes[0].connections: 0 is not in the range 1 to 16",
            ),
            (
                "nodes:\n- name: a\n  host_keys: {pins: [\"SHA256:short\"]}",
                "3:22: nodes[0].host_keys.pins[0]: \"SHA256:short\": expected",
            ),
            ("nodes:\n- name: a\n  host_keys: {pins: []}", "3:21: nodes[0].host_keys.pins: is empty"),
            (
                "nodes:\n- name: a\n  host_keys: {first_use: true}",
                "3:26: nodes[0].host_keys.first_use: needs dial:",
            ),
            (
                "nodes:\n- name: a\n  host_keys: {known_hosts: kh}",
                "3:28: nodes[0].host_keys.known_hosts: needs dial:",
            ),
            (
                "nodes:\n- name: a\n  host_keys: {pin: x}",
                "3:15: nodes[0].host_keys.pin: unknown field; did you mean pins?",
            ),
            (&both, "4:3: nodes[0].host_keys: pins, known_hosts and first_use exclude each other"),
            (&pinned, "3:32: nodes[1].host_keys.pins[0]: is listed already, for node a"),
            (
                "nodes:\n- name: a\n  front_end_listen: 0.0.0.0:6443",
                "3:21: nodes[0].front_end_listen: 0.0.0.0:6443: give the one address",
            ),
            (
                "nodes:\n- name: a\n  front_end_listen: 127.0.0.1:443",
                "3:21: nodes[0].front_end_listen: 127.0.0.1:443: sshd lets nobody but root",
            ),
            ("nodes: &all []\n", "1:13: anchors are not supported"),
            ("nodes: *all\n", "1:8: not YAML"),
        ];
        for (text, expected) in table {
            let shown = parse(text).expect_err(text).to_string();
            let found = shown.lines().any(|line| line.starts_with(&format!("inventory.yaml:{expected}")));
            assert!(found, "{text}\nexpected {expected}\ngot {shown}");
        }
    }

    #[test]
    fn every_mistake_is_shown_at_once() {
        let text =
            "nodes:\n- {name: A}\n- {name: b, dial: b, x: 1}\n- {name: c, cidrs: [x, y]}\nservice_cidr: []\n";
        let errors = parse(text).unwrap_err();
        let places: Vec<_> = errors.iter().map(|e| (e.line, e.field.as_str())).collect();
        assert_eq!(
            places,
            [
                (2, "nodes[0].name"),
                (3, "nodes[1].dial"),
                (3, "nodes[1].x"),
                (4, "nodes[2].cidrs[0]"),
                (4, "nodes[2].cidrs[1]"),
                (5, "service_cidr"),
            ]
        );
    }

    #[test]
    fn known_hosts_files_must_exist() {
        let dir = std::env::temp_dir().join(format!("master-agent-inventory-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("inventory.yaml");
        std::fs::write(&path, "nodes:\n- name: a\n  dial: a:22\n  host_keys: {known_hosts: kh}\n").unwrap();
        let shown = Inventory::load(&path).unwrap_err().to_string();
        assert!(shown.contains(":4:28: nodes[0].host_keys.known_hosts: "), "{shown}");
        assert!(shown.contains("kh can't be read: No such file"), "{shown}");
        std::fs::write(dir.join("kh"), "").unwrap();
        assert_eq!(Inventory::load(&path).unwrap().nodes()[0].trust, HostTrust::KnownHosts(dir.join("kh")));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn thousands_of_nodes_load_quickly() {
        let mut text = String::from("nodes:\n");
        for i in 0..5000 {
            let (a, b) = (i / 250, i % 250);
            text += &format!(
                "- {{name: n{i}, dial: \"10.{a}.{b}.1:22\", addresses: [10.{a}.{b}.1], cidrs: [10.{a}.{b}.0/24]}}\n"
            );
        }
        let began = std::time::Instant::now();
        assert_eq!(parse(&text).unwrap().nodes().len(), 5000);
        assert!(began.elapsed() < std::time::Duration::from_secs(5), "{:?}", began.elapsed());
    }
}
