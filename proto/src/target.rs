//! Targets: what a caller wants to reach.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// The host part of a [`Target`]: an address, or a name in lower case of at most 253 characters that is still to be
/// resolved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    Addr(IpAddr),
    Name(String),
}

/// A host and a TCP port from 1 to 65535, written `10.0.0.1:80`, `[fd00::1]:80` or `n1:10250`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Target {
    pub host: Host,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTarget {
    #[error("no port: write HOST:PORT, or [ADDRESS]:PORT for IPv6")]
    NoPort,
    #[error("the port is not a number from 1 to 65535")]
    Port,
    #[error("the host is neither an address nor a DNS name")]
    Host,
}

impl Target {
    pub fn new(host: Host, port: u16) -> Self {
        Self { host, port }
    }

    /// Parses the authority of a URL, in which the port may be left out.
    pub fn parse_authority(authority: &str, default_port: u16) -> Result<Self, InvalidTarget> {
        // An IPv6 address is in brackets, and the colons in it are not before a port.
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'));
        if has_port { authority.parse() } else { format!("{authority}:{default_port}").parse() }
    }
}

impl Host {
    /// Parses an address (IPv6 without brackets) or a name. An IPv4-mapped IPv6 address becomes IPv4, so that no policy
    /// can be circumvented by another spelling.
    pub fn parse(s: &str) -> Result<Self, InvalidTarget> {
        if let Ok(addr) = s.parse::<IpAddr>() {
            return Ok(Self::Addr(addr.to_canonical()));
        }
        let label = |l: &str| {
            !l.is_empty()
                && l.len() <= 63
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        let name = s.strip_suffix('.').unwrap_or(s);
        // "127.1", "0x7f.1" and "2130706433" have the syntax of names, and some resolvers take them for addresses.
        let last = name.rsplit('.').next().unwrap_or_default();
        let numeric = match last.strip_prefix("0x").or(last.strip_prefix("0X")) {
            Some(hex) => hex.bytes().all(|b| b.is_ascii_hexdigit()),
            None => last.bytes().all(|b| b.is_ascii_digit()),
        };
        if name.len() > 253 || numeric || !name.split('.').all(label) {
            return Err(InvalidTarget::Host);
        }
        Ok(Self::Name(name.to_ascii_lowercase()))
    }
}

impl FromStr for Target {
    type Err = InvalidTarget;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let (host, port) = s.rsplit_once(':').ok_or(InvalidTarget::NoPort)?;
        if port.is_empty() || port.len() > 5 || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(InvalidTarget::Port);
        }
        let port = port.parse().map_err(|_| InvalidTarget::Port)?;
        if port == 0 {
            return Err(InvalidTarget::Port);
        }
        let host = match host.strip_prefix('[') {
            Some(rest) => {
                let addr = rest.strip_suffix(']').ok_or(InvalidTarget::Host)?;
                let addr: Ipv6Addr = addr.parse().map_err(|_| InvalidTarget::Host)?;
                Host::Addr(IpAddr::V6(addr).to_canonical())
            }
            None if host.contains(':') => return Err(InvalidTarget::Host),
            None => Host::parse(host)?,
        };
        Ok(Self { host, port })
    }
}

impl TryFrom<String> for Target {
    type Error = InvalidTarget;

    fn try_from(s: String) -> Result<Self, Self::Error> {
        s.parse()
    }
}

impl From<Target> for String {
    fn from(target: Target) -> Self {
        target.to_string()
    }
}

impl From<SocketAddr> for Target {
    fn from(addr: SocketAddr) -> Self {
        Self::new(Host::Addr(addr.ip().to_canonical()), addr.port())
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(addr) => addr.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Addr(addr) => SocketAddr::new(*addr, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        for (text, shown) in [
            ("10.77.1.2:8080", "10.77.1.2:8080"),
            ("[fd00::1]:443", "[fd00::1]:443"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("N1:10250", "n1:10250"),
            ("web.default.svc.:80", "web.default.svc:80"),
            ("4a.example:1", "4a.example:1"),
        ] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn refuses_what_is_no_target() {
        for bad in [
            "",
            ":",
            "a",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "a: 1",
            "fd00::1:443",
            "[fd00::1:443",
            "[10.0.0.1]:80",
            "[n1]:80",
            "a b:80",
            "a/b:80",
            "a@b:80",
            "a..b:80",
            "2130706433:80",
            "127.1:80",
            "0x7f.1:80",
            "a\0:1",
        ] {
            assert!(bad.parse::<Target>().is_err(), "{bad:?}");
        }
    }
}
