//! Provides the kept corpora of malformed input, and mutations of well-formed bytes that are the same in every run.

use std::path::PathBuf;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    task::JoinSet,
};

/// Each run does the same.
const SEED: u64 = 20_240_601;
/// Connections at a time.
const AT_ONCE: usize = 16;

/// The files of a kept corpus, by name.
pub fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data/corpora").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&directory)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    assert!(files.len() > 50, "{} holds only {} files", directory.display(), files.len());
    files
}

/// Does `one` for each number below `total`, [`AT_ONCE`] at a time.
pub async fn in_turns<F: Future<Output = ()> + Send + 'static>(total: usize, one: impl Fn(usize) -> F) {
    let mut running = JoinSet::new();
    for i in 0..total {
        if running.len() >= AT_ONCE {
            running.join_next().await.unwrap().unwrap();
        }
        running.spawn(one(i));
    }
    while let Some(result) = running.join_next().await {
        result.unwrap();
    }
}

pub fn rng(number: usize) -> StdRng {
    StdRng::seed_from_u64(SEED + number as u64)
}

/// Changes bytes: a few single ones, a piece taken out, doubled or moved, a cut, or something nasty put in.
pub fn mutate(rng: &mut StdRng, bytes: &[u8], nasty: &[&[u8]]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.random_range(1..6) {
        let length = bytes.len();
        let (a, b) = (rng.random_range(0..=length), rng.random_range(0..=length));
        let (from, to) = (a.min(b), a.max(b).min(a.min(b) + 64));
        match rng.random_range(0..8) {
            0 | 1 if length > 0 => bytes[rng.random_range(0..length)] = rng.random(),
            2 if length > 0 => bytes[rng.random_range(0..length)] ^= 1 << rng.random_range(0..8),
            3 => drop(bytes.drain(from..to)),
            4 => {
                let piece = bytes[from..to].to_vec();
                bytes.splice(a..a, piece);
            }
            5 => bytes.truncate(a),
            _ => {
                let piece = nasty[rng.random_range(0..nasty.len())];
                let end = if rng.random() { from } else { to };
                bytes.splice(from..end, piece.iter().copied());
            }
        }
    }
    bytes
}

/// Sends bytes in pieces, ends the sending half, and gives what comes until the other side closes.
pub async fn throw(
    mut socket: impl AsyncRead + AsyncWrite + Unpin,
    bytes: &[u8],
    rng: &mut StdRng,
) -> Vec<u8> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let most = if rng.random_ratio(1, 4) { 40 } else { rest.len() };
        let n = rng.random_range(1..=most.min(rest.len()));
        // The other side may well have closed already.
        if socket.write_all(&rest[..n]).await.is_err() || socket.flush().await.is_err() {
            break;
        }
        if n < rest.len() {
            tokio::task::yield_now().await;
        }
        rest = &rest[n..];
    }
    let _ = socket.shutdown().await;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(n) = socket.read(&mut buffer).await {
        if n == 0 {
            break;
        }
        answer.extend_from_slice(&buffer[..n]);
    }
    answer
}

pub fn status(answer: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(answer.strip_prefix(b"HTTP/1.1 ")?.get(..3)?).ok()?;
    text.parse().ok()
}

pub fn status_lines(answer: &[u8]) -> usize {
    answer.split(|b| *b == b'\n').filter(|line| line.starts_with(b"HTTP/1.1 ")).count()
}

pub fn show(bytes: &[u8]) -> String {
    format!("{} bytes, {}", bytes.len(), bytes[..bytes.len().min(600)].escape_ascii())
}
