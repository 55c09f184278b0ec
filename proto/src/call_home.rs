//! Where nodes call home (RFC 8071), and the request that turns an HTTPS connection to the front end into a link.
//!
//! Over HTTPS the node sends `POST` to [`path`] with `Connection: Upgrade` and `Upgrade:` [`UPGRADE`] (RFC 9110 §7.8).
//! After the answer 101 come the same bytes as on a call home over plain TCP: SSH, with the master as the client.

use std::{fmt, str::FromStr};

use crate::{NodeName, Target, target::InvalidTarget};

/// The name of the protocol that the connection is upgraded to.
pub const UPGRADE: &str = "master-agent-link";
/// Stands for the name of a host that joins and leaves its name to its token. It is not a valid node name.
pub const UNNAMED: &str = "-";
const HTTPS: u16 = 443;

/// What a call home over HTTPS is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Link,
    Join,
}

/// The path of the request on behalf of `node`.
pub fn path(node: Option<&NodeName>, purpose: Purpose) -> String {
    let node = node.map_or(UNNAMED, NodeName::as_str);
    let purpose = match purpose {
        Purpose::Link => "link",
        Purpose::Join => "join",
    };
    format!("/apis/master-agent/v1/nodes/{node}/{purpose}")
}

/// A master as a node dials it: `HOST:PORT`, or `https://HOST[:PORT]` for its front end, with 443 as the default port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Master {
    Tcp(Target),
    Https(Target),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMaster {
    #[error("expected HOST:PORT, or https://HOST:PORT without a path or user")]
    Url,
    #[error("{0}")]
    Target(InvalidTarget),
}

impl FromStr for Master {
    type Err = InvalidMaster;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return text.parse().map(Self::Tcp).map_err(InvalidMaster::Target);
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if !scheme.eq_ignore_ascii_case("https") || authority.contains(['/', '@', '?', '#']) {
            return Err(InvalidMaster::Url);
        }
        Target::parse_authority(authority, HTTPS).map(Self::Https).map_err(InvalidMaster::Target)
    }
}

impl fmt::Display for Master {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(target) => target.fmt(f),
            Self::Https(target) => write!(f, "https://{target}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masters() {
        for (text, shown) in [
            ("master.example:2222", "master.example:2222"),
            ("10.0.0.1:2222", "10.0.0.1:2222"),
            ("https://Master.example", "https://master.example:443"),
            ("HTTPS://master.example:6443/", "https://master.example:6443"),
            ("https://10.0.0.1", "https://10.0.0.1:443"),
            ("https://[fd00::1]", "https://[fd00::1]:443"),
            ("https://[fd00::1]:6443", "https://[fd00::1]:6443"),
        ] {
            let master: Master = text.parse().unwrap();
            assert_eq!(master.to_string(), shown, "{text}");
            assert_eq!(shown.parse(), Ok(master));
        }
        for text in [
            "",
            "master.example",
            "http://master.example",
            "ssh://master.example:22",
            "https://",
            "https://:443",
            "https://master.example:",
            "https://master.example:0",
            "https://master.example/path",
            "https://user@master.example",
            "https://master.example?x",
            "https://fd00::1",
        ] {
            assert!(text.parse::<Master>().is_err(), "{text}");
        }
    }

    #[test]
    fn paths() {
        let node = "n1".parse().unwrap();
        assert_eq!(path(Some(&node), Purpose::Link), "/apis/master-agent/v1/nodes/n1/link");
        assert_eq!(path(None, Purpose::Join), "/apis/master-agent/v1/nodes/-/join");
        assert!(UNNAMED.parse::<NodeName>().is_err());
    }
}
