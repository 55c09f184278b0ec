//! TCP connections to targets and to masters, and to the proxies on the way to these.

use std::{io, net::SocketAddr, time::Duration};

use proto::Target;
use proto_net::socket;
use tokio::{
    net::{TcpStream, lookup_host},
    time::{Instant, timeout_at},
};

/// The least time for one of several addresses, as in Go's dialer. A SYN that is lost is sent again after a second.
const LEAST_PER_ADDRESS: Duration = Duration::from_secs(2);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{to} did not answer within {}", humantime::format_duration(*limit))]
    TimedOut { to: Target, limit: Duration },
    #[error("can't connect to {to}: {error}")]
    Failed { to: Target, error: io::Error },
}

/// Why none of several addresses could be connected to: at least one gave no answer in its time, or the last one failed.
#[derive(Debug)]
pub(crate) enum NoneAnswered {
    InTime,
    Failed(io::Error),
}

/// Resolves and connects to a master, or to a proxy on the way to it.
pub async fn connect(to: &Target, timeout: Duration) -> Result<TcpStream, ConnectError> {
    let deadline = Instant::now() + timeout;
    let failed = |error| ConnectError::Failed { to: to.clone(), error };
    let late = || ConnectError::TimedOut { to: to.clone(), limit: timeout };
    let found = timeout_at(deadline, lookup_host((to.host.to_string(), to.port))).await;
    let addresses = found.map_err(|_| late())?.map_err(failed)?.map(|address| (address, ())).collect();
    match connect_to_any(addresses, deadline, TcpStream::connect::<SocketAddr>).await {
        Ok((socket, ())) => {
            socket::tune_link(&socket);
            Ok(socket)
        }
        Err(NoneAnswered::InTime) => Err(late()),
        Err(NoneAnswered::Failed(error)) => Err(failed(error)),
    }
}

/// Connects to the first of some addresses that answers, one after the other. Each has its part of the time that is left,
/// so that one that answers nothing does not use up the time of the others. What goes with the address is returned, too.
pub(crate) async fn connect_to_any<A, S, F>(
    addresses: Vec<(SocketAddr, A)>,
    deadline: Instant,
    connect: impl Fn(SocketAddr) -> F,
) -> Result<(S, A), NoneAnswered>
where
    F: Future<Output = io::Result<S>>,
{
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut answered = true;
    let mut addresses_left = addresses.len();
    for (address, with) in addresses {
        let now = Instant::now();
        let time = part_of(deadline.saturating_duration_since(now), addresses_left);
        if time.is_zero() {
            answered = false;
            break;
        }
        addresses_left -= 1;
        match timeout_at(now + time, connect(address)).await {
            Ok(Ok(socket)) => return Ok((socket, with)),
            Ok(Err(error)) => failure = error,
            Err(_) => answered = false,
        }
    }
    Err(if answered { NoneAnswered::Failed(failure) } else { NoneAnswered::InTime })
}

/// The time for the next of some addresses.
fn part_of(left: Duration, addresses: usize) -> Duration {
    let even = left / u32::try_from(addresses.max(1)).unwrap_or(u32::MAX);
    even.max(LEAST_PER_ADDRESS).min(left)
}

/// Whether an error says that this process or host has no file descriptor left. The peer has no part in it.
pub(crate) fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_time_is_divided_as_in_go() {
        for (left, addresses, part) in
            [(10, 1, 10), (10, 2, 5), (10, 5, 2), (10, 100, 2), (1, 3, 1), (0, 2, 0)]
        {
            assert_eq!(part_of(secs(left), addresses), secs(part), "{left} s for {addresses}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_answers_nothing_leaves_time_for_the_others() {
        let address = |port: u16| SocketAddr::from(([192, 0, 2, 1], port));
        let connect = |to: SocketAddr| async move {
            match to.port() {
                1 => std::future::pending().await,
                2 => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
                port => Ok(port),
            }
        };
        let dial = async |ports: &[u16]| {
            let began = Instant::now();
            let addresses = ports.iter().map(|port| (address(*port), *port)).collect();
            let dialled = connect_to_any(addresses, began + secs(10), connect).await;
            (dialled, began.elapsed().as_secs())
        };
        assert!(matches!(dial(&[1, 2, 3]).await, (Ok((3, 3)), 3)));
        assert!(matches!(dial(&[1]).await, (Err(NoneAnswered::InTime), 10)));
        assert!(matches!(dial(&[1; 9]).await, (Err(NoneAnswered::InTime), 10)));
        assert!(matches!(dial(&[1, 2]).await, (Err(NoneAnswered::InTime), 5)));
        let refused = dial(&[2, 2]).await;
        assert!(
            matches!(&refused, (Err(NoneAnswered::Failed(e)), 0) if e.kind() == io::ErrorKind::ConnectionRefused)
        );
        assert!(matches!(dial(&[]).await, (Err(NoneAnswered::Failed(_)), 0)));
    }
}
