//! The events that the page gets while it is open, as server-sent events.
//!
//! There is no task. The first watcher in each second makes a snapshot for all watchers, on a thread that carries no
//! streams. Each watcher is sent the difference between this snapshot and the last one that it has taken. A slow
//! watcher therefore misses snapshots, nothing is kept for it, and nothing happens while nobody watches.

use std::{
    cmp::Ordering,
    collections::HashMap,
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use access::limits::{Counted, Counts};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use proto::NodeName;
use proto_net::admin::Body;
use serde::Serialize;
use tokio::{
    sync::{Mutex, OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::paths::Site;
use crate::{
    activity::unix_milliseconds,
    admin_api::{Event, NodeStatus},
    tunnels::registry::Registry,
};

/// The maximum number of pages that are open at once on the admin address, whose viewers may use the admin socket.
const ADMIN_WATCHERS: usize = 16;
/// The maximum number of pages that are open at once on the front end.
const FRONT_END_WATCHERS: usize = 64;
/// The maximum number of pages that one user has open on the front end, so that a few users leave room for others.
const USER_WATCHERS: usize = 4;
/// The time between two snapshots.
const EVERY: Duration = Duration::from_secs(1);
/// Something is sent at least this often, so that the page can tell a silent agent from one that is gone.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// The age up to which the last snapshot serves to compute rates.
const RECENT: Duration = Duration::from_secs(5);
/// How long a page waits before it connects again, in milliseconds.
const RETRY: &[u8] = b"retry: 200\n\n";
/// The maximum number of refusals that are shown, of all nodes together.
const REFUSALS: usize = 100;

/// One node in the page's table.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Row {
    name: NodeName,
    state: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    /// The direction of the active tunnel.
    direction: Option<String>,
    kind: Option<String>,
    tunnels: usize,
    /// The round trip, rounded to two digits. The page shows no more, and smaller differences are no change.
    round_trip_microseconds: Option<u64>,
    streams: usize,
    /// Bytes per second, or 0 if there is nothing to compare with.
    up: u64,
    down: u64,
    errors: u64,
    changed_unix_milliseconds: Option<u64>,
    #[serde(skip)]
    totals: (u64, u64),
    #[serde(skip)]
    refusals: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct Refusal {
    node: NodeName,
    #[serde(flatten)]
    event: Event,
}

/// All nodes at one moment.
#[derive(Debug)]
struct Snapshot {
    at: Instant,
    unix_milliseconds: u64,
    /// Whether there was an earlier snapshot to compute rates with.
    rates: bool,
    /// The rows, sorted by name. Rows that did not change are shared with the snapshot before.
    rows: Vec<Arc<Row>>,
    refusals: Arc<Vec<Refusal>>,
    /// The time at which the latest comparison arrived.
    compared: u64,
}

/// One event.
#[derive(Debug, Serialize)]
struct Change<'a> {
    unix_milliseconds: u64,
    /// Whether the event replaces everything that was sent before.
    whole: bool,
    /// Whether rates are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    rates: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rows: Vec<&'a Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    gone: Vec<&'a NodeName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusals: Option<&'a [Refusal]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compared: Option<u64>,
}

pub(super) struct Live {
    registry: Arc<Registry>,
    last: Arc<Mutex<Option<Arc<Snapshot>>>>,
    compared: AtomicU64,
    /// The permits of the watchers at each site.
    admin: Arc<Semaphore>,
    front_end: Arc<Semaphore>,
    /// The watchers of each user on the front end.
    users: Counts<str>,
}

impl Live {
    pub(super) fn new(registry: Arc<Registry>) -> Arc<Self> {
        Arc::new(Self {
            registry,
            last: Arc::default(),
            compared: AtomicU64::new(0),
            admin: Arc::new(Semaphore::new(ADMIN_WATCHERS)),
            front_end: Arc::new(Semaphore::new(FRONT_END_WATCHERS)),
            users: Counts::new(USER_WATCHERS),
        })
    }

    /// Tells the watchers of a comparison.
    pub(super) fn compared(&self, unix_milliseconds: u64) {
        self.compared.store(unix_milliseconds, Relaxed);
    }

    /// Returns the events for one page until `draining` is cancelled or `end` is reached, or `None` if too many pages
    /// are open.
    pub(super) fn watch(
        self: &Arc<Self>,
        draining: CancellationToken,
        end: Instant,
        site: &Site,
    ) -> Option<Body> {
        let (permits, of_user) = match site {
            Site::Admin => (&self.admin, None),
            Site::FrontEnd { user } => (&self.front_end, Some(self.users.take(user)?)),
        };
        let of_all = permits.clone().try_acquire_owned().ok()?;
        let permit = Permit { _of_all: of_all, _of_user: of_user };
        let watcher = Watcher { live: self.clone(), seen: None, sent: Instant::now(), permit: Some(permit) };
        let events = stream::unfold(watcher, move |mut watcher| {
            let draining = draining.clone();
            async move {
                let event = tokio::select! {
                    biased;
                    () = draining.cancelled() => return None,
                    () = tokio::time::sleep_until(end) => return None,
                    event = watcher.next() => event?,
                };
                Some((Ok::<_, Infallible>(Frame::data(event)), watcher))
            }
        });
        let begin = stream::iter([Ok(Frame::data(Bytes::from_static(RETRY)))]);
        Some(StreamBody::new(begin.chain(events)).boxed_unsync())
    }

    /// Returns the snapshot of the present second, or the next one if that is `seen`. Returns `None` if it can't be
    /// made.
    async fn next(self: &Arc<Self>, seen: Option<&Arc<Snapshot>>) -> Option<Arc<Snapshot>> {
        loop {
            let mut last = self.last.clone().lock_owned().await;
            let now = Instant::now();
            let until = match last.as_ref().filter(|last| now < last.at + EVERY) {
                Some(last) if seen.is_none_or(|seen| !Arc::ptr_eq(seen, last)) => return Some(last.clone()),
                Some(last) => last.at + EVERY,
                None => {
                    let live = self.clone();
                    let made = spawn_blocking(move || {
                        let snapshot = Arc::new(live.snapshot(last.as_deref(), now));
                        *last = Some(snapshot.clone());
                        snapshot
                    });
                    return made.await.ok();
                }
            };
            drop(last);
            tokio::time::sleep_until(until).await;
        }
    }

    fn snapshot(&self, last: Option<&Snapshot>, now: Instant) -> Snapshot {
        let rows = rows(self.registry.status(), last, now);
        let rates = since(last, now).is_some();
        let refused = |rows: &[Arc<Row>]| rows.iter().map(|row| row.refusals).sum::<u64>();
        let refusals = match last {
            Some(last) if refused(&last.rows) == refused(&rows) => last.refusals.clone(),
            Some(_) | None => {
                let refusals = self.registry.refusals(REFUSALS).into_iter();
                Arc::new(refusals.map(|(node, event)| Refusal { node, event }).collect())
            }
        };
        let unix_milliseconds = unix_milliseconds(SystemTime::now());
        Snapshot { at: now, unix_milliseconds, rates, rows, refusals, compared: self.compared.load(Relaxed) }
    }
}

/// One page.
struct Watcher {
    live: Arc<Live>,
    seen: Option<Arc<Snapshot>>,
    sent: Instant,
    permit: Option<Permit>,
}

/// Counts as one of the watchers of a site, and of a user.
struct Permit {
    _of_all: OwnedSemaphorePermit,
    _of_user: Option<Counted<str>>,
}

impl Watcher {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let next = self.live.next(self.seen.as_ref()).await?;
            let (seen, now, silent) =
                (self.seen.replace(next.clone()), next, self.sent.elapsed() >= HEARTBEAT);
            let event = spawn_blocking(move || {
                let change = Change::between(seen.as_deref(), &now);
                (!change.is_empty() || silent).then(|| change.event())
            });
            if let Some(event) = event.await.ok()? {
                self.sent = Instant::now();
                return Some(event);
            }
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        drop(self.permit.take());
        let Live { admin, front_end, .. } = &*self.live;
        let nobody = admin.available_permits() == ADMIN_WATCHERS
            && front_end.available_permits() == FRONT_END_WATCHERS;
        if nobody && let Ok(mut last) = self.live.last.try_lock() {
            *last = None;
        }
    }
}

impl<'a> Change<'a> {
    fn between(seen: Option<&'a Snapshot>, next: &'a Snapshot) -> Self {
        let (rows, gone) = difference(seen.map_or(&[][..], |seen| &seen.rows), &next.rows);
        let new = |same: fn(&Snapshot, &Snapshot) -> bool| seen.is_none_or(|seen| !same(seen, next));
        Self {
            unix_milliseconds: next.unix_milliseconds,
            whole: seen.is_none(),
            rates: new(|a, b| a.rates == b.rates).then_some(next.rates),
            rows,
            gone,
            refusals: new(|a, b| Arc::ptr_eq(&a.refusals, &b.refusals)).then(|| next.refusals.as_slice()),
            compared: new(|a, b| a.compared == b.compared).then_some(next.compared),
        }
    }

    fn is_empty(&self) -> bool {
        !self.whole
            && self.rates.is_none()
            && self.rows.is_empty()
            && self.gone.is_empty()
            && self.refusals.is_none()
            && self.compared.is_none()
    }

    fn event(&self) -> Bytes {
        // JSON has no line breaks, and serializing these types can't fail.
        let json = serde_json::to_string(self).unwrap_or_default();
        Bytes::from(format!("data: {json}\n\n"))
    }
}

/// Returns the rows that are new or different, and the names of those that are gone. Both slices are sorted by name.
fn difference<'a>(before: &'a [Arc<Row>], now: &'a [Arc<Row>]) -> (Vec<&'a Row>, Vec<&'a NodeName>) {
    let (mut before, mut now) = (before.iter().peekable(), now.iter().peekable());
    let (mut rows, mut gone) = (Vec::new(), Vec::new());
    loop {
        let order = match (before.peek(), now.peek()) {
            (Some(old), Some(new)) => old.name.cmp(&new.name),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return (rows, gone),
        };
        match order {
            Ordering::Less => gone.extend(before.next().map(|old| &old.name)),
            Ordering::Greater => rows.extend(now.next().map(|new| &**new)),
            Ordering::Equal => {
                let (old, new) = (before.next(), now.next());
                let same = old.zip(new).is_some_and(|(old, new)| Arc::ptr_eq(old, new));
                rows.extend(new.filter(|_| !same).map(|new| &**new));
            }
        }
    }
}

/// Returns the age of the last snapshot, unless it is too old to compute rates.
fn since(last: Option<&Snapshot>, now: Instant) -> Option<Duration> {
    last.map(|last| now.duration_since(last.at)).filter(|since| *since <= RECENT)
}

fn rows(status: Vec<NodeStatus>, last: Option<&Snapshot>, now: Instant) -> Vec<Arc<Row>> {
    let before: HashMap<&NodeName, &Arc<Row>> =
        last.into_iter().flat_map(|last| &last.rows).map(|row| (&row.name, row)).collect();
    let since = since(last, now);
    let row = |status: NodeStatus| {
        let before = before.get(&status.name).copied();
        let row = Row::new(status, before.map(|row| row.totals).zip(since));
        before.filter(|before| ***before == row).cloned().unwrap_or_else(|| Arc::new(row))
    };
    status.into_iter().map(row).collect()
}

impl Row {
    fn new(status: NodeStatus, before: Option<((u64, u64), Duration)>) -> Self {
        let totals = (status.totals.up, status.totals.down);
        let rate = |now: u64, before: u64, time: Duration| {
            (now.saturating_sub(before) as f64 / time.as_secs_f64().max(0.001)).round() as u64
        };
        let tunnel = status.tunnels.first();
        Self {
            direction: tunnel.map(|tunnel| tunnel.direction.clone()),
            kind: tunnel.map(|tunnel| tunnel.kind.clone()),
            tunnels: status.tunnels.len(),
            round_trip_microseconds: tunnel.and_then(|t| t.round_trip_microseconds).map(two_digits),
            streams: status.streams(),
            up: before.map_or(0, |((up, _), time)| rate(totals.0, up, time)),
            down: before.map_or(0, |((_, down), time)| rate(totals.1, down, time)),
            errors: status.errors(),
            changed_unix_milliseconds: status.totals.changed_unix_milliseconds,
            totals,
            refusals: status.refusals(),
            name: status.name,
            state: status.state,
            reason: status.reason,
        }
    }
}

fn two_digits(value: u64) -> u64 {
    let unit = 10u64.pow(value.checked_ilog10().unwrap_or_default().saturating_sub(1));
    (value / unit + u64::from(value % unit >= unit.div_ceil(2))) * unit
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{admin_api::EventKind, top::model::tests::node as status, tunnels::absent::Absent};

    fn snapshot(status: Vec<NodeStatus>, last: Option<&Snapshot>, at: Instant) -> Snapshot {
        let rows = rows(status, last, at);
        let refusals = last.map_or_else(Arc::default, |last| last.refusals.clone());
        let rates = since(last, at).is_some();
        Snapshot { at, unix_milliseconds: 0, rates, rows, refusals, compared: 0 }
    }

    fn changed(before: &Snapshot, now: &Snapshot) -> (Vec<String>, Vec<String>) {
        let change = Change::between(Some(before), now);
        let rows = change.rows.iter().map(|row| format!("{} {} {}", row.name, row.state, row.up));
        (rows.collect(), change.gone.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn only_what_changed_is_sent() {
        let now = Instant::now();
        let later = |seconds| now + Duration::from_secs(seconds);
        let list = |b: &str, up| vec![status("a", "connected", 7), status("b", b, up)];
        let first = snapshot(list("connected", 0), None, now);
        assert_eq!(Change::between(None, &first).rows.len(), 2);
        let second = snapshot(list("connected", 2000), Some(&first), later(2));
        assert_eq!(changed(&first, &second).0, ["b connected 1000"]);
        let third = snapshot(list("lost", 2000), Some(&second), later(3));
        assert_eq!(changed(&second, &third).0, ["b lost 0"]);
        let mut more = list("lost", 2000);
        more.remove(0);
        more.push(status("c", "connecting", 0));
        let fourth = snapshot(more.clone(), Some(&third), later(4));
        assert_eq!(changed(&third, &fourth), (vec!["c connecting 0".to_owned()], vec!["a".to_owned()]));
        // A watcher that missed some gets their changes together.
        assert_eq!(changed(&first, &fourth).0, ["b lost 0", "c connecting 0"]);
        let fifth = snapshot(more.clone(), Some(&fourth), later(5));
        assert!(Change::between(Some(&fourth), &fifth).is_empty());
        // An old snapshot gives no rate.
        more[0].totals.up += 1000;
        let sixth = snapshot(more.clone(), Some(&fifth), later(60));
        assert_eq!(changed(&fifth, &sixth).0, ["b lost 0"]);
        assert_eq!(Change::between(Some(&fifth), &sixth).rates, Some(false));
        // The rate falls back to zero with the snapshot after the bytes.
        more[0].totals.up += 10;
        let seventh = snapshot(more.clone(), Some(&sixth), later(61));
        let eighth = snapshot(more, Some(&seventh), later(62));
        assert_eq!(changed(&seventh, &eighth).0, ["b lost 0"]);
    }

    #[test]
    fn a_round_trip_has_two_digits() {
        for (value, rounded) in
            [(0, 0), (7, 7), (42, 42), (149, 150), (144, 140), (9960, 10_000), (12_345, 12_000)]
        {
            assert_eq!(two_digits(value), rounded);
        }
        assert!(two_digits(u64::MAX / 2) > 0);
    }

    async fn next(body: &mut Body) -> Option<serde_json::Value> {
        let frame = body.frame().await?.unwrap().into_data().unwrap();
        let text = String::from_utf8(frame.to_vec()).unwrap();
        let json = text.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
        Some(serde_json::from_str(json).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn watchers_share_snapshots_and_end_with_the_agent() {
        let registry = Arc::new(Registry::new(1));
        let expected = |names: &[&str]| {
            names.iter().map(|name| (name.parse().unwrap(), (1, Absent::WaitingForCallHome))).collect()
        };
        registry.expect(&expected(&["n1", "n2"]));
        let live = Live::new(registry.clone());
        let (draining, end) = (CancellationToken::new(), Instant::now() + Duration::from_secs(100));
        let long = end + Duration::from_secs(1000);
        let mut one = live.watch(draining.clone(), end, &Site::Admin).unwrap();
        let mut other = live.watch(draining.clone(), long, &Site::Admin).unwrap();
        for body in [&mut one, &mut other] {
            let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(frame, RETRY);
        }
        for body in [&mut one, &mut other] {
            let first = next(body).await.unwrap();
            assert_eq!((&first["whole"], first["rows"].as_array().unwrap().len()), (&true.into(), 2));
        }
        let (n1, began) = ("n1".parse().unwrap(), Instant::now());
        registry.set_absent(&n1, Absent::Lost { reason: "gone".to_owned(), since: SystemTime::now() });
        registry.event(&n1, EventKind::Policy, "no");
        registry.count_refused(&n1, &"an impostor");
        for body in [&mut one, &mut other] {
            let change = next(body).await.unwrap();
            assert_eq!(
                (&change["whole"], change["rows"].as_array().unwrap().len()),
                (&false.into(), 1),
                "{change}"
            );
            assert_eq!(change["rows"][0]["state"], "lost");
            let refusals = change["refusals"].as_array().unwrap();
            assert_eq!((refusals.len(), &refusals[0]["node"]), (2, &"n1".into()));
        }
        assert!(began.elapsed() <= EVERY + Duration::from_millis(1), "{:?}", began.elapsed());
        // Snapshots that a watcher misses are not kept.
        for step in 0..50 {
            registry.set_absent(&n1, if step % 2 == 0 { Absent::Connecting } else { Absent::New });
            next(&mut one).await.unwrap();
        }
        assert_eq!(next(&mut other).await.unwrap()["rows"].as_array().unwrap().len(), 1);
        // Something is sent even without a change.
        let began = Instant::now();
        next(&mut other).await.unwrap();
        let word = next(&mut other).await.unwrap();
        assert!(word.get("rows").is_none() && began.elapsed() <= 2 * HEARTBEAT + EVERY, "{word}");
        let watch = |site: &Site| live.watch(draining.clone(), long, site);
        let mut more: Vec<Body> = (2..ADMIN_WATCHERS).map(|_| watch(&Site::Admin).unwrap()).collect();
        assert!(watch(&Site::Admin).is_none());
        let user = |number: usize| Site::FrontEnd { user: format!("user-{number}") };
        for number in 0..FRONT_END_WATCHERS / USER_WATCHERS {
            more.extend((0..USER_WATCHERS).map(|_| watch(&user(number)).unwrap()));
            assert!(watch(&user(number)).is_none(), "one user has so many");
        }
        assert!(watch(&user(1000)).is_none(), "all users together have so many");
        more.pop();
        assert!(watch(&user(1000)).is_some());
        drop(more);
        tokio::time::sleep_until(end).await;
        assert!(next(&mut one).await.is_none(), "its session has ended");
        draining.cancel();
        assert!(next(&mut other).await.is_none());
        drop((one, other));
        assert!(
            live.last.try_lock().unwrap().is_none() && live.watch(draining, long, &Site::Admin).is_some()
        );
    }
}
