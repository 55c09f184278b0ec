//! The loop that keeps a session with a master, with sessions that are no more than their signals.

use std::sync::{Mutex, PoisonError};

use tokio::sync::mpsc;

use super::*;

const MINUTE: Duration = Duration::from_secs(60);

/// A session that the loop has established.
struct TestSession {
    established: Instant,
    retire: CancellationToken,
    /// Ends the session.
    end: oneshot::Sender<Result<(), SessionError>>,
}

/// A master whose answers to calls a test chooses.
struct TestMaster {
    draining: CancellationToken,
    called: Arc<Mutex<Vec<Instant>>>,
    sessions: mpsc::UnboundedReceiver<TestSession>,
    supervised: JoinHandle<Option<()>>,
    tasks: Tasks,
}

impl TestMaster {
    /// `answer` is given the number of a call, and returns how long the session's certificate lets it go without
    /// another link, or `None` to refuse the call.
    fn call(answer: impl Fn(usize) -> Option<Option<Duration>> + Send + Sync + 'static) -> Self {
        let (draining, tasks) = (CancellationToken::new(), Tasks::new());
        let called = Arc::<Mutex<Vec<Instant>>>::default();
        let (established, sessions) = mpsc::unbounded_channel();
        let supervised = tasks.spawn({
            let (draining, called, tasks) = (draining.clone(), called.clone(), tasks.clone());
            async move {
                let master = "master.example:2222".parse().unwrap();
                let call = || {
                    let number = {
                        let mut called = called.lock().unwrap_or_else(PoisonError::into_inner);
                        called.push(Instant::now());
                        called.len()
                    };
                    let answer = answer(number).map(|relink| establish(relink, &established, &tasks));
                    async move { answer.ok_or(CallError::ClosedEarly) }
                };
                supervise(&master, &draining, || None, call).await;
            }
        });
        Self { draining, called, sessions, supervised, tasks }
    }

    fn called(&self) -> Vec<Instant> {
        self.called.lock().unwrap().clone()
    }

    async fn next_session(&mut self) -> TestSession {
        self.sessions.recv().await.unwrap()
    }
}

fn establish(
    relink: Option<Duration>,
    established: &mpsc::UnboundedSender<TestSession>,
    tasks: &Tasks,
) -> EstablishedSession {
    let (end, ended) = oneshot::channel();
    let retire = CancellationToken::new();
    let session = TestSession { established: Instant::now(), retire: retire.clone(), end };
    established.send(session).unwrap_or_else(|_| unreachable!("the test has ended"));
    let served = tasks.spawn(async move { ended.await.unwrap_or(Ok(())) });
    EstablishedSession { served, authenticated: Authenticated { relink, retire } }
}

#[tokio::test(start_paused = true)]
async fn a_master_that_refuses_is_called_again_ever_later_up_to_a_bound() {
    let master = TestMaster::call(|_| None);
    tokio::time::sleep(10 * MINUTE).await;
    let called = master.called();
    let pauses: Vec<_> = called.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(pauses[0] >= MIN_BACKOFF / 2 && pauses[0] <= MIN_BACKOFF, "{pauses:?}");
    assert!(pauses[1] > MIN_BACKOFF / 2 && pauses[1] <= 2 * MIN_BACKOFF + Duration::from_millis(1));
    let last = &pauses[4..];
    let late =
        |pause: &Duration| *pause >= MAX_BACKOFF / 2 && *pause <= MAX_BACKOFF + Duration::from_millis(1);
    assert!(last.iter().all(late), "{pauses:?}");
}

#[tokio::test(start_paused = true)]
async fn a_session_that_lasted_is_replaced_soon_and_one_that_did_not_is_backed_off() {
    // Refuses until the pauses are long, and then accepts.
    let mut master = TestMaster::call(|number| (number > 10).then_some(None));
    let session = master.next_session().await;
    tokio::time::sleep(USEFUL_SESSION / 2).await;
    let ended = Instant::now();
    session.end.send(Ok(())).unwrap();
    let session = master.next_session().await;
    assert!(session.established - ended >= MAX_BACKOFF / 2);
    tokio::time::sleep(2 * USEFUL_SESSION).await;
    let ended = Instant::now();
    session.end.send(Err(SessionError::Evicted)).unwrap();
    let session = master.next_session().await;
    assert!(session.established - ended <= MIN_BACKOFF + Duration::from_millis(1));
}

#[tokio::test(start_paused = true)]
async fn another_session_is_made_before_the_end_and_takes_over_once_it_has_settled() {
    let mut master = TestMaster::call(|_| Some(Some(MINUTE)));
    let first = master.next_session().await;
    let second = master.next_session().await;
    let due = second.established - first.established;
    assert!(due >= MINUTE && due < MINUTE + Duration::from_secs(1), "{due:?}");
    assert!(!first.retire.is_cancelled(), "the second one may be closed at once");
    first.retire.cancelled().await;
    let settled = second.established.elapsed();
    assert!(settled >= SETTLE && settled < 2 * SETTLE, "{settled:?}");
    assert!(!second.retire.is_cancelled());
    let third = master.next_session().await;
    second.retire.cancelled().await;
    assert!(third.established - second.established >= MINUTE);
}

#[tokio::test(start_paused = true)]
async fn a_session_stays_while_its_replacement_is_refused() {
    let mut master = TestMaster::call(|number| match number {
        1 | 4 => Some(Some(MINUTE)),
        _ => None,
    });
    let first = master.next_session().await;
    let fourth = master.next_session().await;
    assert_eq!(master.called().len(), 4);
    assert!(!first.retire.is_cancelled());
    first.retire.cancelled().await;
    assert!(fourth.established.elapsed() >= SETTLE);
}

#[tokio::test(start_paused = true)]
async fn a_replacement_that_is_closed_at_once_leaves_the_former_session_in_place() {
    let mut master = TestMaster::call(|_| Some(Some(MINUTE)));
    let first = master.next_session().await;
    let second = master.next_session().await;
    second.end.send(Ok(())).unwrap();
    let third = master.next_session().await;
    assert!(!first.retire.is_cancelled());
    first.retire.cancelled().await;
    assert!(third.established.elapsed() >= SETTLE);
}

#[tokio::test(start_paused = true)]
async fn a_master_that_refuses_does_not_delay_another() {
    let refuses = TestMaster::call(|_| None);
    let mut accepts = TestMaster::call(|_| Some(None));
    let session = accepts.next_session().await;
    tokio::time::sleep(10 * MINUTE).await;
    assert!(refuses.called().len() > 100);
    assert_eq!(accepts.called().len(), 1);
    assert!(!session.retire.is_cancelled() && !session.end.is_closed());
}

#[tokio::test(start_paused = true)]
async fn a_call_under_way_ends_when_the_agent_drains() {
    let draining = CancellationToken::new();
    let master = "master.example:2222".parse().unwrap();
    let unreachable = || std::future::pending::<Result<EstablishedSession, CallError>>();
    let supervised = supervise(&master, &draining, || None, unreachable);
    let drain = async {
        tokio::time::sleep(MINUTE).await;
        draining.cancel();
        Instant::now()
    };
    let ((), began) = tokio::join!(supervised, drain);
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn no_call_is_made_once_the_agent_drains() {
    let mut with_session = TestMaster::call(|_| Some(None));
    let session = with_session.next_session().await;
    let refused = TestMaster::call(|_| None);
    tokio::time::sleep(MINUTE).await;
    for master in [&with_session, &refused] {
        master.draining.cancel();
    }
    let calls = refused.called().len();
    assert_eq!(with_session.supervised.await.unwrap(), Some(()));
    assert_eq!(refused.supervised.await.unwrap(), Some(()));
    assert_eq!(refused.called.lock().unwrap().len(), calls);
    // The session says goodbye by itself.
    assert!(!session.end.is_closed());
    assert_eq!(with_session.tasks.len(), 1);
}
