//! Call home (RFC 8071): this node dials a master and serves the same session as on a link that the master dials.
//!
//! Each master has a loop of its own, which keeps one session with it and makes another before the master's certificate
//! ends.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use proto::{
    backoff::Backoff,
    call_home::{Master, Purpose},
    refusal::LONGEST_WAIT,
};
use proto_net::{clock::Clock, log_throttle::LogThrottle, tasks::Tasks};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, oneshot},
    task::{JoinError, JoinHandle},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    dialer::Dialer,
    greeting::{Greeting, Overheard},
    https::{self, CallHomeHttps, HttpsError, LinkRequest},
    identity::current::CurrentIdentity,
    session::{
        error::SessionError,
        serve::{Authenticated, Direction, SessionServer},
    },
    tcp::{self, ConnectError},
};

/// The ceilings of the pauses between calls begin with this and double. The first call after a session is lost is
/// practically made at once.
const MIN_BACKOFF: Duration = Duration::from_millis(250);
/// The greatest ceiling while the master does not answer.
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// The greatest ceiling while the master answers and refuses, so that the node is back soon after a person has mended what
/// is wrong.
const MAX_BACKOFF_AFTER_ANSWER: Duration = Duration::from_secs(2);
/// The greatest time that is added to what a master says, so that nodes that are told the same come one after another.
const SPREAD: Duration = Duration::from_secs(1);
/// A session that lasts so long shows that the master is well. One that ends sooner does not.
const USEFUL_SESSION: Duration = Duration::from_secs(10);
/// How long a session has to last until the one that it replaces takes no new streams. A master that has enough links
/// closes the next one at once.
const SETTLE: Duration = Duration::from_secs(1);
/// How long a session goes on that its master wants to be replaced, unless the master itself ends it. The master may
/// still ask for streams on it while other nodes make their links.
const HELD: Duration = Duration::from_secs(60);
/// The most sessions with one master that go on so.
const MAX_HELD: usize = 32;

/// Calls masters home. Cheap to clone.
#[derive(Clone)]
pub struct CallHome {
    pub server: SessionServer,
    pub identity: CurrentIdentity,
    /// Knows this node's name.
    pub dialer: Arc<Dialer>,
    pub https: CallHomeHttps,
    /// For connecting to a master.
    pub connect_timeout: Duration,
    pub clock: Clock,
    /// Cancelled when no further links are made.
    pub leaving: CancellationToken,
    /// The sessions' tasks.
    pub tasks: Tasks,
}

/// Why a call, or the session that it led to, ended. The text is for people.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error(transparent)]
    Tcp(#[from] ConnectError),
    #[error(transparent)]
    Https(#[from] HttpsError),
    #[error("this host has no name yet: join it (`node-agent join`)")]
    Unnamed,
    #[error("the master closed the session before it had authenticated")]
    ClosedEarly,
    #[error("the master wants to be called again after {}", humantime::format_duration(*.0))]
    ComeAgain(Duration),
    /// Nobody has said anything on the link, or what was said is not SSH.
    #[error(transparent)]
    NoAnswer(Box<CallError>),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("the session's task failed: {0}")]
    Task(JoinError),
}

/// What a call, or the session that it led to, says about the time of the next call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The master has not answered.
    Missing,
    /// The master has answered, or this node needs a person to be able to call.
    Given,
    /// The master wants to be called again after this time.
    ComeAgain(Duration),
}

impl CallError {
    fn answer(&self) -> Answer {
        match self {
            Self::Https(error) => match error.retry_after() {
                Some(after) => Answer::ComeAgain(after),
                None if error.is_without_answer() => Answer::Missing,
                None => Answer::Given,
            },
            Self::ComeAgain(after) => Answer::ComeAgain(*after),
            Self::Tcp(_) | Self::NoAnswer(_) => Answer::Missing,
            Self::Unnamed | Self::ClosedEarly | Self::Session(_) | Self::Task(_) => Answer::Given,
        }
    }
}

impl Answer {
    /// The pause before the next call. `random` is a number in 0..1.
    fn pause(self, backoff: &mut Backoff, random: f64) -> Duration {
        match self {
            Self::Missing => backoff.next_delay(random),
            Self::Given => backoff.next_delay_within(MAX_BACKOFF_AFTER_ANSWER, random),
            Self::ComeAgain(after) => {
                let least = backoff.next_delay_within(MAX_BACKOFF_AFTER_ANSWER, random);
                (after + SPREAD.mul_f64(random)).max(least).min(LONGEST_WAIT)
            }
        }
    }
}

impl CallHome {
    /// Keeps a session with a master until the agent leaves.
    pub async fn run(self, master: Master) {
        let expired = || {
            let now = self.clock.now();
            self.identity.get().not_after().filter(|at| *at <= now)
        };
        let call = || async {
            let mut session = self.call(&master, Direction::CallHome).await?;
            if let Some(calls) = session.authenticated.calls.take() {
                self.tasks.spawn(self.clone().answer_calls(master.clone(), calls));
            }
            Ok(session)
        };
        supervise(&master, &self.leaving, &self.tasks.child(), expired, call).await;
    }

    /// Makes the further connections of a session that its master calls for, until the session ends or the agent leaves.
    async fn answer_calls(self, master: Master, calls: mpsc::Receiver<()>) {
        self.leaving.run_until_cancelled(self.make_further(&master, calls)).await;
    }

    async fn make_further(&self, master: &Master, mut calls: mpsc::Receiver<()>) {
        let mut backoff = Backoff::new(MIN_BACKOFF, MAX_BACKOFF);
        while calls.recv().await.is_some() {
            // The connection serves itself, and ends with the session.
            match self.call(master, Direction::CallHomeFurther).await {
                Ok(_) => {
                    backoff.reset();
                    tracing::debug!(%master, "called home once more");
                }
                Err(error) => tracing::debug!(%master, %error, "no further connection to the master"),
            }
            tokio::time::sleep(backoff.next_delay(rand::random())).await;
        }
    }

    async fn call(&self, master: &Master, direction: Direction) -> Result<EstablishedSession, CallError> {
        let timeout = self.connect_timeout;
        match master {
            Master::Tcp(address) => {
                let socket = tcp::connect(address, timeout).await?;
                let peer = socket.peer_addr().ok();
                self.establish(socket, peer, direction).await
            }
            Master::Https(front_end) => {
                let node = self.dialer.scope().node.clone().ok_or(CallError::Unnamed)?;
                let (node, purpose) = (Some(&node), Purpose::Link);
                let request = LinkRequest { front_end, node, purpose, admission: None };
                let link = https::connect(&self.https, request, timeout).await?;
                self.establish(link.stream, link.peer, direction).await
            }
        }
    }

    /// Serves a session on a link, and waits until the master has authenticated.
    async fn establish<T>(
        &self,
        link: T,
        peer: Option<SocketAddr>,
        direction: Direction,
    ) -> Result<EstablishedSession, CallError>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (link, heard) = Overheard::new(link);
        let (authenticated, proof) = oneshot::channel();
        let served = self.server.clone().serve(link, peer, direction, authenticated);
        let served = self.tasks.spawn(served);
        if let Ok(authenticated) = proof.await {
            return Ok(EstablishedSession { served, authenticated });
        }
        let error = outcome(served.await).err().unwrap_or(CallError::ClosedEarly);
        Err(match heard.greeting() {
            Some(Greeting::ComeAgain(after)) => CallError::ComeAgain(after),
            Some(Greeting::Hello) => error,
            None => CallError::NoAnswer(Box::new(error)),
        })
    }
}

/// A session in which the master has authenticated.
struct EstablishedSession {
    served: JoinHandle<Option<Result<(), SessionError>>>,
    authenticated: Authenticated,
}

/// Keeps a session with a master until the agent leaves. One that comes to its end with the master's certificate is
/// replaced before: the next session is established first, and the former one is then left to its streams. One that its
/// master wants to be replaced goes on for a while, as one of the tasks in `held`. `expired` tells when this node's own
/// certificate expired, if it has.
async fn supervise<F, C>(
    master: &Master,
    leaving: &CancellationToken,
    held: &Tasks,
    expired: impl Fn() -> Option<SystemTime>,
    call: F,
) where
    F: Fn() -> C,
    C: Future<Output = Result<EstablishedSession, CallError>>,
{
    let mut backoff = Backoff::new(MIN_BACKOFF, MAX_BACKOFF);
    let mut former = Former::default();
    let repeats = LogThrottle::default();
    while !leaving.is_cancelled() {
        let (mut established, mut asked) = (None, CancellationToken::new());
        let called = tokio::select! {
            called = call() => called,
            () = leaving.cancelled() => return,
        };
        let ended = match called {
            Ok(mut session) => {
                established = Some(Instant::now());
                asked = session.authenticated.relink_asked.clone();
                tracing::info!(%master, "called home");
                let may_hold = held.len() < MAX_HELD;
                match await_end_or_relink(leaving, &mut session, &mut former, may_hold).await {
                    Course::Ended(ended) => ended,
                    Course::Expiring => {
                        backoff.reset();
                        former.expiring = Some(session);
                        continue;
                    }
                    Course::Unwanted => {
                        backoff.reset();
                        let replaced = CancellationToken::new();
                        former.unwanted.push(replaced.clone());
                        held.spawn(async move {
                            tokio::join!(replaced.cancelled(), tokio::time::sleep(HELD));
                            session.authenticated.retire.cancel();
                        });
                        continue;
                    }
                }
            }
            Err(error) => Err(error),
        };
        let answer = match ended {
            Ok(()) => {
                tracing::info!(%master, "the master closed the tunnel");
                Answer::Given
            }
            Err(error) => {
                log_failure(master, &error, expired(), &repeats);
                error.answer()
            }
        };
        let lasted = established.map(|at: Instant| at.elapsed()).unwrap_or_default();
        if lasted > USEFUL_SESSION || asked.is_cancelled() {
            backoff.reset();
        }
        // A master that says goodbye is about to be there again.
        let pause = match asked.is_cancelled() {
            true => SETTLE.saturating_sub(lasted),
            false => answer.pause(&mut backoff, rand::random()),
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = leaving.cancelled() => {}
        }
    }
}

/// Logs why there is no tunnel. What only a person can mend comes back with every call until somebody does, so it is not
/// logged each time. The calls themselves go on, since the node is to be back soon after that.
fn log_failure(master: &Master, error: &CallError, expired: Option<SystemTime>, repeats: &LogThrottle) {
    if let CallError::ComeAgain(after) = error {
        tracing::info!(%master, seconds = after.as_secs(), "the master wants to be called again later");
        return;
    }
    let is_refusal = matches!(error, CallError::Session(SessionError::RefusedByMaster(_)));
    let times = if is_refusal || expired.is_some() { repeats.count(1) } else { Some(1) };
    let Some(times) = times else { return };
    match expired {
        Some(at) => {
            let at = humantime::format_rfc3339_seconds(at);
            tracing::error!(%master, %error, expired = %at, times, "no tunnel to the master, and this node's certificate has expired: join it again with a new token");
        }
        None => tracing::warn!(%master, %error, times, "no tunnel to the master"),
    }
}

/// Sessions that the present one is to replace, once it has lasted for [`SETTLE`].
#[derive(Default)]
struct Former {
    expiring: Option<EstablishedSession>,
    /// Tell those that their master does not want any more.
    unwanted: Vec<CancellationToken>,
}

impl Former {
    fn replaced(&mut self) {
        if let Some(expiring) = self.expiring.take() {
            expiring.authenticated.retire.cancel();
        }
        for unwanted in self.unwanted.drain(..) {
            unwanted.cancel();
        }
    }
}

/// The way in which a session comes to its end.
enum Course {
    Ended(Result<(), CallError>),
    /// Another one is to be established before the master's certificate ends, or the agent leaves.
    Expiring,
    /// The master asks for another one.
    Unwanted,
}

/// Waits until a session has ended, or another one is to be established before that, but not before this one has lasted
/// for [`SETTLE`], after which it replaces former sessions.
async fn await_end_or_relink(
    leaving: &CancellationToken,
    session: &mut EstablishedSession,
    former: &mut Former,
    may_hold: bool,
) -> Course {
    let Authenticated { relink, relink_asked, .. } = &session.authenticated;
    let (relink, relink_asked) = (*relink, relink_asked.clone());
    let settle = tokio::time::sleep(SETTLE);
    tokio::pin!(settle);
    let due = async {
        match relink {
            Some(after) => tokio::time::sleep(after.max(SETTLE)).await,
            None => std::future::pending().await,
        }
    };
    let unwanted = async {
        tokio::join!(relink_asked.cancelled(), tokio::time::sleep(SETTLE));
    };
    tokio::pin!(due, unwanted);
    let mut settled = false;
    loop {
        tokio::select! {
            served = &mut session.served => return Course::Ended(outcome(served)),
            () = &mut settle, if !settled => {
                settled = true;
                former.replaced();
            }
            () = &mut due, if former.expiring.is_none() => return Course::Expiring,
            () = &mut unwanted, if may_hold => return Course::Unwanted,
            () = leaving.cancelled() => return Course::Expiring,
        }
    }
}

fn outcome(served: Result<Option<Result<(), SessionError>>, JoinError>) -> Result<(), CallError> {
    match served.map_err(CallError::Task)? {
        Some(result) => Ok(result?),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
