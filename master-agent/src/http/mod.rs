//! What the egress listener of proxy URLs and the front end have in common as HTTP servers and proxies.

pub mod browser;
pub mod claims;
pub mod exchange;
pub mod hop;
pub mod status;
pub mod watched;

use std::net::IpAddr;

use proto_net::tasks::Tasks;

/// Runs the tasks of an HTTP/2 connection where they are drained with the others.
#[derive(Clone)]
pub struct Executor(pub Tasks);

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}

/// Whether a host, as a URL has it, is this one.
pub fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}
