//! A DNS server of a few names, whose answers may differ from one query to the next.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context;
use tokio::net::UdpSocket;

const A: u16 = 1;
const AAAA: u16 = 28;
const NAME_ERROR: u8 = 3;

/// A server that runs until the runtime ends.
pub struct Server {
    pub address: SocketAddr,
    asked: Asked,
}

/// Queries so far by name and record type.
type Asked = Arc<Mutex<HashMap<(String, u16), usize>>>;

/// For each name its answers, taken in turn, round and round. Of an answer, a query gets the addresses of the
/// type that it asks for, with a time to live of 0.
pub type Zone = HashMap<String, Vec<Vec<IpAddr>>>;

impl Server {
    /// Serves on port 53, where resolvers look, of a loopback address that nobody else has.
    pub async fn start(zone: Zone) -> anyhow::Result<Self> {
        let mut socket = UdpSocket::bind((random_loopback(), 53)).await;
        for _ in 0..10 {
            if socket.is_err() {
                socket = UdpSocket::bind((random_loopback(), 53)).await;
            }
        }
        let socket = socket.context("can't listen on port 53")?;
        let asked = Asked::default();
        let server = Self { address: socket.local_addr()?, asked: asked.clone() };
        tokio::spawn(async move {
            let mut query = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut query).await {
                if let Some(answer) = answer(&query[..length], &zone, &asked) {
                    let _ = socket.send_to(&answer, from).await;
                }
            }
        });
        Ok(server)
    }

    /// How many queries for a name's IPv4 addresses have come.
    pub fn asked(&self, name: &str) -> usize {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.get(&(name.to_owned(), A)).copied().unwrap_or(0)
    }
}

fn random_loopback() -> IpAddr {
    IpAddr::from([127, rand::random_range(16..255), rand::random_range(0..255), rand::random_range(1..255)])
}

/// `None` for what is no query.
fn answer(query: &[u8], zone: &Zone, asked: &Asked) -> Option<Vec<u8>> {
    let (name, end) = question_name(query)?;
    let kind = u16::from_be_bytes([*query.get(end)?, *query.get(end + 1)?]);
    let question = query.get(12..end + 4)?;
    let number = {
        let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
        let count = asked.entry((name.clone(), kind)).or_default();
        *count += 1;
        *count - 1
    };
    let answers = zone.get(&name);
    let addresses = answers.map(|all| all[number % all.len()].as_slice()).unwrap_or_default();
    let data: Vec<Vec<u8>> = addresses
        .iter()
        .filter_map(|address| match (address, kind) {
            (IpAddr::V4(v4), A) => Some(v4.octets().to_vec()),
            (IpAddr::V6(v6), AAAA) => Some(v6.octets().to_vec()),
            _ => None,
        })
        .collect();
    // Response, authoritative, with recursion as desired and available (RFC 1035 §4.1.1).
    let code = if answers.is_some() { 0 } else { NAME_ERROR };
    let mut out = vec![query[0], query[1], 0x84 | query[2] & 1, 0x80 | code, 0, 1];
    out.extend((data.len() as u16).to_be_bytes());
    out.extend([0; 4]);
    out.extend(question);
    for data in data {
        // The name is a pointer to the one in the question.
        out.extend([0xc0, 12]);
        out.extend(kind.to_be_bytes());
        out.extend([0, 1, 0, 0, 0, 0]);
        out.extend((data.len() as u16).to_be_bytes());
        out.extend(data);
    }
    Some(out)
}

/// The name of the only question, and where it ends.
fn question_name(query: &[u8]) -> Option<(String, usize)> {
    if query.get(4..6)? != [0, 1] {
        return None;
    }
    let (mut labels, mut at) = (Vec::new(), 12);
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            return Some((labels.join("."), at));
        }
        let label = query.get(at..at + length)?;
        labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
        at += length;
    }
}
