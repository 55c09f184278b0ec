//! The SSH handshake on a link, which results in a [`Session`] once both sides have authenticated.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use proto::{keep_alive, refusal};
use proto_net::{
    channel::Channels,
    gate::Gate,
    handshake::{BEGUN, HandshakePermit},
    link::Link,
    ssh, stalls,
    tasks::Tasks,
};
use russh::{
    SshId,
    client::{self, Handle},
    keys::PrivateKeyWithHashAlg,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    error::TunnelError,
    handler::ClientHandler,
    identity::{HostIdentity, Verify},
    state::{Loss, SessionState},
};
use crate::{identity::UserIdentity, tunnels::config::TunnelsConfig};

/// The longest time to send a refusal, or to wait for the reason of the node's refusal.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest time for each step of closing a session.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// The advice in the error when a port does not speak SSH.
const NOT_SSH_HINT: &str = "If another service holds this port, let the node call home (`call_home:` in its config), \
     give node-agent another port (`listen:`, and `dial:` in the inventory), or use the sshd that runs there \
     (`master-agent sshd-config`)";

/// How both sides of one link authenticate.
pub struct Credentials<'a> {
    /// Verifies the node's host key.
    pub verify: Verify,
    /// The SSH user name to log in with.
    pub login: &'a str,
    pub user: &'a Arc<UserIdentity>,
    /// The permit of the handshake, which a newer handshake may evict. `None` means that handshakes are not limited.
    pub permit: Option<&'a HandshakePermit>,
}

/// Performs handshakes as the SSH client.
pub struct SshClient {
    config: TunnelsConfig,
    stalls: stalls::ByDirection,
}

/// An SSH session in which both sides have authenticated. Dropping it ends it.
pub struct Session {
    pub identity: HostIdentity,
    /// The key and certificate that authenticated the master.
    pub(crate) user: Arc<UserIdentity>,
    pub(crate) handle: Arc<Handle<ClientHandler>>,
    pub(crate) state: Arc<SessionState>,
    pub(crate) channels: Channels,
    pub(crate) stalls: stalls::ByDirection,
    pub(crate) tasks: Tasks,
    pub(super) gate: Gate,
    cut: CancellationToken,
}

impl SshClient {
    /// Takes the counters of how often, and for how long, streams wait.
    pub fn new(config: TunnelsConfig, stalls: stalls::ByDirection) -> Self {
        Self { config, stalls }
    }

    /// Performs the handshake. The session's tasks belong to a group below `tasks`.
    pub async fn authenticate<T>(
        &self,
        link: T,
        credentials: Credentials<'_>,
        tasks: &Tasks,
    ) -> Result<Session, TunnelError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Credentials { verify, login, user, permit } = credentials;
        let tasks = tasks.child();
        // The link ends with the group, whoever still holds the session.
        let cut = tasks.child_token();
        // A failure or a drop of this future must also end the task in which russh runs the session.
        let cut_on_drop = cut.clone().drop_guard();
        let received = permit.map(|permit| permit.received.clone()).unwrap_or_default();
        let (link, gate) = Link::new(link, cut.clone(), received.clone());
        // To a node-agent. To a plain sshd, russh sends the keep-alives of SSH.
        gate.keep_alive(keep_alive::quiet(self.config.keepalive_interval));
        let patience = self.config.sshd_stall_timeout;
        let channels = Channels::new(gate.clone(), tasks.clone(), patience, self.stalls.up.clone());
        let state = Arc::<SessionState>::default();
        let handler = ClientHandler {
            verify,
            state: state.clone(),
            channels: channels.clone(),
            stalls: self.stalls.clone(),
        };
        let handshake = async {
            let (mut handle, identity) = exchange_keys(link, self.ssh_config(), handler, &state).await?;
            log_in(&mut handle, &state, login, user).await?;
            Ok::<_, TunnelError>((handle, identity))
        };
        let limit = self.config.handshake_timeout;
        let (handle, identity) = tokio::select! {
            result = timeout(limit, handshake) => {
                result.map_err(|_| timed_out(limit, received.load(Ordering::Relaxed)))??
            }
            () = evicted(permit) => return Err(TunnelError::Evicted),
        };
        cut_on_drop.disarm();
        Ok(Session {
            identity,
            user: user.clone(),
            handle: Arc::new(handle),
            state,
            channels,
            stalls: self.stalls.clone(),
            tasks,
            gate,
            cut,
        })
    }

    fn ssh_config(&self) -> client::Config {
        client::Config {
            client_id: SshId::Standard(refusal::MASTER_AGENT.into()),
            limits: ssh::master_limits(self.config.rekey_interval),
            window_size: ssh::TUNNEL_WINDOW,
            maximum_packet_size: ssh::MAX_PACKET,
            channel_buffer_size: 16,
            preferred: ssh::preferred(),
            inactivity_timeout: None,
            keepalive_interval: Some(self.config.keepalive_interval),
            keepalive_max: self.config.keepalive_max,
            nodelay: true,
            ..client::Config::default()
        }
    }
}

impl Session {
    /// Whether the other side identifies itself as a node-agent.
    pub fn is_with_node_agent(&self) -> bool {
        self.state.is_node_agent()
    }

    /// Ends the session and tells the other side why.
    pub async fn close(&self, reason: &str) {
        self.close_after(async {}, reason).await;
    }

    /// Ends the session after `last_messages`, which has [`CLOSE_TIMEOUT`] to complete, and tells the other side why.
    pub(crate) async fn close_after(&self, last_messages: impl Future<Output = ()>, reason: &str) {
        let leave = async {
            last_messages.await;
            let _ = self.handle.disconnect(russh::Disconnect::ByApplication, reason, "").await;
        };
        let _ = timeout(CLOSE_TIMEOUT, leave).await;
        let _ = timeout(CLOSE_TIMEOUT, self.state.ended.cancelled()).await;
        self.cut();
    }

    fn cut(&self) {
        self.cut.cancel();
        self.tasks.cancel();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.cut();
    }
}

/// Performs the key exchange, which verifies the host key. A node whose key is refused is told why.
async fn exchange_keys<T>(
    link: Link<T>,
    config: client::Config,
    handler: ClientHandler,
    state: &SessionState,
) -> Result<(Handle<ClientHandler>, HostIdentity), TunnelError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connected = client::connect_stream(Arc::new(config), link, handler).await;
    match (connected, state.identity.get().cloned()) {
        (Ok(handle), Some(Ok(identity))) => Ok((handle, identity)),
        (Ok(mut handle), Some(Err(refused))) => {
            let _ = timeout(REFUSAL_TIMEOUT, refuse(&mut handle, state, &refused.for_peer())).await;
            Err(TunnelError::HostKey(refused))
        }
        (Err(_), Some(Err(refused))) => Err(TunnelError::HostKey(refused)),
        (Ok(_), None) => Err(TunnelError::Ssh(russh::Error::UnknownKey)),
        (Err(error), Some(Ok(_)) | None) => Err(not_ssh(error)),
    }
}

/// Tells a node why its key is refused, before this master has authenticated.
async fn refuse(handle: &mut Handle<ClientHandler>, state: &SessionState, reason: &str) {
    if state.is_node_agent() {
        let _ = handle.authenticate_none(refusal::to_login(reason)).await;
    }
    let _ = handle.disconnect(russh::Disconnect::ByApplication, reason, "").await;
    state.ended.cancelled().await;
}

async fn log_in(
    handle: &mut Handle<ClientHandler>,
    state: &SessionState,
    login: &str,
    user: &UserIdentity,
) -> Result<(), TunnelError> {
    let key = Arc::new(user.key.clone());
    let result = match &user.certificate {
        Some(certificate) => handle.authenticate_openssh_cert(login, key, certificate.clone()).await?,
        None => {
            let hash = handle.best_supported_rsa_hash().await?.flatten();
            handle.authenticate_publickey(login, PrivateKeyWithHashAlg::new(key, hash)).await?
        }
    };
    if result.success() {
        return Ok(());
    }
    // A node-agent gives the reason and disconnects.
    let closed = handle.is_closed();
    if closed || state.is_node_agent() {
        let _ = timeout(REFUSAL_TIMEOUT, state.ended.cancelled()).await;
    }
    let unauthorized = |said| TunnelError::Unauthorized { user: login.to_owned(), said };
    Err(match state.end_reason() {
        Some((Loss::ByNode, said)) => unauthorized(format!(" ({said})")),
        // russh reports the end of a session in the same way as a refusal.
        Some(_) | None if closed => TunnelError::Closed,
        Some(_) | None => unauthorized(String::new()),
    })
}

fn timed_out(limit: Duration, received: usize) -> TunnelError {
    if received >= BEGUN {
        return TunnelError::Timeout(limit);
    }
    let limit = humantime::format_duration(limit);
    TunnelError::NotSsh(format!("no SSH server answered there within {limit}. {NOT_SSH_HINT}"))
}

async fn evicted(permit: Option<&HandshakePermit>) {
    match permit {
        Some(permit) => permit.evicted.cancelled().await,
        None => std::future::pending().await,
    }
}

/// Returns the error of a failed key exchange, with a hint if something other than an SSH server seems to listen there.
fn not_ssh(error: russh::Error) -> TunnelError {
    if matches!(error, russh::Error::Disconnect | russh::Error::Version | russh::Error::IO(_)) {
        return TunnelError::NotSsh(format!(
            "no SSH server completed a handshake there ({error}). {NOT_SSH_HINT}"
        ));
    }
    TunnelError::Ssh(error)
}
