//! Seats for requests, shared fairly among users.
//!
//! While all seats are taken, the requests of each user wait in a queue of their own, and the queues take turns. A user
//! with many requests delays nobody but themselves.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::oneshot;

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

struct Shared {
    limits: SeatLimits,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    taken: usize,
    users: HashMap<String, Queue>,
    /// The users whose requests wait, in the order of their turns.
    turns: VecDeque<String>,
    next: u64,
}

#[derive(Default)]
struct Queue {
    held: usize,
    waiting: VecDeque<(u64, oneshot::Sender<Seat>)>,
}

/// One seat. Dropping it gives it to the next request.
pub struct Seat {
    seats: Seats,
    user: String,
    /// Whether the seat still counts among those of all users.
    working: bool,
}

/// The error of a request for which no seat became free in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Busy;

impl Seats {
    pub(super) fn new(limits: SeatLimits) -> Self {
        Self(Arc::new(Shared { limits, state: Mutex::default() }))
    }

    /// Takes a seat, and waits if none is free.
    pub(super) async fn take(&self, user: &str) -> Result<Seat, Busy> {
        let limits = self.0.limits;
        let (id, seat) = {
            let mut state = self.lock();
            let id = state.next;
            state.next += 1;
            let free = state.taken < limits.total;
            let queue = state.users.entry(user.to_owned()).or_default();
            // This overtakes no other user: while seats are free, only users who have reached their own limit wait.
            if free && queue.waiting.is_empty() && queue.held < limits.per_user {
                queue.held += 1;
                state.taken += 1;
                return Ok(Seat { seats: self.clone(), user: user.to_owned(), working: true });
            }
            if queue.waiting.len() >= limits.queue {
                return Err(Busy);
            }
            let (sender, receiver) = oneshot::channel();
            queue.waiting.push_back((id, sender));
            if queue.waiting.len() == 1 {
                state.turns.push_back(user.to_owned());
            }
            (id, receiver)
        };
        let waiting = Waiting { seats: self, user, id };
        self.hand_out();
        let seat = tokio::time::timeout(limits.wait, seat).await;
        drop(waiting);
        match seat {
            Ok(Ok(seat)) => Ok(seat),
            Ok(Err(_)) | Err(_) => Err(Busy),
        }
    }

    /// Returns how many seats are taken and how many requests wait.
    pub(super) fn count(&self) -> (usize, usize) {
        let state = self.lock();
        let waiting =
            state.turns.iter().filter_map(|user| state.users.get(user)).map(|queue| queue.waiting.len());
        (state.taken, waiting.sum())
    }

    /// Gives free seats to the users whose turn it is.
    fn hand_out(&self) {
        let mut given = Vec::new();
        {
            let mut state = self.lock();
            // A user who has reached their own limit is skipped and stays in the queue of turns.
            let mut skipped = 0;
            while state.taken < self.0.limits.total && skipped < state.turns.len() {
                let Some(user) = state.turns.pop_front() else { break };
                let Some(queue) = state.users.get_mut(&user) else { continue };
                if queue.held >= self.0.limits.per_user {
                    state.turns.push_back(user);
                    skipped += 1;
                    continue;
                }
                let Some((_, sender)) = queue.waiting.pop_front() else { continue };
                queue.held += 1;
                let more = !queue.waiting.is_empty();
                state.taken += 1;
                given.push((sender, user.clone()));
                if more {
                    state.turns.push_back(user);
                }
                skipped = 0;
            }
        }
        // If the request has been dropped in the meantime, its seat is dropped here and goes to the next request.
        for (sender, user) in given {
            let _ = sender.send(Seat { seats: self.clone(), user, working: true });
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Frees the seat for other users when the response begins. It counts for its own user until it is dropped, so that
    /// a caller who reads slowly takes nothing from other users.
    pub fn answered(&mut self) {
        if std::mem::take(&mut self.working) {
            let mut state = self.seats.lock();
            state.taken = state.taken.saturating_sub(1);
            drop(state);
            self.seats.hand_out();
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        {
            let mut state = self.seats.lock();
            state.taken = state.taken.saturating_sub(usize::from(self.working));
            if let Some(queue) = state.users.get_mut(&self.user) {
                queue.held = queue.held.saturating_sub(1);
                if queue.held == 0 && queue.waiting.is_empty() {
                    state.users.remove(&self.user);
                }
            }
        }
        self.seats.hand_out();
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
        let mut state = self.seats.lock();
        let Some(queue) = state.users.get_mut(self.user) else { return };
        let Some(at) = queue.waiting.iter().position(|(id, _)| *id == self.id) else { return };
        queue.waiting.remove(at);
        if queue.waiting.is_empty() {
            let gone = queue.held == 0;
            state.turns.retain(|user| user != self.user);
            if gone {
                state.users.remove(self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn seats(total: usize, per_user: usize, queue: usize) -> Seats {
        Seats::new(SeatLimits { total, per_user, queue, wait: Duration::from_secs(5) })
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
        let state = all.lock();
        assert_eq!((state.taken, state.users.len(), state.turns.len()), (0, 0, 0));
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
        let state = all.lock();
        assert_eq!((state.taken, state.users.len(), state.turns.len()), (0, 0, 0));
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
        let state = all.lock();
        assert_eq!((state.taken, state.users.len(), state.turns.len()), (0, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends() {
        let all = seats(1, 1, 5);
        let held = all.take("a").await.unwrap();
        assert_eq!(all.take("b").await.err(), Some(Busy));
        drop(held);
        assert!(all.take("b").await.is_ok());
        let state = all.lock();
        assert_eq!((state.taken, state.users.len(), state.turns.len()), (0, 0, 0));
    }

    /// The counts stay right while requests arrive, wait and leave at random.
    #[tokio::test(start_paused = true)]
    async fn no_seat_is_lost() {
        use rand::{RngExt, SeedableRng, rngs::StdRng};
        let mut rng = StdRng::seed_from_u64(3);
        let all = seats(4, 2, 3);
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
            assert!(all.lock().taken <= 4);
        }
        drop((waiting, held));
        let state = all.lock();
        assert_eq!((state.taken, state.users.len(), state.turns.len()), (0, 0, 0));
    }
}
