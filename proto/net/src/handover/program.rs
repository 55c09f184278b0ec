//! The program that an agent runs, and how a process of it starts the next one.

use std::{
    env,
    ffi::OsString,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::message::Message;
use crate::descriptors;

/// Makes a process take over from the one at the other end of its standard input.
const TAKE_OVER: &str = "--take-over";
/// Makes a process start one that takes over, and end.
pub(super) const START_NEXT: &str = "--start-next";

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
        let arguments = arguments.filter(|argument| argument != TAKE_OVER && argument != START_NEXT);
        Ok(Self { path, arguments: arguments.collect() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The command that starts a process which starts the next one. systemd supervises a main process only if that is its
    /// own child, and it adopts the next process when the one between has ended.
    pub(super) fn start_next(&self) -> Command {
        let mut command = self.command(START_NEXT);
        // systemd addresses these variables to the process whose number they hold.
        for variable in ["WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
            command.env_remove(variable);
        }
        command
    }

    /// Starts the next process with the standard input of this one, and tells the process at its other end. This process
    /// must end then.
    pub fn run_next(&self) -> io::Result<()> {
        let next = self.command(TAKE_OVER).spawn()?;
        let process = pidfd_open(Pid::from_child(&next), PidfdFlags::empty())?;
        let message = serde_json::to_vec(&Message::Started(next.id()))?;
        descriptors::send(io::stdin(), &message, &[process.as_fd()])
    }

    fn command(&self, role: &str) -> Command {
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).arg(role);
        command
    }
}
