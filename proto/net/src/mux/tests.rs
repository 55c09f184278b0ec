//! Two ends joined in memory: streams, windows, refusals, resets and notices.

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use proto::{
    DialError, Target,
    mux::{
        Version,
        budget::Budget,
        frame::{self, Credit, Frame, Hello},
        ids::{Numbering, Opener},
        window,
    },
};
use tokio::sync::mpsc;

use super::{Incoming, Mux, Notice, ProtocolError, SendFrame, Settings, hello};
use crate::{
    gate::Gate,
    stalls::{self, Stalls},
    stream::{Stream, StreamError},
    tasks::Tasks,
};

mod windows;

struct Pair {
    master: Mux,
    node: Mux,
    node_stalls: Stalls,
    /// The streams that the master opens, and those that the node opens.
    incoming: mpsc::Receiver<Incoming>,
    callers: mpsc::Receiver<Incoming>,
    notices: mpsc::Receiver<Notice>,
    tasks: Tasks,
}

/// Which side's streams have which ids, on the master's side and on the node's.
fn numberings(version: Version) -> [Numbering; 2] {
    match version {
        Version::V1 => [Opener::This, Opener::Peer].map(|opener| Numbering::All { opener }),
        Version::V2 => [true, false].map(|is_client| Numbering::Halves { is_client }),
    }
}

/// Two ends of the latest version.
fn pair(max_streams: usize) -> Pair {
    pair_of(Version::V2, max_streams)
}

/// Two ends joined in memory, each fed by a task as an SSH session would.
fn pair_of(version: Version, max_streams: usize) -> Pair {
    let tasks = Tasks::new();
    let [of_master, of_node] = numberings(version);
    let end = |numbering: Numbering, peer: u64| {
        let (tx, rx) = mpsc::channel::<Bytes>(16);
        let gate = Gate::default();
        let link = gate.clone();
        let out: SendFrame = Box::new(move |frame| {
            let (tx, link) = (tx.clone(), link.clone());
            Box::pin(async move {
                link.release(frame.len());
                tx.send(frame).await.is_ok()
            })
        });
        let stalls = stalls::ByDirection::default();
        let most = |opener| if numbering.opens(opener) { max_streams } else { 0 };
        let (max_opened, max_accepted) = (most(Opener::This), most(Opener::Peer));
        let peer = (version == Version::V2).then(|| hello(peer, [1; 16]));
        let settings = Settings { numbering, max_opened, max_accepted, stalls: stalls.clone(), peer };
        (Mux::new(settings, gate, out, &tasks), rx, stalls.down)
    };
    let ((master, mut master_feeder, to_master_events), mut to_node, _) = end(of_master, 0);
    let ((node, mut node_feeder, events), mut to_master, node_stalls) = end(of_node, Hello::FRONT_END);
    tasks.spawn(async move {
        while let Some(frame) = to_node.recv().await {
            node_feeder.feed(&frame).unwrap();
        }
    });
    tasks.spawn(async move {
        while let Some(frame) = to_master.recv().await {
            master_feeder.feed(&frame).unwrap();
        }
    });
    let (incoming, notices, callers) = (events.incoming, events.notices, to_master_events.incoming);
    Pair { master, node, node_stalls, incoming, callers, notices, tasks }
}

/// A further connection of both ends.
struct Further {
    /// The bytes that the node has sent on it.
    from_node: Arc<AtomicUsize>,
    /// Cancelling it loses the connection.
    tasks: Tasks,
}

impl Further {
    /// Joins a connection, and waits until both sides have measured it.
    async fn join(pair: &Pair) -> Self {
        let (tasks, from_node) = (Tasks::new(), Arc::<AtomicUsize>::default());
        let side = |mux: &Mux, count: Option<Arc<AtomicUsize>>| {
            let (tx, rx) = mpsc::channel::<Bytes>(16);
            let gate = Gate::default();
            let link = gate.clone();
            let out: SendFrame = Box::new(move |frame| {
                let (tx, link, count) = (tx.clone(), link.clone(), count.clone());
                Box::pin(async move {
                    link.release(frame.len());
                    if let Some(count) = count {
                        count.fetch_add(frame.len(), Ordering::Relaxed);
                    }
                    tx.send(frame).await.is_ok()
                })
            });
            (mux.join(gate, out, &tasks).unwrap(), rx)
        };
        let (mut master_feeder, mut to_node) = side(&pair.master, None);
        let (mut node_feeder, mut to_master) = side(&pair.node, Some(from_node.clone()));
        tasks.spawn(async move {
            while let Some(frame) = to_node.recv().await {
                node_feeder.feed(&frame).unwrap();
            }
        });
        tasks.spawn(async move {
            while let Some(frame) = to_master.recv().await {
                master_feeder.feed(&frame).unwrap();
            }
        });
        for mux in [&pair.master, &pair.node] {
            while mux.0.further.choose(&mux.0.first, false).is_none() {
                tokio::task::yield_now().await;
            }
        }
        Self { from_node, tasks }
    }
}

fn target() -> Target {
    "10.0.0.1:80".parse().unwrap()
}

async fn connect(pair: &mut Pair) -> (Stream, Stream) {
    let master = pair.master.clone();
    let target = target();
    let open = master.open(&target, "test", Duration::from_secs(5));
    let accept = async { pair.incoming.recv().await.unwrap().accept().await.unwrap() };
    let (near, far) = tokio::join!(open, accept);
    (near.unwrap(), far)
}

async fn send(stream: &mut Stream, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let room = stream.writer.room().await.unwrap().min(bytes.len()).min(frame::MAX_DATA);
        let mut buffer = stream.writer.buffer(room);
        buffer.extend_from_slice(&bytes[..room]);
        stream.writer.send(buffer).await.unwrap();
        bytes = &bytes[room..];
    }
}

async fn receive(stream: &mut Stream) -> Result<Vec<u8>, StreamError> {
    let mut all = Vec::new();
    loop {
        let bytes = stream.reader.fill().await?;
        if bytes.is_empty() {
            return Ok(all);
        }
        all.extend_from_slice(bytes);
        stream.reader.taken().await?;
    }
}

#[tokio::test(start_paused = true)]
async fn a_target_that_never_answers_is_the_peers_to_report() {
    let mut pair = pair(8);
    let target: Target = "n1:1".parse().unwrap();
    for (timeout, for_peer) in [(9000, 8000), (60_000, 59_000), (800, 700), (10, 8)]
        .map(|(a, b)| (Duration::from_millis(a), Duration::from_millis(b)))
    {
        let refuse = async {
            let incoming = pair.incoming.recv().await.unwrap();
            assert_eq!(incoming.timeout, for_peer);
            tokio::time::sleep(incoming.timeout).await;
            incoming.refuse(DialError::TimedOut("dial tcp n1:1: no answer".into())).await;
        };
        let (opened, ()) = tokio::join!(pair.master.open(&target, "test", timeout), refuse);
        assert_eq!(opened.err(), Some(DialError::TimedOut("dial tcp n1:1: no answer".into())));
    }
    // A peer that says nothing is reported here.
    let opened = pair.master.open(&target, "test", Duration::from_secs(9)).await;
    assert!(
        opened.is_err_and(|error| error.to_string().contains("the other agent gave no answer within 9s"))
    );
}

#[tokio::test]
async fn carries_both_directions_and_closes_each_alone() {
    for version in Version::ALL {
        carries_both_directions(pair_of(version, 10)).await;
    }
}

async fn carries_both_directions(mut pair: Pair) {
    let (mut near, mut far) = connect(&mut pair).await;
    let up: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7) as u8).collect();
    let (got, ()) = tokio::join!(receive(&mut far), async {
        send(&mut near, &up).await;
        near.writer.finish().await.unwrap();
    });
    assert!(got.unwrap() == up);
    send(&mut far, b"answer").await;
    far.writer.finish().await.unwrap();
    assert_eq!(receive(&mut near).await.unwrap(), b"answer");
    drop((near, far));
    assert_eq!((pair.master.streams_open(), pair.node.streams_open()), (0, 0));
    for mux in [&pair.master, &pair.node] {
        assert_eq!(mux.budget().left(), Budget::total(mux.version()));
    }
}

#[tokio::test]
async fn both_sides_open_streams_on_one_connection() {
    let mut pair = pair(2);
    let (mut up, mut up_far) = connect(&mut pair).await;
    let (node, target) = (pair.node.clone(), target());
    let open = node.open(&target, "a caller", Duration::from_secs(5));
    let accept = async {
        let incoming = pair.callers.recv().await.unwrap();
        assert_eq!(incoming.origin, "a caller");
        incoming.accept().await.unwrap()
    };
    let (down, mut down_far) = tokio::join!(open, accept);
    let mut down = down.unwrap();
    for (near, far, words) in
        [(&mut up, &mut up_far, b"to the node"), (&mut down, &mut down_far, b"to the host")]
    {
        send(near, words).await;
        near.writer.finish().await.unwrap();
        assert_eq!(receive(far).await.unwrap(), words);
    }
    for mux in [&pair.master, &pair.node] {
        assert_eq!([Opener::This, Opener::Peer].map(|opener| mux.streams_of(opener)), [1, 1]);
    }
    // Each side has a limit of its own.
    let _second = connect(&mut pair).await;
    let third = pair.master.open(&target, "", Duration::from_secs(5)).await;
    assert!(matches!(third, Err(DialError::TooManyStreams(_))), "{third:?}");
}

#[tokio::test]
async fn a_reader_that_stops_stops_only_its_own_stream() {
    let mut pair = pair(100);
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let (near, mut far) = connect(&mut pair).await;
        let filled = pair.tasks.spawn(async move {
            let mut sent = 0usize;
            // Writes are tiny, and as many as the window takes.
            while let Ok(room) = tokio::time::timeout(Duration::from_millis(200), far.writer.room()).await {
                let n = room.unwrap().min(100);
                let mut buffer = far.writer.buffer(n);
                buffer.resize(buffer.len() + n, 1);
                far.writer.send(buffer).await.unwrap();
                sent += n;
            }
            sent
        });
        stalled.push((near, filled));
    }
    let (mut near, mut far) = connect(&mut pair).await;
    let bytes = vec![5; 20_000_000];
    let (got, ()) = tokio::join!(receive(&mut near), async {
        send(&mut far, &bytes).await;
        far.writer.finish().await.unwrap();
    });
    assert_eq!(got.unwrap().len(), bytes.len());
    for (near, filled) in stalled {
        assert_eq!(filled.await.unwrap(), Some(window::INITIAL as usize));
        drop(near);
    }
}

#[tokio::test]
async fn who_waits_for_the_peer_s_window_is_counted_and_nobody_else() {
    let mut pair = pair(10);
    let (mut near, mut far) = connect(&mut pair).await;
    send(&mut far, &vec![1; window::INITIAL as usize]).await;
    assert_eq!((pair.node_stalls.begun(), pair.node_stalls.now()), (0, 0));
    let mut room = Box::pin(far.writer.room());
    let waits = poll_fn(|cx| Poll::Ready(room.as_mut().poll(cx).is_pending())).await;
    assert!(waits);
    assert_eq!((pair.node_stalls.begun(), pair.node_stalls.now()), (1, 1));
    assert_eq!(pair.node_stalls.lasted(), Duration::ZERO);
    let read = async {
        while !near.reader.fill().await.unwrap().is_empty() {
            near.reader.taken().await.unwrap();
        }
    };
    tokio::select! {
        room = room => assert!(room.unwrap() > 0),
        () = read => panic!("the stream has not ended"),
    }
    assert_eq!((pair.node_stalls.begun(), pair.node_stalls.now()), (1, 0));
    assert!(pair.node_stalls.lasted() > Duration::ZERO);
}

#[tokio::test]
async fn refusals_cancellations_and_caps() {
    let mut pair = pair(2);
    let master = pair.master.clone();
    let target = target();
    let refused = tokio::join!(master.open(&target, "", Duration::from_secs(5)), async {
        let error = DialError::Policy { rule: "x".into(), reason: "y".into() };
        pair.incoming.recv().await.unwrap().refuse(error).await;
    });
    assert!(matches!(refused.0, Err(DialError::Policy { rule, .. }) if rule == "x"));

    // A caller who gives up cancels the dial on the other side.
    let given_up = master.open(&target, "", Duration::from_millis(50)).await;
    assert!(matches!(given_up, Err(DialError::TimedOut(_))), "{given_up:?}");
    let incoming = pair.incoming.recv().await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), incoming.cancelled()).await.unwrap();
    drop(incoming);

    let (a, b) = (connect(&mut pair).await, connect(&mut pair).await);
    let third = master.open(&target, "", Duration::from_secs(5)).await;
    assert!(matches!(third, Err(DialError::TooManyStreams(_))), "{third:?}");
    drop((a, b));
    assert_eq!(master.streams_open(), 0);
}

#[tokio::test]
async fn a_reset_and_a_lost_tunnel_reach_the_other_side() {
    let mut pair = pair(10);
    let (mut near, mut far) = connect(&mut pair).await;
    far.writer.reset("the far socket failed");
    drop(far);
    assert_eq!(receive(&mut near).await, Err(StreamError("the far socket failed".into())));

    let (mut near, _far) = connect(&mut pair).await;
    pair.master.close("cut");
    assert_eq!(receive(&mut near).await, Err(StreamError("cut".into())));
    let open = pair.master.open(&target(), "", Duration::from_secs(5)).await;
    assert!(matches!(open, Err(DialError::TunnelLost { .. })), "{open:?}");
}

#[tokio::test]
async fn going_away_and_certificates_are_told() {
    let mut pair = pair(10);
    assert!(pair.master.send_certificate("ssh-ed25519-cert").await);
    assert_eq!(pair.notices.recv().await, Some(Notice::Certificate("ssh-ed25519-cert".into())));
    pair.master.go_away("stopping").await;
    assert_eq!(pair.notices.recv().await, Some(Notice::GoAway("stopping".into())));
    assert!(pair.master.is_going_away() && pair.node.is_going_away());
}

#[tokio::test]
async fn a_heavy_stream_goes_over_further_connections_and_its_bytes_stay_in_order() {
    let mut pair = pair(10);
    let (mut near, mut far) = connect(&mut pair).await;
    let (mut small, mut small_far) = connect(&mut pair).await;
    let further = [Further::join(&pair).await, Further::join(&pair).await];
    assert_eq!((pair.master.heavy_streams(), pair.master.further_connections()), (0, 2));
    let bytes: Vec<u8> = (0..20_000_000u32).map(|i| (i / 5) as u8).collect();
    let sends = async {
        send(&mut far, &bytes).await;
        assert_eq!((pair.node.heavy_streams(), pair.master.heavy_streams()), (1, 1));
        let before: Vec<_> = further.iter().map(|f| f.from_node.load(Ordering::Relaxed)).collect();
        // A small exchange stays on the first connection.
        send(&mut small_far, b"small").await;
        small_far.writer.finish().await.unwrap();
        let after: Vec<_> = further.iter().map(|f| f.from_node.load(Ordering::Relaxed)).collect();
        assert_eq!(before, after);
        far.writer.finish().await.unwrap();
    };
    let (got, small, ()) = tokio::join!(receive(&mut near), receive(&mut small), sends);
    assert!(got.unwrap() == bytes);
    assert_eq!(small.unwrap(), b"small");
    let on_further: usize = further.iter().map(|f| f.from_node.load(Ordering::Relaxed)).sum();
    assert!(on_further > 15_000_000, "{on_further}");
    drop((near, far));
    assert_eq!((pair.node.heavy_streams(), pair.master.heavy_streams()), (0, 0));
}

#[tokio::test]
async fn a_lost_connection_ends_the_streams_whose_bytes_it_may_have_lost_and_no_other() {
    let mut pair = pair(10);
    let (mut near, mut far) = connect(&mut pair).await;
    let (mut arrived, mut arrived_far) = connect(&mut pair).await;
    let (mut small, mut small_far) = connect(&mut pair).await;
    let further = Further::join(&pair).await;
    let bytes = vec![7; 4_000_000];
    let read = async |stream: &mut Stream| {
        let mut left = bytes.len();
        while left > 0 {
            left -= stream.reader.fill().await.unwrap().len();
            stream.reader.taken().await.unwrap();
        }
    };
    tokio::join!(send(&mut arrived_far, &bytes), read(&mut arrived));
    let connection = pair.node.0.further.choose(&pair.node.0.first, false).unwrap();
    let (sent, known) = connection.gate.sent_and_arrived();
    assert!(sent > 3_000_000 && known > 500_000, "{known} of {sent}");
    // The last PING was in front of the last bytes.
    while connection.gate.sent_and_arrived().1 < sent {
        connection.gate.mark([9; 8]);
        connection.on_pong([9; 8]).unwrap();
    }
    tokio::join!(send(&mut far, &bytes), read(&mut near));
    further.tasks.cancel();
    let lost = StreamError("one of the tunnel's connections was lost".into());
    assert_eq!(receive(&mut near).await, Err(lost));
    assert!(receive(&mut far).await.is_err());
    for mux in [&pair.master, &pair.node] {
        assert_eq!(mux.further_connections(), 0);
    }
    for (near, far) in [(&mut small, &mut small_far), (&mut arrived, &mut arrived_far)] {
        send(far, b"goes on").await;
        far.writer.finish().await.unwrap();
        assert_eq!(receive(near).await.unwrap(), b"goes on");
    }
}

#[tokio::test]
async fn the_open_streams_of_one_side_are_reset_with_the_reason() {
    let mut pair = pair(10);
    let (mut near, mut far) = connect(&mut pair).await;
    assert_eq!(pair.master.reset_streams(Opener::Peer, "not this one"), 0);
    assert_eq!(pair.master.reset_streams(Opener::This, "the node is drained"), 1);
    let reset: Result<Vec<u8>, _> = Err(StreamError("the node is drained".into()));
    assert_eq!((receive(&mut near).await, receive(&mut far).await), (reset.clone(), reset));
    drop((near, far));
    let (_near, mut far) = connect(&mut pair).await;
    assert_eq!(pair.node.reset_streams(Opener::Peer, "the node is drained"), 1);
    assert!(receive(&mut far).await.is_err());
}

#[tokio::test]
async fn a_further_connection_carries_data_only_and_a_session_has_few_of_them() {
    let pair = pair(10);
    let join = || {
        let out: SendFrame = Box::new(|_| Box::pin(std::future::ready(true)));
        pair.node.join(Gate::default(), out, &pair.tasks)
    };
    let mut feeder = join().unwrap();
    for (frame, name) in [
        (Frame::GoAway { reason: "bye".into() }, "GOAWAY"),
        (Frame::Call, "CALL"),
        (Frame::Relink, "RELINK"),
        (Frame::Drain { milliseconds: 1 }, "DRAIN"),
        (Frame::Retract { stream: 1, limit: 1 }, "RETRACT"),
        (Frame::Retracted { stream: 1, limit: 1 }, "RETRACTED"),
        (Frame::Credit { stream: 1, credit: Credit::UpTo(1) }, "CREDIT"),
    ] {
        let fed = feeder.feed(&frame::encode(Version::V2, &frame));
        assert_eq!(fed, Err(ProtocolError::Further(name)));
    }
    let others: Vec<_> = std::iter::from_fn(join).collect();
    assert_eq!(pair.node.further_connections(), 1 + others.len());
    assert!((2..20).contains(&others.len()), "{}", others.len());
}
