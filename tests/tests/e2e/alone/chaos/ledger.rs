//! What callers meet, and whether they may: a failure needs a fault on its way, and some things must never happen.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{faults::Fault, site::NODES};

/// How long callers may still fail after everything has worked again, while the agents settle.
const GRACE: Duration = Duration::from_secs(5);
/// Disturbances that are over for so long excuse nothing that is still under way.
const FORGOTTEN: Duration = Duration::from_secs(300);

/// What must never happen, whatever else is wrong.
#[derive(Debug)]
pub struct Broken(pub String);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Broken {}

/// What a caller does, and the node that it goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    pub what: &'static str,
    pub node: Option<usize>,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.node {
            Some(node) => write!(f, "{} through {} ({:?})", self.what, NODES[node].0, NODES[node].1),
            None => write!(f, "{} at the front end", self.what),
        }
    }
}

pub struct Ledger {
    seed: u64,
    began: Instant,
    /// Of the events that watches see.
    numbers: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    disturbances: Vec<Disturbance>,
    /// When the step began that was the last to succeed on each way.
    succeeded: BTreeMap<Way, Option<Instant>>,
    steps: u64,
    bytes: u64,
    excused: u64,
    broken: Vec<String>,
}

struct Disturbance {
    faults: Vec<Fault>,
    /// When everything worked again.
    over: Option<Instant>,
}

impl Disturbance {
    fn excuses(&self, way: Way, began: Instant) -> bool {
        let then = self.over.is_none_or(|over| began < over + GRACE);
        then && self.faults.iter().any(|fault| fault.disturbs(way.node))
    }
}

impl Ledger {
    pub fn new(seed: u64) -> Self {
        Self { seed, began: Instant::now(), numbers: AtomicU64::new(1), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the next event.
    pub fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Says something, with the time.
    pub fn say(&self, what: fmt::Arguments<'_>) {
        println!("{:7.1} s  {what}", self.began.elapsed().as_secs_f64());
    }

    /// From now on, faults are there.
    pub fn disturb(&self, faults: &[Fault]) {
        let mut state = self.state();
        state.disturbances.retain(|one| one.over.is_none_or(|over| over.elapsed() < FORGOTTEN));
        state.disturbances.push(Disturbance { faults: faults.to_vec(), over: None });
    }

    /// Everything works again.
    pub fn settled(&self) {
        if let Some(last) = self.state().disturbances.last_mut() {
            last.over = Some(Instant::now());
        }
    }

    /// The ways on which nothing has succeeded that began later.
    pub fn waiting(&self, since: Instant) -> Vec<String> {
        let state = self.state();
        let late = state.succeeded.iter().filter(|(_, began)| began.is_none_or(|began| began < since));
        late.map(|(way, _)| way.to_string()).collect()
    }

    /// Something has happened that must not happen.
    pub fn broken(&self, what: &str) {
        let mut state = self.state();
        let now: Vec<_> = state.disturbances.iter().filter(|one| one.over.is_none()).collect();
        let faults: Vec<_> = now.iter().flat_map(|one| &one.faults).collect();
        let (seed, time) = (self.seed, self.began.elapsed().as_secs_f64());
        let text = format!("seed {seed}, {time:.1} s, faults {faults:?}: {what}");
        eprintln!("{text}");
        state.broken.push(text);
    }

    /// Fails if that has happened.
    pub fn check(&self) {
        let broken = self.state().broken.clone();
        assert!(
            broken.is_empty(),
            "{} broken promises, the first ones: {:#?}",
            broken.len(),
            &broken[..broken.len().min(10)]
        );
    }

    pub fn summary(&self) -> String {
        let state = self.state();
        let State { steps, bytes, excused, .. } = &*state;
        format!(
            "{steps} steps of callers with {:.1} MB, and {excused} that faults let fail",
            *bytes as f64 / 1e6
        )
    }
}

/// What one caller does, step by step.
pub struct Steps {
    ledger: Arc<Ledger>,
    way: Way,
    /// Cancelled when callers are to leave.
    pub stop: CancellationToken,
    began: Mutex<Instant>,
}

impl Steps {
    /// Names a way on which something has to succeed after every fault.
    pub fn new(ledger: Arc<Ledger>, way: Way, stop: CancellationToken) -> Self {
        ledger.state().succeeded.entry(way).or_default();
        Self { ledger, way, stop, began: Mutex::new(Instant::now()) }
    }

    fn began(&self) -> MutexGuard<'_, Instant> {
        self.began.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A step begins.
    pub fn begin(&self) {
        *self.began() = Instant::now();
    }

    /// It has succeeded, with so many bytes.
    pub fn succeeded(&self, bytes: u64) {
        let began = *self.began();
        let mut state = self.ledger.state();
        state.succeeded.insert(self.way, Some(began));
        state.steps += 1;
        state.bytes += bytes;
    }

    /// It has failed.
    pub fn failed(&self, error: &anyhow::Error) {
        let began = *self.began();
        {
            let mut state = self.ledger.state();
            let excused = state.disturbances.iter().any(|one| one.excuses(self.way, began));
            if excused && !error.is::<Broken>() {
                state.excused += 1;
                return;
            }
        }
        let after = began.elapsed();
        self.ledger.broken(&format!("{} failed {after:.1?} after its last step began: {error:#}", self.way));
    }
}
