//! A TCP relay that delays, limits, stops or cuts what passes through it. It stands for networks that the kernel here
//! does not emulate.

use std::{collections::VecDeque, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    time::Instant,
};

/// Bytes that may be on the way in each direction.
const IN_FLIGHT: usize = 256 * 1024 * 1024;
/// What a relay holds that [`Relay::shape`] has slowed down, in seconds at its rate.
const QUEUE: f64 = 0.25;

#[derive(Clone, Copy, Debug, PartialEq)]
struct State {
    /// Nothing passes and nothing is answered, but no socket is closed.
    black_hole: bool,
    /// A connection that began at a smaller number is closed.
    cuts: u64,
    /// What each direction takes.
    delay: Duration,
    /// Bytes a second that each direction carries at most.
    rate: Option<f64>,
    /// Bytes that may be on the way in each direction.
    room: usize,
}

/// A running relay. Dropping it leaves existing connections to the runtime.
#[derive(Clone, Debug)]
pub struct Relay {
    pub address: SocketAddr,
    state: Arc<watch::Sender<State>>,
}

impl Relay {
    /// Relays from `listen` to `to`. Until [`Self::shape`] changes that, each direction takes `delay`, and carries at most
    /// `rate` bytes a second.
    pub async fn start(
        listen: SocketAddr,
        to: SocketAddr,
        delay: Duration,
        rate: Option<f64>,
    ) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let first = State { black_hole: false, cuts: 0, delay, rate, room: IN_FLIGHT };
        let (state, watched) = watch::channel(first);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let state = watched.clone();
                tokio::spawn(async move {
                    // A relay in a black hole answers no SYN either; loopback can only keep it waiting.
                    let mut waiting = state.clone();
                    let _ = waiting.wait_for(|s| !s.black_hole).await;
                    if let Ok(far) = TcpStream::connect(to).await {
                        connection(near, far, state).await;
                    }
                });
            }
        });
        Ok(Self { address, state: Arc::new(state) })
    }

    /// Stops everything without closing anything, as a firewall that drops would.
    pub fn black_hole(&self) {
        self.state.send_modify(|s| s.black_hole = true);
    }

    pub fn restore(&self) {
        self.state.send_modify(|s| s.black_hole = false);
    }

    /// Closes every connection; new ones pass.
    pub fn cut(&self) {
        self.state.send_modify(|s| *s = State { black_hole: false, cuts: s.cuts + 1, ..*s });
    }

    /// Changes the delay and the rate for bytes that come from now on. With a rate, the relay holds no more than it carries
    /// in a moment, so that it is fast again soon after the rate is lifted.
    pub fn shape(&self, delay: Duration, rate: Option<f64>) {
        let room = rate.map_or(IN_FLIGHT, |rate| (rate * (delay.as_secs_f64() + QUEUE)) as usize);
        self.state.send_modify(|s| *s = State { delay, rate, room, ..*s });
    }
}

async fn connection(near: TcpStream, far: TcpStream, mut state: watch::Receiver<State>) {
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let up = direction(near_read, far_write, state.clone());
    let down = direction(far_read, near_write, state.clone());
    let began = state.borrow_and_update().cuts;
    let cut = async {
        if state.wait_for(|s| s.cuts != began).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        _ = async { tokio::join!(up, down) } => {}
        () = cut => {}
    }
}

async fn direction(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut state: watch::Receiver<State>) {
    let mut queue: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut queued = 0;
    let mut ended = None;
    let mut line_free = Instant::now();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let Ok(State { delay, rate, room, .. }) = state.wait_for(|s| !s.black_hole).await.map(|s| *s) else {
            return;
        };
        let next = queue.front().map(|(due, _)| *due).or(ended);
        tokio::select! {
            read = from.read(&mut buffer), if ended.is_none() && queued < room => {
                let now = Instant::now();
                match read {
                    Ok(n) if n > 0 => {
                        line_free = line_free.max(now);
                        if let Some(rate) = rate {
                            line_free += Duration::from_secs_f64(n as f64 / rate);
                        }
                        queue.push_back((line_free + delay, buffer[..n].to_vec()));
                        queued += n;
                    }
                    _ => ended = Some(line_free.max(now) + delay),
                }
            }
            () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                match queue.pop_front() {
                    Some((_, bytes)) => {
                        queued -= bytes.len();
                        if to.write_all(&bytes).await.is_err() {
                            return;
                        }
                    }
                    None => {
                        let _ = to.shutdown().await;
                        return;
                    }
                }
            }
            _ = state.changed() => {}
        }
    }
}
