//! HTTP/2 frames are judged as RFC 9113 (sections 3.4, 4, 5 and 6) and RFC 7541 have it: what the front end must
//! accept, what ends a stream, and what ends the connection.

use bytes::{BufMut, Bytes, BytesMut};
use tests::{
    front_end::{Credential, FrontEnd, Http, Setup, TOKEN},
    h2::{
        ACK, Answer, CONTINUATION, Connection, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PADDED,
        PING, PRIORITIZED, PRIORITY, PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE, block,
    },
    load::completes,
};

const PROTOCOL: u32 = 1;
const FLOW_CONTROL: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE: u32 = 6;
const COMPRESSION: u32 = 9;

/// The outcome that a case must have. A server may always treat a stream error as one of the connection (RFC 9113 §5.4.2), and
/// may close without a GOAWAY.
#[derive(Clone, Copy, Debug)]
enum Expect {
    /// Stream 1 is answered with 200.
    Served,
    /// The PING that follows is acknowledged.
    Ignored,
    /// RST_STREAM on stream 1 with this code, 4xx, or the connection's end with it.
    Stream(u32),
    /// The connection's end with this code.
    Connection(u32),
    /// Left to the server.
    Either,
    /// The connection's end with any of these.
    OneOf(&'static [u32]),
}

use Expect::{Ignored, OneOf, Served, Stream};

struct Case {
    section: &'static str,
    what: &'static str,
    /// After the preface and empty settings.
    bytes: Vec<u8>,
    expect: Expect,
}

/// Where the front end's HTTP/2 (the h2 crate) differs from the standard: it ends the connection, as it should, but names
/// PROTOCOL_ERROR where the standard has a more specific code. It decodes frames and header blocks before it knows of
/// streams, and calls whatever it can't decode that; and it does not tell streams that have ended from those that
/// never were.
const LESS_SPECIFIC: [&str; 18] = [
    "a header block that can't be decoded",
    "DATA after END_STREAM",
    "HEADERS after END_STREAM",
    "HEADERS after RST_STREAM",
    "PRIORITY that is too short",
    "RST_STREAM that is too short",
    "SETTINGS in an ACK",
    "SETTINGS of another length than sixes",
    "INITIAL_WINDOW_SIZE of 2^31",
    "PING that is too short",
    "WINDOW_UPDATE that is too short",
    "the index 0",
    "an index that is not there",
    "a table size update at the end of a block",
    "an integer without end",
    "Huffman padding of more than 7 bits",
    "Huffman's end of string",
    "a table larger than allowed",
];

/// Fields of a request that is served.
fn request(extra: &[(&str, &str)]) -> Bytes {
    let bearer = format!("Bearer {TOKEN}");
    let base = [
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", "api"),
        (":path", "/echo"),
        ("authorization", &bearer),
    ];
    block(&[&base[..], extra].concat())
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    Frame::new(kind, flags, stream, Bytes::copy_from_slice(payload)).encode().to_vec()
}

fn whole(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &request(&[]))
}

/// The head of a request whose body is to come.
fn open(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &request(&[]))
}

fn setting(id: u16, value: u32) -> Vec<u8> {
    let mut payload = BytesMut::new();
    payload.put_u16(id);
    payload.put_u32(value);
    frame(SETTINGS, 0, 0, &payload)
}

fn cases() -> Vec<Case> {
    let connection = Expect::Connection;
    let case =
        |section, what, parts: &[Vec<u8>], expect| Case { section, what, bytes: parts.concat(), expect };
    let headers = request(&[]);
    let (start, end) = (&headers[..20], &headers[20..]);
    let padded = |pad: u8, rest: &[u8], padding: usize| [&[pad][..], rest, &vec![0; padding]].concat();
    let increment = |n: u32| n.to_be_bytes();
    let hpack = |bytes: &[u8]| frame(HEADERS, END_HEADERS | END_STREAM, 1, &[bytes, &headers].concat());
    vec![
        // §4: frames
        case(
            "4.1",
            "an unknown frame type",
            &[frame(0x16, 0, 0, b"unknown!"), frame(0x16, 0, 5, b"x")],
            Ignored,
        ),
        case("4.1", "unknown flags of PING", &[frame(PING, 0x16, 0, b"12345678")], Ignored),
        case(
            "4.1",
            "the reserved bit",
            &[{
                let mut ping = frame(PING, 0, 0, b"12345678");
                ping[5] |= 0x80;
                ping
            }],
            Ignored,
        ),
        case(
            "4.2",
            "DATA of the largest size",
            &[open(1), frame(DATA, END_STREAM, 1, &vec![b'x'; 16_384])],
            Served,
        ),
        case(
            "4.2",
            "DATA larger than that",
            &[open(1), frame(DATA, END_STREAM, 1, &vec![b'x'; 16_385])],
            Stream(FRAME_SIZE),
        ),
        case(
            "4.2",
            "HEADERS larger than that",
            &[frame(HEADERS, END_HEADERS, 1, &vec![0; 16_385])],
            connection(FRAME_SIZE),
        ),
        case(
            "4.3",
            "a header block that can't be decoded",
            &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x00, 0x85, 0xf2, 0xb2, 0x4a])],
            connection(COMPRESSION),
        ),
        case(
            "4.3",
            "PRIORITY within a header block",
            &[
                frame(HEADERS, END_STREAM, 1, start),
                frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1]),
                frame(CONTINUATION, END_HEADERS, 1, end),
            ],
            connection(PROTOCOL),
        ),
        case(
            "4.3",
            "HEADERS of another stream within a header block",
            &[frame(HEADERS, END_STREAM, 1, start), whole(3)],
            connection(PROTOCOL),
        ),
        // §5.1: states of streams
        case("5.1", "DATA on an idle stream", &[frame(DATA, END_STREAM, 1, b"x")], connection(PROTOCOL)),
        case(
            "5.1",
            "RST_STREAM on an idle stream",
            &[frame(RST_STREAM, 0, 1, &[0, 0, 0, 8])],
            connection(PROTOCOL),
        ),
        case(
            "5.1",
            "WINDOW_UPDATE on an idle stream",
            &[frame(WINDOW_UPDATE, 0, 1, &increment(100))],
            connection(PROTOCOL),
        ),
        case(
            "5.1",
            "CONTINUATION on an idle stream",
            &[frame(CONTINUATION, END_HEADERS, 1, &headers)],
            connection(PROTOCOL),
        ),
        case(
            "5.1",
            "DATA after END_STREAM",
            &[whole(1), frame(DATA, END_STREAM, 1, b"x")],
            Stream(STREAM_CLOSED),
        ),
        case("5.1", "HEADERS after END_STREAM", &[whole(1), whole(1)], Stream(STREAM_CLOSED)),
        case(
            "5.1",
            "CONTINUATION after END_STREAM",
            &[whole(1), frame(CONTINUATION, END_HEADERS, 1, &headers)],
            OneOf(&[PROTOCOL, STREAM_CLOSED]),
        ),
        case(
            "5.1",
            "HEADERS after RST_STREAM",
            &[open(1), frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]), whole(1)],
            Stream(STREAM_CLOSED),
        ),
        case("5.1.1", "an even stream", &[whole(2)], connection(PROTOCOL)),
        case("5.1.1", "a stream lower than the last", &[whole(5), whole(3)], connection(PROTOCOL)),
        case(
            "5.1.2",
            "more streams than allowed",
            &[(0..1000).flat_map(|i| open(2 * i + 1)).collect()],
            Expect::Ignored,
        ),
        case(
            "5.3.1",
            "a stream that depends on itself",
            &[frame(
                HEADERS,
                END_HEADERS | END_STREAM | PRIORITIZED,
                1,
                &[&[0, 0, 0, 1, 1], &headers[..]].concat(),
            )],
            Expect::Either,
        ),
        case("5.5", "an unknown setting", &[setting(0xff, 1)], Ignored),
        // §6.1: DATA
        case("6.1", "DATA on stream 0", &[frame(DATA, END_STREAM, 0, b"x")], connection(PROTOCOL)),
        case(
            "6.1",
            "DATA with padding",
            &[open(1), frame(DATA, END_STREAM | PADDED, 1, &padded(5, b"hello", 5))],
            Served,
        ),
        case(
            "6.1",
            "DATA with more padding than there is",
            &[open(1), frame(DATA, END_STREAM | PADDED, 1, &padded(200, b"hello", 0))],
            connection(PROTOCOL),
        ),
        case(
            "6.1",
            "empty DATA",
            &[open(1), frame(DATA, 0, 1, b""), frame(DATA, END_STREAM, 1, b"")],
            Served,
        ),
        // §6.2: HEADERS
        case("6.2", "HEADERS on stream 0", &[whole(0)], connection(PROTOCOL)),
        case(
            "6.2",
            "HEADERS with padding",
            &[frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, &padded(7, &headers, 7))],
            Served,
        ),
        case(
            "6.2",
            "HEADERS with priority",
            &[frame(
                HEADERS,
                END_HEADERS | END_STREAM | PRIORITIZED,
                1,
                &[&[0, 0, 0, 0, 1], &headers[..]].concat(),
            )],
            Served,
        ),
        case(
            "6.2",
            "HEADERS with more padding than there is",
            &[frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, &padded(255, b"hello", 0))],
            connection(PROTOCOL),
        ),
        // §6.3: PRIORITY
        case("6.3", "PRIORITY", &[frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1]), whole(1)], Served),
        case("6.3", "PRIORITY on stream 0", &[frame(PRIORITY, 0, 0, &[0, 0, 0, 0, 1])], connection(PROTOCOL)),
        case(
            "6.3",
            "PRIORITY that is too short",
            &[open(1), frame(PRIORITY, 0, 1, &[0, 0, 0, 1])],
            Stream(FRAME_SIZE),
        ),
        // §6.4: RST_STREAM
        case(
            "6.4",
            "RST_STREAM on stream 0",
            &[frame(RST_STREAM, 0, 0, &[0, 0, 0, 8])],
            connection(PROTOCOL),
        ),
        case(
            "6.4",
            "RST_STREAM that is too short",
            &[open(1), frame(RST_STREAM, 0, 1, &[0, 0, 8])],
            connection(FRAME_SIZE),
        ),
        // §6.5: SETTINGS
        case("6.5", "SETTINGS in an ACK", &[frame(SETTINGS, ACK, 0, &[0; 6])], connection(FRAME_SIZE)),
        case("6.5", "SETTINGS on a stream", &[frame(SETTINGS, 0, 1, b"")], connection(PROTOCOL)),
        case(
            "6.5",
            "SETTINGS of another length than sixes",
            &[frame(SETTINGS, 0, 0, &[0; 5])],
            connection(FRAME_SIZE),
        ),
        case("6.5.2", "ENABLE_PUSH of 2", &[setting(2, 2)], connection(PROTOCOL)),
        case("6.5.2", "INITIAL_WINDOW_SIZE of 2^31", &[setting(4, 1 << 31)], connection(FLOW_CONTROL)),
        case("6.5.2", "MAX_FRAME_SIZE of 16383", &[setting(5, 16_383)], connection(PROTOCOL)),
        case("6.5.2", "MAX_FRAME_SIZE of 2^24", &[setting(5, 1 << 24)], connection(PROTOCOL)),
        case(
            "6.5.3",
            "settings twice, then a request",
            &[setting(4, 100), setting(4, 65_535), whole(1)],
            Served,
        ),
        // §6.6: PUSH_PROMISE
        case(
            "6.6",
            "PUSH_PROMISE by a client",
            &[open(1), frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2], &headers[..]].concat())],
            connection(PROTOCOL),
        ),
        // §6.7: PING
        case("6.7", "a PING that is an ACK of nothing", &[frame(PING, ACK, 0, b"nothing!")], Ignored),
        case("6.7", "PING on a stream", &[frame(PING, 0, 1, b"12345678")], connection(PROTOCOL)),
        case("6.7", "PING that is too short", &[frame(PING, 0, 0, b"123456")], connection(FRAME_SIZE)),
        // §6.8: GOAWAY
        case("6.8", "GOAWAY on a stream", &[frame(GOAWAY, 0, 1, &[0; 8])], connection(PROTOCOL)),
        // §6.9: WINDOW_UPDATE
        case("6.9", "WINDOW_UPDATE of 0", &[frame(WINDOW_UPDATE, 0, 0, &increment(0))], connection(PROTOCOL)),
        case(
            "6.9",
            "WINDOW_UPDATE of 0 on a stream",
            &[open(1), frame(WINDOW_UPDATE, 0, 1, &increment(0))],
            Stream(PROTOCOL),
        ),
        case(
            "6.9",
            "WINDOW_UPDATE that is too short",
            &[frame(WINDOW_UPDATE, 0, 0, &[0, 0, 1])],
            connection(FRAME_SIZE),
        ),
        case(
            "6.9.1",
            "a window of more than 2^31 - 1",
            &[frame(WINDOW_UPDATE, 0, 0, &increment(0x7fff_ffff))],
            connection(FLOW_CONTROL),
        ),
        case(
            "6.9.1",
            "a stream's window of more than that",
            &[open(1), frame(WINDOW_UPDATE, 0, 1, &increment(0x7fff_ffff))],
            Stream(FLOW_CONTROL),
        ),
        case("6.9.2", "a window of one byte at the start", &[setting(4, 1), whole(1)], Served),
        case(
            "6.9.2",
            "a window that becomes too large",
            &[open(1), frame(WINDOW_UPDATE, 0, 1, &increment(0x7fff_0000)), setting(4, 0x7fff_ffff)],
            connection(FLOW_CONTROL),
        ),
        // §6.10: CONTINUATION
        case(
            "6.10",
            "a header block in three frames",
            &[
                frame(HEADERS, END_STREAM, 1, start),
                frame(CONTINUATION, 0, 1, &end[..5]),
                frame(CONTINUATION, END_HEADERS, 1, &end[5..]),
            ],
            Served,
        ),
        case(
            "6.10",
            "CONTINUATION after END_HEADERS",
            &[open(1), frame(CONTINUATION, END_HEADERS, 1, b"")],
            connection(PROTOCOL),
        ),
        case(
            "6.10",
            "CONTINUATION on stream 0",
            &[frame(HEADERS, END_STREAM, 1, start), frame(CONTINUATION, END_HEADERS, 0, end)],
            connection(PROTOCOL),
        ),
        case(
            "6.10",
            "CONTINUATION after DATA",
            &[open(1), frame(DATA, 0, 1, b"x"), frame(CONTINUATION, END_HEADERS, 1, b"")],
            connection(PROTOCOL),
        ),
        case(
            "6.10",
            "CONTINUATION without end (CVE-2024-27316)",
            &[[
                frame(HEADERS, END_STREAM, 1, start),
                (0..5000).flat_map(|_| frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b")).collect(),
            ]
            .concat()],
            OneOf(&[0, 1, 2, 11, COMPRESSION]),
        ),
        // RFC 7541
        case("HPACK 2.3.3", "the index 0", &[hpack(&[0x80])], connection(COMPRESSION)),
        case("HPACK 2.3.3", "an index that is not there", &[hpack(&[0xc6])], connection(COMPRESSION)),
        case(
            "HPACK 4.2",
            "a table size update at the end of a block",
            &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &[&headers[..], &[0x20]].concat())],
            connection(COMPRESSION),
        ),
        case("HPACK 4.2", "a table size update at the start", &[hpack(&[0x20])], Served),
        case("HPACK 5.1", "an integer without end", &[hpack(&[0xff; 20])], connection(COMPRESSION)),
        case(
            "HPACK 5.2",
            "Huffman padding of more than 7 bits",
            &[hpack(&[0x00, 0x85, 0xf2, 0xb2, 0x4a, 0x84, 0xff, 0x87, 0x49, 0x51, 0x6f, 0x9d, 0xff])],
            connection(COMPRESSION),
        ),
        case(
            "HPACK 5.2",
            "Huffman's end of string",
            &[hpack(&[0x00, 0x01, b'a', 0x84, 0xff, 0xff, 0xff, 0xfc])],
            connection(COMPRESSION),
        ),
        case(
            "HPACK 6.3",
            "a table larger than allowed",
            &[hpack(&[0x3f, 0xff, 0xff, 0x03])],
            connection(COMPRESSION),
        ),
    ]
}

#[tokio::test]
async fn frames_are_taken_as_rfc_9113_has_it() {
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    let cases = cases();
    let mut failed = Vec::new();
    for case in &cases {
        let stream = front_end.connect(Credential::None, Http::V2).await.unwrap();
        let mut connection = Connection::start(stream).await.unwrap();
        // The server may have ended the connection before it has read all.
        let _ = connection.write(&case.bytes).await;
        if matches!(case.expect, Ignored) {
            let _ = connection.send(&Frame::new(PING, 0, 0, Bytes::from_static(b"are you?"))).await;
        }
        let on = match case.expect {
            Served | Stream(_) | Expect::Either => 1,
            Ignored | Expect::Connection(_) | OneOf(_) => 0,
        };
        let mut answer = completes(case.what, connection.answer(on)).await;
        if let (Stream(_), Ok(Answer::Response(response))) = (case.expect, &answer)
            && response.status == 200
        {
            // The request was served before the frame that is wrong came: what about that one?
            let _ = connection.send(&Frame::new(PING, 0, 0, Bytes::from_static(b"are you?"))).await;
            answer = completes(case.what, connection.answer(0)).await;
        }
        while case.section != "4.1" && matches!(&answer, Ok(Answer::Pong(pong)) if &pong[..] == b"12345678") {
            answer = completes(case.what, connection.answer(on)).await;
        }
        let good = match (case.expect, &answer) {
            (_, Err(_)) => false,
            (Served, Ok(Answer::Response(response))) => response.status == 200,
            (Ignored, Ok(Answer::Pong(_))) | (Expect::Either, Ok(_)) => true,
            (Stream(_), Ok(Answer::Response(response))) => (400..500).contains(&response.status),
            // A frame for a stream that has ended may come late, and be ignored for that (§5.1).
            (Stream(STREAM_CLOSED), Ok(Answer::Pong(_))) => true,
            (Stream(code), Ok(Answer::Reset(got) | Answer::GoAway(got))) => code == *got,
            (Expect::Connection(code), Ok(Answer::GoAway(got))) => code == *got,
            (OneOf(codes), Ok(Answer::GoAway(got))) => codes.contains(got),
            (Stream(_) | Expect::Connection(_) | OneOf(_), Ok(Answer::Closed)) => true,
            _ => false,
        };
        let explained = LESS_SPECIFIC.contains(&case.what) && matches!(answer, Ok(Answer::GoAway(PROTOCOL)));
        let verdict = match (good, explained) {
            (true, _) => "",
            (false, true) => "less specific than the standard",
            (false, false) => "FAILED",
        };
        let brief = match &answer {
            Ok(Answer::Response(response)) => response.status.to_string(),
            other => format!("{other:?}"),
        };
        println!("{:12} {:50} {brief:30} {verdict}", case.section, case.what);
        if !good && !explained {
            failed.push(format!("{} {}: {answer:?}, and not {:?}", case.section, case.what, case.expect));
        }
        // Another user, who has seats of their own.
        let mut honest = front_end.caller(Credential::Certificate, Http::V2).await.unwrap();
        let honest = honest.get("/echo").await.unwrap();
        assert_eq!(honest.status.as_u16(), 200, "after {}", case.what);
        for received in front_end.upstream.take() {
            let user = received.identity().unwrap().user;
            assert!(["sam", "jane"].contains(&user.as_str()), "{}: {user}", case.what);
        }
    }
    println!("{} cases, {} failed", cases.len(), failed.len());
    tests::steady::Health::of(&front_end.cluster.master).no_panic();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert_eq!(cases.len(), 68);
}

#[tokio::test]
async fn a_connection_begins_with_the_preface() {
    // The h2 crate takes other frames before the client's SETTINGS (§3.4), with the defaults that hold until then.
    let front_end = FrontEnd::start(Setup::default()).await.unwrap();
    for (what, bytes) in [
        ("another preface", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n".to_vec()),
        ("HTTP/1.1", b"GET / HTTP/1.1\r\nHost: api\r\n\r\n".to_vec()),
    ] {
        let stream = front_end.connect(Credential::None, Http::V2).await.unwrap();
        let mut connection = Connection::raw(stream);
        connection.write(&bytes).await.unwrap();
        let answer = completes(what, connection.answer(1)).await.unwrap();
        assert!(matches!(answer, Answer::Closed | Answer::GoAway(PROTOCOL)), "{what}: {answer:?}");
    }
    assert_eq!(front_end.upstream.received().len(), 0);
}
