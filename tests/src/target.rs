//! What the streams lead to: a server of one simple line protocol, in this process or one of its own.
//!
//! The first line says what to do:
//!
//! | line | the server |
//! | --- | --- |
//! | `source N` | sends N bytes of the pattern, and closes |
//! | `repeat` | reads a number N a line, and sends N bytes of the pattern for each |
//! | `sink` | reads the pattern to the end, then answers with the number of bytes and closes |
//! | `drain` | the same without looking at the bytes |
//! | `echo` | sends back what comes, and closes after the caller has |
//! | `tiny` | sends one byte at a time for ever |
//! | `firehose` | sends as fast as it can for ever |
//! | `hold` | does nothing until the caller closes |
//! | `GET ...` | is an HTTP/1.1 server with a 2-byte body, kept alive |

use std::net::SocketAddr;

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

use crate::{
    pattern::{Checker, fill},
    process::free_port,
};

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// Serves on `address` until the runtime ends; gives the address that it got.
pub async fn serve(address: SocketAddr) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    tokio::spawn(accept(listener));
    Ok(bound)
}

/// Serves on all addresses of this host, IPv6 included; gives the port.
pub async fn start() -> u16 {
    let port = free_port();
    serve(SocketAddr::from(([0u16; 8], port))).await.expect("a free port");
    port
}

pub async fn accept(listener: TcpListener) {
    while let Ok((socket, _)) = listener.accept().await {
        tokio::spawn(async move {
            // A caller that leaves early is not the server's failure.
            let _ = connection(socket).await;
        });
    }
}

async fn connection(socket: TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut socket = BufReader::with_capacity(1024, socket);
    let mut line = String::new();
    socket.read_line(&mut line).await?;
    match line.trim().split_once(' ').unwrap_or((line.trim(), "")) {
        ("source", n) => source(socket.get_mut(), n.parse().unwrap_or(0)).await,
        ("repeat", _) => repeat(socket).await,
        ("sink", _) => sink(socket, true).await,
        ("drain", _) => sink(socket, false).await,
        ("echo", _) => echo(socket).await,
        ("tiny", _) => {
            // With much more room it would take minutes to fill, byte by byte, and with less it would wait for each
            // delayed acknowledgement.
            socket2::SockRef::from(socket.get_ref()).set_send_buffer_size(256 * 1024)?;
            loop {
                socket.get_mut().write_all(b"x").await?;
            }
        }
        ("firehose", _) => source(socket.get_mut(), u64::MAX).await,
        ("hold", _) => socket.read_u8().await.map(drop),
        ("GET", _) => http(socket).await,
        _ => Ok(()),
    }
}

async fn repeat(mut socket: BufReader<TcpStream>) -> std::io::Result<()> {
    let mut line = String::new();
    while socket.read_line(&mut line).await? > 0 {
        send(socket.get_mut(), line.trim().parse().unwrap_or(0)).await?;
        line.clear();
    }
    Ok(())
}

async fn source(socket: &mut TcpStream, bytes: u64) -> std::io::Result<()> {
    send(socket, bytes).await?;
    socket.shutdown().await
}

async fn send(socket: &mut TcpStream, bytes: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    let mut offset = 0;
    while offset < bytes {
        let n = (bytes - offset).min(buffer.len() as u64) as usize;
        fill(&mut buffer[..n], offset);
        socket.write_all(&buffer[..n]).await?;
        offset += n as u64;
    }
    Ok(())
}

async fn sink(socket: BufReader<TcpStream>, check: bool) -> std::io::Result<()> {
    let mut checker = Checker::default();
    let mut total = 0;
    let mut take = |bytes: &[u8]| {
        total += bytes.len() as u64;
        if check {
            checker.check(bytes);
        }
        total
    };
    take(socket.buffer());
    let mut socket = socket.into_inner();
    let mut buffer = vec![0; 256 * 1024];
    let total = loop {
        let n = socket.read(&mut buffer).await?;
        let total = take(&buffer[..n]);
        if n == 0 {
            break total;
        }
    };
    socket.write_all(format!("{total}\n").as_bytes()).await?;
    socket.shutdown().await
}

async fn echo(socket: BufReader<TcpStream>) -> std::io::Result<()> {
    let buffered = socket.buffer().to_vec();
    let (mut read, mut write) = socket.into_inner().into_split();
    write.write_all(&buffered).await?;
    tokio::io::copy(&mut read, &mut write).await?;
    write.shutdown().await
}

async fn http(mut socket: BufReader<TcpStream>) -> std::io::Result<()> {
    let mut line = String::new();
    loop {
        // This reads the rest of one head, and then the first line of the next.
        while line != "\r\n" {
            line.clear();
            if socket.read_line(&mut line).await? == 0 {
                return Ok(());
            }
        }
        line.clear();
        socket.get_mut().write_all(ANSWER).await?;
    }
}
