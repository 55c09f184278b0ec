//! A peer that does what no honest one does, frame by frame, against either side.

use std::{future::poll_fn, task::Poll};

use bytes::Bytes;
use proto::{
    DialError,
    mux::{
        Version,
        budget::Budget,
        frame::{self, Credit, Decoder, Frame, Hello},
        ids::{Numbering, Opener},
        window,
    },
};
use tokio::{sync::mpsc, time::Duration};

use super::{
    Events, Feeder, Mux, ProtocolError, SendFrame, Settings, feeder::ANSWERS, greeting::Greeting, hello,
};
use crate::{
    gate::Gate,
    stalls,
    stream::{Reader, Stream},
    tasks::Tasks,
};

const LIMIT: usize = 10;
/// How often a peer is asked that says nothing.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Streams of the table below, by their number among those of their side: one that is open, one that the peer has ended,
/// one that has ended here, one that the peer was asked for and has not answered (where this side opens streams), and one
/// that nobody has opened.
const OPEN: u64 = 1;
const RESET: u64 = 2;
const DROPPED: u64 = 3;
const ASKED: u64 = 4;
const NEVER: u64 = 9;

/// The frames of a version, for the streams that the master's side opens, by their number.
#[derive(Clone, Copy)]
struct Wire(Version);

impl Wire {
    fn id(self, number: u64) -> u64 {
        match self.0 {
            Version::V1 => number,
            Version::V2 => 2 * number - 1,
        }
    }

    /// What only the second version says.
    fn said<T>(self, value: T) -> Option<T> {
        (self.0 == Version::V2).then_some(value)
    }

    fn open(self, number: u64) -> Frame<'static> {
        let (target, origin) = ("10.0.0.1:80".into(), "x".into());
        Frame::Open {
            stream: self.id(number),
            timeout_ms: 1000,
            limit: window::INITIAL.into(),
            target,
            origin,
        }
    }

    fn opened(self, number: u64) -> Frame<'static> {
        Frame::Opened { stream: self.id(number), limit: window::INITIAL.into() }
    }

    fn refused(self, number: u64) -> Frame<'static> {
        Frame::Refused { stream: self.id(number), error: DialError::Cancelled }
    }

    /// The first four bytes of a stream.
    fn data(self, number: u64) -> Frame<'static> {
        self.data_at(number, 0, b"data")
    }

    fn data_at(self, number: u64, offset: u64, bytes: &[u8]) -> Frame<'_> {
        Frame::Data { stream: self.id(number), offset: self.said(offset), bytes }
    }

    /// Credit for so many bytes more than at the beginning.
    fn credit(self, number: u64, more: u32) -> Frame<'static> {
        let credit = match self.0 {
            Version::V1 => Credit::By(more),
            Version::V2 => Credit::UpTo(u64::from(window::INITIAL) + u64::from(more)),
        };
        Frame::Credit { stream: self.id(number), credit }
    }

    fn eof(self, number: u64, end: u64) -> Frame<'static> {
        Frame::Eof { stream: self.id(number), end: self.said(end) }
    }

    fn reset(self, number: u64) -> Frame<'static> {
        Frame::Reset { stream: self.id(number), end: self.said(0), reason: "gone".into() }
    }
}

/// One end, whose peer is the test.
struct End {
    wire: Wire,
    is_master: bool,
    mux: Mux,
    feeder: Feeder,
    events: Events,
    sent: mpsc::UnboundedReceiver<Bytes>,
    tasks: Tasks,
}

impl End {
    /// The end of the latest version that opens streams, or the other one.
    fn new(is_master: bool) -> Self {
        Self::of(Version::V2, is_master)
    }

    fn of(version: Version, is_master: bool) -> Self {
        let tasks = Tasks::new();
        let (tx, sent) = mpsc::unbounded_channel();
        let out: SendFrame = Box::new(move |frame| {
            let sent = tx.send(frame).is_ok();
            Box::pin(async move { sent })
        });
        let gate = Gate::default();
        gate.keep_alive(PING_INTERVAL);
        let (mux, feeder, events) = Mux::new(settings(version, is_master), gate, out, &tasks);
        Self { wire: Wire(version), is_master, mux, feeder, events, sent, tasks }
    }

    fn feed(&mut self, frame: &Frame<'_>) -> Result<(), ProtocolError> {
        self.feeder.feed(&frame::encode(self.wire.0, frame))
    }

    /// The next stream, which has this number, opened by whoever may.
    async fn open(&mut self, number: u64) -> Stream {
        if self.is_master {
            let asking = self.ask(number).await;
            self.feed(&self.wire.opened(number)).unwrap();
            return asking.await.unwrap().unwrap().unwrap();
        }
        self.feed(&self.wire.open(number)).unwrap();
        self.events.incoming.recv().await.unwrap().accept().await.unwrap()
    }

    /// Asks the peer for the stream with the next number, and waits until it has heard of it.
    async fn ask(&mut self, number: u64) -> tokio::task::JoinHandle<Option<Result<Stream, DialError>>> {
        let mux = self.mux.clone();
        let asking = self.tasks.spawn(async move {
            mux.open(&"10.0.0.1:80".parse().unwrap(), "test", Duration::from_secs(60)).await
        });
        // The type and the id are the same.
        let asked = frame::encode(self.wire.0, &self.wire.open(number));
        let same = self.wire.0.header() - 4;
        while self.sent.recv().await.unwrap()[..same] != asked[..same] {}
        asking
    }

    /// The table's streams. What is given has to be kept.
    async fn with_streams(&mut self) -> Vec<Stream> {
        let kept = vec![self.open(OPEN).await, self.open(RESET).await];
        self.feed(&self.wire.reset(RESET)).unwrap();
        drop(self.open(DROPPED).await);
        if self.is_master {
            self.ask(ASKED).await;
        }
        kept
    }

    /// The id of the next PING that is sent.
    async fn pinged(&mut self) -> [u8; 8] {
        loop {
            let bytes = self.sent.recv().await.unwrap();
            if let Some(Frame::Ping(id)) = Decoder::new(self.wire.0).decode(&mut &bytes[..]).unwrap() {
                return id;
            }
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

/// What an agent's end is: the master opens streams, and the node takes them.
fn settings(version: Version, is_master: bool) -> Settings {
    let numbering = match (version, is_master) {
        (Version::V1, true) => Numbering::All { opener: Opener::This },
        (Version::V1, false) => Numbering::All { opener: Opener::Peer },
        (Version::V2, is_client) => Numbering::Halves { is_client },
    };
    let (max_opened, max_accepted) = if is_master { (LIMIT, 0) } else { (0, LIMIT) };
    let peer = (version == Version::V2).then(|| hello(0, [1; 16]));
    Settings { numbering, max_opened, max_accepted, stalls: stalls::ByDirection::default(), peer }
}

/// Frames that an honest peer does not send after one another, to the master, to a node or to both, with the number of
/// the stream of which the last one is, and what is said of it.
type Case<'a> = (&'static [bool], Vec<Frame<'a>>, u64, &'static str);

const BOTH: &[bool] = &[true, false];
const MASTER: &[bool] = &[true];
const NODE: &[bool] = &[false];

fn violations(wire: Wire, large: &[u8]) -> Vec<Case<'_>> {
    let overrun = || (0..5).map(|i| wire.data_at(OPEN, i * large.len() as u64, large)).collect();
    let most = window::largest(wire.0) - window::INITIAL;
    vec![
        (BOTH, vec![wire.eof(OPEN, 0), wire.data(OPEN)], OPEN, "DATA after EOF"),
        (BOTH, vec![wire.eof(OPEN, 0), wire.data_at(OPEN, 0, b"")], OPEN, "DATA after EOF"),
        (BOTH, vec![wire.eof(OPEN, 0), wire.eof(OPEN, 0)], OPEN, "EOF after EOF"),
        (BOTH, overrun(), OPEN, "the peer sent more than its window"),
        (BOTH, vec![wire.credit(OPEN, u32::MAX)], OPEN, "CREDIT beyond the largest window"),
        (
            BOTH,
            vec![wire.credit(OPEN, most), wire.credit(OPEN, most + 1)],
            OPEN,
            "CREDIT beyond the largest window",
        ),
        (BOTH, vec![wire.data(NEVER)], NEVER, "DATA for a stream that was never opened"),
        (BOTH, vec![wire.credit(NEVER, 1)], NEVER, "CREDIT for a stream that was never opened"),
        (BOTH, vec![wire.eof(NEVER, 0)], NEVER, "EOF for a stream that was never opened"),
        // A hostile node: this side opens streams.
        (MASTER, vec![wire.open(NEVER)], NEVER, "OPEN by the side that may not open streams"),
        (MASTER, vec![wire.open(OPEN)], OPEN, "OPEN by the side that may not open streams"),
        (MASTER, vec![wire.opened(OPEN)], OPEN, "OPENED for a stream that was answered already"),
        (
            MASTER,
            vec![wire.opened(ASKED), wire.opened(ASKED)],
            ASKED,
            "OPENED for a stream that was answered already",
        ),
        (MASTER, vec![wire.refused(OPEN)], OPEN, "REFUSED for a stream that was answered already"),
        (MASTER, vec![wire.opened(NEVER)], NEVER, "OPENED for a stream that was never opened"),
        (MASTER, vec![wire.refused(NEVER)], NEVER, "REFUSED for a stream that was never opened"),
        (MASTER, vec![wire.reset(NEVER)], NEVER, "RESET for a stream that was never opened"),
        (MASTER, vec![wire.data(ASKED)], ASKED, "DATA before the answer to OPEN"),
        (MASTER, vec![wire.credit(ASKED, 1)], ASKED, "CREDIT before the answer to OPEN"),
        (MASTER, vec![wire.eof(ASKED, 0)], ASKED, "EOF before the answer to OPEN"),
        // A hostile master, or a node that opens streams to the front end.
        (NODE, vec![wire.open(OPEN)], OPEN, "OPEN with an id that was used before"),
        (NODE, vec![wire.open(RESET)], RESET, "OPEN with an id that was used before"),
        (NODE, vec![wire.open(DROPPED)], DROPPED, "OPEN with an id that was used before"),
        (NODE, vec![wire.open(NEVER), wire.open(NEVER)], NEVER, "OPEN with an id that was used before"),
        (NODE, vec![wire.open(9000), wire.open(9)], 9, "OPEN with an id that was used before"),
        (NODE, vec![wire.opened(OPEN)], OPEN, "OPENED by the side that opens streams"),
        (NODE, vec![wire.refused(OPEN)], OPEN, "REFUSED by the side that opens streams"),
        (NODE, vec![wire.opened(NEVER)], NEVER, "OPENED by the side that opens streams"),
    ]
}

/// What only the second version can get wrong.
fn violations_of_v2<'a>() -> Vec<Case<'a>> {
    let wire = Wire(Version::V2);
    let offset = "the peer left out or repeated bytes";
    let gaps = (1..=257).map(|i| wire.data_at(OPEN, 2 * i, b"x")).collect();
    let open = |stream, limit| Frame::Open {
        stream,
        timeout_ms: 1000,
        limit,
        target: "10.0.0.1:80".into(),
        origin: String::new(),
    };
    let too_much = u64::from(window::largest(Version::V2)) + 1;
    let initial = u64::from(window::INITIAL);
    let retract = |number, limit| Frame::Retract { stream: wire.id(number), limit };
    let retracted = |number, limit| Frame::Retracted { stream: wire.id(number), limit };
    let raises = "RETRACT that does not lower the limit";
    let never_opened = "RESET for a stream that was never opened";
    vec![
        (BOTH, vec![wire.data(OPEN), wire.data(OPEN)], OPEN, offset),
        (BOTH, vec![wire.data_at(OPEN, 9, b"x"), wire.data_at(OPEN, 9, b"x")], OPEN, offset),
        (BOTH, vec![wire.data(OPEN), wire.eof(OPEN, 3)], OPEN, offset),
        (BOTH, vec![wire.eof(OPEN, 9), wire.data_at(OPEN, 8, b"xy")], OPEN, offset),
        (BOTH, vec![wire.data_at(OPEN, u64::MAX, b"x")], OPEN, "the peer sent more than its window"),
        (BOTH, vec![wire.eof(OPEN, u64::MAX)], OPEN, "the peer sent more than its window"),
        (BOTH, gaps, OPEN, "the peer leaves too many gaps"),
        (NODE, vec![wire.reset(NEVER)], NEVER, never_opened),
        (
            MASTER,
            vec![Frame::Opened { stream: wire.id(ASKED), limit: too_much }],
            ASKED,
            "CREDIT beyond the largest window",
        ),
        (NODE, vec![open(wire.id(NEVER), too_much)], NEVER, "CREDIT beyond the largest window"),
        // The number of the id 24, which is the node's to use.
        (NODE, vec![open(24, 1)], 0, "OPEN by the side that may not open streams"),
        (MASTER, vec![open(24, 1)], 0, "OPEN by the side that may not open streams"),
        (BOTH, vec![retract(OPEN, initial)], OPEN, raises),
        (BOTH, vec![wire.credit(OPEN, 9), retract(OPEN, initial + 10)], OPEN, raises),
        (BOTH, vec![retract(OPEN, 7), retract(OPEN, 6)], OPEN, "RETRACT before the answer to RETRACT"),
        (BOTH, vec![retract(OPEN, 7), wire.credit(OPEN, 1)], OPEN, "CREDIT before the answer to RETRACT"),
        (BOTH, vec![retract(NEVER, 1)], NEVER, "RETRACT for a stream that was never opened"),
        (MASTER, vec![retract(ASKED, 1)], ASKED, "RETRACT before the answer to OPEN"),
        (BOTH, vec![retracted(OPEN, initial)], OPEN, "RETRACTED without a RETRACT"),
        (BOTH, vec![retracted(NEVER, 1)], NEVER, "RETRACTED for a stream that was never opened"),
        (MASTER, vec![retracted(ASKED, 1)], ASKED, "RETRACTED without a RETRACT"),
    ]
}

#[tokio::test]
async fn what_no_honest_peer_does_ends_the_tunnel() {
    let large = [0; frame::MAX_DATA];
    for version in Version::ALL {
        let wire = Wire(version);
        let mut cases = violations(wire, &large);
        if version == Version::V2 {
            cases.extend(violations_of_v2());
        }
        for (sides, frames, number, want) in cases {
            let id = if number == 0 { 24 } else { wire.id(number) };
            for is_master in sides {
                assert_ends_the_tunnel(version, *is_master, &frames, &format!("stream {id}: {want}")).await;
            }
        }
        for is_master in [true, false] {
            for pong in [[0; 8], [0xff; 8]] {
                let frames = [Frame::Pong(pong)];
                assert_ends_the_tunnel(version, is_master, &frames, "a PONG answers no PING").await;
            }
        }
    }
    let bytes = [b"\x04\0\0\0\0\0\0\0\x01".as_slice(), &u32::MAX.to_be_bytes()].concat();
    let oversize = End::new(true).feeder.feed(&bytes).unwrap_err();
    assert_eq!(oversize.to_string(), format!("a frame of type 4 has {} bytes of payload", u32::MAX));
}

async fn assert_ends_the_tunnel(version: Version, is_master: bool, frames: &[Frame<'_>], want: &str) {
    let mut end = End::of(version, is_master);
    let mut kept = end.with_streams().await;
    let (last, before) = frames.split_last().unwrap();
    for frame in before {
        end.feed(frame).unwrap_or_else(|e| panic!("{frame:?} before {last:?}: {e}"));
    }
    let error = end.feed(last).expect_err(want);
    assert_eq!(error.to_string(), want);
    // What the session does then.
    end.feeder.mux().close("cut");
    let stream = kept.swap_remove(0);
    let mut reader = stream.reader;
    while reader.fill().await.is_ok_and(|bytes| !bytes.is_empty()) {}
    assert!(end.mux.open(&"a:1".parse().unwrap(), "", Duration::from_secs(60)).await.is_err());
}

#[tokio::test]
async fn a_peer_begins_with_hello_and_says_it_once() {
    let encoded = |frame: &Frame<'_>| frame::encode(Version::V2, frame);
    // Capabilities that this side has never heard of.
    let said = Hello { capabilities: u64::MAX, instance: [7; 16], session: [8; 16] };
    let bytes = [encoded(&Frame::Hello(said)), encoded(&Frame::Ping([0; 8]))].concat();
    for piece in [1, 10, bytes.len()] {
        let (mut greeting, mut heard, mut rest) = (Greeting::default(), None, Vec::new());
        for mut chunk in bytes.chunks(piece) {
            if heard.is_none() {
                heard = greeting.take(&mut chunk).unwrap();
            }
            rest.extend_from_slice(chunk);
        }
        assert_eq!((heard, &rest[..]), (Some(said), &encoded(&Frame::Ping([0; 8]))[..]));
    }
    for frame in [Frame::Ping([0; 8]), Wire(Version::V2).open(OPEN), Frame::GoAway { reason: "bye".into() }] {
        assert_eq!(
            Greeting::default().take(&mut &encoded(&frame)[..]),
            Err(ProtocolError::Hello),
            "{frame:?}"
        );
    }
    for is_master in [true, false] {
        assert_eq!(End::new(is_master).feed(&Frame::Hello(said)), Err(ProtocolError::Hello));
    }
}

#[tokio::test]
async fn only_a_node_says_drain_and_a_flood_of_it_costs_nothing() {
    assert_eq!(End::new(false).feed(&Frame::Drain { milliseconds: 1 }), Err(ProtocolError::Drain));
    let mut end = End::new(true);
    for milliseconds in 0..100_000 {
        end.feed(&Frame::Drain { milliseconds }).unwrap();
    }
}

#[tokio::test]
async fn credit_does_not_lower_the_limit() {
    let mut end = End::new(true);
    let mut stream = end.open(OPEN).await;
    let (wire, id) = (end.wire, end.wire.id(OPEN));
    for credit in
        [wire.credit(OPEN, 1000), wire.credit(OPEN, 0), Frame::Credit { stream: id, credit: Credit::UpTo(0) }]
    {
        end.feed(&credit).unwrap();
    }
    let mut sent = 0;
    while sent < u64::from(window::INITIAL) + 1000 {
        let room = stream.writer.room().await.unwrap();
        let mut buffer = stream.writer.buffer(room);
        buffer.resize(buffer.len() + room.min(10_000), 1);
        stream.writer.send(buffer).await.unwrap();
        // Nothing takes what was sent, as a socket would.
        end.mux.0.first.gate.release(usize::MAX);
        sent += room.min(10_000) as u64;
    }
    assert_eq!(sent, u64::from(window::INITIAL) + 1000);
}

#[tokio::test]
async fn frames_that_cross_a_stream_s_end_are_honest() {
    for (version, is_master) in Version::ALL.into_iter().flat_map(|v| [(v, true), (v, false)]) {
        let mut end = End::of(version, is_master);
        let wire = end.wire;
        let mut kept = end.with_streams().await;
        for stream in [RESET, DROPPED] {
            let mut frames = vec![
                wire.data(stream),
                wire.credit(stream, 1),
                wire.eof(stream, 4),
                wire.reset(stream),
                wire.reset(stream),
                wire.data(stream),
            ];
            if version == Version::V2 {
                frames.extend([
                    Frame::Retract { stream: wire.id(stream), limit: 1 },
                    Frame::Retracted { stream: wire.id(stream), limit: 1 },
                ]);
            }
            if is_master {
                frames.extend([wire.opened(stream), wire.refused(stream)]);
            }
            for frame in frames {
                end.feed(&frame).unwrap_or_else(|e| panic!("{frame:?}: {e}"));
            }
        }
        // Both directions of a stream close on their own, and credit goes on after the end of the other.
        for frame in [wire.data(OPEN), wire.credit(OPEN, 1), wire.eof(OPEN, 4), wire.credit(OPEN, 2)] {
            end.feed(&frame).unwrap_or_else(|e| panic!("{frame:?}: {e}"));
        }
        let mut stream = kept.swap_remove(0);
        assert_eq!(stream.reader.fill().await.unwrap(), b"data");
        stream.reader.taken().await.unwrap();
        assert_eq!(stream.reader.fill().await.unwrap(), b"");
        stream.writer.finish().await.unwrap();
    }
}

#[tokio::test]
async fn dials_that_run_at_the_same_time_may_arrive_in_disorder() {
    let mut end = End::of(Version::V1, false);
    let wire = end.wire;
    for stream in [3, 1, 2, 6] {
        end.feed(&wire.open(stream)).unwrap();
    }
    // One that was given up before it was asked for.
    end.feed(&wire.reset(4)).unwrap();
    end.feed(&wire.open(5)).unwrap();
    for stream in [3, 1, 2, 6, 5] {
        let incoming = end.events.incoming.recv().await.unwrap();
        assert_eq!(incoming.entry.as_ref().unwrap().id, wire.id(stream));
    }
}

/// The peer gives up streams and asks for more while the sockets of the first ones are still open.
#[tokio::test]
async fn a_stream_counts_until_its_socket_is_closed() {
    let mut end = End::new(false);
    let mut sockets = Vec::new();
    for id in 1..=300 {
        end.feed(&end.wire.open(id)).unwrap();
        if let Ok(incoming) = end.events.incoming.try_recv() {
            sockets.push(incoming.accept().await.unwrap());
        }
        end.feed(&end.wire.reset(id)).unwrap();
        assert!(sockets.len() <= LIMIT, "{} sockets with a limit of {LIMIT}", sockets.len());
    }
    assert_eq!((sockets.len(), end.mux.streams_open()), (LIMIT, LIMIT));
    sockets.truncate(4);
    assert_eq!(end.mux.streams_open(), 4);
    for id in 301..=320 {
        end.feed(&end.wire.open(id)).unwrap();
    }
    // Dials that have not ended count as well.
    for _ in 4..LIMIT {
        let incoming = end.events.incoming.try_recv().unwrap();
        sockets.push(incoming.accept().await.unwrap());
    }
    assert!(end.events.incoming.try_recv().is_err());
    drop(sockets);
    assert_eq!(end.mux.streams_open(), 0);
}

/// On the side that opens streams, what its peer refuses or resets counts while a caller holds it.
#[tokio::test]
async fn a_stream_that_the_peer_resets_counts_while_its_caller_is_there() {
    let mut end = End::new(true);
    let mut callers = Vec::new();
    for id in 1..=LIMIT as u64 {
        callers.push(end.open(id).await);
        end.feed(&end.wire.reset(id)).unwrap();
    }
    let open = end.mux.open(&"a:1".parse().unwrap(), "", Duration::from_secs(60)).await;
    assert!(matches!(open, Err(DialError::TooManyStreams(_))), "{open:?}");
    callers.clear();
    end.open(LIMIT as u64 + 1).await;
}

#[tokio::test]
async fn only_the_answer_to_a_ping_is_a_measurement() {
    // What the peer could have told from the clock, or from another tunnel, or from before.
    let mut other = End::new(true);
    let guesses = [[0; 8], 1u64.to_be_bytes(), u64::MAX.to_be_bytes(), other.pinged().await];
    for guess in guesses {
        let mut end = End::new(true);
        assert_ne!(end.pinged().await, guess);
        assert_eq!(end.feed(&Frame::Pong(guess)), Err(ProtocolError::Pong));
        assert_eq!(end.mux.round_trip(), None);
    }

    let mut end = End::new(true);
    let asked = end.pinged().await;
    end.feed(&Frame::Pong(asked)).unwrap();
    let measured = end.mux.round_trip();
    assert!(measured.is_some());
    assert_eq!(end.feed(&Frame::Pong(asked)), Err(ProtocolError::Pong), "once more");
    assert_eq!(end.mux.round_trip(), measured);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_owes_an_answer_is_asked_nothing_more_and_comes_no_nearer() {
    let mut end = End::new(true);
    let asked = end.pinged().await;
    // The peer owes the answer for many times the interval.
    for _ in 0..1000 {
        tokio::time::advance(PING_INTERVAL).await;
        tokio::task::yield_now().await;
    }
    assert!(end.sent.try_recv().is_err(), "one PING is on the way at a time");
    assert!(end.mux.0.first.round_trip.next_ping().is_none());
    let owed = end.mux.round_trip().expect("at least the time that it owes the answer");
    assert!(end.mux.0.first.round_trip.next_ping().is_none());
    assert!(end.mux.round_trip() >= Some(owed));

    // A late answer is one, and then it goes on.
    end.feed(&Frame::Pong(asked)).unwrap();
    assert!(end.mux.round_trip().is_some());
    let next = end.pinged().await;
    assert_ne!(next, asked);
    end.feed(&Frame::Pong(next)).unwrap();
}

#[tokio::test]
async fn a_peer_that_agrees_to_no_multiplexer_is_not_measured() {
    let end = End::new(true);
    let gate = &end.mux.0.first.gate;
    let mut turn = gate.turn();
    // Such as an sshd, whose channels share the link, and which answers no PING.
    for _ in 0..1000 {
        let room = tokio::time::timeout(Duration::from_secs(5), gate.reserve(&mut turn, 64 * 1024)).await;
        room.expect("nothing waits for a PONG").unwrap().used();
        gate.release(64 * 1024);
    }
}

#[tokio::test]
async fn answers_to_a_peer_that_does_not_read_wait() {
    let mut end = End::new(true);
    end.pinged().await;
    end.mux.0.first.gate.set_backlog(16 * 1024 * 1024);
    for _ in 0..100 {
        end.feed(&Frame::Ping([0; 8])).unwrap();
        tokio::task::yield_now().await;
    }
    assert!(end.sent.try_recv().is_err());
    end.mux.0.first.gate.set_backlog(0);
    for _ in 0..100 {
        assert_eq!(end.sent.recv().await.unwrap(), frame::encode(Version::V2, &Frame::Pong([0; 8])));
    }
}

#[tokio::test]
async fn a_peer_that_asks_for_more_answers_than_it_takes_is_found_out() {
    let tasks = Tasks::new();
    let stuck: SendFrame = Box::new(|_| Box::pin(std::future::pending()));
    let (_mux, mut feeder, _events) = Mux::new(settings(Version::V1, true), Gate::default(), stuck, &tasks);
    let ping = frame::encode(Version::V1, &Frame::Ping([0; 8]));
    for _ in 0..=ANSWERS + LIMIT {
        feeder.feed(&ping).unwrap();
    }
    assert_eq!(feeder.feed(&ping), Err(ProtocolError::Flood));
    tasks.cancel();
}

#[tokio::test]
async fn a_limit_is_lowered_to_what_was_sent_or_promised() {
    for is_master in [true, false] {
        let mut end = End::new(is_master);
        let mut stream = end.open(OPEN).await;
        let id = end.wire.id(OPEN);
        end.feed(&end.wire.credit(OPEN, 1_000_000)).unwrap();
        let room = stream.writer.room().await.unwrap();
        let answer = |limit| frame::encode(Version::V2, &Frame::Retracted { stream: id, limit });
        // The writer has been told that it may send so much.
        end.feed(&Frame::Retract { stream: id, limit: 0 }).unwrap();
        while end.sent.recv().await.unwrap() != answer(room as u64) {}
        let mut buffer = stream.writer.buffer(room);
        buffer.resize(buffer.len() + room, 1);
        stream.writer.send(buffer).await.unwrap();
        let mut more = Box::pin(stream.writer.room());
        let waits = poll_fn(|cx| Poll::Ready(more.as_mut().poll(cx).is_pending())).await;
        assert!(waits, "the limit is reached");
        drop(more);
        // After the answer, there may be more credit, and another RETRACT.
        let limit = room as u64 + 5000;
        end.feed(&Frame::Credit { stream: id, credit: Credit::UpTo(limit) }).unwrap();
        end.feed(&Frame::Retract { stream: id, limit: limit - 1 }).unwrap();
        while end.sent.recv().await.unwrap() != answer(limit - 1) {}
        end.mux.0.first.gate.release(usize::MAX);
        assert_eq!(stream.writer.room().await.unwrap(), 4999);
    }
}

/// The bytes that come on a stream until its window has the whole budget.
const BULK: u64 = 600 * frame::MAX_DATA as u64;

/// Opens two streams. [`BULK`] bytes come on the first one, and after a pause, as many on the second one as it takes for the
/// first one to be asked for its credit. Returns the limit of the first one, and the one that is asked for.
async fn retracts(end: &mut End, kept: &mut Vec<Stream>) -> (u64, u64) {
    for number in [1, 2] {
        kept.push(end.open(number).await);
    }
    let zeros = [0; frame::MAX_DATA];
    let mut now = std::time::Instant::now();
    for (number, bytes, stream) in [(1, BULK, 0), (2, BULK / 30, 1)] {
        for sent in (0..bytes).step_by(zeros.len()) {
            end.feed(&end.wire.data_at(number, sent, &zeros)).unwrap();
            now += Duration::from_millis(1);
            take(&mut kept[stream], now, Duration::from_secs(1)).await;
        }
        now += Duration::from_secs(60);
    }
    let (first, mut limit) = (end.wire.id(1), 0);
    loop {
        let bytes = end.sent.recv().await.unwrap();
        let frame = Decoder::new(Version::V2).decode(&mut &bytes[..]).unwrap().unwrap();
        if let Frame::Credit { stream, credit: Credit::UpTo(to) } = frame
            && stream == first
        {
            limit = to;
        }
        if let Frame::Retract { stream, limit: asked } = frame {
            assert_eq!((stream, asked), (first, BULK + u64::from(window::INITIAL)));
            return (limit, asked);
        }
    }
}

/// Takes what has come on a stream.
async fn take(stream: &mut Stream, now: std::time::Instant, round_trip: Duration) {
    let Reader::Mux(reader) = &mut stream.reader else { panic!("the multiplexer carries it") };
    reader.fill().await.unwrap();
    reader.taken_at(now, round_trip).await;
}

/// The frames of a peer, which get the limit and what was asked for, and what is said of the last one.
type AnswerCase<'a> = (&'a dyn Fn(u64, u64) -> Vec<Frame<'static>>, &'a str);

#[tokio::test]
async fn a_peer_gives_back_what_it_was_asked_for_and_is_held_to_it() {
    let wire = Wire(Version::V2);
    let id = wire.id(1);
    let not_possible = format!("stream {id}: RETRACTED with a limit that can't be");
    let overrun = format!("stream {id}: the peer sent more than its window");
    let unasked = format!("stream {id}: RETRACTED without a RETRACT");
    for is_master in [true, false] {
        let answer = |limit| Frame::Retracted { stream: id, limit };
        let byte = |offset| wire.data_at(1, offset, b"x");
        let cases: [AnswerCase<'_>; 6] = [
            (&|limit, _| vec![answer(limit + 1)], &not_possible),
            (&|_, asked| vec![answer(asked - 1)], &not_possible),
            // It has sent more than it says.
            (&|limit, asked| vec![byte(limit - 1), answer(asked)], &not_possible),
            (&|_, asked| vec![byte(asked - 1), answer(asked), byte(asked)], &overrun),
            (&|_, asked| vec![answer(asked), answer(asked)], &unasked),
            (&|limit, _| vec![answer(limit), byte(limit)], &overrun),
        ];
        for (frames, want) in cases {
            let (mut end, mut kept) = (End::new(is_master), Vec::new());
            let (limit, asked) = retracts(&mut end, &mut kept).await;
            assert!(limit > asked);
            let frames = frames(limit, asked);
            let (last, before) = frames.split_last().unwrap();
            for frame in before {
                end.feed(frame).unwrap_or_else(|e| panic!("{frame:?} before {last:?}: {e}"));
            }
            assert_eq!(end.feed(last).expect_err(want).to_string(), want);
        }
    }
}

#[tokio::test]
async fn a_reader_that_goes_on_while_credit_is_taken_back_gets_more() {
    let (mut end, mut kept) = (End::new(true), Vec::new());
    let (limit, asked) = retracts(&mut end, &mut kept).await;
    let id = end.wire.id(1);
    let zeros = [0; frame::MAX_DATA];
    let mut sent = BULK;
    // The peer had sent more when it was asked. The reader takes it before the answer comes, and then it waits.
    for _ in 0..100 {
        end.feed(&end.wire.data_at(1, sent, &zeros)).unwrap();
        sent += zeros.len() as u64;
    }
    assert!(sent > asked && sent < limit);
    take(&mut kept[0], std::time::Instant::now(), Duration::from_secs(1)).await;
    end.feed(&Frame::Retracted { stream: id, limit: sent }).unwrap();
    let granted = Frame::Credit { stream: id, credit: Credit::UpTo(sent + u64::from(window::INITIAL)) };
    while end.sent.recv().await.unwrap() != frame::encode(Version::V2, &granted) {}
    assert!(end.mux.budget().left() >= Budget::total(Version::V2) / 2);
}

#[tokio::test]
async fn a_peer_that_answers_no_retract_is_never_asked() {
    for version in Version::ALL {
        let (tasks, (tx, mut sent)) = (Tasks::new(), mpsc::unbounded_channel());
        let out: SendFrame = Box::new(move |frame| {
            let sent = tx.send(frame).is_ok();
            Box::pin(async move { sent })
        });
        let said = Hello { capabilities: Hello::CONNECTIONS, ..hello(0, [1; 16]) };
        let peer = (version == Version::V2).then_some(said);
        let settings = Settings { peer, ..settings(version, false) };
        let (mux, mut feeder, mut events) = Mux::new(settings, Gate::default(), out, &tasks);
        let (wire, zeros) = (Wire(version), [0; frame::MAX_DATA]);
        let (mut now, mut kept) = (std::time::Instant::now(), Vec::new());
        for number in 1..=3 {
            feeder.feed(&frame::encode(version, &wire.open(number))).unwrap();
            let mut stream = events.incoming.recv().await.unwrap().accept().await.unwrap();
            for i in 0..300 {
                let data = wire.data_at(number, i * zeros.len() as u64, &zeros);
                feeder.feed(&frame::encode(version, &data)).unwrap();
                now += Duration::from_millis(1);
                take(&mut stream, now, Duration::from_secs(1)).await;
            }
            kept.push(stream);
            now += Duration::from_secs(60);
        }
        tokio::task::yield_now().await;
        while let Ok(bytes) = sent.try_recv() {
            let frame = Decoder::new(version).decode(&mut &bytes[..]).unwrap().unwrap();
            let is_known = matches!(frame, Frame::Opened { .. } | Frame::Credit { .. } | Frame::Ping(_));
            assert!(is_known, "{version:?}: {frame:?}");
        }
        drop(kept);
        assert_eq!(mux.budget().left(), Budget::total(version));
        tasks.cancel();
    }
}

#[tokio::test]
async fn retracts_whose_answers_nobody_takes_are_one_for_each_stream() {
    let tasks = Tasks::new();
    let stuck: SendFrame = Box::new(|_| Box::pin(std::future::pending()));
    let (_mux, mut feeder, mut events) =
        Mux::new(settings(Version::V2, false), Gate::default(), stuck, &tasks);
    let wire = Wire(Version::V2);
    let mut feed = |frame: &Frame<'_>| feeder.feed(&frame::encode(Version::V2, frame));
    feed(&Frame::Ping([0; 8])).unwrap();
    // The task that sends answers waits for the PONG to be taken.
    tokio::task::yield_now().await;
    let mut asked = Vec::new();
    for number in 1..=3 {
        feed(&wire.open(number)).unwrap();
        asked.push(events.incoming.recv().await.unwrap());
        feed(&Frame::Retract { stream: wire.id(number), limit: 100 }).unwrap();
    }
    tokio::task::yield_now().await;
    let again = feed(&Frame::Retract { stream: wire.id(1), limit: 99 }).unwrap_err();
    assert_eq!(again.to_string(), "stream 1: RETRACT before the answer to RETRACT");
    tasks.cancel();
}
