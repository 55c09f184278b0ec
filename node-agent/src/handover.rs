//! The node-agent's part in a handover: that of the running process, and that of the next one.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use proto_net::{
    handover::{Agent, Predecessor},
    listeners::{Listeners, Stage},
    tasks::Tasks,
};
use tokio::time::{sleep, timeout};

use crate::session::services::SessionServices;

/// How long the next process waits for the masters that the running one is linked to.
const LINKS_TIMEOUT: Duration = Duration::from_secs(20);
/// The pause between two looks at which of them are there.
const LINKS_INTERVAL: Duration = Duration::from_millis(10);
/// The pause between two looks for masters that have not been asked for another link.
const ASK_INTERVAL: Duration = Duration::from_millis(500);

/// The agent that runs, for the handover to its next process.
pub(crate) struct Running<'a> {
    pub(crate) services: &'a Arc<SessionServices>,
    /// Asks masters, each of which may keep its sender waiting.
    pub(crate) asking: Tasks,
}

impl Agent for Running<'_> {
    fn peers(&self) -> Vec<String> {
        self.services.connected_masters.replaceable()
    }

    /// Asks the masters that dial this node. The next process calls the others home by itself.
    async fn ask_for_links(&self) -> Infallible {
        loop {
            self.services.connected_masters.ask_for_links(&self.asking);
            sleep(ASK_INTERVAL).await;
        }
    }

    fn callers(&self) -> u64 {
        self.services.streams_open()
    }
}

/// Waits for the masters that the former process is linked to, and then serves everybody.
pub(crate) async fn take_over(
    predecessor: &mut Predecessor,
    listeners: &Listeners,
    services: &SessionServices,
) -> io::Result<()> {
    let mut missing = predecessor.take_peers();
    let linked = async {
        // Only the last one is looked at, until it is there.
        while let Some(last) = missing.last() {
            if services.connected_masters.is_connected(last) {
                missing.pop();
            } else {
                sleep(LINKS_INTERVAL).await;
            }
        }
    };
    if timeout(LINKS_TIMEOUT, linked).await.is_err() {
        let first = missing.last();
        tracing::warn!(first, at_most = missing.len(), "masters of the former process have no link yet");
    }
    listeners.accept(Stage::Callers, true);
    predecessor.serving().await
}
