//! Admits data to a link: how much may be ahead of the next message, and whose turn it is.
//!
//! Two things bound what is ahead. What was admitted and has not left for the socket can't be overtaken any more, since
//! russh sends in order, so it is little. And where a multiplexer measures the path with PINGs ([`Flow`]), what has left
//! for the socket and has not arrived is little more than the path needs.
//!
//! While there is no room, streams wait in two queues. A stream that has sent little lately goes ahead of those that
//! send without end, and those take turns: this is what fq_codel (RFC 8290, §4.1) does with packets. So a small answer waits
//! for what is under way and for nothing else, and no stream starves.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use proto::mux::{
    flow::{Flow, PingId, Use},
    load::Lately,
};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::keep_alive::Traffic;

/// The least and the most bytes between the streams and the socket. In between, it is what the path carries in [`QUEUE`].
const LEAST_ROOM: usize = 32 * 1024;
pub(crate) const ROOM: usize = 256 * 1024;
const QUEUE: Duration = Duration::from_millis(2);
/// The least that a stream may send at once, however many wait for room. Streams that send without end always have more,
/// so somebody waits for a message that is smaller.
const LEAST_SHARE: usize = 4 * 1024;
/// What a stream may send ahead of others before it has to wait for its turn.
const QUANTUM: usize = 64 * 1024;
/// What may go ahead of those that wait for their turn before one of them is served.
const AHEAD: usize = 4 * QUANTUM;
/// For how long a connection counts as mixed after a small message has been sent beside another stream. Streams that
/// send without end gain nothing by little being under way.
const MIXED: Duration = Duration::from_millis(200);
/// The backlog of the link, in bytes, above which answers wait, which are not admitted otherwise. A peer may cause any
/// number of them and need not read them.
const ANSWERED_BACKLOG: usize = 1024 * 1024;

/// Admits data to one link. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    streams: AtomicU64,
    /// Tells those who wait in [`Gate::settled`].
    settled: Notify,
    /// Absent unless this side keeps the link alive.
    traffic: OnceLock<Arc<Traffic>>,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes that were admitted and that the socket has not taken, and those of them that have not been sent.
    queued: usize,
    unsent: usize,
    /// What the link holds for the socket, including what was not admitted, such as answers and what SSH adds.
    backlog: usize,
    /// Absent until a PING has been answered, and where nobody sends any.
    path: Option<Path>,
    /// Those who send little, and those who wait for their turn.
    ahead: VecDeque<Waiter>,
    turns: VecDeque<Waiter>,
    /// Bytes that went ahead since a turn was last taken.
    went_ahead: usize,
    /// Grows by one when everyone who waits for a turn has had one.
    round: u64,
    left_in_round: usize,
    /// Somebody had to wait since the last PING.
    held_back: bool,
    /// The stream that was admitted last, and until when the connection counts as mixed.
    last_stream: u64,
    mixed_until: Option<Instant>,
    closed: bool,
}

/// The path to the peer, and who sends PINGs on it.
#[derive(Debug)]
struct Path {
    flow: Flow,
    pings: mpsc::UnboundedSender<PingId>,
}

#[derive(Debug)]
struct Waiter {
    bytes: usize,
    admit: oneshot::Sender<Reservation>,
}

/// What a gate knows of one stream.
#[derive(Debug)]
pub struct Turn {
    stream: u64,
    /// Bytes that may go ahead, and the round in which they were allowed.
    allowance: usize,
    round: u64,
    lately: Lately,
}

impl Turn {
    /// Takes over what the stream has sent through another gate.
    pub(crate) fn inherit(&mut self, other: Self) {
        self.lately = other.lately;
    }

    /// Whether the stream has sent much lately.
    pub(crate) fn is_heavy(&mut self) -> bool {
        self.lately.add(0, Instant::now());
        self.lately.is_heavy()
    }
}

/// Room for bytes that are about to be sent. Dropping it without [`Self::used`] gives the room back, as when the stream
/// has failed in the meantime or its sender has left.
#[derive(Debug)]
#[must_use]
pub struct Reservation {
    gate: Gate,
    bytes: usize,
    round: u64,
}

impl Gate {
    /// What the gate has to know of a new stream.
    pub fn turn(&self) -> Turn {
        Turn {
            stream: self.0.streams.fetch_add(1, Ordering::Relaxed) + 1,
            allowance: QUANTUM,
            round: 0,
            lately: Lately::new(Instant::now()),
        }
    }

    /// The bytes that were ever sent, and those of them that have arrived as far as is known. Both count from when the path
    /// was first measured.
    pub(crate) fn sent_and_arrived(&self) -> (u64, u64) {
        self.lock().path.as_ref().map_or((0, 0), |path| (path.flow.sent(), path.flow.arrived()))
    }

    /// Whether nobody waits, and there is room for a full frame.
    pub(crate) fn is_free(&self) -> bool {
        let state = self.lock();
        !state.closed && !state.somebody_waits() && state.has_room(QUANTUM)
    }

    /// Whether the path has been measured, so that it is known what has arrived.
    pub(crate) fn is_measured(&self) -> bool {
        self.lock().path.is_some()
    }

    /// Whether the link is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Has this side keep the link alive: a multiplexer that begins from now on sends a PING whenever nothing has been sent,
    /// or nothing has come, for `quiet`.
    pub fn keep_alive(&self, quiet: Duration) {
        let _ = self.0.traffic.set(Arc::new(Traffic::new(quiet)));
    }

    pub(crate) fn traffic(&self) -> Option<&Arc<Traffic>> {
        self.0.traffic.get()
    }

    /// Measures the path from now on. The peer has answered a PING after `round_trip`. Further ones are to be sent behind
    /// everything else as they come to `pings`.
    pub(crate) fn measure(&self, round_trip: Duration, pings: &mpsc::UnboundedSender<PingId>) {
        self.lock().path.get_or_insert_with(|| Path {
            flow: Flow::new(Instant::now(), round_trip),
            pings: pings.clone(),
        });
    }

    /// How many bytes one stream should send at once, so that little is ahead of the others and the streams that wait for
    /// room hold little together.
    pub fn share(&self) -> usize {
        let state = self.lock();
        let waiting = state.ahead.len() + state.turns.len();
        (state.room() / (1 + waiting)).min(state.limit() / 4).max(LEAST_SHARE)
    }

    /// Waits until there is room for `bytes` bytes, and reserves it; `None` once the link is gone. Cancel-safe.
    pub async fn reserve(&self, turn: &mut Turn, bytes: usize) -> Option<Reservation> {
        let admitted = {
            let mut state = self.lock();
            if state.closed {
                return None;
            }
            let (ahead, now) = (state.goes_ahead(turn, bytes), Instant::now());
            turn.lately.add(bytes, now);
            state.note_use(turn.stream, ahead && !turn.lately.is_heavy() && bytes < LEAST_SHARE, now);
            let nobody_first =
                state.ahead.is_empty() && (state.turns.is_empty() || ahead && state.went_ahead < AHEAD);
            if nobody_first && state.has_room(bytes) {
                turn.round = state.admit(bytes, ahead);
                return Some(Reservation { gate: self.clone(), bytes, round: turn.round });
            }
            state.held_back = true;
            let (admit, admitted) = oneshot::channel();
            let queue = if ahead { &mut state.ahead } else { &mut state.turns };
            queue.push_back(Waiter { bytes, admit });
            state.ask_if_unmarked();
            admitted
        };
        let reservation = admitted.await.ok()?;
        turn.round = reservation.round;
        Some(reservation)
    }

    /// A PING is about to be sent for another reason. It measures the path as well.
    pub(crate) fn mark(&self, id: PingId) {
        if let Some(path) = &mut self.lock().path {
            path.flow.mark(id, Instant::now(), false);
        }
    }

    /// A PONG has come. Returns `false` if it answers no PING of this link.
    pub(crate) fn on_pong(&self, id: PingId) -> bool {
        let answered = self.lock().path.as_mut().is_some_and(|path| path.flow.on_answer(id, Instant::now()));
        self.serve();
        self.lock().ask_if_unmarked();
        answered
    }

    /// Waits until the link has handed over most of what it holds, or is gone. Cancel-safe.
    pub(crate) async fn settled(&self) {
        let mut settled = std::pin::pin!(self.0.settled.notified());
        loop {
            settled.as_mut().enable();
            if self.lock().is_settled() {
                return;
            }
            settled.as_mut().await;
            settled.set(self.0.settled.notified());
        }
    }

    /// What the link holds for the socket, in bytes.
    pub(super) fn set_backlog(&self, bytes: usize) {
        let before = std::mem::replace(&mut self.lock().backlog, bytes);
        if before > ANSWERED_BACKLOG && bytes <= ANSWERED_BACKLOG {
            self.0.settled.notify_waiters();
        }
    }

    /// Gives back the room of bytes that have left. SSH makes them a little more than was reserved.
    pub(super) fn release(&self, bytes: usize) {
        let mut state = self.lock();
        state.queued = state.queued.saturating_sub(bytes);
        drop(state);
        self.serve();
    }

    /// Refuses everyone who waits, and everyone who comes.
    pub(super) fn close(&self) {
        let waiting = {
            let mut state = self.lock();
            state.closed = true;
            (std::mem::take(&mut state.ahead), std::mem::take(&mut state.turns))
        };
        drop(waiting);
        self.0.settled.notify_waiters();
    }

    /// Admits those for whom there is room now.
    fn serve(&self) {
        loop {
            // Whoever has left gives the room back, which takes the lock.
            let Some((waiter, round)) = self.lock().next() else { return };
            let reservation = Reservation { gate: self.clone(), bytes: waiter.bytes, round };
            let _ = waiter.admit.send(reservation);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_settled(&self) -> bool {
        self.closed || self.backlog <= ANSWERED_BACKLOG
    }

    fn used(&self) -> Use {
        if self.mixed_until.is_some() { Use::Mixed } else { Use::Bulk }
    }

    fn note_use(&mut self, stream: u64, small: bool, now: Instant) {
        if small && self.last_stream != stream && self.last_stream != 0 {
            self.mixed_until = Some(now + MIXED);
        } else if self.mixed_until.is_some_and(|until| until < now) {
            self.mixed_until = None;
        }
        self.last_stream = stream;
    }

    /// The bytes that may be between the streams and the socket.
    fn room(&self) -> usize {
        let carried = self.path.as_ref().and_then(|path| path.flow.carries(QUEUE));
        carried.map_or(ROOM, |bytes| usize::try_from(bytes).unwrap_or(ROOM).clamp(LEAST_ROOM, ROOM))
    }

    /// The bytes that may be under way.
    fn limit(&self) -> usize {
        let limit = self.path.as_ref().map(|path| path.flow.limit(self.used()));
        limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX)
    }

    fn has_room(&self, bytes: usize) -> bool {
        let under_way = self.path.as_ref().map_or(0, |path| path.flow.under_way());
        let ahead = usize::try_from(under_way).unwrap_or(usize::MAX).saturating_add(self.unsent);
        let queued = self.queued.max(self.backlog);
        (queued == 0 || queued + bytes <= self.room())
            && (ahead == 0 || ahead.saturating_add(bytes) <= self.limit())
    }

    /// Whether a stream may go ahead of those that wait for their turn. Whoever has taken a turn may not until a round has
    /// passed without it, which makes its allowance whole again.
    fn goes_ahead(&self, turn: &mut Turn, bytes: usize) -> bool {
        if self.round > turn.round + 1 {
            turn.allowance = QUANTUM;
        }
        let ahead = bytes <= turn.allowance;
        turn.allowance = if ahead { turn.allowance - bytes } else { 0 };
        ahead
    }

    /// Takes room for bytes. Returns the present round.
    fn admit(&mut self, bytes: usize, ahead: bool) -> u64 {
        self.queued += bytes;
        self.unsent += bytes;
        if ahead {
            self.went_ahead += bytes;
        } else {
            self.went_ahead = 0;
            self.left_in_round = self.left_in_round.saturating_sub(1);
            if self.left_in_round == 0 {
                self.round += 1;
                self.left_in_round = self.turns.len();
            }
        }
        self.round
    }

    /// Takes the next one for whom there is room out of the queues.
    fn next(&mut self) -> Option<(Waiter, u64)> {
        loop {
            let ahead = !self.ahead.is_empty() && (self.went_ahead < AHEAD || self.turns.is_empty());
            let queue = if ahead { &mut self.ahead } else { &mut self.turns };
            let waiter = queue.pop_front()?;
            if waiter.admit.is_closed() {
                continue;
            }
            if !self.has_room(waiter.bytes) {
                let queue = if ahead { &mut self.ahead } else { &mut self.turns };
                queue.push_front(waiter);
                return None;
            }
            let round = self.admit(waiter.bytes, ahead);
            return Some((waiter, round));
        }
    }

    fn somebody_waits(&self) -> bool {
        !self.ahead.is_empty() || !self.turns.is_empty()
    }

    /// Sends a PING if somebody waits for what is under way, and nothing else will tell when it has arrived.
    fn ask_if_unmarked(&mut self) {
        if self.somebody_waits() && self.path.as_ref().is_some_and(|path| path.flow.is_unmarked()) {
            self.ask();
        }
    }

    /// Counts what was sent, and sends a PING behind it if one is due.
    fn on_sent(&mut self, bytes: usize) {
        let used = self.used();
        let Some(path) = &mut self.path else { return };
        path.flow.on_sent(bytes, Instant::now());
        if path.flow.mark_due(used) {
            self.ask();
        } else {
            self.ask_if_unmarked();
        }
    }

    fn ask(&mut self) {
        let waiting = self.somebody_waits();
        let limited = std::mem::replace(&mut self.held_back, waiting);
        let id = rand::random();
        if let Some(path) = &mut self.path {
            path.flow.mark(id, Instant::now(), limited);
            let _ = path.pings.send(id);
        }
    }
}

impl Reservation {
    /// Leaves the room to the bytes, which have been sent and give it back as they leave the link.
    pub fn used(mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut state = self.gate.lock();
        state.unsent = state.unsent.saturating_sub(bytes);
        state.on_sent(bytes);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            let mut state = self.gate.lock();
            state.unsent = state.unsent.saturating_sub(self.bytes);
            drop(state);
            self.gate.release(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin, task::Poll};

    use super::*;

    /// Whether a future waits, and what it gives if not.
    async fn now<T>(future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }

    /// Fills the room with one stream's bytes.
    async fn fill(gate: &Gate) {
        gate.reserve(&mut gate.turn(), ROOM).await.unwrap().used();
    }

    /// Streams that wait with `bytes` each, and say so in `order` when they are admitted; each keeps sending `times`.
    fn senders(
        gate: &Gate,
        order: &Arc<Mutex<Vec<&'static str>>>,
        name: &'static str,
        bytes: usize,
        times: usize,
    ) -> impl Future<Output = ()> + use<> {
        let (gate, order) = (gate.clone(), order.clone());
        async move {
            let mut turn = gate.turn();
            for _ in 0..times {
                gate.reserve(&mut turn, bytes).await.unwrap().used();
                order.lock().unwrap().push(name);
            }
        }
    }

    #[tokio::test]
    async fn room_is_bounded_and_shared() {
        let gate = Gate::default();
        assert_eq!(gate.share(), ROOM);
        fill(&gate).await;
        let (mut a, mut b) = (gate.turn(), gate.turn());
        let mut first = pin!(gate.reserve(&mut a, 20));
        assert!(now(first.as_mut()).await.is_none());
        {
            let mut second = pin!(gate.reserve(&mut b, 20));
            assert!(now(second.as_mut()).await.is_none());
            assert_eq!(gate.share(), ROOM / 3);
        }
        gate.release(20);
        assert!(now(first.as_mut()).await.unwrap().is_some(), "in the order of asking");
        // The one that left has no room.
        gate.release(20);
        let mut c = gate.turn();
        assert!(now(gate.reserve(&mut c, 20)).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn only_small_messages_of_light_streams_make_a_connection_mixed() {
        let gate = Gate::default();
        let (mut bulk, mut light) = (gate.turn(), gate.turn());
        for _ in 0..100 {
            gate.reserve(&mut bulk, QUANTUM).await.unwrap().used();
            gate.release(QUANTUM);
        }
        // A socket gave little, as the sockets of transfers do now and then.
        let mut other = gate.turn();
        gate.reserve(&mut other, QUANTUM).await.unwrap().used();
        bulk.allowance = QUANTUM;
        gate.reserve(&mut bulk, 100).await.unwrap().used();
        assert_eq!(gate.lock().used(), Use::Bulk);
        gate.reserve(&mut light, 100).await.unwrap().used();
        assert_eq!(gate.lock().used(), Use::Mixed);
    }

    #[tokio::test]
    async fn a_link_that_is_gone_admits_nobody() {
        let gate = Gate::default();
        fill(&gate).await;
        let mut turn = gate.turn();
        let mut waiting = pin!(gate.reserve(&mut turn, 20));
        assert!(now(waiting.as_mut()).await.is_none());
        gate.close();
        assert!(waiting.await.is_none());
        assert!(gate.reserve(&mut gate.turn(), 1).await.is_none());
    }

    #[tokio::test]
    async fn room_that_is_not_used_is_given_back() {
        let gate = Gate::default();
        let mut turn = gate.turn();
        for _ in 0..1000 {
            drop(gate.reserve(&mut turn, 64 * 1024).await.unwrap());
        }
        let all = gate.reserve(&mut turn, ROOM).await.unwrap();
        let mut waiting = gate.turn();
        {
            // Whoever leaves after having been admitted.
            let mut leaving = pin!(gate.reserve(&mut waiting, ROOM));
            assert!(now(leaving.as_mut()).await.is_none());
            drop(all);
        }
        assert!(now(gate.reserve(&mut turn, ROOM)).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn who_sends_little_goes_ahead_and_the_others_take_turns() {
        let gate = Gate::default();
        fill(&gate).await;
        let order = Arc::default();
        let mut all = pin!(async {
            tokio::join!(
                senders(&gate, &order, "bulk 1", QUANTUM, 6),
                senders(&gate, &order, "bulk 2", QUANTUM, 6),
                async {
                    // It comes when the others have long been sending.
                    while order.lock().unwrap().len() < 6 {
                        tokio::task::yield_now().await;
                    }
                    senders(&gate, &order, "small", 100, 3).await;
                },
            );
        });
        while now(all.as_mut()).await.is_none() {
            gate.release(QUANTUM);
        }
        let order = order.lock().unwrap().clone();
        let small: Vec<_> = (0..order.len()).filter(|i| order[*i] == "small").collect();
        assert_eq!(small.len(), 3);
        assert!(small.windows(2).all(|w| w[1] - w[0] <= 3) && small[0] <= 9, "{order:?}");
        let bulk: Vec<_> = order.iter().filter(|name| **name != "small").collect();
        assert!(bulk[2..].windows(2).filter(|w| w[0] == w[1]).count() <= 1, "by turns: {order:?}");
    }

    #[tokio::test]
    async fn those_who_come_anew_do_not_starve_the_others() {
        let gate = Gate::default();
        fill(&gate).await;
        let order: Arc<Mutex<Vec<&'static str>>> = Arc::default();
        let mut bulk = pin!(senders(&gate, &order, "bulk", QUANTUM, 4));
        let mut crowd: Vec<_> =
            (0..200).map(|_| Box::pin(senders(&gate, &order, "new", QUANTUM, 1))).collect();
        assert!(now(bulk.as_mut()).await.is_none());
        for new in &mut crowd {
            assert!(now(new.as_mut()).await.is_none());
        }
        let mut served = 0;
        while now(bulk.as_mut()).await.is_none() {
            gate.release(QUANTUM);
            crowd.retain_mut(|new| {
                new.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_pending()
            });
            served += 1;
            assert!(served < 40, "{served} were served first");
        }
    }

    #[tokio::test]
    async fn those_who_find_room_do_not_starve_who_needs_more() {
        let gate = Gate::default();
        fill(&gate).await;
        let mut bulk = gate.turn();
        bulk.allowance = 0;
        let mut waiting = pin!(gate.reserve(&mut bulk, QUANTUM));
        assert!(now(waiting.as_mut()).await.is_none());
        let mut passed = 0;
        while now(waiting.as_mut()).await.is_none() {
            gate.release(QUANTUM / 16);
            // A new stream takes what has become free.
            if let Some(Some(room)) = now(gate.reserve(&mut gate.turn(), QUANTUM / 16)).await {
                room.used();
                passed += 1;
            }
            assert!(passed < 200);
        }
    }

    #[tokio::test]
    async fn what_was_never_admitted_takes_room_as_well() {
        let gate = Gate::default();
        gate.set_backlog(ROOM);
        let mut turn = gate.turn();
        let mut waiting = pin!(gate.reserve(&mut turn, 1));
        assert!(now(waiting.as_mut()).await.is_none());
        gate.set_backlog(0);
        gate.release(ROOM);
        assert!(now(waiting.as_mut()).await.is_some());
    }

    #[tokio::test]
    async fn answers_wait_while_the_peer_does_not_read() {
        let gate = Gate::default();
        assert!(now(gate.settled()).await.is_some());
        gate.set_backlog(ANSWERED_BACKLOG + 1);
        let mut answer = pin!(gate.settled());
        assert!(now(answer.as_mut()).await.is_none());
        gate.set_backlog(ANSWERED_BACKLOG);
        answer.await;
        gate.set_backlog(ANSWERED_BACKLOG + 1);
        let mut answer = pin!(gate.settled());
        assert!(now(answer.as_mut()).await.is_none());
        gate.close();
        answer.await;
    }

    /// A gate that measures a path of a millisecond, and the PINGs that it asks for.
    fn measuring() -> (Gate, mpsc::UnboundedReceiver<PingId>) {
        let gate = Gate::default();
        let (pings, asked) = mpsc::unbounded_channel();
        gate.measure(Duration::from_millis(1), &pings);
        (gate, asked)
    }

    #[tokio::test]
    async fn what_is_under_way_is_bounded_until_it_is_known_to_have_arrived() {
        let (gate, mut asked) = measuring();
        let mut turn = gate.turn();
        // The socket takes everything.
        let mut sent = 0;
        while let Some(Some(reserved)) = now(gate.reserve(&mut turn, QUANTUM)).await {
            reserved.used();
            gate.release(QUANTUM);
            sent += QUANTUM;
        }
        let mut marks = Vec::new();
        while let Ok(id) = asked.try_recv() {
            marks.push(id);
        }
        assert!((256 * 1024..=512 * 1024).contains(&sent), "{sent}");
        assert!(!marks.is_empty());
        assert!(!gate.on_pong([0; 8]));
        assert!(marks.iter().all(|id| gate.on_pong(*id)));
        assert!(!gate.on_pong(marks[0]), "once");
        assert!(now(gate.reserve(&mut turn, QUANTUM)).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn nobody_waits_for_what_was_never_asked() {
        let (gate, mut asked) = measuring();
        let mut turn = gate.turn();
        gate.reserve(&mut turn, QUANTUM).await.unwrap().used();
        gate.release(QUANTUM);
        assert!(asked.try_recv().is_err(), "there is room for more");
        let mut waiting = pin!(gate.reserve(&mut turn, ROOM * 8));
        assert!(now(waiting.as_mut()).await.is_none());
        assert!(gate.on_pong(asked.try_recv().expect("it would wait for ever")));
        assert!(waiting.await.is_some());
    }

    #[tokio::test]
    async fn nobody_waits_behind_what_is_sent_only_later() {
        let (gate, mut asked) = measuring();
        let (mut first, mut second) = (gate.turn(), gate.turn());
        let admitted = gate.reserve(&mut first, QUANTUM).await.unwrap();
        // Nothing is under way when the second one begins to wait.
        let mut waiting = pin!(gate.reserve(&mut second, ROOM * 8));
        assert!(now(waiting.as_mut()).await.is_none());
        assert!(asked.try_recv().is_err());
        admitted.used();
        gate.release(QUANTUM);
        assert!(gate.on_pong(asked.try_recv().expect("it would wait for ever")));
        assert!(waiting.await.is_some());
    }
}
