//! A window alone, several that share a budget, and one on a long path.

use std::collections::VecDeque;

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;
use crate::mux::budget::Budget;

const RTT: Duration = Duration::from_millis(100);
const SECOND: Duration = Duration::from_secs(1);
const START: u64 = INITIAL as u64;

/// A budget that is never used up.
fn all(_size: u32, by: u32) -> u32 {
    by
}

/// Lets a reader take whole windows at once for as long as the window is the limit.
fn take_whole_windows(
    w: &mut Receive,
    now: &mut Instant,
    times: usize,
    pace: impl Fn(u64) -> Duration,
    mut grow: impl FnMut(u32, u32) -> u32,
) {
    for _ in 0..times {
        let bytes = w.limit - w.taken;
        *now += pace(bytes);
        w.check(w.limit).unwrap();
        w.on_taken(bytes as usize, *now, RTT, &mut grow);
        w.settle();
    }
}

#[test]
fn no_more_is_granted_than_was_taken() {
    for version in Version::ALL {
        let t0 = Instant::now();
        let mut w = Receive::new(version, t0);
        assert_eq!((w.check(START), w.check(START + 1)), (Ok(()), Err(WindowError::Overrun)));
        assert_eq!(w.on_taken(1000, t0 + RTT * 10, RTT, all).grant, None);
        let grant = w.on_taken(INITIAL as usize / 2 - 1000, t0 + RTT * 10, RTT, all).grant;
        assert_eq!(grant, Some(Grant { by: INITIAL / 2, limit: START * 3 / 2 }));
        assert_eq!((w.check(START * 3 / 2), w.check(START * 3 / 2 + 1)), (Ok(()), Err(WindowError::Overrun)));
    }
}

#[test]
fn grows_while_it_limits_a_fast_reader_and_stops_there() {
    for version in Version::ALL {
        let mut now = Instant::now();
        let mut w = Receive::new(version, now);
        // A reader of 20 MB/s over 100 ms needs 2 MB on the way, and a window of twice that. Whole windows arrive at
        // once, a round trip apart, for as long as the window is the limit.
        let rate = 20_000_000.0;
        let least = RTT + Duration::from_millis(1);
        let pace = |bytes: u64| least.max(Duration::from_secs_f64(bytes as f64 / rate));
        take_whole_windows(&mut w, &mut now, 400, pace, all);
        assert_eq!((w.size(), w.held()), (4 * 1024 * 1024, 4 * 1024 * 1024 - INITIAL));
    }
}

#[test]
fn a_refused_budget_keeps_the_size() {
    for version in Version::ALL {
        let t0 = Instant::now();
        let mut w = Receive::new(version, t0);
        let taken = w.on_taken(INITIAL as usize, t0, RTT, |_, _| 0);
        assert_eq!(taken, Taken { grant: Some(Grant { by: INITIAL, limit: 2 * START }), lacks: true });
        assert_eq!((w.size(), w.held()), (INITIAL, 0));
    }
}

#[test]
fn never_exceeds_the_maximum() {
    for (version, most) in [(Version::V1, MAX), (Version::V2, 2 * MAX)] {
        let mut now = Instant::now();
        let mut w = Receive::new(version, now);
        take_whole_windows(&mut w, &mut now, 100, |_| Duration::ZERO, all);
        assert_eq!((w.size(), largest(version)), (most, most));
        let taken = w.on_taken(most as usize, now, RTT, all);
        assert!(!taken.lacks);
    }
}

/// A window that has grown to `size`, and whose reader has taken everything.
fn grown(size: u32) -> (Receive, Instant) {
    let mut now = Instant::now();
    let mut w = Receive::new(Version::V2, now);
    while w.size() < size {
        take_whole_windows(&mut w, &mut now, 1, |_| RTT / 4, all);
    }
    assert_eq!((w.size(), w.limit - w.taken), (size, u64::from(size)));
    (w, now)
}

#[test]
fn shrinks_as_the_reader_takes_bytes_for_which_nothing_is_granted() {
    const MB: u32 = 1024 * 1024;
    let (mut w, mut now) = grown(16 * MB);
    now += RTT;
    w.shrink(Some(4 * MB), now, RTT);
    assert_eq!((w.size(), w.settle()), (4 * MB, 0));
    let (mut freed, limit) = (0, w.limit);
    for i in 1..=12 {
        now += RTT / 10;
        let taken = w.on_taken(MB as usize, now, RTT, |_, _| panic!("it shrinks"));
        assert_eq!(taken, Taken { grant: None, lacks: false });
        freed += w.settle();
        assert_eq!((freed, w.held()), (i * MB, 16 * MB - i * MB - INITIAL));
    }
    assert_eq!(w.limit, limit);
    // It has its new size, and may grow again.
    now += RTT;
    let grant = w.on_taken(MB as usize, now, RTT, |_, _| 0).grant;
    assert_eq!(grant, Some(Grant { by: MB, limit: limit + u64::from(MB) }));
    take_whole_windows(&mut w, &mut now, 1, |_| RTT / 4, all);
    assert_eq!((w.size(), w.held()), (8 * MB, 8 * MB - INITIAL));
}

#[test]
fn keeps_what_its_reader_needs() {
    const MB: u32 = 1024 * 1024;
    let (mut w, mut now) = grown(16 * MB);
    // The reader was held back a moment ago.
    w.shrink(None, now, RTT);
    assert_eq!(w.size(), 16 * MB);
    // Then it takes 1 MB in a round trip.
    for _ in 0..40 {
        now += RTT;
        w.on_taken(MB as usize, now, RTT, all);
        w.settle();
    }
    w.shrink(None, now, RTT);
    assert_eq!(w.size(), 4 * MB);
    // A share that is larger changes nothing.
    w.shrink(Some(5 * MB), now, RTT);
    assert_eq!(w.size(), 4 * MB);
    now += SECOND;
    w.shrink(Some(5 * MB), now, RTT);
    assert_eq!(w.size(), INITIAL);
}

#[test]
fn an_idle_stream_s_credit_is_taken_back() {
    const MB: u32 = 1024 * 1024;
    let (mut w, now) = grown(16 * MB);
    let (received, limit) = (w.taken, w.limit);
    w.shrink(None, now + RTT * 9, RTT);
    assert_eq!((w.size(), w.retract(received, now + RTT * 9, RTT)), (16 * MB, None));
    let later = now + SECOND;
    w.shrink(None, later, RTT);
    assert_eq!((w.size(), w.settle()), (INITIAL, 0));
    assert_eq!(w.retract(received, later, RTT), Some(received + START));
    assert_eq!(w.retract(received, later + SECOND * 9, RTT), None, "the first one is not answered");
    assert_eq!(w.on_retracted(received + START, later), Ok(None));
    assert_eq!((w.settle(), w.held()), (16 * MB - INITIAL, 0));
    assert_eq!(
        (w.check(received + START), w.check(received + START + 1)),
        (Ok(()), Err(WindowError::Overrun))
    );
    assert_eq!(w.retract(received, later + SECOND * 9, RTT), None, "nothing is left to take back");
    // It grows again as at first.
    assert!(w.limit < limit);
    let mut now = later + SECOND;
    while w.size() < 16 * MB {
        take_whole_windows(&mut w, &mut now, 1, |_| RTT / 4, all);
    }
    assert_eq!(w.held(), 16 * MB - INITIAL);
}

#[test]
fn a_reader_that_goes_on_while_credit_is_taken_back_is_not_forgotten() {
    let (mut w, now) = grown(4 * INITIAL);
    let later = now + SECOND;
    w.shrink(None, later, RTT);
    let asked = w.retract(w.taken, later, RTT).unwrap();
    // The peer has sent everything by then, and the reader takes it before the answer comes.
    let limit = w.limit;
    assert_eq!(w.check(limit), Ok(()));
    let taken = w.on_taken(4 * INITIAL as usize, later, RTT, |_, _| panic!("it shrinks"));
    assert_eq!(taken, Taken { grant: None, lacks: false });
    assert_eq!(w.on_retracted(asked, later), Err(WindowError::Retracted), "more has come");
    assert_eq!(w.on_retracted(limit, later), Ok(Some(Grant { by: INITIAL, limit: limit + START })));
    w.settle();
    assert_eq!(w.held(), 0);
}

#[test]
fn a_reader_that_takes_too_little_to_shrink_gives_credit_back_as_well() {
    let (mut w, mut now) = grown(64 * INITIAL);
    let share = 32 * INITIAL;
    let mut asked = None;
    for _ in 0..30 {
        now += RTT;
        w.on_taken(10, now, RTT, all);
        w.shrink(Some(share), now, RTT);
        w.settle();
        assert!(w.size() <= share && !w.is_idle(now, RTT));
        asked = asked.or(w.retract(w.taken, now, RTT));
    }
    assert!(w.on_retracted(asked.unwrap(), now).is_ok());
    w.settle();
    assert!(w.held() <= share, "{}", w.held());
}

#[test]
fn a_peer_gives_back_what_it_was_asked_for_and_once() {
    let (mut unasked, now) = grown(8 * INITIAL);
    let limit = unasked.limit;
    let ask = || {
        let (mut w, now) = grown(8 * INITIAL);
        w.shrink(None, now + SECOND, RTT);
        let asked = w.retract(w.taken, now + SECOND, RTT).unwrap();
        (w, asked)
    };
    assert_eq!(unasked.on_retracted(limit, now), Err(WindowError::Unasked));
    for (answer, want) in
        [(0, Err(WindowError::Retracted)), (limit + 1, Err(WindowError::Retracted)), (limit, Ok(None))]
    {
        let (mut w, asked) = ask();
        assert_eq!(w.on_retracted(answer, now), want, "{answer} instead of {asked}");
    }
    let (mut w, asked) = ask();
    assert_eq!(w.on_retracted(asked - 1, now), Err(WindowError::Retracted));
    assert_eq!(w.on_retracted(asked, now), Ok(None));
    assert_eq!(w.on_retracted(asked, now), Err(WindowError::Unasked));
}

#[test]
fn a_direction_that_has_ended_holds_only_what_is_still_to_come() {
    let (mut w, now) = grown(64 * INITIAL);
    w.on_end(w.taken + 3 * START);
    assert_eq!((w.settle(), w.held()), (61 * INITIAL, 2 * INITIAL));
    let taken = w.on_taken(2 * INITIAL as usize, now, RTT, |_, _| panic!("it has ended"));
    assert_eq!(taken, Taken { grant: None, lacks: false });
    assert_eq!((w.settle(), w.held()), (2 * INITIAL, 0));
    assert_eq!(w.retract(w.taken, now + SECOND, RTT), None);
    assert_eq!((w.close(), w.settle()), (0, 0));
}

#[test]
fn one_stream_carries_a_gigabit_over_300_ms() {
    const RATE: u64 = 125_000;
    const ONE_WAY: usize = 150;
    let round_trip = Duration::from_millis(2 * ONE_WAY as u64);
    let mut now = Instant::now();
    let mut w = Receive::new(Version::V2, now);
    let (mut sent, mut limit) = (0, w.limit);
    // What arrives in each millisecond, at the receiver and at the sender.
    let mut bytes: VecDeque<u64> = vec![0; ONE_WAY].into();
    let mut grants: VecDeque<u64> = vec![0; ONE_WAY].into();
    let mut taken = Vec::new();
    for _ in 0..20_000 {
        now += Duration::from_millis(1);
        limit = limit.max(grants.pop_front().unwrap());
        let sends = RATE.min(limit - sent);
        sent += sends;
        bytes.push_back(sends);
        let came = bytes.pop_front().unwrap();
        let grant = w.on_taken(came as usize, now, round_trip, all).grant;
        w.settle();
        grants.push_back(grant.map_or(0, |grant| grant.limit));
        taken.push(came);
    }
    let last: u64 = taken[18_000..].iter().sum();
    assert!(last >= RATE * 2000 * 95 / 100, "{last}");
}

/// Streams that share a budget, whose peer sends whatever it may.
struct Streams {
    budget: Budget,
    windows: Vec<Receive>,
    /// The bytes that have come on each.
    received: Vec<u64>,
    now: Instant,
}

impl Streams {
    fn new(count: usize) -> Self {
        let now = Instant::now();
        let windows = (0..count).map(|_| Receive::new(Version::V2, now)).collect();
        Self { budget: Budget::new(Version::V2), windows, received: vec![0; count], now }
    }

    fn settle(&mut self, at: usize) {
        let freed = self.windows[at].settle();
        if freed > 0 {
            self.budget.give_back(at as u64, freed, self.windows[at].held());
        }
    }

    /// Bytes come, and the reader takes them. Returns the streams that are asked to give credit back.
    fn take(&mut self, at: usize, bytes: u64) -> Vec<usize> {
        let (w, budget, now) = (&mut self.windows[at], &mut self.budget, self.now);
        let bytes = bytes.min(w.limit - w.taken);
        self.received[at] = self.received[at].max(w.taken + bytes);
        w.check(self.received[at]).unwrap();
        let grow = |size, by| budget.grow(at as u64, size, by, now);
        let lacks = w.on_taken(bytes as usize, now, RTT, grow).lacks;
        let size = w.size();
        self.settle(at);
        if lacks { self.look(at, size) } else { Vec::new() }
    }

    fn look(&mut self, asking: usize, size: u32) -> Vec<usize> {
        let Some(grown) = self.budget.look(self.now, RTT) else { return Vec::new() };
        let others: Vec<usize> = grown.iter().map(|id| *id as usize).filter(|id| *id != asking).collect();
        let active = others.iter().filter(|id| !self.windows[**id].is_idle(self.now, RTT)).count();
        let share = self.budget.share(size, 1 + active as u32, self.now, RTT);
        let mut asked = Vec::new();
        for id in others {
            self.windows[id].shrink(share, self.now, RTT);
            if self.windows[id].retract(self.received[id], self.now, RTT).is_some() {
                asked.push(id);
            }
            self.settle(id);
        }
        asked
    }

    fn answer(&mut self, at: usize, limit: u64) {
        self.windows[at].on_retracted(limit, self.now).unwrap();
        self.settle(at);
    }

    /// What the peer can make this side buffer beyond the initial windows never exceeds the budget.
    fn assert_bounded(&self) {
        let mut held = 0;
        for w in &self.windows {
            assert!(w.limit.saturating_sub(w.taken).max(w.size().into()) <= START + u64::from(w.held()));
            held += w.held();
        }
        assert_eq!(held + self.budget.left(), Budget::total(Version::V2));
    }

    /// A round trip in which these streams take whole windows.
    fn run(&mut self, active: &[usize]) {
        let mut asked = Vec::new();
        for part in 1..=4 {
            self.now += RTT / 5;
            for at in active {
                let left = self.windows[*at].limit - self.windows[*at].taken;
                asked.extend(self.take(*at, left * part / 4));
                self.assert_bounded();
            }
        }
        for at in asked {
            let Retract::Asked(limit) = self.windows[at].retract else { panic!("{at} was not asked") };
            self.answer(at, limit.max(self.received[at]));
        }
        self.assert_bounded();
    }

    fn sizes(&self) -> Vec<u32> {
        self.windows.iter().map(|w| w.size() / 1024 / 1024).collect()
    }
}

#[test]
fn an_idle_stream_costs_the_next_one_nothing() {
    let mut streams = Streams::new(3);
    for at in 0..3 {
        for _ in 0..40 {
            streams.run(&[at]);
        }
        let mut sizes = [0; 3];
        sizes[at] = 64;
        assert_eq!(streams.sizes(), sizes);
        streams.now += SECOND;
    }
}

#[test]
fn active_streams_share_the_budget() {
    let mut streams = Streams::new(3);
    for _ in 0..20 {
        streams.run(&[0]);
    }
    for _ in 0..100 {
        streams.run(&[0, 1, 2]);
    }
    let sizes = streams.sizes();
    assert!(sizes.iter().all(|size| (16..=28).contains(size)), "{sizes:?}");
    for _ in 0..60 {
        streams.run(&[1]);
    }
    let sizes = streams.sizes();
    assert!(matches!(sizes[..], [0, 63..=64, 0]), "{sizes:?}");
}

#[test]
fn the_budget_holds_whatever_happens() {
    let mut rng = StdRng::seed_from_u64(64);
    for _ in 0..20 {
        let mut streams = Streams::new(12);
        let mut asked = Vec::new();
        for _ in 0..4000 {
            let at = rng.random_range(0..12);
            if rng.random_bool(0.5) {
                streams.now += Duration::from_millis(rng.random_range(0..200));
            }
            let most = streams.windows[at].limit - streams.windows[at].taken;
            let bytes = if rng.random_bool(0.2) { rng.random_range(0..=most) } else { most };
            asked.extend(streams.take(at, bytes));
            streams.assert_bounded();
            if rng.random_bool(0.3)
                && let Some(at) = asked.pop()
            {
                let Retract::Asked(limit) = streams.windows[at].retract else { panic!("{at}") };
                let most = streams.windows[at].limit;
                let limit = limit.max(streams.received[at]);
                streams.answer(at, rng.random_range(limit..=most));
                streams.assert_bounded();
            }
        }
    }
}
