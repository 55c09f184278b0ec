//! The loop that keeps a session with a master, with sessions that are no more than their signals.

use std::sync::{Mutex, PoisonError};

use hyper::StatusCode;
use tokio::sync::mpsc;

use super::*;
use crate::https::AnswerFault;

const MINUTE: Duration = Duration::from_secs(60);

/// A session that the loop has established.
struct TestSession {
    established: Instant,
    /// Has the master ask for another link.
    relink: CancellationToken,
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
        Self::answering(move |number| answer(number).ok_or(CallError::ClosedEarly))
    }

    /// `answer` returns the same, or why the call fails.
    fn answering(
        answer: impl Fn(usize) -> Result<Option<Duration>, CallError> + Send + Sync + 'static,
    ) -> Self {
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
                    async move { answer }
                };
                supervise(&master, &draining, &tasks.child(), || None, call).await;
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
    let (relink_asked, retire) = (CancellationToken::new(), CancellationToken::new());
    let session = TestSession {
        established: Instant::now(),
        relink: relink_asked.clone(),
        retire: retire.clone(),
        end,
    };
    established.send(session).unwrap_or_else(|_| unreachable!("the test has ended"));
    let served = tasks.spawn(async move { ended.await.unwrap_or(Ok(())) });
    EstablishedSession { served, authenticated: Authenticated { relink, relink_asked, retire, calls: None } }
}

fn without_answer() -> CallError {
    CallError::NoAnswer(Box::new(CallError::ClosedEarly))
}

#[tokio::test(start_paused = true)]
async fn a_master_is_called_again_ever_later_up_to_a_bound_which_is_lower_if_it_answers() {
    let refuses = TestMaster::call(|_| None);
    let is_away = TestMaster::answering(|_| Err(without_answer()));
    tokio::time::sleep(10 * MINUTE).await;
    for (master, most) in [(refuses, MAX_BACKOFF_AFTER_ANSWER), (is_away, MAX_BACKOFF)] {
        let called = master.called();
        let pauses: Vec<_> = called.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let ms = Duration::from_millis(1);
        assert!(pauses[0] >= MIN_BACKOFF / 2 && pauses[0] <= MIN_BACKOFF + ms, "{pauses:?}");
        assert!(pauses[1] > MIN_BACKOFF / 2 && pauses[1] <= 2 * MIN_BACKOFF + ms, "{pauses:?}");
        let late = |pause: &Duration| *pause >= most / 2 && *pause <= most + ms;
        assert!(pauses[7..].len() > 10 && pauses[7..].iter().all(late), "{pauses:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_master_that_was_away_for_a_moment_is_called_soon_after_it_is_back() {
    let away = Duration::from_secs(3);
    let began = Instant::now();
    let mut master =
        TestMaster::answering(move |_| if began.elapsed() < away { Err(without_answer()) } else { Ok(None) });
    let session = master.next_session().await;
    // Each pause is at most twice as long as all before it together, and a little.
    let back = session.established - began;
    assert!(back <= away * 3 + MIN_BACKOFF + Duration::from_millis(10), "{back:?}");
}

#[tokio::test(start_paused = true)]
async fn a_master_is_called_when_it_says_so() {
    let after = Duration::from_secs(20);
    let mut master = TestMaster::answering(move |number| match number {
        1 => Err(CallError::ComeAgain(after)),
        _ => Ok(None),
    });
    let session = master.next_session().await;
    let called = master.called()[0];
    let paused = session.established - called;
    assert!(paused >= after && paused <= after + SPREAD + Duration::from_millis(1), "{paused:?}");
}

#[test]
fn the_pause_follows_from_what_the_master_has_said() {
    let mut backoff = Backoff::new(MIN_BACKOFF, MAX_BACKOFF);
    let mut pause = |answer: Answer, random| answer.pause(&mut backoff, random).as_millis();
    let seconds = |seconds| Answer::ComeAgain(Duration::from_secs(seconds));
    let missing: Vec<_> = (0..9).map(|_| pause(Answer::Missing, 1.0)).collect();
    assert_eq!(missing, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
    assert_eq!([pause(Answer::Given, 1.0), pause(Answer::Given, 0.0)], [2000, 1000]);
    for (seconds, random, expected) in [
        (seconds(5), 0.0, 5000),
        (seconds(5), 1.0, 6000),
        // A master can't have itself called without a pause, or make the node wait for longer than the bound.
        (seconds(0), 0.0, 1000),
        (seconds(1_000_000), 0.0, 30_000),
        (seconds(30), 1.0, 30_000),
    ] {
        assert_eq!(pause(seconds, random), expected);
    }
    // Once a master has answered, the pauses grow from there, however long it was away before.
    assert_eq!([pause(Answer::Given, 1.0), pause(Answer::Missing, 1.0)], [2000, 2000]);
}

#[test]
fn an_answer_is_told_from_none() {
    let front_end: proto::Target = "master.example:443".parse().unwrap();
    let https = |fault| CallError::Https(HttpsError::FrontEnd { front_end: front_end.clone(), fault });
    let refused = |status, seconds: Option<u64>| {
        let retry_after = seconds.map(Duration::from_secs);
        https(AnswerFault::Refused { status, reason: String::new(), retry_after })
    };
    let limit = Duration::from_secs(10);
    let timed_out = || ConnectError::TimedOut { to: front_end.clone(), limit };
    let again = |seconds| Answer::ComeAgain(Duration::from_secs(seconds));
    for (error, answer) in [
        (CallError::Tcp(timed_out()), Answer::Missing),
        (without_answer(), Answer::Missing),
        (CallError::ClosedEarly, Answer::Given),
        (CallError::Unnamed, Answer::Given),
        (CallError::Session(SessionError::RefusedByMaster(String::new())), Answer::Given),
        (CallError::ComeAgain(limit), again(10)),
        (CallError::Https(HttpsError::Connect(timed_out())), Answer::Missing),
        (CallError::Https(HttpsError::NoToken("token".into())), Answer::Given),
        (https(AnswerFault::Unauthorized), Answer::Given),
        (https(AnswerFault::Lost), Answer::Missing),
        (refused(StatusCode::FORBIDDEN, None), Answer::Given),
        (refused(StatusCode::SERVICE_UNAVAILABLE, Some(17)), again(17)),
        (refused(StatusCode::TOO_MANY_REQUESTS, Some(2)), again(2)),
        // A balancer whose masters are away.
        (refused(StatusCode::SERVICE_UNAVAILABLE, None), Answer::Missing),
        (refused(StatusCode::BAD_GATEWAY, None), Answer::Missing),
    ] {
        assert_eq!(error.answer(), answer, "{error:?}");
    }
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
    assert!(session.established - ended >= MAX_BACKOFF_AFTER_ANSWER / 2);
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
async fn a_master_that_asks_for_another_session_gets_it_at_once_but_not_any_number_of_them() {
    let mut master = TestMaster::call(|_| Some(None));
    let mut former = master.next_session().await;
    tokio::time::sleep(MINUTE).await;
    let asked = Instant::now();
    former.relink.cancel();
    let next = master.next_session().await;
    assert!(asked.elapsed() < Duration::from_millis(10));
    // The master may still use the former one.
    tokio::time::sleep(HELD / 2).await;
    assert!(!former.retire.is_cancelled());
    former.retire.cancelled().await;
    assert!(asked.elapsed() < HELD + Duration::from_secs(1));
    // Another request comes too early.
    former = next;
    let began = Instant::now();
    let mut sessions = Vec::new();
    while began.elapsed() < HELD / 2 {
        former.relink.cancel();
        let Ok(next) = tokio::time::timeout(HELD, master.next_session()).await else { break };
        let after = next.established - former.established;
        assert!(after >= SETTLE, "{after:?}");
        sessions.push(std::mem::replace(&mut former, next));
    }
    assert!(sessions.len() >= 20 && sessions.iter().all(|session| !session.retire.is_cancelled()));
}

#[tokio::test(start_paused = true)]
async fn a_master_that_says_goodbye_is_called_again_soon_however_often_it_does() {
    let mut master = TestMaster::call(|_| Some(None));
    let mut former = master.next_session().await;
    for lasts in [SETTLE / 10, SETTLE / 2, SETTLE * 9 / 10].into_iter().cycle().take(30) {
        tokio::time::sleep(lasts).await;
        former.relink.cancel();
        former.end.send(Ok(())).unwrap();
        let next = master.next_session().await;
        let after = next.established - former.established;
        assert!(after >= SETTLE && after < SETTLE + Duration::from_millis(10), "{after:?}");
        former = next;
    }
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
    let (draining, held) = (CancellationToken::new(), Tasks::new());
    let master = "master.example:2222".parse().unwrap();
    let unreachable = || std::future::pending::<Result<EstablishedSession, CallError>>();
    let supervised = supervise(&master, &draining, &held, || None, unreachable);
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
