//! Seats for requests, shared fairly among users.
//!
//! While all seats are taken, the requests of each user wait in a queue of their own, and the queues take turns. A user
//! with many requests delays nobody but themselves.
//!
//! While nobody waits, threads do not meet at one lock: the free seats are an atomic number, and the seats that each
//! user holds are in a table of many parts.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::sync::oneshot;

use crate::shards::{SHARDS, Shards};

/// The numbers of seats, and how long a request waits for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeatLimits {
    /// The maximum number of seats that all users together take at once.
    pub total: usize,
    /// The maximum number of seats that one user takes at once.
    pub per_user: usize,
    /// The maximum number of waiting requests of one user.
    pub queue: usize,
    pub wait: Duration,
}

/// The seats, and the requests that wait for them.
#[derive(Clone)]
pub(super) struct Seats(Arc<Shared>);

/// A seat is returned before it is checked whether anybody waits, and a request is in its queue before it is checked
/// whether a seat is free. So one of the two sees the other, and no request waits beside a free seat.
struct Shared {
    limits: SeatLimits,
    /// The number of seats that nobody has taken.
    free: AtomicUsize,
    /// The number of seats that each user holds, if it is not zero.
    held: Shards<HashMap<Arc<str>, usize>>,
    /// The number of users whose requests wait. It changes only while the queues are locked.
    waiting: AtomicUsize,
    queues: Mutex<Queues>,
}

/// The requests that wait. A part of `held` may be locked while the queues are locked, but not the other way round.
#[derive(Default)]
struct Queues {
    /// The requests of each user. No queue is empty.
    of_users: HashMap<Arc<str>, VecDeque<(u64, oneshot::Sender<Seat>)>>,
    /// The users whose requests wait, in the order of their turns.
    turns: VecDeque<Arc<str>>,
    next: u64,
}

/// One seat. Dropping it gives it to the next request.
pub struct Seat {
    seats: Seats,
    user: Arc<str>,
    /// Whether the seat still counts among those of all users.
    working: bool,
}

/// The error of a request for which no seat became free in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Busy;

impl Seats {
    pub(super) fn new(limits: SeatLimits) -> Self {
        Self(Arc::new(Shared {
            limits,
            free: AtomicUsize::new(limits.total),
            held: Shards::new(SHARDS),
            waiting: AtomicUsize::new(0),
            queues: Mutex::default(),
        }))
    }

    /// Takes a seat, and waits if none is free.
    pub(super) async fn take(&self, user: &str) -> Result<Seat, Busy> {
        if self.0.waiting.load(SeqCst) == 0
            && let Some(user) = self.try_take(user)
        {
            return Ok(self.seat(user));
        }
        let (id, seat) = self.enqueue(user)?;
        let waiting = Waiting { seats: self, user, id };
        self.hand_out();
        let seat = tokio::time::timeout(self.0.limits.wait, seat).await;
        drop(waiting);
        match seat {
            Ok(Ok(seat)) => Ok(seat),
            Ok(Err(_)) | Err(_) => Err(Busy),
        }
    }

    /// Returns how many seats are taken and how many requests wait.
    pub(super) fn count(&self) -> (usize, usize) {
        let taken = self.0.limits.total.saturating_sub(self.0.free.load(SeqCst));
        (taken, self.queues().of_users.values().map(VecDeque::len).sum())
    }

    /// Counts a seat as the user's, unless none is free or the user holds as many as one user may.
    fn try_take(&self, user: &str) -> Option<Arc<str>> {
        let Shared { limits, free, held, .. } = &*self.0;
        let mut held = held.of(user);
        let known = held.get_key_value(user).map(|(user, count)| (user.clone(), *count));
        if known.as_ref().is_some_and(|(_, count)| *count >= limits.per_user) {
            return None;
        }
        free.fetch_update(SeqCst, SeqCst, |free| free.checked_sub(1)).ok()?;
        let user = known.map_or_else(|| Arc::from(user), |(user, _)| user);
        *held.entry(user.clone()).or_default() += 1;
        Some(user)
    }

    fn seat(&self, user: Arc<str>) -> Seat {
        Seat { seats: self.clone(), user, working: true }
    }

    /// Adds a request to its user's queue.
    fn enqueue(&self, user: &str) -> Result<(u64, oneshot::Receiver<Seat>), Busy> {
        let mut queues = self.queues();
        let Queues { of_users, turns, next } = &mut *queues;
        let (sender, seat) = oneshot::channel();
        let id = *next;
        match of_users.get_mut(user) {
            Some(queue) if queue.len() >= self.0.limits.queue => return Err(Busy),
            Some(queue) => queue.push_back((id, sender)),
            None => {
                let user = Arc::<str>::from(user);
                of_users.insert(user.clone(), VecDeque::from([(id, sender)]));
                turns.push_back(user);
                self.0.waiting.store(turns.len(), SeqCst);
            }
        }
        *next += 1;
        Ok((id, seat))
    }

    /// Gives free seats to the users whose turn it is.
    fn hand_out(&self) {
        let mut given = Vec::new();
        {
            let mut queues = self.queues();
            let Queues { of_users, turns, .. } = &mut *queues;
            // A user who has reached their own limit is skipped and stays in the queue of turns.
            let mut skipped = 0;
            while skipped < turns.len() && self.0.free.load(SeqCst) > 0 {
                let Some(user) = turns.pop_front() else { break };
                let Some(queue) = of_users.get_mut(&user) else { continue };
                let Some(holder) = self.try_take(&user) else {
                    turns.push_back(user);
                    skipped += 1;
                    continue;
                };
                given.push((queue.pop_front(), holder));
                if queue.is_empty() {
                    of_users.remove(&user);
                } else {
                    turns.push_back(user);
                }
                skipped = 0;
            }
            self.0.waiting.store(turns.len(), SeqCst);
        }
        // If the request has been dropped in the meantime, its seat is dropped here and goes to the next request. A
        // seat must not be dropped while the queues are locked.
        for (request, holder) in given {
            let seat = self.seat(holder);
            if let Some((_, sender)) = request {
                let _ = sender.send(seat);
            }
        }
    }

    /// Gives a seat that has just been returned to whoever waits for it.
    fn returned(&self) {
        if self.0.waiting.load(SeqCst) > 0 {
            self.hand_out();
        }
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.0.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Frees the seat for other users when the response begins. It counts for its own user until it is dropped, so that
    /// a caller who reads slowly takes nothing from other users.
    pub fn answered(&mut self) {
        if std::mem::take(&mut self.working) {
            self.seats.0.free.fetch_add(1, SeqCst);
            self.seats.returned();
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let Self { seats, user, working } = self;
        {
            let mut held = seats.0.held.of(&**user);
            if let Some(count) = held.get_mut(&**user) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    held.remove(&**user);
                }
            }
        }
        if *working {
            seats.0.free.fetch_add(1, SeqCst);
        }
        seats.returned();
    }
}

/// A waiting request. Dropping it removes it from the queue.
struct Waiting<'a> {
    seats: &'a Seats,
    user: &'a str,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut queues = self.seats.queues();
        let Queues { of_users, turns, .. } = &mut *queues;
        let Some(queue) = of_users.get_mut(self.user) else { return };
        let Some(at) = queue.iter().position(|(id, _)| *id == self.id) else { return };
        queue.remove(at);
        if queue.is_empty() {
            of_users.remove(self.user);
            turns.retain(|user| **user != *self.user);
            self.seats.0.waiting.store(turns.len(), SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use futures_util::FutureExt;

    use super::*;

    fn seats(total: usize, per_user: usize, queue: usize) -> Seats {
        Seats::new(SeatLimits { total, per_user, queue, wait: Duration::from_secs(5) })
    }

    /// Nobody holds a seat or waits for one, and nothing is kept of those who did.
    fn assert_at_rest(all: &Seats) {
        assert_eq!(all.count(), (0, 0));
        assert!(all.0.held.each().all(|held| held.is_empty()));
        let queues = all.queues();
        assert_eq!((queues.of_users.len(), queues.turns.len(), all.0.waiting.load(SeqCst)), (0, 0, 0));
    }

    #[tokio::test]
    async fn seats_are_free_taken_and_given_back() {
        let all = seats(2, 2, 1);
        let (a, b) = (all.take("a").await.unwrap(), all.take("a").await.unwrap());
        let mut third = Box::pin(all.take("a"));
        assert!(third.as_mut().now_or_never().is_none());
        assert_eq!(all.take("a").now_or_never().unwrap().err(), Some(Busy), "the queue is full");
        drop(a);
        let third = third.await.unwrap();
        drop((b, third));
        assert_at_rest(&all);
    }

    #[tokio::test]
    async fn the_queues_of_users_take_turns() {
        let all = seats(1, 1, 100);
        let held = all.take("many").await.unwrap();
        let mut many: Vec<_> = (0..50).map(|_| Box::pin(all.take("many"))).collect();
        for waiting in &mut many {
            assert!(waiting.as_mut().now_or_never().is_none());
        }
        let mut one = Box::pin(all.take("one"));
        assert!(one.as_mut().now_or_never().is_none());
        drop(held);
        // The first request of the user with many came first, and the other user is next.
        drop(many.remove(0).await.unwrap());
        assert!(one.now_or_never().unwrap().is_ok());
        drop(many);
        assert_at_rest(&all);
    }

    #[tokio::test]
    async fn one_user_does_not_get_all_seats() {
        let all = seats(10, 3, 5);
        let held: Vec<_> = futures_util::future::join_all((0..3).map(|_| all.take("a"))).await;
        assert!(held.iter().all(Result::is_ok));
        let mut fourth = Box::pin(all.take("a"));
        assert!(fourth.as_mut().now_or_never().is_none());
        assert!(
            all.take("b").now_or_never().unwrap().is_ok(),
            "others overtake a user who has reached the limit"
        );
        drop(held);
        assert!(fourth.now_or_never().unwrap().is_ok());
    }

    #[tokio::test]
    async fn a_slow_reader_delays_only_their_own_requests() {
        let all = seats(1, 1, 5);
        let mut slow = all.take("slow").await.unwrap();
        let mut other = Box::pin(all.take("other"));
        assert!(other.as_mut().now_or_never().is_none());
        slow.answered();
        slow.answered();
        let other = other.now_or_never().unwrap().unwrap();
        let mut again = Box::pin(all.take("slow"));
        assert!(again.as_mut().now_or_never().is_none());
        drop(other);
        assert!(again.as_mut().now_or_never().is_none(), "the seat still counts as theirs while they read");
        drop(slow);
        drop(again.now_or_never().unwrap());
        assert_at_rest(&all);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends() {
        let all = seats(1, 1, 5);
        let held = all.take("a").await.unwrap();
        assert_eq!(all.take("b").await.err(), Some(Busy));
        drop(held);
        assert!(all.take("b").await.is_ok());
        assert_at_rest(&all);
    }

    /// The counts stay right while requests arrive, wait and leave at random.
    #[tokio::test(start_paused = true)]
    async fn no_seat_is_lost() {
        use rand::{RngExt, SeedableRng, rngs::StdRng};
        let mut rng = StdRng::seed_from_u64(3);
        let all = seats(TOTAL, PER_USER, 3);
        let mut waiting = Vec::new();
        let mut held = Vec::new();
        for _ in 0..20_000 {
            match rng.random_range(0..4) {
                0 | 1 => {
                    let (all, user) = (all.clone(), format!("u{}", rng.random_range(0..6)));
                    let mut taking = Box::pin(async move { all.take(&user).await });
                    match taking.as_mut().now_or_never() {
                        Some(Ok(seat)) => held.push(seat),
                        Some(Err(Busy)) => {}
                        None => waiting.push(taking),
                    }
                }
                2 if !held.is_empty() => drop(held.swap_remove(rng.random_range(0..held.len()))),
                _ if !waiting.is_empty() => {
                    let mut one = waiting.swap_remove(rng.random_range(0..waiting.len()));
                    if rng.random_bool(0.5)
                        && let Some(Ok(seat)) = one.as_mut().now_or_never()
                    {
                        held.push(seat);
                    }
                }
                _ => {}
            }
            assert!(all.count().0 <= TOTAL);
        }
        drop((waiting, held));
        assert_at_rest(&all);
    }

    const TOTAL: usize = 4;
    const PER_USER: usize = 2;
    const USERS: [&str; 3] = ["a", "b", "c"];

    /// Takes seats for each user in turn, and checks that no more are taken than there are.
    async fn take_in_turn(all: &Seats, working: &AtomicUsize, held: &[AtomicUsize; 3], first: usize) {
        for i in first..first + 500 {
            let user = i % USERS.len();
            let mut seat = all.take(USERS[user]).await.unwrap();
            assert!(working.fetch_add(1, SeqCst) < TOTAL);
            assert!(held[user].fetch_add(1, SeqCst) < PER_USER);
            thread::yield_now();
            working.fetch_sub(1, SeqCst);
            if i % 2 == 0 {
                seat.answered();
            }
            held[user].fetch_sub(1, SeqCst);
        }
    }

    #[test]
    fn threads_together_take_no_more_seats_than_there_are_and_each_is_served() {
        let wait = Duration::from_secs(60);
        let all = Seats::new(SeatLimits { total: TOTAL, per_user: PER_USER, queue: 100, wait });
        let working = AtomicUsize::new(0);
        let held = USERS.map(|_| AtomicUsize::new(0));
        thread::scope(|scope| {
            for first in 0..8 {
                let work = take_in_turn(&all, &working, &held, first);
                scope.spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
                    runtime.unwrap().block_on(work);
                });
            }
        });
        assert_at_rest(&all);
    }
}
