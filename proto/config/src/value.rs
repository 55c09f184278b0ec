//! The types of single values in both agents' configurations, and how each is written.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;

use super::{
    description::Shape,
    section::{At, Value},
    tree::Kind,
};
use proto::{NodeName, Target, call_home::Master};

/// A file mode, written as four octal digits: `"0660"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(pub u32);

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// TCP ports from 1 to 65535, written `80`, `"80-90"`, or as a list of those.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(pub Vec<RangeInclusive<u16>>);

impl Value for String {
    const SHAPE: Shape = Shape::text("text");

    fn read(at: &At<'_>) -> Option<Self> {
        let text = at.text()?;
        if text.is_empty() {
            at.error("is empty");
            return None;
        }
        Some(text.to_owned())
    }
}

impl Value for PathBuf {
    const SHAPE: Shape = Shape::text("path");

    fn read(at: &At<'_>) -> Option<Self> {
        at.path()
    }
}

impl Value for bool {
    const SHAPE: Shape = Shape::Boolean;

    fn read(at: &At<'_>) -> Option<Self> {
        match at.scalar("true or false")? {
            ("true", true) => Some(true),
            ("false", true) => Some(false),
            (text, _) => at.complain(text, "expected true or false"),
        }
    }
}

impl Value for usize {
    const SHAPE: Shape = Shape::Integer;

    fn read(at: &At<'_>) -> Option<Self> {
        match at.scalar("a whole number")? {
            (text, true) if text.bytes().all(|b| b.is_ascii_digit()) => match text.parse() {
                Ok(number) => Some(number),
                Err(_) => at.complain(text, "is too large"),
            },
            (text, _) => at.complain(text, "expected a whole number, without quotes"),
        }
    }
}

impl Value for f64 {
    const SHAPE: Shape = Shape::Number;

    fn read(at: &At<'_>) -> Option<Self> {
        match at.scalar("a number")? {
            (text, true) if text.bytes().all(|b| b.is_ascii_digit() || b == b'.') => {
                text.parse().ok().or_else(|| at.complain(text, "expected a number such as 0.5"))
            }
            (text, _) => at.complain(text, "expected a number such as 0.5, without quotes"),
        }
    }
}

impl Value for u16 {
    const SHAPE: Shape = Shape::Port;

    fn read(at: &At<'_>) -> Option<Self> {
        let number = usize::read(at)?;
        u16::try_from(number)
            .ok()
            .or_else(|| at.complain(&number.to_string(), "is not in the range 0 to 65535"))
    }
}

impl Value for Duration {
    const SHAPE: Shape = Shape::Text { name: "duration", pattern: Some("^[0-9]") };

    fn read(at: &At<'_>) -> Option<Self> {
        let (text, _) = at.scalar("a duration such as 15s or 250ms")?;
        if text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            return at.complain(text, "has no unit: write a duration with one, such as 15s or 250ms");
        }
        match humantime::parse_duration(text) {
            Ok(duration) => Some(duration),
            Err(error) => at.complain(text, &format!("expected a duration such as 15s or 250ms: {error}")),
        }
    }
}

impl Value for SocketAddr {
    const SHAPE: Shape = Shape::Text { name: "ADDRESS:PORT", pattern: Some("^.+:[0-9]{1,5}$") };

    fn read(at: &At<'_>) -> Option<Self> {
        let (text, _) = at.scalar("ADDRESS:PORT")?;
        let expected = "expected ADDRESS:PORT with a numeric address, such as 127.0.0.1:9070 or [::]:2222";
        text.parse().ok().or_else(|| at.complain(text, expected))
    }
}

impl Value for IpAddr {
    const SHAPE: Shape = Shape::Text { name: "address", pattern: Some("^[0-9A-Fa-f.:]+$") };

    fn read(at: &At<'_>) -> Option<Self> {
        let (text, _) = at.scalar("an IP address")?;
        let address: Option<IpAddr> = text.parse().ok();
        let address = address.map(|address| address.to_canonical());
        address.or_else(|| at.complain(text, "expected an IP address, such as 10.0.0.5 or fd00::5"))
    }
}

impl Value for IpNet {
    const SHAPE: Shape = Shape::Text { name: "ADDRESS/BITS", pattern: Some("^[0-9A-Fa-f.:]+/[0-9]{1,3}$") };

    fn read(at: &At<'_>) -> Option<Self> {
        let (text, _) = at.scalar("a network")?;
        let Ok(net) = text.parse::<IpNet>() else {
            return at.complain(text, "expected a network ADDRESS/BITS, such as 10.244.1.0/24");
        };
        if net.trunc() != net {
            return at.complain(text, &format!("has bits beyond its prefix: write {}", net.trunc()));
        }
        if let IpNet::V6(v6) = net
            && v6.addr().to_ipv4_mapped().is_some()
        {
            return at.complain(text, "is an IPv4-mapped network: write it as IPv4");
        }
        Some(net)
    }
}

impl Value for NodeName {
    const SHAPE: Shape = Shape::text("node name");

    fn read(at: &At<'_>) -> Option<Self> {
        let (text, _) = at.scalar("a node's name")?;
        text.parse().map_err(|error: proto::name::InvalidNodeName| at.error(error.to_string())).ok()
    }
}

impl Value for Target {
    const SHAPE: Shape = Shape::Text { name: "HOST:PORT", pattern: Some("^.+:[0-9]{1,5}$") };

    fn read(at: &At<'_>) -> Option<Self> {
        let (text, _) = at.scalar("HOST:PORT")?;
        let parsed = text.parse::<Self>();
        parsed.or_else(|error| at.complain(text, &error.to_string()).ok_or(error)).ok()
    }
}

impl Value for Master {
    const SHAPE: Shape = Shape::text("HOST:PORT or https://HOST:PORT");

    fn read(at: &At<'_>) -> Option<Self> {
        let (text, _) = at.scalar("HOST:PORT or https://HOST:PORT")?;
        let parsed = text.parse::<Self>();
        parsed.or_else(|error| at.complain(text, &error.to_string()).ok_or(error)).ok()
    }
}

impl Value for Mode {
    const SHAPE: Shape = Shape::Text { name: "mode", pattern: Some("^0[0-7]{3}$") };

    fn read(at: &At<'_>) -> Option<Self> {
        let expected = "expected a mode as four octal digits, such as \"0660\"";
        let (text, _) = at.scalar("a mode")?;
        match u32::from_str_radix(text, 8) {
            Ok(mode) if text.len() == 4 && text.starts_with('0') => Some(Self(mode)),
            Ok(_) | Err(_) => at.complain(text, expected),
        }
    }
}

impl Value for Ports {
    const SHAPE: Shape = Shape::Ports;

    fn read(at: &At<'_>) -> Option<Self> {
        let ranges = match &at.node.kind {
            Kind::List(items) if items.is_empty() => return at.complain("[]", "names no port"),
            Kind::List(_) => at.items().iter().map(port_range).collect::<Vec<_>>(),
            Kind::Scalar { .. } | Kind::Map(_) | Kind::Bad | Kind::Any => vec![port_range(at)],
        };
        ranges.into_iter().collect::<Option<Vec<_>>>().map(Self)
    }
}

fn port_range(at: &At<'_>) -> Option<RangeInclusive<u16>> {
    let (text, _) = at.scalar("a port or a range of ports")?;
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0 && !text.starts_with('+'));
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (port(first.trim()), port(last.trim())) {
        (Some(first), Some(last)) if first <= last => Some(first..=last),
        (Some(_), Some(_)) => at.complain(text, "ends before it begins"),
        (Some(_), None) | (None, Some(_)) | (None, None) => {
            at.complain(text, "expected a port from 1 to 65535 or a range such as \"8000-8090\"")
        }
    }
}
