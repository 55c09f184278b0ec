//! Configuration fields that several features share: ranges, listening addresses, Unix sockets and TLS.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use hyper::Uri;
use proto_config::{At, Meanings, Mode, Section};

use crate::http::is_loopback;

pub(crate) const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The range of waits: long enough for any network, but no month by accident.
pub(crate) const WAIT: RangeInclusive<Duration> = Duration::from_millis(10)..=DAY;

pub(crate) const COUNT: RangeInclusive<usize> = 1..=1_000_000;

pub(crate) const NO_LISTENER: &str = "has no listener: give it unix, tcp or both";

pub(crate) fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub(crate) fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

pub(crate) fn any(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)
}

pub(crate) fn listen_loopback(s: &Section<'_>, default_port: u16) -> SocketAddr {
    s.document(&[("listen", "The address, which is a loopback address.")]);
    let default = loopback(default_port);
    let address = s.listen("listen", default);
    if !address.ip().to_canonical().is_loopback() {
        s.error("listen", format!("{address} has no authentication, so it must be a loopback address"));
    }
    address
}

/// Takes `https://` URLs, and those that never leave this host.
pub(crate) fn verified_or_loopback(at: &At<'_>, uri: Uri) -> Option<Uri> {
    match uri.scheme_str() {
        Some("https") => Some(uri),
        Some("http") if is_loopback(uri.host().unwrap_or_default()) => Some(uri),
        _ => {
            let text = at.text()?;
            at.error(format!("{text:?}: must be https://, as http:// is for loopback only"));
            None
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixConfig {
    pub path: PathBuf,
    pub mode: u32,
    /// The numeric owner of the socket file; `None` leaves the process's own.
    pub owner: Option<u32>,
    /// The numeric group of the socket file; `None` leaves the process's own.
    pub group: Option<u32>,
}

const UNIX_FIELDS: Meanings = &[
    ("path", "The socket's path."),
    ("mode", "The socket's mode. Whoever may write to the socket may call."),
    (
        "owner",
        "The socket's owner, as a name or a number. By default, the user of the process. Another owner \
         requires root.",
    ),
    (
        "group",
        "The socket's group, as a name or a number. By default, the group of the process. Another group \
         requires that the agent is a member, as deploy/systemd/socket-group.conf makes it.",
    ),
];

impl UnixConfig {
    pub(crate) fn read(s: &Section<'_>, default_path: &str) -> Self {
        s.document(UNIX_FIELDS);
        Self {
            path: s.listen_unix("path", default_path),
            mode: s.or("mode", Mode(0o660)).0,
            owner: s.at("owner").and_then(|at| account(&at, "/etc/passwd", "user")),
            group: s.at("group").and_then(|at| account(&at, "/etc/group", "group")),
        }
    }
}

/// TLS that requires a certificate of every caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    pub listen: SocketAddr,
    pub cert: PathBuf,
    pub key: PathBuf,
    pub client_ca: PathBuf,
    /// The common names or subject alternative names that may call. If empty, every certificate of `client_ca` may.
    pub allowed_names: Vec<String>,
}

const TLS_FIELDS: Meanings = &[
    ("listen", "The address to listen on."),
    ("cert", "The serving certificate, in PEM."),
    ("key", "The key of cert, with mode 0600 or 0640."),
    ("client_ca", "The CA whose certificates callers must present."),
    (
        "allowed_names",
        "The common names or subject alternative names of callers. If the list is empty, all certificates of \
         client_ca may call.",
    ),
];

impl TlsConfig {
    pub(crate) fn read(s: &Section<'_>, default_port: u16) -> Option<Self> {
        s.document(TLS_FIELDS);
        let listen = s.listen("listen", any(default_port));
        let cert = s.required_file("cert");
        let key = s.required_private_file("key");
        let client_ca = s.required_file("client_ca");
        let allowed_names = s.list("allowed_names");
        Some(Self { listen, cert: cert?, key: key?, client_ca: client_ca?, allowed_names })
    }
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

/// In both tables, the name is the first field and the id the third.
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
    use super::*;

    #[test]
    fn account_tables_are_read_as_passwd_and_group_are() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nkube:x:1001:1002::/:/bin/false\nbad\n";
        assert_eq!(id_of(passwd, "kube"), Some(1001));
        assert_eq!(id_of(passwd, "bad"), None);
        assert_eq!(id_of("wheel:x:10:root,kube\n", "wheel"), Some(10));
    }
}
