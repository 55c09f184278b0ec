//! A peer that does what no honest one does, frame by frame, against either side.

use bytes::Bytes;
use proto::{
    DialError,
    mux::{
        frame::{self, Decoder, Frame},
        window,
    },
};
use tokio::{sync::mpsc, time::Duration};

use super::{Events, Feeder, Mux, ProtocolError, SendFrame, feeder::ANSWERS};
use crate::{gate::Gate, stalls::Stalls, stream::Stream, tasks::Tasks};

const LIMIT: usize = 10;
/// How often a peer is asked that says nothing.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Streams of the table below: one that is open, one that the peer has ended, one that has ended here, one that the
/// peer was asked for and has not answered (where this side opens streams), and one that nobody has opened.
const OPEN: u32 = 1;
const RESET: u32 = 2;
const DROPPED: u32 = 3;
const ASKED: u32 = 4;
const NEVER: u32 = 9;

/// One end, whose peer is the test.
struct End {
    mux: Mux,
    feeder: Feeder,
    events: Events,
    sent: mpsc::UnboundedReceiver<Bytes>,
    tasks: Tasks,
}

impl End {
    fn new(initiator: bool) -> Self {
        let tasks = Tasks::new();
        let (tx, sent) = mpsc::unbounded_channel();
        let out: SendFrame = Box::new(move |frame| {
            let sent = tx.send(frame).is_ok();
            Box::pin(async move { sent })
        });
        let gate = Gate::default();
        gate.keep_alive(PING_INTERVAL);
        let (mux, feeder, events) = Mux::new(initiator, LIMIT, gate, Stalls::default(), out, &tasks);
        Self { mux, feeder, events, sent, tasks }
    }

    fn feed(&mut self, frame: &Frame<'_>) -> Result<(), ProtocolError> {
        self.feeder.feed(&frame::encode(frame))
    }

    /// The stream with the next id, opened by whoever may.
    async fn open(&mut self, id: u32) -> Stream {
        if self.mux.0.initiator {
            let asking = self.ask(id).await;
            self.feed(&Frame::Opened { stream: id }).unwrap();
            return asking.await.unwrap().unwrap().unwrap();
        }
        self.feed(&open(id)).unwrap();
        self.events.incoming.recv().await.unwrap().accept().await.unwrap()
    }

    /// Asks the peer for the stream with the next id, and waits until it has heard of it.
    async fn ask(&mut self, id: u32) -> tokio::task::JoinHandle<Option<Result<Stream, DialError>>> {
        let mux = self.mux.clone();
        let asking = self.tasks.spawn(async move {
            mux.open(&"10.0.0.1:80".parse().unwrap(), "test", Duration::from_secs(60)).await
        });
        let asked = frame::encode(&open(id));
        while self.sent.recv().await.unwrap()[..frame::HEADER - 4] != asked[..frame::HEADER - 4] {}
        asking
    }

    /// The table's streams. What is given has to be kept.
    async fn with_streams(&mut self) -> Vec<Stream> {
        let kept = vec![self.open(OPEN).await, self.open(RESET).await];
        self.feed(&Frame::Reset { stream: RESET, reason: "gone".into() }).unwrap();
        drop(self.open(DROPPED).await);
        if self.mux.0.initiator {
            self.ask(ASKED).await;
        }
        kept
    }

    /// The id of the next PING that is sent.
    async fn pinged(&mut self) -> [u8; 8] {
        loop {
            let bytes = self.sent.recv().await.unwrap();
            if let Some(Frame::Ping(id)) = Decoder::default().decode(&mut &bytes[..]).unwrap() {
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

fn open(stream: u32) -> Frame<'static> {
    Frame::Open { stream, timeout_ms: 1000, target: "10.0.0.1:80".into(), origin: "x".into() }
}

fn data(stream: u32) -> Frame<'static> {
    Frame::Data { stream, bytes: b"data" }
}

fn credit(stream: u32) -> Frame<'static> {
    Frame::Credit { stream, bytes: 1 }
}

fn reset(stream: u32) -> Frame<'static> {
    Frame::Reset { stream, reason: "gone".into() }
}

fn refused(stream: u32) -> Frame<'static> {
    Frame::Refused { stream, error: DialError::Cancelled }
}

fn eof(stream: u32) -> Frame<'static> {
    Frame::Eof { stream }
}

fn opened(stream: u32) -> Frame<'static> {
    Frame::Opened { stream }
}

#[tokio::test]
async fn what_no_honest_peer_does_ends_the_tunnel() {
    const BOTH: &[bool] = &[true, false];
    const MASTER: &[bool] = &[true];
    const NODE: &[bool] = &[false];
    let large = [0; frame::MAX_DATA];
    let overrun = || (0..5).map(|_| Frame::Data { stream: OPEN, bytes: &large }).collect();
    let cases: Vec<(&[bool], Vec<Frame<'_>>, &str)> = vec![
        (BOTH, vec![eof(OPEN), data(OPEN)], "stream 1: DATA after EOF"),
        (BOTH, vec![eof(OPEN), Frame::Data { stream: OPEN, bytes: b"" }], "stream 1: DATA after EOF"),
        (BOTH, vec![eof(OPEN), eof(OPEN)], "stream 1: EOF after EOF"),
        (BOTH, overrun(), "stream 1: the peer sent more than its window"),
        (
            BOTH,
            vec![Frame::Credit { stream: OPEN, bytes: u32::MAX }],
            "stream 1: CREDIT beyond the largest window",
        ),
        (
            BOTH,
            vec![Frame::Credit { stream: OPEN, bytes: window::MAX - window::INITIAL }, credit(OPEN)],
            "stream 1: CREDIT beyond the largest window",
        ),
        (BOTH, vec![data(NEVER)], "stream 9: DATA for a stream that was never opened"),
        (BOTH, vec![credit(NEVER)], "stream 9: CREDIT for a stream that was never opened"),
        (BOTH, vec![eof(NEVER)], "stream 9: EOF for a stream that was never opened"),
        (BOTH, vec![Frame::Pong([0; 8])], "a PONG answers no PING"),
        (BOTH, vec![Frame::Pong([0xff; 8])], "a PONG answers no PING"),
        // A hostile node: this side opens streams.
        (MASTER, vec![open(NEVER)], "stream 9: OPEN by the side that may not open streams"),
        (MASTER, vec![open(OPEN)], "stream 1: OPEN by the side that may not open streams"),
        (MASTER, vec![opened(OPEN)], "stream 1: OPENED for a stream that was answered already"),
        (
            MASTER,
            vec![opened(ASKED), opened(ASKED)],
            "stream 4: OPENED for a stream that was answered already",
        ),
        (MASTER, vec![refused(OPEN)], "stream 1: REFUSED for a stream that was answered already"),
        (MASTER, vec![opened(NEVER)], "stream 9: OPENED for a stream that was never opened"),
        (MASTER, vec![refused(NEVER)], "stream 9: REFUSED for a stream that was never opened"),
        (MASTER, vec![reset(NEVER)], "stream 9: RESET for a stream that was never opened"),
        (MASTER, vec![data(ASKED)], "stream 4: DATA before the answer to OPEN"),
        (MASTER, vec![credit(ASKED)], "stream 4: CREDIT before the answer to OPEN"),
        (MASTER, vec![eof(ASKED)], "stream 4: EOF before the answer to OPEN"),
        // A hostile master, or a node that opens streams to the front end.
        (NODE, vec![open(OPEN)], "stream 1: OPEN with an id that was used before"),
        (NODE, vec![open(RESET)], "stream 2: OPEN with an id that was used before"),
        (NODE, vec![open(DROPPED)], "stream 3: OPEN with an id that was used before"),
        (NODE, vec![open(NEVER), open(NEVER)], "stream 9: OPEN with an id that was used before"),
        (NODE, vec![open(9000), open(9)], "stream 9: OPEN with an id that was used before"),
        (NODE, vec![reset(NEVER), open(NEVER)], "stream 9: OPEN with an id that was used before"),
        (NODE, vec![opened(OPEN)], "stream 1: OPENED by the side that opens streams"),
        (NODE, vec![refused(OPEN)], "stream 1: REFUSED by the side that opens streams"),
        (NODE, vec![opened(NEVER)], "stream 9: OPENED by the side that opens streams"),
    ];
    for (sides, frames, want) in cases {
        for initiator in sides {
            let mut end = End::new(*initiator);
            let mut kept = end.with_streams().await;
            let (last, before) = frames.split_last().unwrap();
            for frame in before {
                end.feed(frame).unwrap_or_else(|e| panic!("{frame:?} before {last:?}: {e}"));
            }
            let error = end.feed(last).expect_err(want);
            assert_eq!(error.to_string(), want);
            // What the session does then.
            let End { feeder, .. } = &mut end;
            feeder.mux().close("cut");
            let stream = kept.swap_remove(0);
            let mut reader = stream.reader;
            while reader.fill().await.is_ok_and(|bytes| !bytes.is_empty()) {}
            assert!(end.mux.open(&"a:1".parse().unwrap(), "", Duration::from_secs(60)).await.is_err());
        }
    }
    let bytes = [b"\x04\0\0\0\x01".as_slice(), &u32::MAX.to_be_bytes()].concat();
    let oversize = End::new(true).feeder.feed(&bytes).unwrap_err();
    assert_eq!(oversize.to_string(), format!("a frame of type 4 has {} bytes of payload", u32::MAX));
}

#[tokio::test]
async fn frames_that_cross_a_stream_s_end_are_honest() {
    for initiator in [true, false] {
        let mut end = End::new(initiator);
        let mut kept = end.with_streams().await;
        for stream in [RESET, DROPPED] {
            let mut frames =
                vec![data(stream), credit(stream), eof(stream), reset(stream), reset(stream), data(stream)];
            if initiator {
                frames.extend([opened(stream), refused(stream)]);
            }
            for frame in frames {
                end.feed(&frame).unwrap_or_else(|e| panic!("{frame:?}: {e}"));
            }
        }
        // Both directions of a stream close on their own, and credit goes on after the end of the other.
        for frame in [data(OPEN), credit(OPEN), eof(OPEN), credit(OPEN)] {
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
    let mut end = End::new(false);
    for stream in [3, 1, 2, 6] {
        end.feed(&open(stream)).unwrap();
    }
    // One that was given up before it was asked for.
    end.feed(&reset(4)).unwrap();
    end.feed(&open(5)).unwrap();
    for stream in [3, 1, 2, 6, 5] {
        let incoming = end.events.incoming.recv().await.unwrap();
        assert_eq!(incoming.entry.as_ref().unwrap().id, stream);
    }
}

/// The peer gives up streams and asks for more while the sockets of the first ones are still open.
#[tokio::test]
async fn a_stream_counts_until_its_socket_is_closed() {
    let mut end = End::new(false);
    let mut sockets = Vec::new();
    for id in 1..=300 {
        end.feed(&open(id)).unwrap();
        if let Ok(incoming) = end.events.incoming.try_recv() {
            sockets.push(incoming.accept().await.unwrap());
        }
        end.feed(&reset(id)).unwrap();
        assert!(sockets.len() <= LIMIT, "{} sockets with a limit of {LIMIT}", sockets.len());
    }
    assert_eq!((sockets.len(), end.mux.streams_open()), (LIMIT, LIMIT));
    sockets.truncate(4);
    assert_eq!(end.mux.streams_open(), 4);
    for id in 301..=320 {
        end.feed(&open(id)).unwrap();
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
    for id in 1..=u32::try_from(LIMIT).unwrap() {
        callers.push(end.open(id).await);
        end.feed(&reset(id)).unwrap();
    }
    let open = end.mux.open(&"a:1".parse().unwrap(), "", Duration::from_secs(60)).await;
    assert!(matches!(open, Err(DialError::TooManyStreams(_))), "{open:?}");
    callers.clear();
    end.open(u32::try_from(LIMIT).unwrap() + 1).await;
}

#[tokio::test]
async fn an_id_that_comes_round_again_evicts_nobody() {
    let mut end = End::new(false);
    let first = end.open(1).await;
    // The peer has given the stream up, so that only its socket holds it; and then all the ids have been used.
    end.feed(&reset(1)).unwrap();
    for id in [1 << 30, 1 << 31, 3 << 30, u32::MAX] {
        end.feed(&open(id)).unwrap();
    }
    let incoming = async |end: &mut End| end.events.incoming.recv().await.unwrap();
    for _ in 0..4 {
        drop(incoming(&mut end).await);
    }
    let mut second = end.open(1).await;
    drop(first);
    end.feed(&data(1)).unwrap();
    assert_eq!(second.reader.fill().await.unwrap(), b"data");
    assert_eq!(end.mux.streams_open(), 1);
    end.feed(&open(1)).unwrap_err();
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
    assert!(end.mux.0.round_trip.next_ping().is_none());
    let owed = end.mux.round_trip().expect("at least the time that it owes the answer");
    assert!(end.mux.0.round_trip.next_ping().is_none());
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
    let gate = &end.mux.0.gate;
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
    end.mux.0.gate.set_backlog(16 * 1024 * 1024);
    for _ in 0..100 {
        end.feed(&Frame::Ping([0; 8])).unwrap();
        tokio::task::yield_now().await;
    }
    assert!(end.sent.try_recv().is_err());
    end.mux.0.gate.set_backlog(0);
    for _ in 0..100 {
        assert_eq!(end.sent.recv().await.unwrap(), frame::encode(&Frame::Pong([0; 8])));
    }
}

#[tokio::test]
async fn a_peer_that_asks_for_more_answers_than_it_takes_is_found_out() {
    let tasks = Tasks::new();
    let stuck: SendFrame = Box::new(|_| Box::pin(std::future::pending()));
    let (_mux, mut feeder, _events) =
        Mux::new(true, LIMIT, Gate::default(), Stalls::default(), stuck, &tasks);
    let ping = frame::encode(&Frame::Ping([0; 8]));
    for _ in 0..=ANSWERS + LIMIT {
        feeder.feed(&ping).unwrap();
    }
    assert_eq!(feeder.feed(&ping), Err(ProtocolError::Flood));
    tasks.cancel();
}
