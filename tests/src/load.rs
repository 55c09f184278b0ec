//! Generates traffic that checks itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    task::JoinSet,
};

use crate::{
    client::{Door, Stream},
    pattern::{Checker, fill},
};

/// Far more than anything takes on a busy machine: what has not ended by then hangs.
const HANGS: Duration = Duration::from_secs(240);
pub const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: target\r\n\r\n";
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// Waits for something that must complete.
pub async fn completes<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(HANGS, future).await {
        Ok(value) => value,
        Err(_) => panic!("hangs: {what}"),
    }
}

/// Fetches the first `bytes` of the pattern.
pub async fn download(door: &Door, target: &str, bytes: u64) {
    let mut stream = door.stream(target).await.unwrap();
    stream.write_all(format!("source {bytes}\n").as_bytes()).await.unwrap();
    let mut checker = Checker::default();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let n = stream.read(&mut buffer).await.unwrap();
        if n == 0 {
            break;
        }
        checker.check(&buffer[..n]);
    }
    assert_eq!(checker.offset(), bytes);
}

/// Sends the first `bytes` of the pattern, closes the sending half, then reads the answer.
pub async fn upload(door: &Door, target: &str, bytes: u64) {
    let mut stream = door.stream(target).await.unwrap();
    stream.write_all(b"sink\n").await.unwrap();
    let mut buffer = vec![0; 256 * 1024];
    let mut offset = 0;
    while offset < bytes {
        let n = (bytes - offset).min(buffer.len() as u64) as usize;
        fill(&mut buffer[..n], offset);
        stream.write_all(&buffer[..n]).await.unwrap();
        offset += n as u64;
    }
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).await.unwrap();
    assert_eq!(answer.trim(), bytes.to_string());
}

/// One request and its response on a stream that stays open.
pub async fn get(stream: &mut Stream) -> std::io::Result<()> {
    stream.write_all(REQUEST).await?;
    let mut response = [0; RESPONSE.len()];
    stream.read_exact(&mut response).await?;
    assert_eq!(response, RESPONSE);
    Ok(())
}

/// `total` requests on `connections` kept connections, which enter by the doors in turn.
pub async fn gets(doors: &[Door], target: &str, connections: usize, total: usize) {
    let left = Arc::new(AtomicUsize::new(total));
    let mut callers = JoinSet::new();
    for i in 0..connections {
        let (door, target, left) = (doors[i % doors.len()].clone(), target.to_owned(), left.clone());
        callers.spawn(async move {
            let mut stream = door.stream(&target).await.unwrap();
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
                get(&mut stream).await.unwrap();
            }
        });
    }
    callers.join_all().await;
}
