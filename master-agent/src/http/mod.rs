//! The parts of an HTTP server and proxy that the front end and the egress listener of proxy URLs share.

pub mod browser;
pub mod claims;
pub mod connection_tasks;
pub mod exchange;
pub mod generations;
pub mod hop;
pub mod status;
pub mod watched;

use std::net::IpAddr;

use proto_net::tasks::Tasks;

/// Runs the tasks of an HTTP/2 connection in a group that is drained with the others.
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

/// Whether the host of a URL is a loopback address.
pub fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}
