//! The work that is measured: one download, GETs, and so on, over streams that lead to the target.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use tests::client::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use super::{paths::Entry, report::median};

/// One download; MB/s from the request to the last byte.
pub async fn download(mut stream: Stream, bytes: u64) -> anyhow::Result<f64> {
    let began = Instant::now();
    stream.write_all(format!("source {bytes}\n").as_bytes()).await?;
    let mut buffer = vec![0; 1 << 20];
    let mut got = 0;
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        got += n as u64;
    }
    if got != bytes {
        bail!("{got} of {bytes} bytes arrived");
    }
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

/// A download on a stream that stays open; MB/s. Its target has been asked to `repeat`.
pub async fn download_piece(stream: &mut Stream, bytes: u64) -> anyhow::Result<f64> {
    let began = Instant::now();
    stream.write_all(format!("{bytes}\n").as_bytes()).await?;
    let mut buffer = vec![0; 1 << 20];
    let mut got = 0;
    while got < bytes {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            bail!("{got} of {bytes} bytes arrived");
        }
        got += n as u64;
    }
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

/// One upload; MB/s from the first byte to the answer that counts them.
pub async fn upload(mut stream: Stream, bytes: u64) -> anyhow::Result<f64> {
    let buffer = vec![0; 256 * 1024];
    let began = Instant::now();
    stream.write_all(b"drain\n").await?;
    for _ in 0..bytes / buffer.len() as u64 {
        stream.write_all(&buffer).await?;
    }
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    if answer.trim() != bytes.to_string() {
        bail!("{answer:?} of {bytes} bytes arrived");
    }
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

/// `transfer` on several streams at once, which share `bytes`; MB/s of all together until the last one has ended.
pub async fn at_once<F: Future<Output = anyhow::Result<f64>>>(
    count: u64,
    connect: impl AsyncFn() -> anyhow::Result<Stream>,
    bytes: u64,
    transfer: impl Fn(Stream, u64) -> F,
) -> anyhow::Result<f64> {
    let mut streams = Vec::new();
    for _ in 0..count {
        streams.push(connect().await?);
    }
    let began = Instant::now();
    let transfers = streams.into_iter().map(|stream| transfer(stream, bytes / count));
    try_all(transfers.map(|transfer| async { transfer.await.map(drop) })).await?;
    Ok((bytes / count * count) as f64 / 1e6 / began.elapsed().as_secs_f64())
}

pub async fn get(stream: &mut Stream) -> anyhow::Result<()> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await?;
    let mut answer = [0; 40];
    stream.read_exact(&mut answer).await?;
    Ok(())
}

/// Microseconds from the caller's connection to the answer, each on a connection of its own.
pub async fn new_connections(
    connect: impl AsyncFn() -> anyhow::Result<Stream>,
    count: usize,
) -> anyhow::Result<Vec<f64>> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        let mut stream = connect().await?;
        get(&mut stream).await?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

/// New connections with a GET on each, 32 at once; how many a second.
pub async fn new_connection_rate(
    connect: impl AsyncFn() -> anyhow::Result<Stream>,
    count: usize,
) -> anyhow::Result<f64> {
    let began = Instant::now();
    let workers = (0..32).map(|_| async {
        for _ in 0..count / 32 {
            let mut stream = connect().await?;
            get(&mut stream).await?;
        }
        anyhow::Ok(())
    });
    try_all(workers).await?;
    Ok((count / 32 * 32) as f64 / began.elapsed().as_secs_f64())
}

/// Microseconds of each GET on one kept connection, as many as fit into `time`.
pub async fn kept_gets(mut stream: Stream, time: Duration) -> anyhow::Result<Vec<f64>> {
    let (mut times, all) = (Vec::new(), Instant::now());
    while all.elapsed() < time {
        let began = Instant::now();
        get(&mut stream).await?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

/// The median of [`kept_gets`].
pub async fn kept_get_p50(stream: Stream, time: Duration) -> anyhow::Result<f64> {
    median(kept_gets(stream, time).await?).context("no GET was answered")
}

/// GETs a second on 32 kept connections.
pub async fn kept_get_rate(
    connect: impl AsyncFn() -> anyhow::Result<Stream>,
    time: Duration,
) -> anyhow::Result<f64> {
    let began = Instant::now();
    let done = Cell::new(0u64);
    let workers = (0..32).map(|_| async {
        let mut stream = connect().await?;
        while began.elapsed() < time {
            get(&mut stream).await?;
            done.set(done.get() + 1);
        }
        anyhow::Ok(())
    });
    try_all(workers).await?;
    Ok(done.get() as f64 / began.elapsed().as_secs_f64())
}

/// Runs all at once on this thread.
pub async fn try_all(
    futures: impl Iterator<Item = impl Future<Output = anyhow::Result<()>>>,
) -> anyhow::Result<()> {
    let mut pending: Vec<_> = futures.map(Box::pin).collect();
    std::future::poll_fn(|cx| {
        let mut error = None;
        pending.retain_mut(|future| match future.as_mut().poll(cx) {
            std::task::Poll::Pending => true,
            std::task::Poll::Ready(result) => {
                error = error.take().or(result.err());
                false
            }
        });
        match error {
            Some(e) => std::task::Poll::Ready(Err(e)),
            None if pending.is_empty() => std::task::Poll::Ready(Ok(())),
            None => std::task::Poll::Pending,
        }
    })
    .await
}

/// Endless downloads on a thread of their own, so that they do not share the thread that measures beside them.
pub struct Downloads {
    bytes: Arc<AtomicU64>,
    stop: CancellationToken,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Downloads {
    /// Begins as many as there are entries.
    pub fn start(entries: Vec<Entry>) -> Self {
        let (bytes, stop) = (Arc::<AtomicU64>::default(), CancellationToken::new());
        let (count, stopped) = (bytes.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let all = try_all(entries.iter().map(|entry| endless(entry, &count)));
            runtime.block_on(stopped.run_until_cancelled(all)).unwrap_or(Ok(()))
        });
        Self { bytes, stop, thread }
    }

    /// Waits for `first` bytes, then runs `beside`; gives its outcome, and the MB/s meanwhile.
    pub async fn during<T>(&self, first: u64, beside: impl Future<Output = T>) -> anyhow::Result<(T, f64)> {
        while self.bytes.load(Ordering::Relaxed) < first {
            if self.thread.is_finished() {
                bail!("the download has ended");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let (began, before) = (Instant::now(), self.bytes.load(Ordering::Relaxed));
        let outcome = beside.await;
        let bytes = self.bytes.load(Ordering::Relaxed) - before;
        Ok((outcome, bytes as f64 / 1e6 / began.elapsed().as_secs_f64()))
    }

    /// Ends them; an error if one has ended before.
    pub fn stop(self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.thread.join().map_err(|_| anyhow::anyhow!("the downloading thread panicked"))?
    }
}

async fn endless(entry: &Entry, bytes: &AtomicU64) -> anyhow::Result<()> {
    let mut stream = entry.connect().await?;
    stream.write_all(b"firehose\n").await?;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match stream.read(&mut buffer).await? {
            0 => bail!("a download that never ends has ended"),
            n => bytes.fetch_add(n as u64, Ordering::Relaxed),
        };
    }
}
