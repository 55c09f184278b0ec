//! Both versions of the wire, byte by byte.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;
use crate::refusal;

const HELLO_SAID: Hello = Hello {
    capabilities: Hello::FRONT_END | Hello::CONNECTIONS,
    instance: *b"0123456789abcdef",
    session: *b"ABCDEFGHIJKLMNOP",
};

/// Every frame of a version.
fn samples(version: Version) -> Vec<Frame<'static>> {
    let errors = [
        DialError::BadTarget("x".into()),
        DialError::TooManyStreams("x".into()),
        DialError::Cancelled,
        DialError::NoRoute("x".into()),
        DialError::NoTunnel { node: "n1".into(), state: "down".into() },
        DialError::TunnelLost { node: "n1".into(), reason: "cut".into() },
        DialError::Policy { rule: "link-local".into(), reason: "no".into() },
        DialError::Refused("connection refused".into()),
        DialError::Resolve("no such name".into()),
        DialError::Unreachable("no route to host".into()),
        DialError::TimedOut("10 s".into()),
    ];
    let (limit, place, credit, last) = match version {
        Version::V1 => (window::INITIAL.into(), None, Credit::By(65536), u32::MAX.into()),
        Version::V2 => (70_000, Some(1 << 40), Credit::UpTo(u64::MAX), u64::MAX),
    };
    let mut all: Vec<_> = errors.into_iter().map(|error| Frame::Refused { stream: 3, error }).collect();
    all.extend([
        Frame::Open {
            stream: 1,
            timeout_ms: 10_000,
            limit,
            target: "10.0.0.1:80".into(),
            origin: "uid=0".into(),
        },
        Frame::Opened { stream: last, limit },
        Frame::Data { stream: 7, offset: place, bytes: b"hello" },
        Frame::Credit { stream: 1, credit },
        Frame::Eof { stream: 1, end: place },
        Frame::Reset { stream: 1, end: place, reason: "gone".into() },
        Frame::Ping(*b"12345678"),
        Frame::Pong(*b"12345678"),
        Frame::GoAway { reason: "draining".into() },
        Frame::Certificate { text: "ssh-ed25519-cert-v01@openssh.com AAAA".into() },
    ]);
    if version == Version::V2 {
        all.extend([
            Frame::Hello(HELLO_SAID),
            Frame::Call,
            Frame::Retract { stream: last, limit },
            Frame::Retracted { stream: 1, limit: u64::MAX },
            Frame::Relink,
            Frame::Drain { milliseconds: u64::MAX },
        ]);
    }
    all
}

fn decode(version: Version, mut bytes: &[u8]) -> Result<Option<Frame<'_>>, FrameError> {
    Decoder::new(version).decode(&mut bytes)
}

#[test]
fn round_trips_in_any_pieces() {
    for (version, frame) in Version::ALL.iter().flat_map(|v| samples(*v).into_iter().map(|f| (*v, f))) {
        let bytes = encode(version, &frame);
        for piece in [1, 2, 8, 9, 10, 13, 20, 21, bytes.len()] {
            let mut decoder = Decoder::new(version);
            let mut data = Vec::new();
            let mut got = None;
            for mut chunk in bytes.chunks(piece) {
                while let Some(f) = decoder.decode(&mut chunk).unwrap() {
                    if let Frame::Data { stream, offset, bytes } = f {
                        assert_eq!(
                            (stream, offset),
                            (7, (version == Version::V2).then_some((1 << 40) + data.len() as u64))
                        );
                        data.extend_from_slice(bytes);
                    } else {
                        assert!(got.replace(f).is_none());
                    }
                }
                assert!(chunk.is_empty());
            }
            if let Frame::Data { bytes, .. } = frame {
                assert_eq!(data, bytes);
            } else {
                assert_eq!(got.as_ref(), Some(&frame), "in pieces of {piece}");
            }
        }
    }
}

#[test]
fn the_first_version_stays_as_it_is() {
    let open = Frame::Open {
        stream: 1,
        timeout_ms: 256,
        limit: window::INITIAL.into(),
        target: "a:1".into(),
        origin: String::new(),
    };
    assert_eq!(encode(Version::V1, &open)[..], *b"\x01\0\0\0\x01\0\0\0\x0b\0\0\x01\0\0\x03a:1\0\0");
    let mut data = start_data(Version::V1, 2);
    data.extend_from_slice(b"hi");
    assert_eq!(finish_data(Version::V1, data, 2, 99)[..], *b"\x04\0\0\0\x02\0\0\0\x02hi");
    assert_eq!(encode(Version::V1, &Frame::Eof { stream: 1, end: Some(7) })[..], *b"\x06\0\0\0\x01\0\0\0\0");
}

/// The examples of the specification: lines of hexadecimal bytes, each with the frame that it is.
#[test]
fn the_specification_s_examples_are_what_is_sent() {
    let text = include_str!("../../../STREAMS.md");
    let examples: Vec<Vec<u8>> = text
        .split("```hex\n")
        .skip(1)
        .map(|block| {
            let digits: String = block.split("```").next().unwrap().split_whitespace().collect();
            (0..digits.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
                .collect()
        })
        .collect();
    let stream = 3;
    let frames = [
        Frame::Hello(HELLO_SAID),
        Frame::Open {
            stream,
            timeout_ms: 9000,
            limit: 262_144,
            target: "10.0.0.7:10250".into(),
            origin: "uid=0".into(),
        },
        Frame::Opened { stream, limit: 262_144 },
        Frame::Refused {
            stream,
            error: DialError::Policy {
                rule: "link-local".into(),
                reason: "169.254.0.1 is link-local".into(),
            },
        },
        Frame::Data { stream, offset: Some(65_536), bytes: b"hello" },
        Frame::Credit { stream, credit: Credit::UpTo(393_216) },
        Frame::Eof { stream, end: Some(65_541) },
        Frame::Reset { stream, end: Some(65_541), reason: "the far socket failed".into() },
        Frame::Ping(*b"12345678"),
        Frame::Pong(*b"12345678"),
        Frame::GoAway { reason: "the agent stops".into() },
        Frame::Certificate { text: "ssh-ed25519-cert-v01@openssh.com AAAA".into() },
        Frame::Call,
        Frame::Retract { stream, limit: 327_685 },
        Frame::Retracted { stream, limit: 331_776 },
        Frame::Relink,
        Frame::Drain { milliseconds: 600_000 },
    ];
    assert_eq!(examples.len(), frames.len() + 1);
    for (bytes, frame) in examples.iter().zip(&frames) {
        assert_eq!(encode(Version::V2, frame)[..], bytes[..], "{frame:?}");
        assert_eq!(decode(Version::V2, bytes).unwrap().as_ref(), Some(frame));
    }
    // The last example is a frame to be skipped, and a PING.
    assert_eq!(decode(Version::V2, examples.last().unwrap()), Ok(Some(Frame::Ping(*b"12345678"))));
}

#[test]
fn refuses_what_breaks_the_protocol() {
    for (bytes, want) in [
        (&b"\x00\0\0\0\x01\0\0\0\0"[..], FrameError::Type(0)),
        (b"\x0c\0\0\0\0\0\0\0\0", FrameError::Type(HELLO)),
        (b"\x0e\0\0\0\x01\0\0\0\x08", FrameError::Type(RETRACT)),
        (b"\x10\0\0\0\0\0\0\0\0", FrameError::Type(RELINK)),
        (b"\x11\0\0\0\0\0\0\0\x08", FrameError::Type(DRAIN)),
        (b"\x80\0\0\0\0\0\0\0\0", FrameError::Type(OPTIONAL)),
        (b"\x04\0\0\0\0\0\0\0\x01", FrameError::Stream(DATA)),
        (b"\x08\0\0\0\x01\0\0\0\x08", FrameError::Stream(PING)),
        (b"\x04\0\0\0\x01\0\0\xfc\x01", FrameError::Length { kind: DATA, len: MAX_DATA + 1 }),
        (b"\x01\0\0\0\x01\xff\xff\xff\xff", FrameError::Length { kind: OPEN, len: u32::MAX as usize }),
        (b"\x05\0\0\0\x01\0\0\0\x03abc", FrameError::Payload(CREDIT)),
        (b"\x05\0\0\0\x01\0\0\0\x05abcde", FrameError::Payload(CREDIT)),
        (b"\x03\0\0\0\x01\0\0\0\x05\x63\0\0\0\0", FrameError::Payload(REFUSED)),
        (b"\x07\0\0\0\x01\0\0\0\x03\0\x01\xff", FrameError::Payload(RESET)),
    ] {
        assert_eq!(decode(Version::V1, bytes), Err(want), "{bytes:?}");
    }
    for (bytes, want) in [
        (&b"\x00\0\0\0\0\0\0\0\x01\0\0\0\0"[..], FrameError::Type(0)),
        (b"\x12\0\0\0\0\0\0\0\x01\0\0\0\0", FrameError::Type(18)),
        (b"\x11\0\0\0\0\0\0\0\x01\0\0\0\x08", FrameError::Stream(DRAIN)),
        (b"\x11\0\0\0\0\0\0\0\0\0\0\0\x04abcd", FrameError::Payload(DRAIN)),
        (b"\x10\0\0\0\0\0\0\0\x01\0\0\0\0", FrameError::Stream(RELINK)),
        (b"\x10\0\0\0\0\0\0\0\0\0\0\0\x01x", FrameError::Payload(RELINK)),
        (b"\x0e\0\0\0\0\0\0\0\0\0\0\0\x08", FrameError::Stream(RETRACT)),
        (b"\x0e\0\0\0\0\0\0\0\x01\0\0\0\x04abcd", FrameError::Payload(RETRACT)),
        (b"\x0f\0\0\0\0\0\0\0\x01\0\0\0\x09123456789", FrameError::Payload(RETRACTED)),
        (b"\x7f\0\0\0\0\0\0\0\0\0\0\0\0", FrameError::Type(127)),
        (b"\x80\0\0\0\0\0\0\0\0\0\0\x40\x01", FrameError::Length { kind: 128, len: MAX_CONTROL + 1 }),
        (b"\x0c\0\0\0\0\0\0\0\x01\0\0\0\x18", FrameError::Stream(HELLO)),
        (b"\x04\0\0\0\0\0\0\0\0\0\0\0\x09", FrameError::Stream(DATA)),
        (b"\x04\0\0\0\0\0\0\0\x01\0\0\0\x07", FrameError::Length { kind: DATA, len: 7 }),
        (b"\x04\0\0\0\0\0\0\0\x01\0\0\xfc\x09", FrameError::Length { kind: DATA, len: MAX_DATA + 9 }),
        (b"\x05\0\0\0\0\0\0\0\x01\0\0\0\x04abcd", FrameError::Payload(CREDIT)),
        (b"\x06\0\0\0\0\0\0\0\x01\0\0\0\0", FrameError::Payload(EOF)),
        (b"\x02\0\0\0\0\0\0\0\x01\0\0\0\x09123456789", FrameError::Payload(OPENED)),
        (b"\x0c\0\0\0\0\0\0\0\0\0\0\0\x01x", FrameError::Payload(HELLO)),
    ] {
        assert_eq!(decode(Version::V2, bytes), Err(want), "{bytes:?}");
    }
}

#[test]
fn text_from_a_peer_is_printable() {
    for version in Version::ALL {
        let end = (version == Version::V2).then_some(0);
        let reason = "a\r\nSet-Cookie: \u{202e}x".into();
        let bytes = encode(version, &Frame::Reset { stream: 1, end, reason });
        let frame = decode(version, &bytes).unwrap().unwrap();
        assert_eq!(frame, Frame::Reset { stream: 1, end, reason: "a  Set-Cookie:  x".into() });
    }
}

#[test]
fn a_long_certificate_is_whole_and_other_long_texts_are_cut_off() {
    for version in Version::ALL {
        let text = "A".repeat(MAX_CERTIFICATE);
        let bytes = encode(version, &Frame::Certificate { text: text.clone() });
        assert_eq!(bytes.len(), version.header() + MAX_CONTROL);
        assert_eq!(decode(version, &bytes), Ok(Some(Frame::Certificate { text: text.clone() })));
        let bytes = encode(version, &Frame::GoAway { reason: text });
        let reason = "A".repeat(refusal::MOST);
        assert_eq!(decode(version, &bytes), Ok(Some(Frame::GoAway { reason })));
    }
}

#[test]
fn no_bytes_make_it_panic_or_hoard() {
    let mut rng = StdRng::seed_from_u64(4);
    for version in Version::ALL {
        let valid: Vec<Bytes> = samples(version).iter().map(|frame| encode(version, frame)).collect();
        for _ in 0..20_000 {
            let mut bytes: Vec<u8> = valid[rng.random_range(0..valid.len())].to_vec();
            for _ in 0..rng.random_range(0..6) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.random();
            }
            let mut decoder = Decoder::new(version);
            let mut input = &bytes[..];
            while let Ok(Some(_)) = decoder.decode(&mut input) {}
            assert!(decoder.partial.capacity() <= 2 * MAX_CONTROL);
        }
    }
}
