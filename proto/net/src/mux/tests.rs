//! Two ends joined in memory: streams, windows, refusals, resets and notices.

use std::{future::poll_fn, sync::atomic::Ordering, task::Poll, time::Duration};

use bytes::Bytes;
use proto::{
    DialError, Target,
    mux::{frame, window},
};
use tokio::sync::mpsc;

use super::{Incoming, Mux, Notice, SendFrame, endpoint::GROWTH_BUDGET};
use crate::{
    gate::Gate,
    stalls::Stalls,
    stream::{Stream, StreamError},
    tasks::Tasks,
};

struct Pair {
    master: Mux,
    node: Mux,
    node_stalls: Stalls,
    incoming: mpsc::Receiver<Incoming>,
    notices: mpsc::Receiver<Notice>,
    tasks: Tasks,
}

/// Two ends joined in memory, each fed by a task as an SSH session would.
fn pair(max_streams: usize) -> Pair {
    let tasks = Tasks::new();
    let end = |initiator| {
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
        let stalls = Stalls::default();
        (Mux::new(initiator, max_streams, gate, stalls.clone(), out, &tasks), rx, stalls)
    };
    let ((master, mut master_feeder, _), mut to_node, _) = end(true);
    let ((node, mut node_feeder, events), mut to_master, node_stalls) = end(false);
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
    Pair { master, node, node_stalls, incoming: events.incoming, notices: events.notices, tasks }
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
    let mut pair = pair(10);
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
    assert_eq!(pair.master.0.growth_left.load(Ordering::Relaxed), GROWTH_BUDGET);
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
