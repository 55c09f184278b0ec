//! A target whose connections are never established.

use std::{net::SocketAddr, time::Duration};

use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::process::free_port;

/// A listener that answers no further SYN, since its queue is full.
pub struct NeverAnswers {
    pub port: u16,
    pub listener: TcpListener,
    /// The connections that fill the queue.
    pub waiting: Vec<TcpStream>,
}

impl NeverAnswers {
    pub async fn start() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        socket.bind(address).unwrap();
        let listener = socket.listen(1).unwrap();
        let mut waiting = Vec::new();
        // A busy machine may be late once, but hardly three times in a row.
        let mut unanswered = 0;
        while unanswered < 3 {
            match tokio::time::timeout(Duration::from_millis(500), TcpStream::connect(address)).await {
                Ok(connected) => {
                    waiting.push(connected.unwrap());
                    unanswered = 0;
                }
                Err(_) => unanswered += 1,
            }
        }
        Self { port: address.port(), listener, waiting }
    }

    /// How many dials of the port are under way: SYNs that have had no answer.
    pub fn dials(&self) -> usize {
        let (suffix, syn_sent) = (format!(":{:04X}", self.port), "02");
        let tables =
            ["/proc/net/tcp", "/proc/net/tcp6"].map(|file| std::fs::read_to_string(file).unwrap_or_default());
        let lines = tables.iter().flat_map(|table| table.lines().skip(1));
        let under_way = lines.filter(|line| {
            let mut fields = line.split_whitespace().skip(2);
            fields.next().is_some_and(|remote| remote.ends_with(&suffix)) && fields.next() == Some(syn_sent)
        });
        under_way.count()
    }
}
