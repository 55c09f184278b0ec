//! SOCKS5 (RFC 1928), for browsers, curl and whatever else knows proxies. CONNECT only; names are routed as names,
//! and resolved by the node if at all.
//!
//! Without a users file there is no authentication: who may call is the socket file's mode, or whoever is on this
//! host. With one, callers show a user name and password (RFC 1929), which pass in the clear: beyond loopback that is
//! for networks one trusts. The password is read here and not by the SOCKS library, which would log it.

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
use proto_net::{dialer::Origin, handshake::Places};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::Instant,
};
use zeroize::Zeroizing;

use super::{
    door::{Common, Dialled, EgressListener},
    early::{self, WithEarly},
    socket::Socket,
    users::{LoginError, Users},
};
use crate::stream::caller::Caller;

/// Callers at once that have not shown their password yet.
const HANDSHAKES: usize = 256;
/// When a refusal is answered, counted from when the password came: by then it does not show what was computed.
const REFUSAL_DELAY: Duration = Duration::from_secs(1);

/// The egress listener.
pub struct Socks5 {
    common: Common,
    users: Option<Users>,
    handshakes: Places,
}

impl Socks5 {
    /// With `users`, every caller must be one of them.
    pub fn new(common: Common, users: Option<Users>) -> Self {
        Self { common, users, handshakes: Places::new(HANDSHAKES) }
    }
}

impl EgressListener for Socks5 {
    fn common(&self) -> &Common {
        &self.common
    }

    async fn serve<S: Socket>(self: Arc<Self>, mut socket: S, mut caller: Caller) {
        // Boxed, so that a long-lived stream does not keep the room that the beginning needed.
        let begun = Box::pin(self.begin(&mut socket, &mut caller)).await;
        if let Some((target, connection, early)) = begun {
            let (read, write) = socket.halves();
            self.common.relay(WithEarly { early, inner: read }, write, connection, target, caller).await;
        }
    }
}

/// Why no dial was made.
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
    #[error("{target:?} is no target: {error}")]
    Target { target: String, error: InvalidTarget },
    #[error("the handshake did not end in time")]
    Timeout,
}

impl Socks5 {
    /// Up to the answer: the connection if it succeeded, and what the caller has sent already.
    async fn begin<S: Socket>(
        &self,
        socket: &mut S,
        caller: &mut Caller,
    ) -> Option<(Target, Dialled, BytesMut)> {
        let target = self.bounded_greeting(socket, caller).await?;
        match early::dial(&self.common, socket, &target, caller, BytesMut::new()).await {
            Ok((dialled, early)) => {
                socket.write_all(&reply(ReplyError::Succeeded)).await.ok()?;
                socket.flush().await.ok()?;
                Some((target, dialled, early))
            }
            Err(error) => {
                self.common.dial_failed(&target, caller, &error);
                if error != DialError::Cancelled {
                    early::refuse(socket, &reply(dial_reply(&error))).await;
                }
                None
            }
        }
    }

    /// Who has not shown a password can't take the places of those who have.
    async fn bounded_greeting<S: Socket>(&self, socket: &mut S, caller: &mut Caller) -> Option<Target> {
        let Some(peer) = self.users.as_ref().and(socket.peer()) else {
            return self.greet(socket, caller).await;
        };
        let place = self.handshakes.take(peer);
        let origin = caller.origin.clone();
        tokio::select! {
            target = self.greet(socket, caller) => target,
            () = place.evicted.cancelled() => {
                self.common.bad_request(caller.door, &origin, &"gave its place to a newer handshake");
                None
            }
        }
    }

    /// The handshake up to the target; who is refused is told so.
    async fn greet<S: Socket>(&self, socket: &mut S, caller: &mut Caller) -> Option<Target> {
        let handshake = tokio::time::timeout(self.common.head_timeout, self.handshake(socket, caller)).await;
        let refusal = match handshake.unwrap_or(Err(Refusal::Timeout)) {
            Ok(target) => return Some(target),
            // Nobody there to be answered.
            Err(Refusal::Io(_) | Refusal::Protocol(SocksServerError::Io { .. })) => return None,
            Err(refusal) => refusal,
        };
        self.common.bad_request(caller.door, &caller.origin, &refusal);
        let answer = match refusal {
            Refusal::Command => reply(ReplyError::CommandNotSupported).to_vec(),
            Refusal::Target { .. } => reply(ReplyError::GeneralFailure).to_vec(),
            Refusal::NoPassword | Refusal::Login(_) => vec![1, 1],
            // Either answered by the library, or without an answer in the protocol.
            Refusal::Protocol(_) | Refusal::Io(_) | Refusal::Timeout => Vec::new(),
        };
        early::refuse(socket, &answer).await;
        None
    }

    async fn handshake<S: Socket>(&self, socket: &mut S, caller: &mut Caller) -> Result<Target, Refusal> {
        // Only a Unix socket has none, and it has no users.
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
    let refused =
        |error| Refusal::Target { target: format!("{host}:{port}").chars().take(100).collect(), error };
    if port == 0 {
        return Err(refused(InvalidTarget::Port));
    }
    Ok(Target::new(Host::parse(&host).map_err(refused)?, port))
}

/// The address that a reply has room for is that of the master's own socket; there is none.
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
    /// Gives the user's name.
    async fn log_in(
        self,
        users: &Users,
        peer: IpAddr,
    ) -> Result<(String, Socks5ServerProtocol<T, states::Authenticated>), Refusal> {
        let mut socket = self.0;
        if socket.read_u8().await? != 1 {
            return Err(Refusal::NoPassword);
        }
        let name = read_text(&mut socket).await?;
        let password = Zeroizing::new(read_text(&mut socket).await?);
        let answer = Instant::now() + REFUSAL_DELAY;
        // A name that is not UTF-8 belongs to no user.
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

/// A length, and as many bytes.
async fn read_text(socket: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut text = vec![0; usize::from(socket.read_u8().await?)];
    socket.read_exact(&mut text).await?;
    Ok(text)
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
