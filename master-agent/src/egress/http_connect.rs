//! HTTP CONNECT, as kube-apiserver speaks it to its egress proxy.

use std::sync::Arc;

use bytes::{Buf, BytesMut};
use proto::{
    DialError, Target,
    connect::{self, HeadError},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    door::{Common, Dialled, EgressListener},
    early::{self, WithEarly},
    socket::Socket,
};
use crate::stream::caller::Caller;

/// The egress listener.
pub struct HttpConnect(pub Common);

/// One accepted connection.
struct Call<'a> {
    common: &'a Common,
    caller: &'a Caller,
}

impl EgressListener for HttpConnect {
    fn common(&self) -> &Common {
        &self.0
    }

    async fn serve<S: Socket>(self: Arc<Self>, mut socket: S, caller: Caller) {
        // Boxed, so that a long-lived stream does not keep the room that the beginning needed.
        let begun = Box::pin(Call { common: &self.0, caller: &caller }.begin(&mut socket)).await;
        if let Some((target, dialled, early)) = begun {
            let (read, write) = socket.halves();
            self.0.relay(WithEarly { early, inner: read }, write, dialled, target, caller).await;
        }
    }
}

impl Call<'_> {
    /// Up to the answer: the connection if it was 200, and what the caller has sent already.
    async fn begin<S: Socket>(&self, socket: &mut S) -> Option<(Target, Dialled, BytesMut)> {
        let (target, early) = self.read_head(socket).await?;
        match early::dial(self.common, socket, &target, self.caller, early).await {
            Ok((dialled, early)) => {
                socket.write_all(connect::ESTABLISHED).await.ok()?;
                socket.flush().await.ok()?;
                Some((target, dialled, early))
            }
            Err(error) => {
                self.common.dial_failed(&target, self.caller, &error);
                if error != DialError::Cancelled {
                    let refusal = connect::refusal(connect::dial_status(&error), &error.to_string());
                    early::refuse(socket, &refusal).await;
                }
                None
            }
        }
    }

    async fn read_head<S: Socket>(&self, socket: &mut S) -> Option<(Target, BytesMut)> {
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
        let error = match tokio::time::timeout(self.common.head_timeout, read).await {
            Ok(Some(Ok(target))) => return Some((target, head)),
            Ok(Some(Err(error))) => error,
            // Nobody there to be answered.
            Ok(None) => return None,
            Err(_) => HeadError::Timeout,
        };
        self.common.bad_request(self.caller.door, &self.caller.origin, &error);
        early::refuse(socket, &connect::refusal(connect::head_status(&error), &error.to_string())).await;
        None
    }
}
