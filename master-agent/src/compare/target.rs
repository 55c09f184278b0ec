//! The targets of a comparison: URLs, and their addresses on the direct path.

use std::{collections::HashMap, fmt, str::FromStr};

use proto::{
    NodeName, Target,
    target::{Host, InvalidTarget},
};

/// The placeholder for each chosen node in a URL.
pub(super) const NODE: &str = "{node}";

/// A URL with `http://`, `https://` or `tcp://`, a target and, for the first two, a path. Nothing is sent to `tcp://`:
/// only the connection is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Url {
    pub scheme: Scheme,
    pub target: Target,
    /// The path with its query. It begins with `/`.
    pub path: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    Http,
    Https,
    Tcp,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidUrl {
    #[error("write http://HOST:PORT/PATH, https://HOST:PORT/PATH or tcp://HOST:PORT")]
    Scheme,
    #[error("{0}")]
    Target(InvalidTarget),
    #[error("a path has no spaces and control characters, and tcp:// has none at all")]
    Path,
}

impl FromStr for Url {
    type Err = InvalidUrl;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let (scheme, rest) = s.split_once("://").ok_or(InvalidUrl::Scheme)?;
        let (scheme, port) = match scheme {
            "http" => (Scheme::Http, Some(80)),
            "https" => (Scheme::Https, Some(443)),
            "tcp" => (Scheme::Tcp, None),
            _ => return Err(InvalidUrl::Scheme),
        };
        let (authority, path) = match rest.find(['/', '?']) {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let target = match authority.parse() {
            Err(InvalidTarget::NoPort) => match port {
                Some(port) => Target::new(Host::parse(authority).map_err(InvalidUrl::Target)?, port),
                None => return Err(InvalidUrl::Target(InvalidTarget::NoPort)),
            },
            other => other.map_err(InvalidUrl::Target)?,
        };
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        if !is_path(&path) || (scheme == Scheme::Tcp && path != "/") {
            return Err(InvalidUrl::Path);
        }
        Ok(Self { scheme, target, path })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.scheme {
            Scheme::Http => write!(f, "http://{}{}", self.target, self.path),
            Scheme::Https => write!(f, "https://{}{}", self.target, self.path),
            Scheme::Tcp => write!(f, "tcp://{}", self.target),
        }
    }
}

/// Whether a text is a path and query for a request line.
pub(super) fn is_path(path: &str) -> bool {
    path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic() && b != b'#')
}

/// Expands a template to one URL for each node if it contains `{node}`, else to a single URL.
pub(super) fn expand(template: &str, nodes: &[NodeName]) -> Result<Vec<(Option<NodeName>, Url)>, InvalidUrl> {
    if !template.contains(NODE) {
        return Ok(vec![(None, template.parse()?)]);
    }
    nodes
        .iter()
        .map(|node| Ok((Some(node.clone()), template.replace(NODE, node.as_str()).parse()?)))
        .collect()
}

/// The arguments of `--direct`: addresses of hosts and targets on the direct path, where they differ from what the
/// tunnel finds.
#[derive(Clone, Debug, Default)]
pub(super) struct DirectAddresses {
    hosts: HashMap<Host, Host>,
    targets: HashMap<Target, Target>,
}

impl DirectAddresses {
    /// Adds a rule such as `n1=10.0.0.5` or `web.default.svc:80=10.3.0.7:8080`.
    pub(super) fn add(&mut self, rule: &str) -> anyhow::Result<()> {
        let pair = rule.split_once('=');
        let (from, to) = pair.ok_or_else(|| anyhow::anyhow!("write HOST=HOST or HOST:PORT=HOST:PORT"))?;
        let targets = (from.parse::<Target>(), to.parse::<Target>());
        if let (Ok(from), Ok(to)) = targets {
            self.targets.insert(from, to);
        } else {
            self.hosts.insert(Host::parse(from)?, Host::parse(to)?);
        }
        Ok(())
    }

    pub(super) fn get(&self, target: &Target) -> Option<Target> {
        let host = || self.hosts.get(&target.host).map(|host| Target::new(host.clone(), target.port));
        self.targets.get(target).cloned().or_else(host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_parsed_and_formatted() {
        for (text, shown) in [
            ("http://n1", "http://n1:80/"),
            ("https://n1/healthz", "https://n1:443/healthz"),
            ("https://N1:10250/healthz?x=1", "https://n1:10250/healthz?x=1"),
            ("http://[fd00::1]:8080?q", "http://[fd00::1]:8080/?q"),
            ("http://10.244.1.7:8080/a/b", "http://10.244.1.7:8080/a/b"),
            ("tcp://web.default.svc:80", "tcp://web.default.svc:80"),
        ] {
            let url: Url = text.parse().unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(shown.parse::<Url>().unwrap(), url);
        }
        for text in [
            "n1:10250",
            "ftp://n1:21/",
            "tcp://n1",
            "tcp://n1:1/path",
            "http://:80/",
            "http://n1:0/",
            "http://n1:80/a b",
            "http://n1:80/a\r\nHost: x",
            "http://n1:80/#x",
            "http://user@n1:80/",
            "http:///x",
            "",
        ] {
            assert!(text.parse::<Url>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_template_expands_to_a_url_for_each_node() {
        let nodes: Vec<NodeName> = ["n1", "n2"].map(|n| n.parse().unwrap()).into();
        let urls = expand("https://{node}:10250/healthz", &nodes).unwrap();
        let shown: Vec<_> = urls.iter().map(|(node, url)| (node.clone().unwrap(), url.to_string())).collect();
        assert_eq!(shown[1], (nodes[1].clone(), "https://n2:10250/healthz".to_owned()));
        let alone = expand("http://10.0.0.1:80/", &nodes).unwrap();
        assert_eq!((alone.len(), &alone[0].0), (1, &None));
        assert!(expand("https://{node}/{node}", &[]).unwrap().is_empty());
    }

    #[test]
    fn direct_addresses_replace_hosts_and_targets() {
        let mut direct_addresses = DirectAddresses::default();
        for rule in ["n1=10.0.0.5", "n1:1=n2:2", "web.default.svc:80=[fd00::7]:8080"] {
            direct_addresses.add(rule).unwrap();
        }
        let found = |target: &str| direct_addresses.get(&target.parse().unwrap()).map(|t| t.to_string());
        assert_eq!(found("n1:10250").as_deref(), Some("10.0.0.5:10250"));
        assert_eq!(found("n1:1").as_deref(), Some("n2:2"));
        assert_eq!(found("web.default.svc:80").as_deref(), Some("[fd00::7]:8080"));
        assert_eq!(found("web.default.svc:81"), None);
        for rule in ["n1", "=", "n1=1:2:3", "n1:1=n2", "a b=c"] {
            assert!(direct_addresses.add(rule).is_err(), "{rule}");
        }
    }
}
