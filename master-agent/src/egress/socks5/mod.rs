//! SOCKS5 (RFC 1928) for browsers, curl and other clients of proxies. Only CONNECT is served. Names are routed as names and
//! resolved by the node, if at all.
//!
//! Without a users file there is no authentication: the mode of the socket file decides who may call, and on loopback
//! everybody on this host may. With a users file, callers present a user name and password (RFC 1929). Both are sent in the
//! clear, so a listener beyond loopback belongs on a trusted network. The password is read here and not by the SOCKS
//! library, which would log it.

pub mod login;
pub mod users;

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use fast_socks5::{
    ReplyError, Socks5Command,
    server::{
        AuthMethod, AuthMethodSuccessState, NoAuthentication, Socks5ServerProtocol, SocksServerError, states,
    },
    util::target_addr::TargetAddr,
};
use proto::{DialError, Host, Target, target::InvalidTarget};
use proto_net::{dialer::Origin, handshake::HandshakePermits, log_throttle::LogThrottle};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    time::Instant,
};

use super::{
    early_data::{self, WithEarlyData},
    lingering_close,
    listener::EgressListener,
    outbound::{Dialled, LOG_BURST, Outbound, excerpt},
    socket::CallerSocket,
};
use crate::stream::caller::Caller;
use login::Login;
use users::{LoginError, Users};

/// The maximum number of concurrent callers that have not authenticated.
const HANDSHAKES: usize = 256;
/// How long after a wrong password has arrived it is refused. The delay hides what was computed meanwhile.
const REFUSAL_DELAY: Duration = Duration::from_secs(1);

/// The egress listener.
pub struct Socks5 {
    outbound: Outbound,
    users: Option<Users>,
    handshakes: HandshakePermits,
    /// Bounds the log lines about callers who have not logged in.
    strangers: LogThrottle,
}

impl Socks5 {
    /// With `users`, every caller must be one of them.
    pub fn new(outbound: Outbound, users: Option<Users>) -> Self {
        let strangers = LogThrottle::with_burst(LOG_BURST);
        Self { outbound, users, handshakes: HandshakePermits::new(HANDSHAKES), strangers }
    }
}

impl EgressListener for Socks5 {
    fn outbound(&self) -> &Outbound {
        &self.outbound
    }

    async fn serve<S: CallerSocket>(self: Arc<Self>, mut socket: S, caller: Caller) {
        // Boxed, so that a long-lived stream does not keep the memory of the handshake.
        let opened = Box::pin(self.open(&mut socket, caller)).await;
        if let Some((dialled, early)) = opened {
            let (read, write) = socket.halves();
            self.outbound.relay(WithEarlyData { early: Ok(early), inner: read }, write, dialled).await;
        }
    }
}

/// Why a caller's request leads to no dial.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("{0}")]
    Protocol(#[from] SocksServerError),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("not a user name and password (RFC 1929)")]
    NoPassword,
    #[error("{0}")]
    Login(#[from] LoginError),
    #[error("only CONNECT is served here")]
    Command,
    #[error("{target:?} is not a target: {error}")]
    Target { target: String, error: InvalidTarget },
    #[error("the handshake did not end in time")]
    Timeout,
}

impl Refusal {
    /// Whether a caller who has not logged in may have caused it.
    fn is_of_a_stranger(&self) -> bool {
        match self {
            Self::Protocol(_) | Self::Io(_) | Self::NoPassword | Self::Login(_) | Self::Timeout => true,
            Self::Command | Self::Target { .. } => false,
        }
    }
}

impl Socks5 {
    /// Performs the handshake, dials and answers. Returns the connection and the caller's early data if the answer was a
    /// success.
    async fn open<S: CallerSocket>(&self, socket: &mut S, mut caller: Caller) -> Option<(Dialled, BytesMut)> {
        let target = self.evictable_handshake(socket, &mut caller).await?;
        match early_data::dial(&self.outbound, socket, &target, &caller, BytesMut::new()).await {
            Ok(opened) => {
                socket.write_all(&reply(ReplyError::Succeeded)).await.ok()?;
                socket.flush().await.ok()?;
                Some(opened)
            }
            Err(error) => {
                self.outbound.dial_failed(&target, &caller, &error);
                if error != DialError::Cancelled {
                    lingering_close::refuse(socket, &reply(dial_reply(&error))).await;
                }
                None
            }
        }
    }

    /// Performs the handshake. Where a password is needed, a newer unauthenticated caller may evict this one: callers
    /// without a password can't shut out those who have one.
    async fn evictable_handshake<S: CallerSocket>(
        &self,
        socket: &mut S,
        caller: &mut Caller,
    ) -> Option<Target> {
        let Some(peer) = self.users.as_ref().and(socket.peer()) else {
            return self.answered_handshake(socket, caller).await;
        };
        let permit = self.handshakes.take(peer);
        let (listener, origin) = (caller.listener, caller.origin.clone());
        tokio::select! {
            target = self.answered_handshake(socket, caller) => target,
            () = permit.evicted.cancelled() => {
                let error = "evicted by a newer handshake";
                self.outbound.bad_requests(&self.strangers, listener, &origin, &error);
                None
            }
        }
    }

    /// Performs the handshake up to the target, and answers a caller that is refused.
    async fn answered_handshake<S: CallerSocket>(
        &self,
        socket: &mut S,
        caller: &mut Caller,
    ) -> Option<Target> {
        let handshake =
            tokio::time::timeout(self.outbound.limits.head_timeout, self.handshake(socket, caller)).await;
        let refusal = match handshake.unwrap_or(Err(Refusal::Timeout)) {
            Ok(target) => return Some(target),
            // The caller has left.
            Err(Refusal::Io(_) | Refusal::Protocol(SocksServerError::Io { .. })) => return None,
            Err(refusal) => refusal,
        };
        if self.users.is_some() && refusal.is_of_a_stranger() {
            self.outbound.bad_requests(&self.strangers, caller.listener, &caller.origin, &refusal);
        } else {
            self.outbound.bad_request(caller.listener, &caller.origin, &refusal);
        }
        let answer = match refusal {
            Refusal::Command => reply(ReplyError::CommandNotSupported).to_vec(),
            Refusal::Target { .. } => reply(ReplyError::GeneralFailure).to_vec(),
            Refusal::NoPassword | Refusal::Login(_) => vec![1, 1],
            // The library has answered, or the protocol has no answer.
            Refusal::Protocol(_) | Refusal::Io(_) | Refusal::Timeout => Vec::new(),
        };
        lingering_close::refuse(socket, &answer).await;
        None
    }

    async fn handshake<S: CallerSocket>(
        &self,
        socket: &mut S,
        caller: &mut Caller,
    ) -> Result<Target, Refusal> {
        // Only a Unix socket has no address, and there are no users on it.
        let peer = socket.peer().unwrap_or(Ipv6Addr::UNSPECIFIED.into());
        let opened = Socks5ServerProtocol::start(&mut *socket);
        let authenticated = match &self.users {
            None => opened.negotiate_auth(&[NoAuthentication]).await?.finish_auth(),
            Some(users) => {
                let (name, authenticated) =
                    opened.negotiate_auth(&[Password]).await?.log_in(users, peer).await?;
                caller.origin = Origin(format!("{} user={name}", caller.origin));
                authenticated
            }
        };
        let (_, command, target) = authenticated.read_command().await?;
        match command {
            Socks5Command::TCPConnect => as_target(target),
            Socks5Command::TCPBind | Socks5Command::UDPAssociate => Err(Refusal::Command),
        }
    }
}

fn as_target(address: TargetAddr) -> Result<Target, Refusal> {
    let (host, port) = address.into_string_and_port();
    let refused = |error| Refusal::Target { target: excerpt(&format!("{host}:{port}")), error };
    if port == 0 {
        return Err(refused(InvalidTarget::Port));
    }
    Ok(Target::new(Host::parse(&host).map_err(refused)?, port))
}

/// A reply. Its address would be that of the master's own socket, which does not exist.
fn reply(code: ReplyError) -> [u8; 10] {
    [5, code.as_u8(), 0, 1, 0, 0, 0, 0, 0, 0]
}

/// The reply to a dial that failed (RFC 1928 §6).
fn dial_reply(error: &DialError) -> ReplyError {
    match error {
        DialError::BadTarget(_) | DialError::TooManyStreams(_) | DialError::Cancelled => {
            ReplyError::GeneralFailure
        }
        DialError::Policy { .. } => ReplyError::ConnectionNotAllowed,
        DialError::NoRoute(_) | DialError::NoTunnel { .. } | DialError::TunnelLost { .. } => {
            ReplyError::NetworkUnreachable
        }
        DialError::Resolve(_) | DialError::Unreachable(_) => ReplyError::HostUnreachable,
        DialError::Refused(_) => ReplyError::ConnectionRefused,
        DialError::TimedOut(_) => ReplyError::TtlExpired,
    }
}

/// The authentication method of RFC 1929.
#[derive(Clone, Copy)]
struct Password;

struct PasswordDue<T>(T);

struct Authenticated<T>(T);

impl<T> AuthMethod<T> for Password {
    type StartingState = PasswordDue<T>;

    fn method_id(self) -> u8 {
        2
    }

    fn new(self, inner: T) -> PasswordDue<T> {
        PasswordDue(inner)
    }
}

impl<T> AuthMethodSuccessState<T> for Authenticated<T> {
    fn into_inner(self) -> T {
        self.0
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> PasswordDue<T> {
    /// Returns the user's name.
    async fn log_in(
        self,
        users: &Users,
        peer: IpAddr,
    ) -> Result<(String, Socks5ServerProtocol<T, states::Authenticated>), Refusal> {
        let mut socket = self.0;
        let Login { name, password } = Login::read(&mut socket).await?.ok_or(Refusal::NoPassword)?;
        let answer = Instant::now() + REFUSAL_DELAY;
        // No user has a name that is not UTF-8.
        let name = String::from_utf8(name).unwrap_or_default();
        if let Err(error) = users.login(&name, password, peer).await {
            tokio::time::sleep_until(answer).await;
            return Err(error.into());
        }
        socket.write_all(&[1, 0]).await?;
        socket.flush().await?;
        Ok((name, Authenticated(socket).finish_auth()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies() {
        let text = || "x".to_owned();
        for (error, code) in [
            (DialError::BadTarget(text()), 1),
            (DialError::TooManyStreams(text()), 1),
            (DialError::Cancelled, 1),
            (DialError::Policy { rule: text(), reason: text() }, 2),
            (DialError::NoRoute(text()), 3),
            (DialError::NoTunnel { node: text(), state: text() }, 3),
            (DialError::TunnelLost { node: text(), reason: text() }, 3),
            (DialError::Resolve(text()), 4),
            (DialError::Unreachable(text()), 4),
            (DialError::Refused(text()), 5),
            (DialError::TimedOut(text()), 6),
        ] {
            assert_eq!(reply(dial_reply(&error)), [5, code, 0, 1, 0, 0, 0, 0, 0, 0], "{error:?}");
        }
    }

    #[test]
    fn targets() {
        let ip = |text: &str| TargetAddr::Ip(text.parse().unwrap());
        let name = |text: &str| TargetAddr::Domain(text.to_owned(), 80);
        for (address, expected) in [
            (ip("10.0.0.1:80"), "10.0.0.1:80"),
            (ip("[fd00::1]:80"), "[fd00::1]:80"),
            (ip("[::ffff:10.0.0.1]:80"), "10.0.0.1:80"),
            (name("N1"), "n1:80"),
            (name("web.default.svc."), "web.default.svc:80"),
            (name("10.0.0.1"), "10.0.0.1:80"),
            (name("fd00::1"), "[fd00::1]:80"),
        ] {
            assert_eq!(as_target(address).unwrap().to_string(), expected);
        }
        for address in [
            ip("10.0.0.1:0"),
            name(""),
            name("a b"),
            name("[::1]"),
            name("127.1"),
            name("a\r\nb"),
            name(&"a".repeat(255)),
        ] {
            assert!(as_target(address).is_err());
        }
    }
}
