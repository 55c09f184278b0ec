//! Sessions with a dialer that connects directly: no HTTP/2, no SSH.
#![allow(clippy::disallowed_methods, reason = "a test owns its tasks by its runtime")]

use std::net::SocketAddr;

use proto::{
    Host,
    konnectivity::{CloseResponse, DialResponse, Drain},
};
use proto_net::{
    dialer::{DialFuture, Dialer, Origin},
    tasks::Tasks,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
};

use super::*;
use crate::{
    egress::outbound::CallerLimits,
    stream::metrics::{DialLabels, ListenerLabels, StreamMetrics},
    tunnels::registry::Registry,
};

const DOOR: &str = "konnectivity-test";
const HANGS: Duration = Duration::from_secs(60);
/// Dials and connections of a client at once.
const SLOTS: usize = 4096;

/// Dials addresses; the names `refused.test`, `never.test` and `held.test` are special.
#[derive(Default)]
struct Spot {
    pending: Arc<std::sync::atomic::AtomicUsize>,
    release: Arc<Notify>,
    /// Where `held.test` leads once released.
    held: Mutex<Option<SocketAddr>>,
}

struct Pending(Arc<std::sync::atomic::AtomicUsize>);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Dialer for Spot {
    fn dial<'a>(&'a self, target: &'a Target, _: &'a Origin) -> DialFuture<'a> {
        Box::pin(async move {
            self.pending.fetch_add(1, Ordering::SeqCst);
            let _pending = Pending(self.pending.clone());
            let address = match &target.host {
                Host::Addr(address) => SocketAddr::new(*address, target.port),
                Host::Name(name) if name == "never.test" => std::future::pending().await,
                Host::Name(name) if name == "held.test" => {
                    self.release.notified().await;
                    self.held.lock().unwrap().unwrap()
                }
                Host::Name(_) => {
                    return Err(DialError::Refused(format!("dial tcp {target}: connection refused")));
                }
            };
            let stream = TcpStream::connect(address).await.unwrap().into();
            Ok(Connection { stream, node: None, reason: "test".to_owned(), permit: None })
        })
    }
}

/// A client and its session.
struct Client {
    packets: Option<mpsc::UnboundedSender<Result<Packet, Status>>>,
    answers: Answers,
    gone: CancellationToken,
    dialer: Arc<Spot>,
    outbound: Outbound,
    listener: TcpListener,
}

impl Client {
    async fn new() -> Self {
        let dialer = Arc::new(Spot::default());
        let outbound = Outbound {
            dialer: dialer.clone(),
            metrics: StreamMetrics::new(Arc::new(Registry::new(1))),
            limits: CallerLimits { head_timeout: HANGS, half_closed_timeout: HANGS, max_connections: 1 },
            tasks: Tasks::new(),
        };
        let caller = Caller::new(DOOR, Origin("test".to_owned()));
        let gone = CancellationToken::new();
        let (session, answers) = Session::new(outbound.clone(), caller, Slots::new(SLOTS), gone.clone());
        let (packets, mut queue) = mpsc::unbounded_channel();
        outbound.tasks.spawn(session.run(futures_util::stream::poll_fn(move |cx| queue.poll_recv(cx))));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { packets: Some(packets), answers, gone, dialer, outbound, listener }
    }

    fn send(&self, packet: Packet) {
        self.packets.as_ref().unwrap().send(Ok(packet)).unwrap();
    }

    async fn next(&mut self) -> Option<Payload> {
        let answer = tokio::time::timeout(HANGS, self.answers.recv()).await.expect("an answer");
        answer.map(|packet| packet.unwrap().into_payload().unwrap())
    }

    fn address(&self) -> String {
        self.listener.local_addr().unwrap().to_string()
    }

    /// A connection to a target that the test plays.
    async fn open(&mut self, random: i64) -> (i64, TcpStream) {
        self.send(Packet::dial_request(random, &self.address()));
        let (target, _) = self.listener.accept().await.unwrap();
        match self.next().await {
            Some(Payload::DialResponse(r)) if r.random == random && r.error.is_empty() => {
                (r.connect_id, target)
            }
            other => panic!("{other:?}"),
        }
    }

    async fn expect_dial_error(&mut self, random: i64, contains: &str) {
        match self.next().await {
            Some(Payload::DialResponse(DialResponse { error, connect_id: 0, random: same })) => {
                assert!(error.contains(contains) && same == random, "{error} {same}");
            }
            other => panic!("{other:?}"),
        }
    }

    /// Data of a connection up to its CLOSE_RSP, and its error.
    async fn read_to_close(&mut self, id: i64) -> (Vec<u8>, String) {
        let mut bytes = Vec::new();
        loop {
            match self.next().await {
                Some(Payload::Data(data)) if data.connect_id == id => {
                    assert!(data.data.len() <= CHUNK);
                    bytes.extend_from_slice(&data.data);
                }
                Some(Payload::CloseResponse(CloseResponse { error, connect_id })) if connect_id == id => {
                    return (bytes, error);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn dials(&self, result: &'static str, fault: &str) -> u64 {
        let outcome = DialLabels { egress: DOOR, result, fault: fault.to_owned() };
        self.outbound.metrics.dials.get_or_create(&outcome).get()
    }

    /// Nothing is left: no task, no stream, no dial.
    async fn assert_nothing_left(&self) {
        assert_eq!(self.outbound.tasks.drain(HANGS).await, 0);
        let streams = self.outbound.metrics.open.get_or_create(&ListenerLabels { egress: DOOR }).get();
        assert_eq!((streams, self.dialer.pending.load(Ordering::SeqCst)), (0, 0));
    }
}

/// All that a target gets until the end of its connection, in whatever way it ends.
async fn drain(target: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(HANGS, target.read_to_end(&mut bytes)).await.expect("an end");
    if let Err(error) = read {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    bytes
}

#[tokio::test]
async fn a_connection_carries_both_ways_until_the_client_closes() {
    let mut client = Client::new().await;
    let (id, mut target) = client.open(-7).await;
    assert_eq!(id, 1);
    for part in ["up ", "and up", ""] {
        client.send(Packet::data(id, Bytes::from_static(part.as_bytes())));
    }
    let mut heard = [0; 9];
    target.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"up and up");
    target.write_all(&[b'd'; 100_000]).await.unwrap();
    let mut down = 0;
    while down < 100_000 {
        let Some(Payload::Data(data)) = client.next().await else { panic!() };
        down += data.data.len();
    }
    client.send(Packet::data(id, Bytes::from_static(b"last")));
    client.send(Packet::close_request(id));
    client.send(Packet::data(id, Bytes::from_static(b"too late")));
    client.send(Packet::close_request(id));
    assert_eq!(client.next().await, Packet::close_response(id, String::new()).payload);
    assert_eq!(drain(&mut target).await, b"last");
    assert_eq!(client.open(8).await.0, 2);
    client.packets = None;
    assert_eq!(client.next().await, Packet::close_response(2, String::new()).payload);
    assert_eq!(client.next().await, None);
    client.assert_nothing_left().await;
}

#[tokio::test]
async fn failed_dials_are_answered_with_their_cause_and_counted() {
    let mut client = Client::new().await;
    client.send(Packet::dial_request(1, "refused.test:8080"));
    client.expect_dial_error(1, "dial tcp refused.test:8080: connection refused").await;
    assert_eq!(client.dials("refused", "target"), 1);
    for (random, address) in [(2, "10.0.0.1"), (3, "fd00::1:80"), (4, ""), (5, "a b:1"), (6, "10.0.0.1:0")] {
        client.send(Packet::dial_request(random, address));
        client.expect_dial_error(random, "bad target").await;
    }
    for protocol in ["udp", "", "TCP"] {
        let (protocol, address) = (protocol.to_owned(), "10.0.0.1:80".to_owned());
        client.send(Payload::DialRequest(DialRequest { protocol, address, random: 9 }).into());
        client.expect_dial_error(9, "only \"tcp\" is").await;
    }
    let long = "x".repeat(1_000_000);
    for (protocol, address) in [("tcp", long.as_str()), (long.as_str(), "10.0.0.1:80")] {
        let (protocol, address) = (protocol.to_owned(), address.to_owned());
        client.send(Payload::DialRequest(DialRequest { protocol, address, random: 9 }).into());
        match client.next().await {
            Some(Payload::DialResponse(answer)) => assert!(answer.error.len() < 200, "{}", answer.error),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        client.outbound.metrics.bad_requests.get_or_create(&ListenerLabels { egress: DOOR }).get(),
        10
    );
    client.send(Packet::dial_request(10, "never.test:1"));
    client.send(Packet::dial_request(10, "never.test:1"));
    client.expect_dial_error(10, "is under way already").await;
}

#[tokio::test]
async fn a_dial_that_is_given_up_is_cancelled_and_not_answered() {
    let mut client = Client::new().await;
    client.send(Packet::dial_request(1, "never.test:1"));
    while client.dialer.pending.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    client.send(Packet::close_dial(1));
    client.send(Packet::close_dial(77));
    // The same number again is another dial, which the end of the first does not touch.
    client.send(Packet::dial_request(1, &client.address()));
    assert!(
        matches!(client.next().await, Some(Payload::DialResponse(r)) if r.random == 1 && r.connect_id == 1)
    );
    while client.dialer.pending.load(Ordering::SeqCst) > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(client.dials("cancelled", "caller"), 1);
}

#[tokio::test]
async fn what_opens_after_its_dial_was_given_up_is_closed() {
    let mut client = Client::new().await;
    *client.dialer.held.lock().unwrap() = Some(client.listener.local_addr().unwrap());
    client.send(Packet::dial_request(5, "held.test:1"));
    client.dialer.release.notify_one();
    let (mut target, _) = client.listener.accept().await.unwrap();
    // The answer is in the queue, and crosses this on its way.
    while client.answers.is_empty() {
        tokio::task::yield_now().await;
    }
    client.send(Packet::close_dial(5));
    assert_eq!(drain(&mut target).await, b"");
    assert!(matches!(client.next().await, Some(Payload::DialResponse(r)) if r.connect_id == 1));
    assert_eq!(client.read_to_close(1).await.1, "the dial was given up");
}

#[tokio::test]
async fn unknown_connections_are_answered_and_packets_of_servers_are_not() {
    let mut client = Client::new().await;
    for packet in [
        Packet::dialled(1, 1),
        Packet::close_response(1, String::new()),
        Payload::Drain(Drain {}).into(),
        Packet { r#type: 4, payload: None },
        Packet { r#type: 4, ..Packet::close_request(1) },
        Packet { r#type: -1, payload: None },
    ] {
        client.send(packet);
    }
    for id in [0, 1, -1, i64::MAX] {
        client.send(Packet::data(id, Bytes::from_static(b"x")));
        assert_eq!(client.read_to_close(id).await.1, format!("there is no connection {id}"));
        client.send(Packet::close_request(id));
        assert_eq!(client.read_to_close(id).await.1, format!("there is no connection {id}"));
    }
}

#[tokio::test]
async fn what_a_target_sent_comes_before_the_answer_to_its_end() {
    let mut client = Client::new().await;
    let (id, mut target) = client.open(1).await;
    let writing = tokio::time::timeout(HANGS, async move {
        target.write_all(&[b'x'; 3_000_000]).await.unwrap();
        target.shutdown().await.unwrap();
        drain(&mut target).await
    });
    let (_, (bytes, error)) = tokio::join!(writing, client.read_to_close(id));
    assert_eq!((bytes.len(), error.as_str()), (3_000_000, ""));
    let (id, target) = client.open(2).await;
    target.set_zero_linger().unwrap();
    drop(target);
    let (_, error) = client.read_to_close(id).await;
    assert!(error.contains("reset"), "{error}");
    client.packets = None;
    assert_eq!(client.next().await, None);
    client.assert_nothing_left().await;
}

#[tokio::test]
async fn a_client_that_vanishes_takes_all_but_what_it_has_closed() {
    let mut client = Client::new().await;
    let (_, mut open) = client.open(1).await;
    let (closed, mut slow) = client.open(2).await;
    client.send(Packet::dial_request(3, "never.test:1"));
    // More than the sockets take, for a target that does not read yet.
    client.send(Packet::data(closed, vec![b'x'; 6_000_000].into()));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let reading = async {
        let mut bytes = vec![0; 5_900_000];
        slow.read_exact(&mut bytes).await.unwrap();
    };
    reading.await;
    client.send(Packet::close_request(closed));
    assert_eq!(client.next().await, Packet::close_response(closed, String::new()).payload);
    client.gone.cancel();
    assert_eq!(drain(&mut slow).await.len(), 100_000);
    assert_eq!(drain(&mut open).await, b"");
    client.assert_nothing_left().await;
    assert_eq!(client.dials("cancelled", "caller"), 1);
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_little_and_its_connections_take_turns() {
    let mut client = Client::new().await;
    let (first, mut one) = client.open(1).await;
    let (second, mut other) = client.open(2).await;
    let feed = async |target: &mut TcpStream| {
        let mut sent = 0;
        while let Ok(written) =
            tokio::time::timeout(Duration::from_millis(500), target.write(&[b'x'; 65536])).await
        {
            sent += written.unwrap();
        }
        sent
    };
    let sent = tokio::join!(feed(&mut one), feed(&mut other));
    // Whatever the kernel holds of it; the session holds a few packets.
    assert!(sent.0 > 0 && sent.1 > 0);
    assert_eq!(client.answers.len(), ANSWERS);
    let writing = async {
        tokio::join!(async { while one.write_all(&[b'x'; 65536]).await.is_ok() {} }, async {
            while other.write_all(&[b'x'; 65536]).await.is_ok() {}
        },)
    };
    let reading = async {
        let mut of = HashMap::from([(first, 0), (second, 0)]);
        for _ in 0..200 {
            let Some(Payload::Data(data)) = client.next().await else { panic!() };
            *of.get_mut(&data.connect_id).unwrap() += 1;
        }
        of
    };
    let of = tokio::select! {
        of = reading => of,
        _ = writing => panic!("a target was closed"),
    };
    assert!(of.values().all(|n| *n > 50), "{of:?}");
}

#[tokio::test]
async fn a_stuck_target_among_several_is_ended_alone() {
    let mut client = Client::new().await;
    let (stuck, _held) = client.open(1).await;
    let (works, mut target) = client.open(2).await;
    for _ in 0..200 {
        client.send(Packet::data(stuck, vec![b'x'; 64 * 1024].into()));
    }
    client.send(Packet::data(works, Bytes::from_static(b"hello")));
    let answering = tokio::spawn(async move {
        let mut heard = [0; 5];
        target.read_exact(&mut heard).await.unwrap();
        target.write_all(&heard).await.unwrap();
        target
    });
    let (mut ended, mut answered) = (false, false);
    while !ended || !answered {
        match client.next().await {
            Some(Payload::CloseResponse(r)) if r.connect_id == stuck => {
                ended |= r.error.contains("too slow");
            }
            Some(Payload::Data(data)) => answered = data.connect_id == works,
            other => panic!("{other:?}"),
        }
    }
    let _target = answering.await.unwrap();
    client.send(Packet::close_request(works));
    loop {
        match client.next().await {
            Some(Payload::CloseResponse(r)) if r.connect_id == works => break assert_eq!(r.error, ""),
            Some(Payload::CloseResponse(r)) if r.connect_id == stuck => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn connections_are_limited() {
    let mut client = Client::new().await;
    for random in 0..=SLOTS as i64 {
        client.send(Packet::dial_request(random, "never.test:1"));
    }
    let error = "too many streams: this HTTP/2 connection has 4096 dials and connections already";
    client.expect_dial_error(SLOTS as i64, error).await;
    assert_eq!(client.dials("too_many_streams", "caller"), 1);
    client.send(Packet::close_dial(0));
    while client.dials("cancelled", "caller") == 0 {
        tokio::task::yield_now().await;
    }
    client.open(-1).await;
    client.packets = None;
    assert!(matches!(client.next().await, Some(Payload::CloseResponse(_))));
    assert_eq!(client.next().await, None);
    client.assert_nothing_left().await;
}

#[tokio::test]
async fn a_broken_stream_is_told_why_and_ends_all() {
    let mut client = Client::new().await;
    let (_, mut target) = client.open(1).await;
    client.packets.as_ref().unwrap().send(Err(Status::internal("no protobuf"))).unwrap();
    let told = client.answers.recv().await.unwrap().unwrap_err();
    assert_eq!(told.message(), "no protobuf");
    assert_eq!(drain(&mut target).await, b"");
    assert_eq!(client.answers.recv().await.map(|_| ()), None);
    client.assert_nothing_left().await;
}
