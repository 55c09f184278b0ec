//! Clients of Konnectivity's `ProxyService`.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use anyhow::bail;
use hyper_util::rt::TokioIo;
use proto::konnectivity::{PROXY, Packet, Payload};
use tokio::sync::mpsc;
use tonic::{
    Status, Streaming,
    client::Grpc,
    codegen::{Service, http::Uri, http::uri::PathAndQuery},
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use crate::{
    client::{Door, Stream},
    load::completes,
};

/// Bytes that the server may send before the client has read them.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;

/// An HTTP/2 connection.
#[derive(Clone)]
pub struct Connection(Channel);

/// One call: a stream of packets each way.
pub struct Call {
    pub packets: mpsc::Sender<Packet>,
    answers: Streaming<Packet>,
}

/// Enters an egress listener.
struct Enter(Door);

impl Service<Uri> for Enter {
    type Response = TokioIo<Stream>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let door = self.0.clone();
        Box::pin(async move { door.enter().await.map(TokioIo::new).map_err(std::io::Error::other) })
    }
}

impl Connection {
    pub async fn open(door: &Door) -> anyhow::Result<Self> {
        let endpoint = Endpoint::from_static("http://localhost")
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        Ok(Self(endpoint.connect_with_connector(Enter(door.clone())).await?))
    }

    /// Calls `Proxy`.
    pub async fn call(&self) -> Result<Call, Status> {
        self.call_method(PROXY).await
    }

    pub async fn call_method(&self, path: &'static str) -> Result<Call, Status> {
        let (packets, mut queue) = mpsc::channel::<Packet>(1);
        let stream = futures_util::stream::poll_fn(move |cx| queue.poll_recv(cx));
        let mut grpc = Grpc::new(self.0.clone());
        grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
        let codec = ProstCodec::<Packet, Packet>::default();
        let answers =
            grpc.streaming(tonic::Request::new(stream), PathAndQuery::from_static(path), codec).await?;
        Ok(Call { packets, answers: answers.into_inner() })
    }

    /// A call with one connection, as kube-apiserver makes it.
    pub async fn dial(&self, address: &str) -> anyhow::Result<(Call, i64)> {
        let mut call = self.call().await?;
        match call.dial(rand::random(), address).await? {
            Ok(id) => Ok((call, id)),
            Err(error) => bail!("{address}: {error}"),
        }
    }
}

impl Call {
    pub async fn send(&self, packet: Packet) {
        completes("a packet is taken", self.packets.send(packet)).await.expect("the call goes on");
    }

    pub async fn data(&self, id: i64, bytes: impl AsRef<[u8]>) {
        self.send(Packet::data(id, bytes.as_ref().to_vec().into())).await;
    }

    /// The next answer; `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Payload>, Status> {
        let packet = completes("an answer", self.answers.message()).await?;
        Ok(packet.map(|packet| packet.into_payload().expect("a packet that holds what it says")))
    }

    /// Dials while nothing else is under way: a connection's number, or the error.
    pub async fn dial(&mut self, random: i64, address: &str) -> anyhow::Result<Result<i64, String>> {
        self.send(Packet::dial_request(random, address)).await;
        match self.next().await? {
            Some(Payload::DialResponse(answer)) if answer.random == random => {
                Ok(if answer.error.is_empty() { Ok(answer.connect_id) } else { Err(answer.error) })
            }
            other => bail!("{other:?}"),
        }
    }

    /// Data of the only connection that sends any.
    pub async fn read(&mut self, id: i64) -> anyhow::Result<bytes::Bytes> {
        match self.next().await? {
            Some(Payload::Data(data)) if data.connect_id == id => Ok(data.data),
            other => bail!("{other:?}"),
        }
    }

    /// The same up to CLOSE_RSP, whose error it gives.
    pub async fn read_to_close(&mut self, id: i64, mut each: impl FnMut(&[u8])) -> anyhow::Result<String> {
        loop {
            match self.next().await? {
                Some(Payload::Data(data)) if data.connect_id == id => each(&data.data),
                Some(Payload::CloseResponse(answer)) if answer.connect_id == id => return Ok(answer.error),
                other => bail!("{other:?}"),
            }
        }
    }
}
