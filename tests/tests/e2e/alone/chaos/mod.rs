//! Everything that can go wrong around the agents goes wrong, while callers of every kind come all the time.
//!
//! A plan that a seed decides ([`faults`]) cuts, silences, delays and throttles links, kills and stops processes, reloads
//! and upgrades agents, replaces certificates, and takes away room and descriptors. Meanwhile:
//!
//! - bytes arrive exactly, in order and once ([`load`], [`targets`]);
//! - nothing hangs, and nobody comes in who may not;
//! - only callers whose way a fault disturbs may fail, and none when agents reload ([`ledger`]);
//! - after every fault, all ways work again.
//!
//! At the end, nothing is left over, and the metrics add up ([`invariants`]). Time itself can't be changed here: the kernel
//! has no namespace for the clock that tells the date.
//!
//! `CHAOS_SECONDS` says how long it takes, and `CHAOS_SEED` which plan it follows; `tests/chaos.sh` sets both.

mod faults;
mod invariants;
mod ledger;
mod load;
mod site;
mod targets;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tests::{netns::Island, steady::raise_descriptor_limit};
use tokio::{runtime::Builder, time::sleep};

use self::{
    faults::{Plan, Round},
    invariants::{AtStart, logs_are_clean, metrics_add_up},
    ledger::Ledger,
    load::{Entrances, Load},
    site::{Site, Undo},
    targets::Targets,
};

/// How long a node or the master may take to be back: its next attempt to connect may be that far away.
const RECOVERY: Duration = Duration::from_secs(45);
/// How long callers come before the agents are measured for the first time.
const WARM: Duration = Duration::from_secs(3);
/// Descriptors of this process and of those that it starts.
const DESCRIPTORS: u64 = 16_384;
/// Runs that last longer have more nodes.
const LONG: Duration = Duration::from_secs(120);

/// A number that a variable of the environment may set.
fn number(variable: &str, without: u64) -> u64 {
    std::env::var(variable).ok().map_or(without, |text| text.parse().expect(variable))
}

#[test]
fn agents_keep_their_promises_while_everything_around_them_fails() {
    let (seed, time) = (number("CHAOS_SEED", 1), Duration::from_secs(number("CHAOS_SECONDS", 60)));
    println!("CHAOS_SEED={seed} CHAOS_SECONDS={}", time.as_secs());
    // Everything starts in a network namespace of its own.
    let island = Island::new().unwrap();
    let _inside = island.enter().unwrap();
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let ledger = Arc::new(Ledger::new(seed));
        if let Err(error) = run(&ledger, Plan::new(seed), time).await {
            ledger.check();
            panic!("seed {seed}: {error:#}");
        }
    });
}

async fn run(ledger: &Arc<Ledger>, mut plan: Plan, time: Duration) -> anyhow::Result<()> {
    raise_descriptor_limit(DESCRIPTORS)?;
    let targets = Targets::start(ledger).await?;
    // With those that carry something, 20 nodes, or 200.
    let others = if time > LONG { 196 } else { 16 };
    let mut site = Site::start(targets.allowed(), others).await?;
    ledger.say(format_args!("all {} nodes are linked", others as usize + site::NODES.len()));

    let load = Load::start(&site, targets, ledger)?;
    recover(&site, ledger, Instant::now()).await?;
    sleep(WARM).await;
    load.stop().await;
    ledger.check();
    let at_start = AtStart::note(&site).await?;

    let (load, began) = (Load::start(&site, targets, ledger)?, Instant::now());
    while began.elapsed() < time {
        round(&mut site, ledger, plan.next_round()).await?;
    }
    load.stop().await;
    ledger.check();
    ledger.say(format_args!("{}", ledger.summary()));
    at_start.is_back(&site).await?;
    metrics_add_up(&site, &Entrances::new(&site, targets)?).await?;
    logs_are_clean(&site)?;
    ledger.check();
    Ok(())
}

/// Faults come, last, and go; then everything works again.
async fn round(site: &mut Site, ledger: &Ledger, round: Round) -> anyhow::Result<()> {
    let Round { faults, lasts, pause } = round;
    ledger.say(format_args!("{faults:?} for {lasts:.1?}"));
    ledger.disturb(&faults);
    let mut undo = Vec::new();
    for fault in &faults {
        undo.push(site.inject(*fault).await?);
    }
    sleep(lasts).await;
    undo.sort_by_key(Undo::waits);
    for undo in undo {
        site.heal(undo, faults.len() == 1).await?;
    }
    let healed = Instant::now();
    recover(site, ledger, healed).await?;
    ledger.settled();
    ledger.say(format_args!("everything worked again {:.1?} later", healed.elapsed()));
    sleep(pause).await;
    ledger.check();
    Ok(())
}

/// Waits until something that began later has succeeded on each way.
async fn recover(site: &Site, ledger: &Ledger, since: Instant) -> anyhow::Result<()> {
    loop {
        ledger.check();
        let waiting = ledger.waiting(since);
        let linked = site.is_linked().await;
        if waiting.is_empty() && linked {
            return Ok(());
        }
        if since.elapsed() > RECOVERY {
            let nodes = if linked { "all nodes are linked" } else { "not all nodes are linked" };
            ledger.broken(&format!(
                "{RECOVERY:?} later, {nodes}, and nothing succeeds on these ways: {waiting:#?}"
            ));
        }
        sleep(Duration::from_millis(50)).await;
    }
}
