//! Answers nodes that call home (RFC 8071), and hosts that call in order to join. Above the link, the tunnel of a node
//! that has called home is the same as one that the master has dialled.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use proto::{NodeName, refusal};
use proto_net::{
    accept::{Acceptor, Tuning},
    handshake::{HandshakePermit, HandshakePermits, Room},
    listeners::Pausable,
    log_throttle::LogThrottle,
    tasks::Tasks,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    absent::Absent,
    config::TunnelsConfig,
    join::{Joining, UnknownHost},
    login::MasterLogin,
    pacing::{BUSY, Pacing, Source},
    refusals::Refusals,
    registry::Registry,
    session::{
        error::TunnelError,
        handshake::{Credentials, Session, SshClient},
        identity::{HostIdentity, Verify},
    },
    supervision::{Linked, Supervisor},
    trust::Trust,
    tunnel::{Direction, Tunnel},
};
use crate::identity::{HostKeyError, LOGIN};

/// The number of callers that are told at the same time to come again.
pub const MAX_FAREWELLS: usize = 1024;
/// The longest time to tell one of them.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
/// The number of bytes that are read of what it sends meanwhile. A node's version and its offer of algorithms are shorter.
const MAX_UNREAD: u64 = 16 * 1024;

/// The purpose of a call home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The call came to the call-home port, so only the SSH handshake tells its purpose.
    Any,
    /// The front end has admitted the call as the link of this node.
    Link(NodeName),
    /// The front end has admitted the call in order to join, under this name if there is one.
    Join(Option<NodeName>),
}

impl Purpose {
    /// Returns the node that the call names, if it names one.
    pub fn node(&self) -> Option<&NodeName> {
        match self {
            Self::Link(node) | Self::Join(Some(node)) => Some(node),
            Self::Join(None) | Self::Any => None,
        }
    }
}

/// What a call has become.
enum Admitted {
    /// A registered tunnel.
    Tunnel(Linked),
    /// A further connection of a tunnel, which has ended once this is cancelled.
    Further(CancellationToken),
    /// Nothing: the host has joined, and calls again as a node.
    Joined,
}

/// Answers calls home.
pub struct CallHome {
    pub config: TunnelsConfig,
    pub client: Arc<SshClient>,
    pub trust: Arc<Trust>,
    pub login: Arc<MasterLogin>,
    pub joining: Arc<Joining>,
    pub registry: Arc<Registry>,
    pub refusals: Refusals,
    pub supervisor: Arc<Supervisor>,
    /// Bounds the calls that have not authenticated yet.
    pub permits: HandshakePermits,
    /// Decides which calls have to come again.
    pub pacing: Pacing,
    /// Has one permit for each caller that may be told so at the same time.
    pub farewells: Arc<Semaphore>,
    /// Bounds the log lines that strangers cause.
    pub log_throttle: Arc<LogThrottle>,
    /// The group that owns the calls and their sessions.
    pub tasks: Tasks,
    /// Cancelled when the agent stops and must not establish new tunnels.
    pub draining: CancellationToken,
}

/// What becomes of a call to the call-home port.
enum Admission {
    Taken(HandshakePermit),
    /// The caller is told to come again, for which there is a permit.
    TurnedAway {
        after: Duration,
        farewell: OwnedSemaphorePermit,
    },
}

impl CallHome {
    /// Accepts calls on the call-home port. Once the agent is stopping, calls are closed at once.
    pub async fn accept(self: Arc<Self>, listener: Pausable<TcpListener>) {
        Acceptor::new(listener, Tuning::Link)
            .serve(
                self.tasks.clone(),
                |peer| (!self.draining.is_cancelled()).then(|| self.admission(peer)),
                |socket, peer, admission| {
                    let home = self.clone();
                    async move {
                        match admission {
                            Admission::Taken(permit) => home.answer(socket, peer, Purpose::Any, permit).await,
                            Admission::TurnedAway { after, farewell } => {
                                say_when(socket, after).await;
                                drop(farewell);
                            }
                        }
                    }
                },
            )
            .await;
    }

    fn admission(&self, peer: SocketAddr) -> Admission {
        // A caller that can't be told when to come again is taken.
        if let Ok(farewell) = self.farewells.clone().try_acquire_owned()
            && let Some(after) = self.turn_away(peer, &Purpose::Any)
        {
            return Admission::TurnedAway { after, farewell };
        }
        Admission::Taken(self.permits.take(peer.ip()))
    }

    /// Returns after what time a caller has to come again, or `None` if its call can be taken now.
    pub fn turn_away(&self, peer: SocketAddr, purpose: &Purpose) -> Option<Duration> {
        let exhausted = match self.permits.room(peer.ip(), BUSY) {
            Room::Enough => return None,
            Room::Little => false,
            Room::Exhausted => true,
        };
        let source = match purpose {
            Purpose::Link(node) => Source::Node(node.clone()),
            Purpose::Any | Purpose::Join(_) => Source::Address(peer.ip().to_canonical()),
        };
        let after = self.pacing.turn_away(source, exhausted)?;
        self.refusals.count("busy");
        Some(after)
    }

    /// Answers a call over the front end's port once its HTTP connection has become a link, and supervises the tunnel
    /// until it ends. `upgrade` returns `None` if the connection does not become a link.
    pub async fn answer_upgrade<T>(
        &self,
        upgrade: impl Future<Output = Option<T>>,
        peer: SocketAddr,
        purpose: Purpose,
    ) where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let permit = self.permits.take(peer.ip());
        let link = tokio::select! {
            link = timeout(self.config.handshake_timeout, upgrade) => link,
            () = permit.evicted.cancelled() => return,
        };
        if let Ok(Some(link)) = link {
            self.answer(link, peer, purpose, permit).await;
        }
    }

    async fn answer<T>(&self, link: T, peer: SocketAddr, purpose: Purpose, permit: HandshakePermit)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let linked = self.link(link, peer, purpose, &permit).await;
        drop(permit);
        match linked {
            Ok(Admitted::Tunnel(linked)) => {
                let node = linked.0.tunnel().node.clone();
                let reason = self.supervisor.clone().supervise(linked).await;
                if !self.registry.is_connected(&node) {
                    self.registry.set_absent(&node, Absent::Lost { reason, since: SystemTime::now() });
                }
            }
            // The link lasts as long as this call is answered.
            Ok(Admitted::Further(ended)) => ended.cancelled().await,
            Ok(Admitted::Joined) => {}
            // An attacker can cause any number of evictions, so they are counted but not logged as warnings.
            Err(error @ TunnelError::Evicted) => tracing::debug!(%peer, %error, "refused a call home"),
            Err(error) => {
                if let Some(times) = self.log_throttle.count(1) {
                    tracing::warn!(%peer, %error, times, "refused a call home");
                }
            }
        }
    }

    /// Lets in whoever calls.
    async fn link<T>(
        &self,
        link: T,
        peer: SocketAddr,
        purpose: Purpose,
        permit: &HandshakePermit,
    ) -> Result<Admitted, TunnelError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let user = self.login.current();
        let verify = only_for(purpose.clone(), self.trust.call_home());
        let credentials = Credentials { verify, login: LOGIN, user: &user, permit: Some(permit) };
        let session = self.client.authenticate(link, credentials, &self.tasks).await;
        let session = session.inspect_err(|error| self.refusals.handshake(error))?;
        tokio::select! {
            linked = self.admit(session, peer, purpose) => linked,
            () = permit.evicted.cancelled() => {
                self.refusals.handshake(&TunnelError::Evicted);
                Err(TunnelError::Evicted)
            }
        }
    }

    /// Makes a tunnel of the session with a known node, and lets an unknown host join.
    async fn admit(
        &self,
        session: Session,
        peer: SocketAddr,
        purpose: Purpose,
    ) -> Result<Admitted, TunnelError> {
        let (direction, name) = match purpose {
            Purpose::Any => (Direction::CallHome, None),
            Purpose::Link(_) => (Direction::CallHomeHttps, None),
            Purpose::Join(name) => (Direction::CallHomeHttps, name),
        };
        match session.identity.clone() {
            HostIdentity::Verified(host) => {
                let present = self.registry.calling(&host);
                let ended = session.state.ended.clone();
                let (from, callers) = ((direction, Some(peer)), self.supervisor.max_callers());
                let established =
                    Tunnel::establish(session, host, from, &self.config, callers, present.as_deref());
                let established = established.await.inspect_err(|error| self.refusals.handshake(error));
                let Some((tunnel, notices)) = established? else { return Ok(Admitted::Further(ended)) };
                Ok(Admitted::Tunnel((self.supervisor.register(tunnel).await?, notices)))
            }
            HostIdentity::Unknown(key, why) => {
                let host = UnknownHost { key: &key, why: &why, name: name.as_ref(), peer };
                let join = self.joining.serve(&session, host);
                match timeout(self.config.handshake_timeout, join).await {
                    Ok(true) => Ok(Admitted::Joined),
                    Ok(false) | Err(_) => Err(self.refusals.host_key(&why)),
                }
            }
        }
    }
}

/// Tells a node when to call again. It costs no cryptography.
async fn say_when<T>(mut socket: T, after: Duration)
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let said = async {
        socket.write_all(&refusal::come_again(after)).await?;
        socket.shutdown().await?;
        // If bytes were left unread, the kernel would reset the connection, and the node might not read what it is told.
        tokio::io::copy(&mut socket.take(MAX_UNREAD), &mut tokio::io::sink()).await
    };
    let _ = timeout(FAREWELL_TIMEOUT, said).await;
}

/// Restricts `verify` to what the call was admitted for, which is one node or a host that is no node yet.
fn only_for(purpose: Purpose, verify: Verify) -> Verify {
    Box::new(move |presented| {
        let (verified, purpose) = (verify(presented), purpose.clone());
        Box::pin(async move {
            match (verified.await?, &purpose) {
                (HostIdentity::Verified(host), Purpose::Link(node)) if host.node != *node => {
                    Err(HostKeyError::OtherNode { admitted: node.clone(), node: host.node })
                }
                (HostIdentity::Verified(host), Purpose::Join(_)) => {
                    Err(HostKeyError::NotJoining { node: host.node })
                }
                (HostIdentity::Unknown(_, why), Purpose::Link(_)) => Err(why.as_ref().clone()),
                (identity, Purpose::Any | Purpose::Link(_) | Purpose::Join(_)) => Ok(identity),
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use russh::keys::{PrivateKey, PublicKeyOrCertificate};
    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        identity::{VerifiedHost, tests::new_key},
        metrics::ReasonLabel,
        tunnels::{
            absent::Absent,
            join::MAX_DECISIONS,
            testing::{Master, n1},
        },
    };

    const HOUR: Duration = Duration::from_secs(3600);

    fn call_home(master: &Master, permits: usize) -> CallHome {
        let log_throttle = Arc::<LogThrottle>::default();
        CallHome {
            config: master.config.clone(),
            client: master.client.clone(),
            trust: master.trust.clone(),
            login: master.login.clone(),
            joining: Arc::new(Joining {
                nodes: master.nodes.subscribe(),
                store: master.store.clone(),
                authorities: master.authorities.clone(),
                host_ttl: HOUR,
                registry: master.registry.clone(),
                refusals: master.refusals.clone(),
                attempts: Default::default(),
                decisions: Arc::new(Semaphore::new(MAX_DECISIONS)),
                log_throttle: log_throttle.clone(),
                tasks: master.tasks.clone(),
            }),
            registry: master.registry.clone(),
            refusals: master.refusals.clone(),
            supervisor: master.supervisor.clone(),
            permits: HandshakePermits::new(permits),
            pacing: Pacing::default(),
            farewells: Arc::new(Semaphore::new(MAX_FAREWELLS)),
            log_throttle,
            tasks: master.tasks.clone(),
            draining: CancellationToken::new(),
        }
    }

    fn count_refused(master: &Master, reason: &'static str) -> u64 {
        master.metrics.refused.get_or_create(&ReasonLabel { reason }).get()
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_delays_its_tunnel_gives_way_to_newcomers() {
        let master = Master::new(HOUR, 8);
        master.registry.expect(&[(n1(), (1, Absent::WaitingForCallHome))].into_iter().collect());
        let (unanswered, mut requests) = mpsc::unbounded_channel();
        *master.node.unanswered.lock().unwrap() = Some(unanswered);
        let home = call_home(&master, 1);
        let peer: SocketAddr = "192.0.2.1:4000".parse().unwrap();
        let link = std::future::ready(Some(master.node.link()));
        let call = timeout(Duration::from_secs(1), home.answer_upgrade(link, peer, Purpose::Any));
        let newcomer = async {
            let unanswered = requests.recv().await.unwrap();
            (home.permits.take(peer.ip()), unanswered)
        };
        let (ended, _kept) = tokio::join!(call, newcomer);
        assert!(ended.is_ok(), "the call has kept its permit");
        assert_eq!((count_refused(&master, "evicted"), master.registry.count()), (1, (0, 1)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_calls_while_many_handshakes_are_in_progress_comes_again_once() {
        let master = Master::new(HOUR, 8);
        let home = call_home(&master, BUSY + 1);
        let peer = |host: u8| SocketAddr::from(([192, 0, 2, host], 4000));
        let mut held: Vec<_> = (0..BUSY - 1).map(|_| home.permits.take(peer(1).ip())).collect();
        let taken = |host| matches!(home.admission(peer(host)), Admission::Taken(_));
        assert!(taken(2), "there is room");
        held.push(home.permits.take(peer(1).ip()));
        assert!(!taken(2) && taken(2) && !taken(3));
        assert!(matches!(home.admission(SocketAddr::from(([198, 51, 100, 1], 4000))), Admission::Taken(_)));
        // Over HTTPS, nodes behind one address are told apart.
        let link = |node: &str| Purpose::Link(node.parse().unwrap());
        let told = |node| home.turn_away(peer(2), &link(node)).is_some();
        assert!(told("n1") && !told("n1") && told("n2"));
        assert_eq!(count_refused(&master, "busy"), 4);
        // There is a bound to those who are told.
        let farewells = home.farewells.clone();
        let _all = farewells.try_acquire_many(u32::try_from(MAX_FAREWELLS).unwrap()).unwrap();
        assert!(taken(4));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_told_to_come_again_need_not_read_it_and_nothing_is_lost_if_it_does() {
        let told = refusal::come_again(Duration::from_secs(5));
        let (near, mut node) = tokio::io::duplex(4096);
        let began = tokio::time::Instant::now();
        let read = async {
            node.write_all(b"SSH-2.0-node-agent\r\n").await.unwrap();
            let mut read = Vec::new();
            node.read_to_end(&mut read).await.unwrap();
            drop(node);
            read
        };
        let ((), read) = tokio::join!(say_when(near, Duration::from_secs(5)), read);
        assert_eq!((read, began.elapsed()), (told, Duration::ZERO));
        let (near, _silent) = tokio::io::duplex(1);
        say_when(near, Duration::from_secs(5)).await;
        assert!(began.elapsed() <= FAREWELL_TIMEOUT + Duration::from_millis(1));
    }

    fn verified(key: &PrivateKey, node: &str) -> HostIdentity {
        HostIdentity::Verified(VerifiedHost {
            node: node.parse().unwrap(),
            key: key.public_key().clone(),
            not_after: None,
            addresses: Vec::<IpAddr>::new(),
        })
    }

    fn unknown(key: &PrivateKey) -> HostIdentity {
        let why = HostKeyError::Store("unknown".to_owned());
        HostIdentity::Unknown(Box::new(key.public_key().clone()), Arc::new(why))
    }

    #[tokio::test]
    async fn a_call_is_good_for_what_it_was_admitted_for_and_nothing_else() {
        let key = new_key();
        let node = |name: &str| name.parse::<NodeName>().unwrap();
        for (purpose, of_n1, of_nobody) in [
            (Purpose::Any, Ok(()), Ok(())),
            (Purpose::Link(node("n1")), Ok(()), Err("store")),
            (Purpose::Link(node("n2")), Err("other_node"), Err("store")),
            (Purpose::Join(None), Err("not_joining"), Ok(())),
            (Purpose::Join(Some(node("n1"))), Err("not_joining"), Ok(())),
        ] {
            for (identity, want) in [(verified(&key, "n1"), of_n1), (unknown(&key), of_nobody)] {
                let verified: Verify = Box::new(move |_| Box::pin(std::future::ready(Ok(identity.clone()))));
                let verify = only_for(purpose.clone(), verified);
                let presented = PublicKeyOrCertificate::from(key.public_key().clone());
                let outcome = verify(&presented).await.map(|_| ()).map_err(|error| error.kind());
                assert_eq!(outcome, want, "{purpose:?}");
            }
        }
    }
}
