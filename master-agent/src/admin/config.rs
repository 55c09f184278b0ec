//! The `admin` section of the configuration.

use std::{net::SocketAddr, path::PathBuf};

use proto_config::{Meanings, Section};

use crate::fields::loopback;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    /// The address of health and metrics. It is a loopback address unless the file says `allow_remote: true`.
    pub listen: SocketAddr,
    /// Whether the page is also served there, to browsers with a login from `master-agent page`.
    pub page: bool,
    /// The socket that the commands use.
    pub socket: PathBuf,
}

const FIELDS: Meanings = &[
    ("listen", "The address of /livez, /readyz and /metrics."),
    ("allow_remote", "Permits a listen address that is not loopback. Callers are not authenticated."),
    (
        "page",
        "Also serves the page there, to browsers that open the URL of `master-agent page`. This needs a \
         loopback address.",
    ),
    (
        "socket",
        "The socket for `node list`, `explain` and the other commands that ask the running agent. Its mode \
         is 0600.",
    ),
];

impl AdminConfig {
    pub(crate) fn read(s: &Section<'_>) -> Self {
        s.document(FIELDS);
        let (listen, page) = (s.listen_local("listen", loopback(9070)), s.or("page", false));
        if page && !listen.ip().to_canonical().is_loopback() {
            let message = "is for a loopback address, as nothing is encrypted there; front_end.serve_page is for others";
            s.error("page", message);
        }
        Self { listen, page, socket: s.listen_unix("socket", "/run/master-agent/admin.sock") }
    }
}
