//! Streams that stall: targets that send without end or read nothing, and callers that stop reading.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpSocket, TcpStream},
    sync::watch,
};

use crate::{
    client::{Door, Stream},
    pattern::{Checker, fill},
    process::{eventually, free_port},
};

/// Bytes of one write: as many as fit, or one at a time.
pub const FIREHOSE: usize = 256 * 1024;
pub const TINY: usize = 1;

/// A target that shows how far its streams have come. After the first line,
/// `feed N` sends the pattern for ever, N bytes at a time;
/// `stuck` reads nothing until it is released, then checks the pattern to its end and answers with its length.
pub struct Staller {
    pub port: u16,
    pub moved: Arc<AtomicU64>,
    open: Arc<AtomicU64>,
    /// Lets the targets that are stuck read on.
    pub release: watch::Sender<bool>,
}

impl Staller {
    pub fn start() -> Self {
        let port = free_port();
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        // Small, so that soon it is the agents who would have to hold what nobody takes.
        socket.set_recv_buffer_size(64 * 1024).unwrap();
        socket.set_send_buffer_size(64 * 1024).unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
        let listener = socket.listen(1024).unwrap();
        let (release, _) = watch::channel(false);
        let staller = Self { port, moved: Arc::default(), open: Arc::default(), release };
        let (moved, open, release) =
            (staller.moved.clone(), staller.open.clone(), staller.release.subscribe());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (moved, open, release) = (moved.clone(), open.clone(), release.clone());
                tokio::spawn(async move {
                    open.fetch_add(1, Ordering::Relaxed);
                    // The caller's end shows in what it gets, not here.
                    let _ = stall(socket, &moved, release).await;
                    open.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
        staller
    }

    /// Waits until next to nothing moves: a kernel's full buffers still take a trickle of tiny packets. Going on
    /// too early makes a test weaker, not wrong.
    pub async fn settled(&self) {
        let (mut mark, mut looks) = (0, 0);
        let began = Instant::now();
        eventually("stalled streams come to a rest", Duration::from_secs(240), async || {
            let now = self.moved.load(Ordering::Relaxed);
            looks += 1;
            if now - mark > 64 * 1024 {
                (mark, looks) = (now, 0);
            }
            (now > 0 && looks >= 100).then_some(())
        })
        .await;
        println!("  at rest after {:.1} MB and {:.1?}", mark as f64 / 1e6, began.elapsed());
    }

    /// Streams that have not ended.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }
}

async fn stall(
    socket: TcpStream,
    moved: &AtomicU64,
    mut release: watch::Receiver<bool>,
) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut socket = BufReader::with_capacity(64, socket);
    let mut line = String::new();
    socket.read_line(&mut line).await?;
    if let Some(size) = line.trim().strip_prefix("feed ") {
        return feed(socket.get_mut(), size.parse().unwrap(), moved, || false).await.map(drop);
    }
    assert_eq!(line.trim(), "stuck");
    let _ = release.wait_for(|released| *released).await;
    let mut checker = Checker::default();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = socket.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        checker.check(&buffer[..n]);
    }
    socket.write_all(format!("{}\n", checker.offset()).as_bytes()).await
}

/// Writes the pattern, `size` bytes at a time, until told to stop; gives the number of bytes.
pub async fn feed(
    socket: &mut (impl AsyncWriteExt + Unpin),
    size: usize,
    moved: &AtomicU64,
    stop: impl Fn() -> bool,
) -> std::io::Result<u64> {
    let mut buffer = vec![0; FIREHOSE];
    let mut offset = 0;
    loop {
        fill(&mut buffer, offset);
        for piece in buffer.chunks(size) {
            if stop() {
                return Ok(offset);
            }
            socket.write_all(piece).await?;
            socket.flush().await?;
            offset += piece.len() as u64;
            moved.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
    }
}

/// A caller that reads the pattern when it is told to.
pub struct Caller {
    stream: Stream,
    pub checker: Checker,
}

impl Caller {
    /// Starts to read and then stops.
    pub async fn stalled(door: &Door, target: &str, line: &str) -> Self {
        let mut stream = door.stream(target).await.unwrap();
        stream.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        let mut caller = Self { stream, checker: Checker::default() };
        assert!(caller.read_on(1000).await, "{line}: the stream ended at once");
        caller
    }

    /// Reads `bytes` more; `false` if the stream ends before.
    pub async fn read_on(&mut self, bytes: u64) -> bool {
        let until = self.checker.offset() + bytes;
        let mut buffer = vec![0; 64 * 1024];
        while self.checker.offset() < until {
            let room = buffer.len().min((until - self.checker.offset()) as usize);
            match self.stream.read(&mut buffer[..room]).await {
                Ok(0) | Err(_) => return false,
                Ok(n) => self.checker.check(&buffer[..n]),
            }
        }
        true
    }
}
