//! Port forwarding as a kubelet does it for the ports of a pod.

use anyhow::Context as _;
use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::spdy::{Session, Stream};

/// Each forwarded connection is a stream for its bytes and one for what goes wrong.
pub(crate) async fn forward_ports(mut session: Session) -> anyhow::Result<()> {
    let mut waiting = Vec::<Stream>::new();
    let mut connections = tokio::task::JoinSet::new();
    while let Some(stream) = session.accept().await {
        let id = stream.header("requestid").to_owned();
        let Some(index) = waiting.iter().position(|other| other.header("requestid") == id) else {
            waiting.push(stream);
            continue;
        };
        let other = waiting.swap_remove(index);
        let (data, error) =
            if stream.header("streamtype") == "data" { (stream, other) } else { (other, stream) };
        connections.spawn(async move {
            if let Err(failure) = forward_port(data).await {
                error.writer.write(format!("{failure:#}").into()).await?;
            }
            error.writer.finish().await
        });
    }
    Ok(())
}

async fn forward_port(data: Stream) -> anyhow::Result<()> {
    let port: u16 = data.header("port").parse()?;
    let Stream { mut reader, writer, .. } = data;
    let socket = TcpStream::connect(("127.0.0.1", port)).await.with_context(|| format!("port {port}"))?;
    let (mut read, mut write) = socket.into_split();
    let up = async {
        while let Some(bytes) = reader.recv().await {
            write.write_all(&bytes).await?;
        }
        write.shutdown().await?;
        // The other direction may go on.
        std::future::pending().await
    };
    let down = async {
        let mut buffer = BytesMut::with_capacity(64 * 1024);
        while read.read_buf(&mut buffer).await? > 0 {
            writer.write(buffer.split().freeze()).await?;
        }
        writer.finish().await
    };
    // The port's end is that of the whole, as with a kubelet: kubectl keeps its half open until it hears of it.
    tokio::select! {
        failed = up => failed,
        done = down => done,
    }
}
