//! SIGHUP has the whole configuration checked. If it has changed, the next process takes it over.

use std::{convert::Infallible, path::Path, sync::Arc};

use proto_config::Errors;
use tokio::{signal::unix::Signal, task::spawn_blocking};

use super::reload::Reloads;

/// The configuration of an agent.
pub trait Configuration: Sized + Send + Sync + 'static {
    /// Reads the file and checks the files that it names. Blocks.
    fn load(file: &Path) -> Result<Self, Errors>;

    /// The names of the sections and fields in which another configuration differs from this one.
    fn differences(&self, other: &Self) -> Vec<&'static str>;
}

/// Reads the configuration again on each `hangup`. If it has changed, the next process takes it over. If it has mistakes,
/// nothing changes.
pub async fn follow<C: Configuration>(
    mut hangup: Signal,
    file: &Path,
    running: Arc<C>,
    reloads: &Reloads,
) -> Infallible {
    loop {
        hangup.recv().await;
        let (file, running) = (file.to_owned(), running.clone());
        let read = spawn_blocking(move || C::load(&file).map(|read| running.differences(&read)));
        match read.await {
            Ok(Ok(changed)) if changed.is_empty() => {
                tracing::info!("the configuration has not changed");
            }
            Ok(Ok(changed)) => {
                let changed = changed.join(", ");
                tracing::info!(changed, "the configuration has changed, and a new process takes it over");
                if let Err(why) = reloads.reload().await {
                    tracing::error!(why, "the changed configuration is not in force");
                }
            }
            Ok(Err(errors)) => tracing::error!("the configuration has mistakes; nothing changes\n{errors}"),
            Err(error) => tracing::error!(%error, "can't read the configuration again"),
        }
    }
}
