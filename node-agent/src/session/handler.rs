//! What a session answers to each message of its peer.

use std::{net::IpAddr, sync::Arc};

use proto::{
    Host, Target,
    mux::{
        FRONT_END_SUBSYSTEM, Version,
        ids::{Numbering, Opener},
    },
    refusal,
    revocation::{self, SignedList},
};
use proto_net::{
    channel::WriteHalf,
    gate::Gate,
    mux::{Feeder, Greeting, Notice},
    ssh,
    tasks::Tasks,
};
use russh::{
    Channel, ChannelId, ChannelOpenFailure,
    keys::{Certificate, PublicKey},
    server::{self, Auth, ChannelOpenHandle, Msg},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::{
    error::SessionError,
    multiplexers::Registered,
    services::SessionServices,
    state::SessionState,
    streams::{EXPIRED, RequestedChannel, STOPPING, TOO_MANY_STREAMS},
    user::AuthenticatedUser,
};
mod muxes;

use crate::{
    drain::DRAINED,
    identity::{
        renewal::SessionRenewals,
        trust::Expected,
        user::{MASTER, UserRole},
    },
    shares::Permit,
};

/// Session channels that a master may have open at once: one for each subsystem, and one to spare.
const MAX_SESSION_CHANNELS: usize = 4;

/// The number of a master's notices that a session logs. An honest master sends a few, and a hostile one can send any
/// number.
const MAX_LOGGED_NOTICES: usize = 16;

const TOO_MANY_SESSIONS: &str = "this node has too many sessions of this master, or of all masters, already";
/// Said for new channels of a session that is [worn out](proto_net::channel::Channels::worn_out), and when it ends.
pub(super) const WORN_OUT: &str =
    "this session has had too many channels that its client did not close: connect again";

/// How authentication ended.
pub(super) type Proof = Result<Arc<AuthenticatedUser>, SessionError>;

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Whatever the peer, which has dialled it, wants.
    Any,
    /// A session of its own, for which this node has called a master home.
    Session,
    /// A further connection, which a master has asked for.
    Further,
}

pub(super) struct Handler {
    services: Arc<SessionServices>,
    state: Arc<SessionState>,
    gate: Gate,
    /// The session's tasks.
    tasks: Tasks,
    peer: Option<IpAddr>,
    /// Who may authenticate on this link.
    expected: Expected,
    purpose: Purpose,
    user: Option<Arc<AuthenticatedUser>>,
    /// The permit of the session.
    _session: Option<Permit>,
    /// Where the end of authentication is reported, once.
    proof: Option<oneshot::Sender<Proof>>,
    /// One permit for each stream that is a channel of its own, until its socket is closed.
    stream_permits: Arc<Semaphore>,
    session_channels: Vec<ChannelId>,
    /// The channel of a multiplexer on which the master's HELLO has not come yet.
    greeting: Option<(ChannelId, Greeting)>,
    /// The multiplexer of the tunnel.
    master_mux: Option<MasterMux>,
    /// The entry of that multiplexer for further connections.
    registered: Option<Registered>,
    /// The channel of the multiplexer on which this node opens streams to the front end of a master of an earlier release.
    node_mux: Option<(ChannelId, Feeder)>,
    revocation_list: Option<RevocationList>,
    /// The permit of the one exchange of a list that a session may have at a time.
    revocation_exchange: Arc<Semaphore>,
    /// Made with the first certificate that the master sends.
    renewals: Option<SessionRenewals>,
    /// How many more of the master's notices are logged.
    notices_to_log: usize,
}

struct MasterMux {
    channel: ChannelId,
    feeder: Feeder,
    /// Absent on a further connection of a multiplexer.
    notices: Option<mpsc::Receiver<Notice>>,
}

/// The channel on which a list of revoked certificates comes.
struct RevocationList {
    channel: ChannelId,
    /// The part of the list that has come, and the permit of the exchange; `None` once the list is complete.
    received: Option<(Vec<u8>, OwnedSemaphorePermit)>,
}

impl Handler {
    pub(super) fn new(
        services: Arc<SessionServices>,
        state: Arc<SessionState>,
        gate: Gate,
        tasks: Tasks,
        peer: Option<IpAddr>,
        (expected, purpose): (Expected, Purpose),
    ) -> (Self, oneshot::Receiver<Proof>) {
        let (proof, proved) = oneshot::channel();
        let stream_permits = Arc::new(Semaphore::new(services.limits.max_streams));
        let handler = Self {
            services,
            state,
            gate,
            tasks,
            peer,
            expected,
            purpose,
            user: None,
            _session: None,
            proof: Some(proof),
            stream_permits,
            session_channels: Vec::new(),
            greeting: None,
            master_mux: None,
            registered: None,
            node_mux: None,
            revocation_list: None,
            revocation_exchange: Arc::new(Semaphore::new(1)),
            renewals: None,
            notices_to_log: MAX_LOGGED_NOTICES,
        };
        (handler, proved)
    }

    fn report_proof(&mut self, proof: Proof) {
        if let Some(report) = self.proof.take() {
            let _ = report.send(proof);
        }
    }

    fn master(&self) -> Option<Arc<AuthenticatedUser>> {
        self.user.clone().filter(|user| user.is_master())
    }

    /// Lets a user in whose certificate is accepted, unless there are too many sessions.
    fn admit(&mut self, role: UserRole, certificate: &Certificate) -> Auth {
        let services = self.services.clone();
        let (user, bounds, reason) = match &role {
            UserRole::Master => (MASTER, &services.bounds_of_masters, TOO_MANY_SESSIONS),
            UserRole::Person { login, .. } => {
                (login.as_str(), &services.bounds_of_people, "limits.max_sessions reached")
            }
        };
        let (key, key_id, serial) = (certificate.public_key(), certificate.key_id(), certificate.serial());
        let peer = self.peer.map(tracing::field::display);
        let Some(session) = bounds.sessions.of(key.clone()).try_take() else {
            if let Some(times) = services.log_throttle.count(1) {
                tracing::warn!(user, key_id, serial, peer, reason, times, "refused a session");
            }
            if role == UserRole::Master {
                self.report_proof(Err(SessionError::MasterCertificate(reason.to_owned())));
            }
            return Auth::reject();
        };
        self._session = Some(session);
        tracing::info!(user, key_id, serial, peer, "authenticated");
        let (streams, lookups) = (bounds.streams.of(key.clone()), bounds.lookups.of(key.clone()));
        let (certificate, clock) = (certificate.clone(), services.clock);
        let user = Arc::new(AuthenticatedUser { role, certificate, clock, streams, lookups });
        if user.is_master() {
            services.connected_masters.add(&user, &self.state);
        }
        self.user = Some(user);
        Auth::Accept
    }

    /// Why the session takes no new channels for streams, if it does not.
    fn takes_no_channels(&self, user: &AuthenticatedUser) -> Option<ChannelOpenFailure> {
        if user.has_expired() {
            Some(prohibited(EXPIRED))
        } else if self.services.shutdown.draining.is_cancelled() {
            Some(prohibited(STOPPING))
        } else if self.state.is_replaced() {
            Some(prohibited("another link has taken the place of this session"))
        } else if self.services.streams.drain.is_over() {
            Some(prohibited(DRAINED))
        } else if self.state.channels.is_worn_out() {
            Some(shortage(WORN_OUT))
        } else {
            None
        }
    }

    /// Takes bytes of a list of revoked certificates, and answers once it is complete.
    fn take_revocation_list(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        session: &server::Session,
    ) -> Result<(), SessionError> {
        let list = self.revocation_list.as_mut().ok_or(SessionError::UnaskedRevocationList)?;
        let (mut received, exchange) = list.received.take().ok_or(SessionError::UnaskedRevocationList)?;
        received.extend_from_slice(data);
        let Some(signed) = SignedList::decode(&received)? else {
            list.received = Some((received, exchange));
            return Ok(());
        };
        let (revocations, handle) = (self.services.revocations.clone(), session.handle());
        self.tasks.spawn(async move {
            if let Some(report) = revocations.take(signed, exchange).await {
                let _ = handle.data(channel, report.encode()).await;
            }
        });
        Ok(())
    }
}

impl server::Handler for Handler {
    type Error = SessionError;

    async fn auth_none(&mut self, user: &str) -> Result<Auth, SessionError> {
        if let Some(reason) = refusal::from_login(user) {
            self.report_proof(Err(SessionError::RefusedByMaster(reason)));
        }
        Ok(Auth::reject())
    }

    async fn auth_publickey_offered(
        &mut self,
        _user: &str,
        _offer: server::PublicKeyOffer<'_>,
    ) -> Result<Auth, SessionError> {
        Ok(Auth::Accept)
    }

    async fn auth_publickey(
        &mut self,
        user: &str,
        key: server::VerifiedPublicKey<'_>,
    ) -> Result<Auth, SessionError> {
        if let Some(times) = self.services.log_throttle.count(1) {
            let fingerprint = PublicKey::fingerprint(key.public_key, Default::default());
            let (user, peer) = (refusal::printable(user), self.peer.map(tracing::field::display));
            tracing::info!(user, %fingerprint, peer, times, "refused a key without certificate");
        }
        Ok(Auth::reject())
    }

    async fn auth_openssh_certificate(
        &mut self,
        user: &str,
        certificate: &Certificate,
    ) -> Result<Auth, SessionError> {
        let now = self.services.clock.now();
        match self.services.trust.verify(self.expected, user, certificate, self.peer, now) {
            Ok(role) => Ok(self.admit(role, certificate)),
            Err(error) => {
                let why = refusal::printable(&error.to_string());
                if let Some(times) = self.services.log_throttle.count(1) {
                    let [user, key_id] = [user, certificate.key_id()].map(refusal::printable);
                    let peer = self.peer.map(tracing::field::display);
                    tracing::warn!(user, key_id, peer, error = %why, times, "refused a certificate");
                }
                if user == MASTER {
                    self.report_proof(Err(SessionError::MasterCertificate(why)));
                }
                Ok(Auth::reject())
            }
        }
    }

    async fn auth_succeeded(&mut self, _session: &mut server::Session) -> Result<(), SessionError> {
        if let Some(user) = self.user.clone() {
            self.report_proof(Ok(user));
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut server::Session,
    ) -> Result<(), SessionError> {
        if self.master().is_some() && self.session_channels.len() < MAX_SESSION_CHANNELS {
            self.session_channels.push(channel.id());
            reply.accept().await;
        } else {
            reply
                .reject(prohibited("this node serves port forwarding only: no shell, no commands, no sftp"))
                .await;
        }
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        session: &mut server::Session,
    ) -> Result<(), SessionError> {
        let Some(master) = self.master() else { return Ok(session.channel_failure(channel)?) };
        let has_no_mux = self.master_mux.is_none() && self.greeting.is_none();
        let may_be_new = self.purpose != Purpose::Further;
        if name == Version::V2.subsystem() && has_no_mux {
            session.channel_success(channel)?;
            self.greeting = Some((channel, Greeting::default()));
        } else if name == Version::V1.subsystem() && has_no_mux && may_be_new {
            session.channel_success(channel)?;
            self.start_master_mux(Numbering::All { opener: Opener::Peer }, None, channel, session);
        } else if name == FRONT_END_SUBSYSTEM
            && self.services.front_ends.is_some()
            && self.node_mux.is_none()
            && may_be_new
        {
            session.channel_success(channel)?;
            self.start_node_mux(master, channel, session);
        } else if name == revocation::SUBSYSTEM
            && self.revocation_list.is_none()
            && let Ok(exchange) = self.revocation_exchange.clone().try_acquire_owned()
        {
            session.channel_success(channel)?;
            self.revocation_list = Some(RevocationList { channel, received: Some((Vec::new(), exchange)) });
            session.data(channel, self.services.revocations.report(None).encode())?;
        } else {
            session.channel_failure(channel)?;
        }
        Ok(())
    }

    async fn shell_request(
        &mut self,
        channel: ChannelId,
        session: &mut server::Session,
    ) -> Result<(), SessionError> {
        Ok(session.channel_failure(channel)?)
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        _command: &[u8],
        session: &mut server::Session,
    ) -> Result<(), SessionError> {
        Ok(session.channel_failure(channel)?)
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _originator_address: &str,
        _originator_port: u32,
        reply: ChannelOpenHandle,
        _session: &mut server::Session,
    ) -> Result<(), SessionError> {
        let Some(user) = self.user.clone() else { return Ok(()) };
        if let Some(failure) = self.takes_no_channels(&user) {
            reply.reject(failure).await;
            return Ok(());
        }
        let Some(target) = parse_target(host, port) else {
            reply.reject(prohibited("the target is not HOST:PORT")).await;
            return Ok(());
        };
        let streams = self.services.streams.clone();
        let permit = self.stream_permits.clone().try_acquire_owned().ok();
        let Some((permit, room)) = permit.and_then(|permit| Some((permit, streams.room(&user)?))) else {
            reply.reject(shortage(TOO_MANY_STREAMS)).await;
            return Ok(());
        };
        let channels = self.state.channels.clone();
        channels.on_open(channel.id());
        let requested = RequestedChannel { half: WriteHalf::Server(channel.split().1), reply, target };
        self.tasks.spawn(async move {
            streams.serve_channel(requested, user, channels, room).await;
            drop(permit);
        });
        Ok(())
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        session: &mut server::Session,
    ) -> Result<(), SessionError> {
        if self.revocation_list.as_ref().is_some_and(|list| list.channel == channel) {
            return self.take_revocation_list(channel, data, session);
        }
        let data = self.greet(channel, data, session)?;
        match self.feed(channel, data) {
            Some(fed) => fed,
            None if self.state.channels.on_data(channel, data).await => Ok(()),
            None => Ok(session.close(channel)?),
        }
    }

    async fn extended_data(
        &mut self,
        _channel: ChannelId,
        _code: u32,
        data: &[u8],
        _session: &mut server::Session,
    ) -> Result<(), SessionError> {
        if self.master().is_some() {
            let _ = self.state.refusal.set(refusal::printable(&String::from_utf8_lossy(data)));
        }
        Ok(())
    }

    fn adjust_window(&mut self, _channel: ChannelId, current: u32) -> u32 {
        // The multiplexer drains its channel at once and bounds what is on the way itself. russh has one size for all
        // channels of a session, so this also holds for direct-tcpip channels beside the multiplexer. What these may have
        // in memory is bounded by `Channels`, which makes the whole session wait.
        let has_mux = self.master_mux.is_some() || self.greeting.is_some();
        if has_mux { ssh::TUNNEL_WINDOW } else { current }
    }

    async fn channel_eof(
        &mut self,
        channel: ChannelId,
        _session: &mut server::Session,
    ) -> Result<(), SessionError> {
        self.state.channels.on_eof(channel);
        Ok(())
    }

    async fn channel_close(
        &mut self,
        channel: ChannelId,
        _session: &mut server::Session,
    ) -> Result<(), SessionError> {
        self.revocation_list.take_if(|list| list.channel == channel);
        self.session_channels.retain(|id| *id != channel);
        self.state.channels.on_close(channel);
        self.node_mux.take_if(|(id, _)| *id == channel);
        self.greeting.take_if(|(id, _)| *id == channel);
        // Another multiplexer in this session would count its streams anew, so the session ends with the first.
        match self.master_mux.take_if(|mux| mux.channel == channel) {
            Some(_) => Err(SessionError::MultiplexerClosed),
            None => Ok(()),
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.state.channels.close("the SSH session ended");
    }
}

/// The reason codes are those of RFC 4254 §5.1.
fn prohibited(reason: &str) -> ChannelOpenFailure {
    ChannelOpenFailure::Other { code: 1, reason: reason.to_owned() }
}

fn shortage(reason: &str) -> ChannelOpenFailure {
    ChannelOpenFailure::Other { code: 4, reason: reason.to_owned() }
}

fn parse_target(host: &str, port: u32) -> Option<Target> {
    let port = u16::try_from(port).ok().filter(|port| *port > 0)?;
    Some(Target::new(Host::parse(host).ok()?, port))
}
