//! What accepts callers on the master. Each front door holds a dialer and nothing else of the rest.

pub mod http_connect;
