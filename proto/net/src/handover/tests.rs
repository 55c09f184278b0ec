//! Both sides of a handover in one process, where the next process is a task, and programs that are none of ours.

use std::{env, os::fd::AsFd, path::PathBuf, process, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{net::TcpStream, runtime::Runtime, time::timeout};

use super::{channel::Channel, message::Message, successor::HandoverError, *};
use crate::{
    accept::Listener,
    listeners::{Address, Listeners, Stage},
};

/// What `sh -c` runs as the next process.
fn program(script: &str) -> Program {
    Program::new(PathBuf::from("/bin/sh"), vec!["-c".into(), script.into(), "sh".into()])
}

async fn fails(script: &str) -> HandoverError {
    Successor::start(&program(script), &Listeners::new(), Vec::new()).await.expect_err("the script serves")
}

#[tokio::test]
async fn sockets_and_peers_arrive_and_each_step_is_waited_for() {
    let mut listeners = Listeners::new();
    let socket = listeners.tcp("127.0.0.1:0".parse().unwrap(), Stage::Links).unwrap();
    let (near, far) = Channel::pair().unwrap();
    let far = Channel::new(far).unwrap();
    let peers: Vec<String> = (0..1000).map(|i| format!("node-{i}")).collect();
    let saying = async {
        for (address, socket) in listeners.handles().unwrap() {
            near.send_with(&Message::Listener(address), &[socket.as_fd()]).await.unwrap();
        }
        for some in peers.chunks(message::PEERS) {
            near.send(&Message::Peers(some.to_vec())).await.unwrap();
        }
        near.send(&Message::Load).await.unwrap();
    };
    let (mut next, ()) = tokio::join!(async { Predecessor::listen_to(far).await.unwrap() }, saying);
    assert_eq!(next.take_peers(), peers);
    let mut inherited = next.take_listeners();
    let taken = inherited.remove(&Address::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
    let taken = std::net::TcpListener::from(taken);
    assert_eq!(taken.local_addr().unwrap(), socket.local_addr().unwrap());
    let _caller = TcpStream::connect(socket.local_addr().unwrap()).await.unwrap();
    socket.accept().await.unwrap();
    // It waits until links may be made.
    let waits = timeout(Duration::from_millis(50), next.loaded("1.2.3", &[])).await;
    assert!(waits.is_err());
    let said = near.receive().await.unwrap().unwrap().0;
    assert_eq!(said, Message::Loaded { version: "1.2.3".to_owned(), unused: Vec::new() });
    near.send(&Message::Link).await.unwrap();
    next.loaded("1.2.3", &[]).await.unwrap();
    next.serving().await.unwrap();
    near.receive().await.unwrap();
    assert_eq!(near.receive().await.unwrap().unwrap().0, Message::Serving);
    // What the former process carries is passed on until it ends.
    let draining = Draining { processes: 1, streams: 7 };
    near.send(&Message::Draining(draining)).await.unwrap();
    let reports = std::cell::RefCell::new(Vec::new());
    let following = next.follow(|report| reports.borrow_mut().push(report), std::future::ready(()));
    let former = async {
        // It hears that the next process is stopping.
        assert_eq!(near.receive().await.unwrap().unwrap().0, Message::Stopping);
        drop(near);
    };
    tokio::join!(following, former);
    assert_eq!(reports.into_inner(), [draining, Draining::default()]);
}

#[tokio::test]
async fn a_running_process_that_dies_leaves_its_place_to_the_next_one() {
    let (near, far) = Channel::pair().unwrap();
    near.send(&Message::Load).await.unwrap();
    let next = Predecessor::listen_to(Channel::new(far).unwrap()).await.unwrap();
    let dies = async {
        near.receive().await.unwrap();
        drop(near);
    };
    let (loaded, ()) = tokio::join!(next.loaded("1", &[]), dies);
    loaded.unwrap();
    next.serving().await.unwrap();
}

#[tokio::test]
async fn a_process_that_nobody_has_started_to_take_over_does_not() {
    let (near, far) = Channel::pair().unwrap();
    drop(near);
    let error = Predecessor::listen_to(Channel::new(far).unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("this is for `reload` alone"), "{error}");
}

#[tokio::test]
async fn a_program_that_is_none_of_ours_does_not_take_over() {
    assert!(matches!(fails("exit 3").await, HandoverError::Ended));
    assert!(matches!(fails("printf nonsense >&0; sleep 60").await, HandoverError::Channel(_)));
    assert!(matches!(fails(r#"printf '"serving"' >&0; sleep 60"#).await, HandoverError::Unexpected));
    let failed = fails(r#"printf '{"failed":"the disk is full"}' >&0; sleep 60"#).await;
    assert_eq!(failed.to_string(), "the new process can't serve: the disk is full");
    let missing = Program::new(PathBuf::from("/nonexistent/agent"), Vec::new());
    let error = Successor::start(&missing, &Listeners::new(), Vec::new()).await.unwrap_err();
    assert!(error.to_string().starts_with("can't start /nonexistent/agent: "), "{error}");
}

/// Does something only in the processes that a test below starts.
#[test]
fn the_program_of_these_tests() {
    match env::args().next_back().as_deref() {
        Some("--start-next") => Program::current().unwrap().run_next().unwrap(),
        Some("--take-over") => Runtime::new().unwrap().block_on(async {
            let next = Predecessor::meet().await.unwrap();
            next.loaded("9", &[]).await.unwrap();
            std::future::pending::<()>().await;
        }),
        _ => {}
    }
}

async fn start_this_program() -> Successor {
    let name = "handover::tests::the_program_of_these_tests";
    let arguments = ["--exact", name, "--"].map(Into::into).to_vec();
    let program = Program::new(env::current_exe().unwrap(), arguments);
    Successor::start(&program, &Listeners::new(), Vec::new()).await.unwrap()
}

/// Whether a process runs, and whose child it is.
fn parent(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    field("State:").filter(|state| !state.starts_with('Z'))?;
    field("PPid:")?.parse().ok()
}

#[tokio::test]
async fn the_next_process_is_no_child_and_ends_if_it_is_given_up() {
    let next = start_this_program().await;
    assert_eq!(next.version, "9");
    assert!(parent(next.pid).is_some_and(|parent| parent != process::id()));
    let pid = next.pid;
    drop(next);
    let ended = async {
        while parent(pid).is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(10), ended).await.unwrap();
}

#[tokio::test]
async fn a_process_that_ends_before_it_serves_is_no_successor() {
    let mut next = start_this_program().await;
    let pid = i32::try_from(next.pid).unwrap();
    let listeners = Listeners::new();
    let serving = next.serve(&listeners);
    let (served, ()) = tokio::join!(serving, async {
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    });
    assert!(matches!(served, Err(HandoverError::Ended | HandoverError::Channel(_))), "{served:?}");
}
