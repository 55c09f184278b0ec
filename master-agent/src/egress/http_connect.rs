//! HTTP CONNECT, as kube-apiserver speaks it to its egress proxy.

use std::sync::Arc;

use bytes::{Buf, BytesMut};
use proto::{
    DialError, Target,
    connect::{self, HeadError},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    early_data::{self, WithEarlyData},
    lingering_close,
    listener::EgressListener,
    outbound::{Dialled, Outbound},
    socket::CallerSocket,
};
use crate::stream::caller::Caller;

/// The egress listener.
pub struct HttpConnect(pub Outbound);

/// One accepted connection.
struct Call<'a> {
    outbound: &'a Outbound,
    caller: Caller,
}

impl EgressListener for HttpConnect {
    fn outbound(&self) -> &Outbound {
        &self.0
    }

    async fn serve<S: CallerSocket>(self: Arc<Self>, mut socket: S, caller: Caller) {
        // Boxed, so that a long-lived stream does not keep the memory of the handshake.
        let opened = Box::pin(Call { outbound: &self.0, caller }.open(&mut socket)).await;
        if let Some((dialled, early)) = opened {
            let (read, write) = socket.halves();
            self.0.relay(WithEarlyData { early, inner: read }, write, dialled).await;
        }
    }
}

impl Call<'_> {
    /// Reads the request, dials and answers. Returns the connection and the caller's early data if the answer was 200.
    async fn open<S: CallerSocket>(self, socket: &mut S) -> Option<(Dialled, BytesMut)> {
        let (target, early) = self.read_head(socket).await?;
        match early_data::dial(self.outbound, socket, &target, &self.caller, early).await {
            Ok(opened) => {
                socket.write_all(connect::ESTABLISHED).await.ok()?;
                socket.flush().await.ok()?;
                Some(opened)
            }
            Err(error) => {
                self.outbound.dial_failed(&target, &self.caller, &error);
                if error != DialError::Cancelled {
                    let refusal = connect::refusal(connect::dial_status(&error), &error.to_string());
                    lingering_close::refuse(socket, &refusal).await;
                }
                None
            }
        }
    }

    async fn read_head<S: CallerSocket>(&self, socket: &mut S) -> Option<(Target, BytesMut)> {
        let mut head = BytesMut::with_capacity(1024);
        let read = async {
            loop {
                match connect::parse(&head) {
                    Ok(Some(request)) => {
                        head.advance(request.head_len);
                        return Some(Ok(request.target));
                    }
                    Ok(None) => {}
                    Err(e) => return Some(Err(e)),
                }
                match socket.read_buf(&mut head).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        };
        let error = match tokio::time::timeout(self.outbound.limits.head_timeout, read).await {
            Ok(Some(Ok(target))) => return Some((target, head)),
            Ok(Some(Err(error))) => error,
            // The caller has left.
            Ok(None) => return None,
            Err(_) => HeadError::Timeout,
        };
        self.outbound.bad_request(self.caller.listener, &self.caller.origin, &error);
        let refusal = connect::refusal(connect::head_status(&error), &error.to_string());
        lingering_close::refuse(socket, &refusal).await;
        None
    }
}
