//! Callers that do the same again and again while something is done to the agents.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::Mutex,
    task::{JoinHandle, JoinSet},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{client::Door, load::get, process::eventually};

/// The time between two calls.
const PAUSE: Duration = Duration::from_millis(20);
/// Far longer than a call takes on a busy machine.
const HANGS: Duration = Duration::from_secs(30);

/// Makes 50 calls a second, each of which may take its time.
pub struct Repeated {
    what: String,
    calling: JoinHandle<()>,
    count: Arc<AtomicUsize>,
    results: Arc<Mutex<Results>>,
    stop: CancellationToken,
}

#[derive(Default)]
struct Results {
    failed: Vec<String>,
    seconds: Vec<f64>,
}

impl Repeated {
    /// Begins. Each call is told how many there have been before.
    pub fn start<C>(what: &str, call: impl Fn(usize) -> C + Send + 'static) -> Self
    where
        C: Future<Output = Result<(), String>> + Send + 'static,
    {
        let (results, stop) = (Arc::<Mutex<Results>>::default(), CancellationToken::new());
        let count = Arc::<AtomicUsize>::default();
        let calling = tokio::spawn({
            let (results, stop, counted) = (results.clone(), stop.clone(), count.clone());
            async move {
                let mut ticks = interval(PAUSE);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                let mut calls = JoinSet::new();
                while stop.run_until_cancelled(ticks.tick()).await.is_some() {
                    let call = call(counted.fetch_add(1, Ordering::Relaxed));
                    let results = results.clone();
                    calls.spawn(async move {
                        let began = Instant::now();
                        let result = timeout(HANGS, call).await;
                        let result = result.unwrap_or_else(|_| Err("no answer".to_owned()));
                        let mut results = results.lock().await;
                        results.seconds.push(began.elapsed().as_secs_f64());
                        if let Err(error) = result {
                            results.failed.push(format!("after {:?}: {error}", began.elapsed()));
                        }
                    });
                    while calls.try_join_next().is_some() {}
                }
                calls.join_all().await;
            }
        });
        Self { what: what.to_owned(), calling, count, results, stop }
    }

    /// Dials one target after the other, each with a request.
    pub fn dials(doors: Vec<Door>, targets: Vec<String>) -> Self {
        Self::start("dials", move |count| {
            let door = doors[count % doors.len()].clone();
            let target = targets[count / doors.len() % targets.len()].clone();
            async move {
                let dialled = dial(&door, &target).await;
                dialled.map_err(|error| format!("{target} by {}: {error}", door.name()))
            }
        })
    }

    /// Goes on until there have been as many calls, and shows that none has failed. Prints how long they took.
    pub async fn finish(self, least: usize) {
        let count = || self.count.load(Ordering::Relaxed);
        eventually("there are enough calls", HANGS, async || (count() >= least).then_some(())).await;
        self.stop.cancel();
        self.calling.await.unwrap();
        let mut results = self.results.lock().await;
        let Results { failed, seconds } = &mut *results;
        let (what, made) = (&self.what, count());
        assert!(failed.is_empty(), "{} of {made} {what} failed: {failed:#?}", failed.len());
        seconds.sort_by(f64::total_cmp);
        let quantile = |share: f64| 1e3 * seconds[(seconds.len() as f64 * share) as usize];
        let longest = 1e3 * seconds[seconds.len() - 1];
        let (half, most) = (quantile(0.5), quantile(0.99));
        println!("  {made} {what}: p50 {half:.1} ms, p99 {most:.1} ms, longest {longest:.1} ms");
    }
}

async fn dial(door: &Door, target: &str) -> Result<(), String> {
    let connected = door.connect(target).await.map_err(|error| format!("{error:#}"))?;
    let mut stream = connected.map_err(|refused| format!("{}: {}", refused.status, refused.reason))?;
    get(&mut stream).await.map_err(|error| error.to_string())
}
