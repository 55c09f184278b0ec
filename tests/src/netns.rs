//! Network namespaces. One with a veth pair to it stands for a host that can lose its link, and one without for a host
//! whose links a test makes.

use std::{
    ffi::OsStr,
    fs::File,
    io::Write,
    marker::PhantomData,
    net::Ipv4Addr,
    os::fd::AsFd,
    process::{Command, Stdio},
};

use anyhow::{Context, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{openssh::run, process::note_started};

/// Exists until it is dropped. Processes in it have to end before.
#[derive(Debug)]
pub struct Namespace {
    pub name: String,
    /// This host's end of the pair.
    pub outside: Ipv4Addr,
    /// The namespace's end.
    pub inside: Ipv4Addr,
    outside_link: String,
    inside_link: String,
}

impl Namespace {
    pub fn new() -> anyhow::Result<Self> {
        let id: u32 = rand::random();
        let [a, b, c, _] = id.to_be_bytes();
        // The upper half of 10.0.0.0/8 leaves the usual networks of containers free.
        let net = |last| Ipv4Addr::new(10, a | 128, b, (c & 0xfc) + last);
        let namespace = Self {
            name: format!("test-{id:08x}"),
            outside: net(1),
            inside: net(2),
            outside_link: format!("to-{id:08x}"),
            inside_link: format!("in-{id:08x}"),
        };
        namespace.create()?;
        Ok(namespace)
    }

    fn create(&self) -> anyhow::Result<()> {
        let (near, far) = (self.outside_link.as_str(), self.inside_link.as_str());
        let (outside, inside) = (format!("{}/30", self.outside), format!("{}/30", self.inside));
        add(&self.name)?;
        ip(&["link", "add", near, "type", "veth", "peer", "name", far, "netns", &self.name])?;
        ip(&["address", "add", &outside, "dev", near])?;
        ip(&["link", "set", near, "up"])?;
        ip(&["-n", &self.name, "address", "add", &inside, "dev", far])?;
        ip(&["-n", &self.name, "link", "set", far, "up"])?;
        ip(&["-n", &self.name, "link", "set", "lo", "up"])
    }

    /// A new kernel state under the old name and addresses, as after a reboot.
    pub fn recreate(&self) -> anyhow::Result<()> {
        self.remove()?;
        self.create()
    }

    /// The link goes first: with its namespace alone it would vanish some time later.
    fn remove(&self) -> anyhow::Result<()> {
        let link = ip(&["link", "delete", &self.outside_link]);
        ip(&["netns", "delete", &self.name])?;
        link
    }

    /// A command that runs inside; the process is the program's own.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    pub fn set_link(&self, up: bool) -> anyhow::Result<()> {
        ip(&["link", "set", &self.outside_link, if up { "up" } else { "down" }])
    }

    /// Drops every packet of the link, in both directions and without a word.
    pub fn drop_packets(&self) -> anyhow::Result<()> {
        let link = &self.inside_link;
        self.nft(&format!(
            "table inet cut {{\n\
             chain in {{\ntype filter hook input priority 0;\niifname \"{link}\" drop\n}}\n\
             chain out {{\ntype filter hook output priority 0;\noifname \"{link}\" drop\n}}\n}}\n"
        ))
    }

    pub fn pass_packets(&self) -> anyhow::Result<()> {
        self.nft("delete table inet cut\n")
    }

    fn nft(&self, script: &str) -> anyhow::Result<()> {
        let mut command = self.command("nft");
        let mut child = command
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("can't run {command:?}"))?;
        child.stdin.take().context("no input")?.write_all(script.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.remove();
    }
}

/// A namespace that has its loopback interface and no link. It exists until it is dropped.
#[derive(Debug)]
pub struct Island {
    pub name: String,
}

impl Island {
    pub fn new() -> anyhow::Result<Self> {
        let island = Self { name: format!("test-{:08x}", rand::random::<u32>()) };
        add(&island.name)?;
        island.ip(&["link", "set", "lo", "up"])?;
        Ok(island)
    }

    /// Runs ip(8) on the namespace.
    pub fn ip(&self, args: &[&str]) -> anyhow::Result<()> {
        ip(&[&["-n", &self.name], args].concat())
    }

    /// Moves this thread into the namespace.
    pub fn enter(&self) -> anyhow::Result<Entered> {
        enter(&self.name)
    }
}

/// Moves this thread into a namespace, with all threads and processes that it starts from now on.
pub fn enter(name: &str) -> anyhow::Result<Entered> {
    let before = File::open("/proc/thread-self/ns/net").context("this thread's namespace")?;
    let there = File::open(format!("/run/netns/{name}")).context("the namespace")?;
    move_into_link_name_space(there.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(Entered { before, of_this_thread: PhantomData })
}

impl Drop for Island {
    fn drop(&mut self) {
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

/// A thread's stay in a namespace. Dropping it takes the thread back to where it was before.
#[derive(Debug)]
#[must_use]
pub struct Entered {
    before: File,
    of_this_thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let back = move_into_link_name_space(self.before.as_fd(), Some(LinkNameSpaceType::Network));
        back.expect("a thread may go back to its namespace");
    }
}

fn add(name: &str) -> anyhow::Result<()> {
    note_started(&format!("namespace {name}"));
    ip(&["netns", "add", name])
}

fn ip(args: &[&str]) -> anyhow::Result<()> {
    run(Command::new("ip").args(args))
}
