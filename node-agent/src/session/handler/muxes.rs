//! The multiplexer of a session, which begins as its master asks.

use std::sync::Arc;

use proto::mux::{
    Version,
    frame::{self, Frame, Hello},
    ids::{Numbering, Opener},
};
use proto_net::mux::{self, Events, Feeder, Mux, Notice, SendFrame, Settings};
use russh::{ChannelId, server};
use tokio::sync::mpsc;

use super::{Handler, MAX_LOGGED_NOTICES, MasterMux, Purpose};
use crate::session::{error::SessionError, user::AuthenticatedUser};

impl Handler {
    fn new_mux(
        &self,
        numbering: Numbering,
        peer: Option<Hello>,
        channel: ChannelId,
        session: &server::Session,
    ) -> (Mux, Feeder, Events) {
        let max_streams = self.services.limits.max_streams;
        let most = |opener| if numbering.opens(opener) { max_streams } else { 0 };
        let settings = Settings {
            numbering,
            max_opened: most(Opener::This),
            max_accepted: most(Opener::Peer),
            stalls: self.services.metrics.stalls.clone(),
            peer,
        };
        Mux::new(settings, self.gate.clone(), sender(channel, session), &self.tasks)
    }

    pub(super) fn start_master_mux(
        &mut self,
        numbering: Numbering,
        peer: Option<Hello>,
        channel: ChannelId,
        session: &server::Session,
    ) {
        let Some(user) = self.master() else { return };
        let (mux, feeder, events) = self.new_mux(numbering, peer, channel, session);
        if let Some(Hello { session, .. }) = peer {
            self.registered = self.services.multiplexers.add(session, &user.certificate, &mux);
        }
        self.state.set_master_mux(mux.clone());
        self.master_mux = Some(MasterMux { channel, feeder, notices: Some(events.notices) });
        let streams = self.services.streams.clone();
        self.tasks.spawn(streams.drain.clone().follow_on_mux(mux.clone()));
        let (state, tasks) = (self.state.clone(), self.tasks.clone());
        self.tasks.spawn(streams.serve_mux(user, state, mux, events.incoming, tasks));
    }

    /// Answers a master's HELLO, and begins as it says: with a multiplexer, or as a further connection of one.
    fn answer_hello(
        &mut self,
        hello: Hello,
        channel: ChannelId,
        session: &mut server::Session,
    ) -> Result<(), SessionError> {
        let Some(user) = self.master() else { return Ok(()) };
        let present = self.services.multiplexers.find(&hello.session, &user.certificate);
        let present = present.filter(|_| self.purpose != Purpose::Session);
        let joined = present.and_then(|mux| {
            let feeder = mux.join(self.gate.clone(), sender(channel, session), &self.tasks)?;
            Some((mux, feeder))
        });
        if joined.is_none() && self.purpose == Purpose::Further {
            return Err(SessionError::NotFurther);
        }
        let said = mux::hello(if joined.is_some() { Hello::JOINED } else { 0 }, hello.session);
        session.data(channel, frame::encode(Version::V2, &Frame::Hello(said)))?;
        match joined {
            Some((mux, feeder)) => {
                self.state.set_joined(mux);
                self.master_mux = Some(MasterMux { channel, feeder, notices: None });
            }
            None => {
                self.start_master_mux(Numbering::Halves { is_client: false }, Some(hello), channel, session);
                self.use_front_end(hello);
            }
        }
        Ok(())
    }

    pub(super) fn start_node_mux(
        &mut self,
        user: Arc<AuthenticatedUser>,
        channel: ChannelId,
        session: &server::Session,
    ) {
        let Some(front_ends) = self.services.front_ends.clone() else { return };
        let numbering = Numbering::All { opener: Opener::This };
        let (mux, feeder, events) = self.new_mux(numbering, None, channel, session);
        self.state.set_node_mux(mux.clone());
        self.node_mux = Some((channel, feeder));
        self.tasks.spawn(async move {
            tokio::select! {
                () = front_ends.offer(mux, user.expired()) => {}
                () = log_notices(events.notices) => {}
            }
        });
    }

    /// Opens streams to the front end of a master that has one, if there is a local endpoint.
    fn use_front_end(&self, hello: Hello) {
        if let (Some(front_ends), Some(user), Some(master)) =
            (self.services.front_ends.clone(), self.user.clone(), &self.master_mux)
            && hello.can(Hello::FRONT_END)
        {
            let mux = master.feeder.mux().clone();
            self.tasks.spawn(async move { front_ends.offer(mux, user.expired()).await });
        }
    }

    /// Takes bytes of the channel on which the master's HELLO has not come yet. Returns what is left for the multiplexer.
    pub(super) fn greet<'a>(
        &mut self,
        channel: ChannelId,
        mut data: &'a [u8],
        session: &mut server::Session,
    ) -> Result<&'a [u8], SessionError> {
        if let Some((_, greeting)) = self.greeting.as_mut().filter(|(id, _)| *id == channel)
            && let Some(hello) = greeting.take(&mut data)?
        {
            self.greeting = None;
            self.answer_hello(hello, channel, session)?;
        }
        Ok(data)
    }

    /// Gives bytes to the multiplexer whose channel they came on; `None` if they came on another channel.
    pub(super) fn feed(&mut self, channel: ChannelId, data: &[u8]) -> Option<Result<(), SessionError>> {
        if let Some(mux) = self.master_mux.as_mut().filter(|mux| mux.channel == channel) {
            let fed = mux.feeder.feed(data);
            self.take_notices();
            return Some(fed.map_err(SessionError::from));
        }
        let (_, feeder) = self.node_mux.as_mut().filter(|(id, _)| *id == channel)?;
        Some(feeder.feed(data).map_err(SessionError::from))
    }

    fn next_notice(&mut self) -> Option<Notice> {
        self.master_mux.as_mut()?.notices.as_mut()?.try_recv().ok()
    }

    /// Takes what the master has said about the whole tunnel. A task of the session could end with it before it does.
    fn take_notices(&mut self) {
        while let Some(notice) = self.next_notice() {
            let is_logged = self.notices_to_log > 0;
            match notice {
                Notice::Call => {
                    let _ = self.state.calls.try_send(());
                }
                Notice::Relink => self.state.relink.cancel(),
                // Only a node sends it.
                Notice::Drain { .. } => {}
                Notice::Certificate(_) if self.user.as_ref().is_some_and(|user| user.has_expired()) => {
                    self.notices_to_log = self.notices_to_log.saturating_sub(1);
                    if is_logged {
                        tracing::warn!("ignored a host certificate from a master whose own has expired");
                    }
                }
                Notice::Certificate(text) => {
                    let services = &self.services;
                    self.renewals.get_or_insert_with(|| services.renewals.session()).submit(text);
                }
                Notice::GoAway(reason) => {
                    self.state.set_replaced();
                    self.state.relink.cancel();
                    self.notices_to_log = self.notices_to_log.saturating_sub(1);
                    if is_logged {
                        tracing::info!(reason, "the master takes no new streams");
                    }
                }
            }
        }
    }
}

/// Sends frames on a channel of a session.
fn sender(channel: ChannelId, session: &server::Session) -> SendFrame {
    let handle = session.handle();
    Box::new(move |frame| {
        let handle = handle.clone();
        Box::pin(async move { handle.data(channel, frame).await.is_ok() })
    })
}

/// Logs what a master of an earlier release says on the multiplexer of its front end, until that ends.
async fn log_notices(mut notices: mpsc::Receiver<Notice>) {
    let mut logged = 0;
    while let Some(notice) = notices.recv().await {
        logged += 1;
        if logged > MAX_LOGGED_NOTICES {
            continue;
        }
        match notice {
            Notice::GoAway(reason) => {
                tracing::info!(reason, "the master's front end takes no new callers");
            }
            Notice::Certificate(_) | Notice::Call | Notice::Relink | Notice::Drain { .. } => {
                tracing::warn!("ignored what does not belong on the front end's multiplexer");
            }
        }
    }
}
