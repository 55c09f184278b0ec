//! The socket between the two processes. It keeps messages apart, carries descriptors, and ends with either process.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketFlags,
        SocketType, recvmsg, socketpair,
    },
};
use tokio::{io::Interest, net::UnixStream};

use super::message::{MAX_MESSAGE, Message};
use crate::descriptors;

/// One end of the socket, which keeps messages apart although its type is that of a stream.
#[derive(Debug)]
pub(super) struct Channel(UnixStream);

impl Channel {
    /// One end, and the other one for the next process.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self::new(near)?, far))
    }

    /// The end that is this process's standard input.
    pub(super) fn of_stdin() -> io::Result<Self> {
        Self::new(io::stdin().as_fd().try_clone_to_owned()?)
    }

    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self(UnixStream::from_std(socket)?))
    }

    pub(super) async fn send(&self, message: &Message) -> io::Result<()> {
        self.send_with(message, &[]).await
    }

    /// Sends a message with descriptors, of which there is at most one.
    pub(super) async fn send_with(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        self.0.async_io(Interest::WRITABLE, || descriptors::send(&self.0, &bytes, fds)).await
    }

    /// The next message, and the descriptor that comes with it; `None` once the other process is gone. Cancel-safe.
    pub(super) async fn receive(&self) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
        self.0.async_io(Interest::READABLE, || receive(&self.0)).await
    }
}

fn receive(socket: impl AsFd) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut next =
        || recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let received = match next() {
        // The other process has not read everything before it ended. What it has said last is still to be read.
        Err(Errno::CONNRESET) => next()?,
        received => received?,
    };
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            fd = fds.next();
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
    }
    bytes.truncate(received.bytes);
    Ok(Some((serde_json::from_slice(&bytes)?, fd)))
}
