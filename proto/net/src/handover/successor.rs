//! The running process's side: it starts the next process, and follows what becomes of it.

use std::{
    env,
    ffi::OsString,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    process::{Child, Command},
    time::timeout,
};

use super::{
    channel::Channel,
    message::{Draining, Message, PEERS},
};
use crate::listeners::{Address, Listeners};

/// How long the next process may take to read and check everything.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take from then on until it serves, most of which it may spend on waiting for links.
const SERVE_TIMEOUT: Duration = Duration::from_secs(60);

/// Makes a process take over from the one at the other end of its standard input.
const TAKE_OVER: &str = "--take-over";

/// Why the running process goes on. The text is for people.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error("can't start {program}: {error}")]
    Start { program: PathBuf, error: io::Error },
    #[error("the new process can't serve: {0}")]
    Failed(String),
    #[error("the new process ended before it served; its log says why")]
    Ended,
    #[error("the new process {what} within {}", humantime::format_duration(*.limit))]
    Late { what: &'static str, limit: Duration },
    #[error("can't speak with the new process: {0}")]
    Channel(#[from] io::Error),
    #[error("the new process has said something unexpected")]
    Unexpected,
}

/// The program of this process, by the path under which it was started. An upgrade may put another file there.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
}

impl Program {
    pub fn new(path: PathBuf, arguments: Vec<OsString>) -> Self {
        Self { path, arguments }
    }

    /// The program with the arguments of this process. It has to be found before anybody replaces the file, whose path is
    /// unknown after that if the process was found by `PATH`.
    pub fn current() -> io::Result<Self> {
        let mut arguments = env::args_os();
        let called = arguments.next().map(PathBuf::from).filter(|path| path.components().count() > 1);
        let path = match called {
            Some(path) => std::path::absolute(path)?,
            None => env::current_exe()?,
        };
        let arguments = arguments.filter(|argument| argument != TAKE_OVER).collect();
        Ok(Self { path, arguments })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What becomes of a process that serves.
#[derive(Debug)]
pub enum End {
    /// It has been replaced itself, or has been told to stop.
    Leaves,
    /// It has ended without having said that it would, with this status.
    Crashed(String),
}

/// The next process, which is a child of the running one until that ends. Dropping this ends it unless it serves.
#[derive(Debug)]
pub struct Successor {
    channel: Channel,
    process: Child,
    serves: bool,
    /// It has said that it will end.
    leaves: bool,
    unused: Vec<Address>,
    pub pid: u32,
    pub version: String,
}

impl Successor {
    /// Starts the next process, and hands it the sockets. Returns once it has read and checked everything.
    pub async fn start(
        program: &Program,
        listeners: &Listeners,
        peers: Vec<String>,
    ) -> Result<Self, HandoverError> {
        let (channel, stdin) = Channel::pair()?;
        let process = Command::new(&program.path)
            .args(&program.arguments)
            .arg(TAKE_OVER)
            .stdin(stdin)
            // systemd addresses these variables to the process whose number they hold.
            .env_remove("WATCHDOG_PID")
            .env_remove("LISTEN_PID")
            .env_remove("LISTEN_FDS")
            .env_remove("LISTEN_FDNAMES")
            .spawn()
            .map_err(|error| HandoverError::Start { program: program.path.clone(), error })?;
        let pid = process.id().unwrap_or_default();
        let mut next = Self {
            channel,
            process,
            serves: false,
            leaves: false,
            unused: Vec::new(),
            pid,
            version: String::new(),
        };
        let loading = async {
            say_all(&next.channel, listeners, &peers).await?;
            let Message::Loaded { version, unused } = next.answer().await? else {
                return Err(HandoverError::Unexpected);
            };
            Ok((version, unused))
        };
        let limit = LOAD_TIMEOUT;
        let late = HandoverError::Late { what: "has not read its files", limit };
        let loaded = timeout(limit, loading).await.unwrap_or(Err(late));
        (next.version, next.unused) = loaded?;
        Ok(next)
    }

    /// Lets the next process accept and make links, and waits until it serves everybody.
    ///
    /// The sockets that it does not need are closed then.
    pub async fn serve(&mut self, listeners: &Listeners) -> Result<(), HandoverError> {
        let serving = async {
            self.channel.send(&Message::Link).await?;
            let Message::Serving = self.answer().await? else { return Err(HandoverError::Unexpected) };
            Ok(())
        };
        let limit = SERVE_TIMEOUT;
        let late = HandoverError::Late { what: "does not serve", limit };
        timeout(limit, serving).await.unwrap_or(Err(late))?;
        self.serves = true;
        listeners.close_handles(&self.unused);
        Ok(())
    }

    /// The next message, unless that says that the process has failed.
    async fn answer(&self) -> Result<Message, HandoverError> {
        match self.channel.receive().await? {
            Some((Message::Failed(why), _)) => Err(HandoverError::Failed(why)),
            Some((message, _)) => Ok(message),
            None => Err(HandoverError::Ended),
        }
    }

    /// Tells the next process what this one and those before it still carry.
    pub async fn report(&self, draining: Draining) {
        let _ = self.channel.send(&Message::Draining(draining)).await;
    }

    /// Waits until the process has ended, or says that it will. Cancel-safe, and never completes after that.
    pub async fn end(&mut self) -> End {
        while !self.leaves
            && let Ok(Some((message, _))) = self.channel.receive().await
        {
            if message == Message::Farewell {
                self.leaves = true;
                return End::Leaves;
            }
        }
        if self.leaves {
            std::future::pending::<()>().await;
        }
        End::Crashed(match self.process.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        })
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if !self.serves {
            // It must not begin to serve later.
            let _ = self.process.start_kill();
        }
    }
}

/// Says everything that the next process needs.
async fn say_all(channel: &Channel, listeners: &Listeners, peers: &[String]) -> Result<(), HandoverError> {
    let said = async {
        for (address, socket) in listeners.handles()? {
            channel.send_with(&Message::Listener(address), &[socket.as_fd()]).await?;
        }
        for some in peers.chunks(PEERS) {
            channel.send(&Message::Peers(some.to_vec())).await?;
        }
        channel.send(&Message::Load).await
    };
    match said.await {
        // Its last message says why it is gone.
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            Ok(())
        }
        said => Ok(said?),
    }
}
