//! The shim between recorded, hostile and random bytes of clients and a reader.

use hyper::http::uri::Authority;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const PREFACE_BYTES: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const BAD: &[u8] = b"%2Frun%2Fegress.sock";
const GOOD: &[u8] = b"localhostlocalhostlo";

fn capture(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/../tests/data/captures/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    Header { len: payload.len(), kind, flags, stream }.write(&mut out);
    out.extend_from_slice(payload);
    out
}

/// `:method: POST`, `:authority` with incremental indexing, `:path: /`.
fn block(authority: &[u8]) -> Vec<u8> {
    let mut out = vec![0x83, 0x41, authority.len() as u8];
    out.extend_from_slice(authority);
    out.push(0x84);
    out
}

/// What a reader gets if both sides use pieces of these sizes.
async fn through(bytes: &[u8], written: usize, read: usize) -> Vec<u8> {
    let (mut client, server) = tokio::io::duplex(written);
    let mut server = WithAuthority::new(server);
    let send = async move {
        for piece in bytes.chunks(written) {
            client.write_all(piece).await.unwrap();
        }
    };
    let receive = async {
        let (mut all, mut buffer) = (Vec::new(), vec![0; read]);
        loop {
            match server.read(&mut buffer).await.unwrap() {
                0 => return all,
                n => all.extend_from_slice(&buffer[..n]),
            }
        }
    };
    tokio::join!(send, receive).1
}

async fn assert_becomes(frames: &[u8], expected: &[u8]) {
    let (bytes, expected) = ([PREFACE_BYTES, frames].concat(), [PREFACE_BYTES, expected].concat());
    for (written, read) in [(1, 1), (1, 4096), (7, 5), (9, 4096), (100_000, 1), (100_000, 100_000)] {
        let got = through(&bytes, written, read).await;
        assert_eq!(got.len(), expected.len(), "written by {written}, read by {read}");
        assert!(got == expected, "written by {written}, read by {read}");
    }
}

#[tokio::test]
async fn the_recorded_bytes_of_kube_apiserver_get_a_valid_authority() {
    for name in ["grpc-uds-1.client.bin", "grpc-uds-2.client.bin"] {
        let bytes = capture(name);
        let rewritten = through(&bytes, 1000, 1000).await;
        let at = PREFACE + 9 + 9;
        let Inspected::Block { len, replaced: Some(frames) } = inspect(&bytes[at..]) else {
            panic!("{name}")
        };
        assert_eq!(rewritten, [&bytes[..at], &frames, &bytes[at + len..]].concat());
        let decode = |frame: &[u8]| loona_hpack::Decoder::new().decode(&frame[9..]).unwrap();
        let (before, after) = (decode(&bytes[at..at + len]), decode(&frames));
        let mut changed = before.iter().zip(&after).filter(|(before, after)| before != after);
        let ((name, was), (_, is)) = changed.next().unwrap();
        assert_eq!((name.as_slice(), changed.next()), (b":authority".as_slice(), None));
        assert!(Authority::try_from(was.as_slice()).is_err());
        assert!(Authority::try_from(is.as_slice()).is_ok());
        assert_eq!(was.len(), is.len());
    }
}

#[tokio::test]
async fn padding_priority_and_continuations_are_understood() {
    let (bad, good) = (block(BAD), block(GOOD));
    let priority = [0, 0, 0, 0, 16];
    let data = frame(0, 0, 1, &[7; 5000]);
    let whole = frame(HEADERS, END_HEADERS, 1, &good);
    let padded = [&[3], bad.as_slice(), &[0; 3]].concat();
    let with_priority = [&priority, bad.as_slice()].concat();
    let with_both = [&[2], priority.as_slice(), &bad, &[0; 2]].concat();
    let good_with_priority =
        frame(HEADERS, END_HEADERS | PRIORITY, 1, &[&priority, good.as_slice()].concat());
    let split = |at: usize| {
        let (a, b) = bad.split_at(at);
        [frame(HEADERS, 0, 1, a), frame(CONTINUATION, 0, 1, &[]), frame(CONTINUATION, END_HEADERS, 1, b)]
            .concat()
    };
    for (from, to) in [
        (frame(HEADERS, END_HEADERS, 1, &bad), &whole),
        (frame(HEADERS, END_HEADERS | PADDED, 1, &padded), &whole),
        (frame(HEADERS, END_HEADERS | PRIORITY, 1, &with_priority), &good_with_priority),
        (frame(HEADERS, END_HEADERS | PRIORITY | PADDED, 1, &with_both), &good_with_priority),
        (split(0), &whole),
        (split(10), &whole),
        (split(bad.len()), &whole),
    ] {
        let from = [from, data.clone(), frame(HEADERS, END_HEADERS | END_STREAM, 3, &bad)].concat();
        let to = [to.clone(), data.clone(), frame(HEADERS, END_HEADERS | END_STREAM, 3, &good)].concat();
        assert_becomes(&from, &to).await;
    }
}

#[tokio::test]
async fn what_is_valid_or_not_understood_passes_unchanged() {
    let bad = block(BAD);
    let far = [vec![0x00, 0x7f, 0xff, 0xff, 0x03], bad.clone()].concat();
    for from in [
        frame(HEADERS, END_HEADERS, 1, &block(b"localhost:8132")),
        frame(HEADERS, END_HEADERS | PADDED, 1, &[&[3], block(b"[::1]:1").as_slice(), &[0; 3]].concat()),
        frame(HEADERS, END_HEADERS, 1, &[0x82, 0x84, 0x86]),
        frame(HEADERS, END_HEADERS, 1, &block(b"")),
        // Malformed HPACK, padding beyond the frame, no room for the priority.
        frame(HEADERS, END_HEADERS, 1, &far),
        frame(HEADERS, END_HEADERS, 1, &[0x41, 0x90, 0x00]),
        frame(HEADERS, END_HEADERS | PADDED, 1, &[200, 0x84]),
        frame(HEADERS, END_HEADERS | PADDED, 1, &[]),
        frame(HEADERS, END_HEADERS | PRIORITY, 1, &[0; 4]),
        // A block that another frame interrupts, one of two streams, and blocks that never end.
        [frame(HEADERS, 0, 1, &bad), frame(0, 0, 1, b"x"), frame(CONTINUATION, END_HEADERS, 1, &[])].concat(),
        [frame(HEADERS, 0, 1, &bad), frame(CONTINUATION, END_HEADERS, 3, &[])].concat(),
        [frame(HEADERS, 0, 1, &bad), frame(CONTINUATION, 0, 1, &[0; 10_000]).repeat(20)].concat(),
        [frame(HEADERS, 0, 1, &bad), frame(CONTINUATION, 0, 1, &[]).repeat(1000)].concat(),
        frame(CONTINUATION, END_HEADERS, 1, &bad),
        // A frame that is larger than the server allows, and truncated frames.
        frame(HEADERS, END_HEADERS, 1, &[bad.as_slice(), &[0x84; 20_000]].concat()),
        frame(HEADERS, END_HEADERS, 1, &bad)[..20].to_vec(),
        frame(HEADERS, END_HEADERS, 1, &bad)[..4].to_vec(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        Vec::new(),
    ] {
        assert_becomes(&from, &from).await;
    }
}

#[test]
fn a_block_that_grows_is_divided_into_frames() {
    // A thousand times `%` in Huffman code (6 bits, 010101) takes 750 bytes.
    let coded: Vec<u8> = [0b0101_0101, 0b0101_0101, 0b0101_0101].repeat(250);
    let mut long = vec![0x41, 0xff, ((750 - 127) as u8 % 128) | 128, ((750 - 127) / 128) as u8];
    long.extend_from_slice(&coded);
    long.resize(MAX_FRAME as usize, 0x84);
    let Inspected::Block { len, replaced: Some(frames) } = inspect(&frame(HEADERS, END_HEADERS, 5, &long))
    else {
        panic!("not replaced")
    };
    assert_eq!(len, FRAME_HEADER + long.len());
    let first = Header::parse(&frames).unwrap();
    let second = Header::parse(&frames[first.frame_len()..]).unwrap();
    assert_eq!((first.len, first.kind, first.flags), (MAX_FRAME as usize, HEADERS, 0));
    assert_eq!((second.kind, second.flags, second.stream), (CONTINUATION, END_HEADERS, 5));
    assert_eq!(frames.len(), first.frame_len() + second.frame_len());
    let block = [&frames[9..first.frame_len()], &frames[first.frame_len() + 9..]].concat();
    let fields = loona_hpack::Decoder::new().decode(&block).unwrap();
    assert_eq!(fields[0].1.len(), 1000);
    assert!(Authority::try_from(fields[0].1.as_slice()).is_ok());
}

/// No input causes a panic, everything is read, and the result does not depend on the size of the pieces.
#[tokio::test]
async fn malformed_input_passes() {
    let mut random = StdRng::seed_from_u64(2026);
    let recorded = capture("grpc-uds-1.client.bin");
    for _ in 0..3000 {
        let mut bytes = recorded.clone();
        for _ in 0..random.random_range(1..8) {
            let at = random.random_range(PREFACE..bytes.len());
            bytes[at] = random.random();
        }
        if random.random_bool(0.3) {
            bytes.truncate(random.random_range(0..bytes.len()));
        }
        if random.random_bool(0.3) {
            let mut tail = vec![0; random.random_range(0..3000)];
            random.fill_bytes(&mut tail);
            bytes.extend_from_slice(&tail);
        }
        let (written, read) = (random.random_range(1..2000), random.random_range(1..2000));
        let got = through(&bytes, written, read).await;
        let same = through(&bytes, 100_000, 100_000).await;
        assert!(got == same, "depends on the pieces");
        let grown = got.len() as i64 - bytes.len() as i64;
        assert!((-600..600).contains(&grown), "{grown}");
    }
    for _ in 0..20_000 {
        let mut block = vec![0; random.random_range(0..200)];
        random.fill_bytes(&mut block);
        let _ = hpack::replace_authority(&block);
        block[..].iter_mut().step_by(3).for_each(|b| *b &= 0x4f);
        let _ = inspect(&frame(HEADERS, random.random(), 1, &block));
    }
}
