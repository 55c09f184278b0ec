//! Sessions over links in memory, with an SSH client of russh at the other end.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use proto::{
    DialError, Target,
    mux::{
        FRONT_END_SUBSYSTEM, Version,
        frame::{self, Decoder, Frame, Hello},
        ids::{Numbering, Opener},
        window,
    },
    refusal,
    relink::GRACE,
    revocation::{
        SignedList,
        krl::{Entry, Krl},
    },
};
use proto_net::{
    channel::Channels,
    clock::Clock,
    gate::Gate,
    handshake::HandshakePermits,
    mux::{Mux, Notice, Settings},
    stalls::{self, Stalls},
};
use russh::{Channel, ChannelMsg, ChannelOpenFailure, client};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use self::peer::{
    HANDSHAKE_TIMEOUT, MAX_CLOSED_FIRST, MAX_PEOPLE, MAX_STREAMS, Peer, SHUTDOWN_GRACE, ServedLink, TestNode,
    VALID, assert_echoes, echo_server,
};
use super::{error::SessionError, state::SessionState, streams::EXPIRED, user::AuthenticatedUser};
use crate::{
    drain::DRAINED,
    identity::user::{MASTER, UserRole},
    shares::Shares,
    testing::{CertificateSpec, NOW, new_key, now, valid_for},
};

mod peer;

const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Later than the end of a certificate, and before the node's patience with its session ends.
const AFTER_THE_END: Duration = VALID.saturating_add(GRACE).saturating_add(Duration::from_secs(2));

fn target(port: u16) -> Target {
    format!("127.0.0.1:{port}").parse().unwrap()
}

async fn open_channel(peer: &Peer, port: u16) -> Result<Channel<client::Msg>, russh::Error> {
    peer.handle.channel_open_direct_tcpip("127.0.0.1", u32::from(port), "127.0.0.1", 9).await
}

#[tokio::test]
async fn a_drained_node_tells_its_master_and_takes_no_streams_after_the_deadline() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let (master, mux, mut events) = node.connect_master().await;
    let drain = node.streams.drain.clone();
    let mut stream = mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    let mut channel = open_channel(&master, port).await.unwrap();
    drain.begin(Duration::from_secs(60)).await.unwrap();
    let Some(Notice::Drain { milliseconds }) = events.notices.recv().await else { panic!("no DRAIN") };
    assert!((1..=60_000).contains(&milliseconds), "{milliseconds}");
    assert_echoes(&mut stream).await;
    drop(mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap());
    drop(open_channel(&master, port).await.unwrap());

    drain.begin(Duration::ZERO).await.unwrap();
    assert_eq!(events.notices.recv().await, Some(Notice::Drain { milliseconds: 1 }));
    assert!(stream.reader.fill().await.is_err_and(|error| error.0 == DRAINED));
    while channel.wait().await.is_some() {}
    assert!(drain.cut() >= 2);
    let refused = mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap_err();
    assert!(refused.retry_elsewhere(), "{refused}");
    assert!(open_channel(&master, port).await.is_err());
    // Another session, since the first one has had many channels that the node closed.
    let (master, mux, mut events) = node.connect_master().await;
    let told = events.notices.recv().await;
    assert_eq!(told, Some(Notice::Drain { milliseconds: 1 }), "each session is told");

    assert!(drain.end().await.unwrap());
    assert_eq!(events.notices.recv().await, Some(Notice::Drain { milliseconds: 0 }));
    mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    open_channel(&master, port).await.unwrap();
}

#[tokio::test]
async fn a_refusal_travels_back_as_the_error_that_it_is() {
    let node = TestNode::new();
    let (master, mux, _events) = node.connect_master().await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let open = async |port| mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap_err();
    let refused = open(1).await;
    assert!(matches!(&refused, DialError::Policy { rule, .. } if rule == "loopback"), "{refused}");
    assert!(matches!(open(closed).await, DialError::Refused(_)));
    for (port, expected) in
        [(1, ChannelOpenFailure::AdministrativelyProhibited), (closed, ChannelOpenFailure::ConnectFailed)]
    {
        match open_channel(&master, port).await {
            Err(russh::Error::ChannelOpenFailure(failure)) => assert_eq!(failure, expected, "{port}"),
            other => panic!("{port}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_and_the_others_go_on() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let (master, mux, _events) = node.connect_master().await;
    let target = target(port);
    let mut streams = Vec::new();
    for _ in 0..MAX_STREAMS {
        streams.push(mux.open(&target, "test", OPEN_TIMEOUT).await.unwrap());
    }
    let beyond = mux.open(&target, "test", OPEN_TIMEOUT).await;
    assert!(matches!(beyond, Err(DialError::TooManyStreams(_))));
    for stream in &mut streams {
        assert_echoes(stream).await;
    }
    streams.pop();
    // The node learns of the end a moment later.
    while mux.open(&target, "test", OPEN_TIMEOUT).await.is_err() {
        tokio::task::yield_now().await;
    }

    let mut channels = Vec::new();
    for _ in 0..MAX_STREAMS {
        channels.push(open_channel(&master, port).await.unwrap());
    }
    let beyond = open_channel(&master, port).await;
    assert!(matches!(beyond, Err(russh::Error::ChannelOpenFailure(ChannelOpenFailure::ResourceShortage))));
}

#[tokio::test]
async fn a_master_gets_no_more_with_further_sessions_and_takes_nothing_from_another() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let target = target(port);
    let (key, mut sessions, mut streams) = (new_key(), Vec::new(), Vec::new());
    let mut beyond = None;
    for _ in 0..3 {
        let mut session = node.connect_with(MASTER, key.clone(), VALID).await;
        let (mux, events) = session.start_mux().await;
        for _ in 0..MAX_STREAMS {
            match mux.open(&target, "test", OPEN_TIMEOUT).await {
                Ok(stream) => streams.push(stream),
                Err(error) => beyond = Some(error),
            }
        }
        sessions.push((session, events));
    }
    assert_eq!(
        streams.len(),
        2 * MAX_STREAMS,
        "as many as on the multiplexer and the channels of one session"
    );
    assert!(matches!(beyond, Some(DialError::TooManyStreams(_))), "{beyond:?}");
    let channel = open_channel(&sessions[0].0, port).await;
    assert!(matches!(channel, Err(russh::Error::ChannelOpenFailure(ChannelOpenFailure::ResourceShortage))));
    let (_other, mux, _events) = node.connect_master().await;
    assert_echoes(&mut mux.open(&target, "test", OPEN_TIMEOUT).await.unwrap()).await;
    assert_echoes(&mut streams[0]).await;
}

#[tokio::test]
async fn a_master_has_so_many_sessions_and_another_has_its_own() {
    const MOST: usize = 160;
    let node = TestNode::new();
    let (key, mut sessions) = (new_key(), Vec::new());
    for _ in 0..MOST {
        let session = node.connect_with(MASTER, key.clone(), VALID).await;
        assert!(session.accepted);
        sessions.push(session);
    }
    let mut beyond = node.connect_with(MASTER, key.clone(), VALID).await;
    assert!(!beyond.accepted);
    let said = beyond.farewell().await;
    assert!(said.contains("too many sessions"), "{said}");
    assert!(node.connect(MASTER).await.accepted);
    let left = sessions.pop().unwrap();
    left.handle.disconnect(russh::Disconnect::ByApplication, "", "").await.unwrap();
    let _ = left.ended().await;
    assert!(node.connect_with(MASTER, key, VALID).await.accepted);
}

#[tokio::test]
async fn only_a_master_answers_a_call_home() {
    let node = TestNode::new();
    let alice = node.answer(node.call_home(), "alice", new_key(), VALID).await;
    assert!(!alice.accepted);
    assert!(node.connect("alice").await.accepted);
    assert!(node.answer(node.call_home(), MASTER, new_key(), VALID).await.accepted);
}

#[tokio::test]
async fn an_id_that_is_used_twice_ends_its_own_tunnel_alone() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let (_honest, mux, _events) = node.connect_master().await;
    let mut stream = mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    let mut hostile = node.connect(MASTER).await;
    let channel = hostile.start_raw_mux().await;
    let open = Frame::Open {
        stream: 7,
        timeout_ms: 10_000,
        limit: window::INITIAL.into(),
        target: target(1).to_string(),
        origin: "test".to_owned(),
    };
    hostile.send_raw(channel, &open).await;
    let refused = hostile
        .next_raw(
            |frame| {
                if let Frame::Refused { stream, error } = frame { Some((stream, error)) } else { None }
            },
        )
        .await;
    assert!(matches!(refused, (7, DialError::Policy { .. })));
    hostile.send_raw(channel, &open).await;
    let ended = hostile.ended().await;
    assert!(matches!(ended, Err(SessionError::Multiplexer(_))), "{ended:?}");
    assert_echoes(&mut stream).await;
    mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
}

#[tokio::test]
async fn after_the_end_of_its_certificate_a_master_opens_nothing_and_its_streams_go_on() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let (mut master, mux, mut events) = node.connect_master().await;
    let mut stream = mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    assert_echoes(&mut stream).await;
    let mut hostile = node.connect(MASTER).await;
    let channel = hostile.start_raw_mux().await;
    let open = |stream| Frame::Open {
        stream,
        timeout_ms: 10_000,
        limit: window::INITIAL.into(),
        target: target(port).to_string(),
        origin: "test".to_owned(),
    };
    hostile.send_raw(channel, &open(1)).await;
    hostile.next_raw(|frame| matches!(frame, Frame::Opened { stream: 1, .. }).then_some(())).await;

    tokio::time::pause();
    tokio::time::sleep(VALID).await;
    mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    tokio::time::sleep(AFTER_THE_END - VALID).await;
    let goaway = events.notices.recv().await;
    assert_eq!(goaway, Some(Notice::GoAway("the certificate of this session has expired".into())));
    // The hostile master does not heed GOAWAY.
    hostile.send_raw(channel, &open(2)).await;
    let refused = hostile
        .next_raw(|frame| {
            assert!(!matches!(frame, Frame::Opened { stream: 2, .. }), "it was opened");
            if let Frame::Refused { error, .. } = frame { Some(error) } else { None }
        })
        .await;
    assert!(matches!(refused, DialError::TunnelLost { .. }), "{refused}");
    let channel = open_channel(&master, port).await;
    let prohibited = ChannelOpenFailure::AdministrativelyProhibited;
    assert!(matches!(channel, Err(russh::Error::ChannelOpenFailure(failure)) if failure == prohibited));

    assert_echoes(&mut stream).await;
    drop(stream);
    assert_eq!(master.farewell().await, "the certificate of this session has expired");
    assert!(master.ended().await.is_ok());
}

/// A master's certificate has expired when streams that it has asked for still wait.
#[tokio::test]
async fn what_is_asked_for_too_late_is_refused_with_the_reason() {
    let node = TestNode::new();
    let key = new_key();
    let certificate =
        CertificateSpec { principals: &[MASTER], ..CertificateSpec::user(&node.user_ca, key.public_key()) };
    let shares = Shares::new(9, 9);
    let user = AuthenticatedUser {
        role: UserRole::Master,
        certificate: CertificateSpec { valid: (1, 2), ..certificate }.sign(),
        clock: Clock::new_virtual(),
        streams: shares.of("streams"),
        lookups: shares.of("lookups"),
    };
    let gate = Gate::default();
    let channels = Channels::new(gate.clone(), node.tasks.clone(), OPEN_TIMEOUT, Stalls::default());
    let (sent, mut frames) = mpsc::unbounded_channel();
    let out = move |frame: Bytes| {
        let sent = sent.clone();
        Box::pin(async move { sent.send(frame).is_ok() }) as _
    };
    let settings = Settings {
        numbering: Numbering::All { opener: Opener::Peer },
        max_opened: 0,
        max_accepted: MAX_STREAMS,
        stalls: stalls::ByDirection::default(),
        peer: None,
    };
    let (mux, mut feeder, events) = Mux::new(settings, gate, Box::new(out), &node.tasks);
    for stream in 1..=MAX_STREAMS as u64 {
        let (target, origin, limit) = (target(1).to_string(), "test".to_owned(), window::INITIAL.into());
        let open = Frame::Open { stream, timeout_ms: 9, limit, target, origin };
        feeder.feed(&frame::encode(Version::V1, &open)).unwrap();
    }
    let state = Arc::new(SessionState::new(channels, mpsc::channel(1).0, true));
    let streams = node.streams.clone();
    streams.serve_mux(Arc::new(user), state, mux, events.incoming, node.tasks.clone()).await;
    let (mut decoder, mut refused) = (Decoder::new(Version::V1), 0);
    while refused < MAX_STREAMS {
        let bytes = frames.recv().await.unwrap();
        let mut bytes = &bytes[..];
        while let Some(frame) = decoder.decode(&mut bytes).unwrap() {
            let Frame::Refused { error, .. } = frame else { continue };
            assert!(matches!(&error, DialError::TunnelLost { reason, .. } if reason == EXPIRED), "{error}");
            refused += 1;
        }
    }
}

#[tokio::test]
async fn a_master_that_only_says_that_it_has_another_link_is_closed_all_the_same() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let (mut master, mux, _events) = node.connect_master().await;
    let _stream = mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    mux.go_away("another link has taken its place").await;
    master.sync().await;
    let began = Instant::now();
    tokio::time::pause();
    assert_eq!(master.farewell().await, "the certificate of this session has expired");
    let (lasted, expected) = (began.elapsed(), VALID + GRACE + SHUTDOWN_GRACE);
    assert!(
        lasted + Duration::from_secs(5) > expected && lasted < expected + Duration::from_secs(5),
        "{lasted:?}"
    );
}

#[tokio::test]
async fn only_a_master_that_makes_no_other_link_is_closed_with_its_streams() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let (mut forgetful, mux, _events) = node.connect_master().await;
    let _stream = mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    let (mut relinked, other, _events) = node.connect_master().await;
    let mut kept = other.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    other.go_away("another link has taken its place").await;
    let _its_place = node.connect_with(MASTER, new_key(), 100 * VALID).await;
    let person = node.connect("alice").await;
    let channel = open_channel(&person, port).await.unwrap();
    let began = Instant::now();

    tokio::time::pause();
    assert_eq!(forgetful.farewell().await, "the certificate of this session has expired");
    let lasted = began.elapsed();
    let expected = VALID + GRACE + SHUTDOWN_GRACE;
    let slack = Duration::from_secs(5);
    assert!(lasted > expected - slack && lasted < expected + slack, "{lasted:?}");

    tokio::time::sleep(10 * SHUTDOWN_GRACE).await;
    assert_echoes(&mut kept).await;
    channel.data(&b"hello"[..]).await.unwrap();
    assert!(!person.served.is_finished() && !relinked.served.is_finished());
    drop(kept);
    assert_eq!(relinked.farewell().await, "another link has taken its place, and its streams have ended");
}

#[tokio::test]
async fn a_session_that_is_retired_tells_its_master_and_lives_as_long_as_its_streams() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let (mut master, mux, mut events) = node.connect_master().await;
    let mut stream = mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    let authenticated = (&mut master.proof).await.unwrap();
    let relink = authenticated.relink.unwrap();
    assert!(relink > VALID / 4 && relink < VALID, "{relink:?}");
    authenticated.retire.cancel();
    let goaway = events.notices.recv().await;
    assert_eq!(goaway, Some(Notice::GoAway("the node has made another link to this master".into())));
    assert!(mux.open(&target(port), "test", OPEN_TIMEOUT).await.is_err());

    tokio::time::pause();
    tokio::time::sleep(AFTER_THE_END + 10 * SHUTDOWN_GRACE).await;
    assert_echoes(&mut stream).await;
    drop(stream);
    assert_eq!(master.farewell().await, "another link has taken its place, and its streams have ended");
}

#[tokio::test]
async fn masters_are_told_that_the_agent_drains_and_then_that_it_stops() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let (mut master, mux, mut events) = node.connect_master().await;
    let mut stream = mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    node.shutdown.draining.cancel();
    let goaway = events.notices.recv().await;
    assert_eq!(goaway, Some(Notice::GoAway("the node-agent is stopping".into())));
    assert_echoes(&mut stream).await;
    node.shutdown.stopping.cancel();
    assert_eq!(master.farewell().await, "node-agent is stopping");
    assert!(master.ended().await.is_ok());
    assert_eq!(node.metrics.sessions.masters.get(), 0);
}

#[tokio::test]
async fn an_agent_that_drains_takes_no_channels_and_waits_for_no_handshake() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let person = node.connect("alice").await;
    let channel = open_channel(&person, port).await.unwrap();
    let silent = [node.accept(None), node.call_home()];
    node.shutdown.draining.cancel();
    for silent in silent {
        let ended = silent.served.await.unwrap().unwrap();
        assert!(matches!(ended, Err(SessionError::Stopping)), "{ended:?}");
    }
    let prohibited = ChannelOpenFailure::AdministrativelyProhibited;
    let refused = open_channel(&person, port).await;
    assert!(matches!(refused, Err(russh::Error::ChannelOpenFailure(failure)) if failure == prohibited));
    channel.data(&b"hello"[..]).await.unwrap();
    assert!(!person.served.is_finished());
    assert_eq!(node.shutdown.dials.len(), 0, "no dial is under way");
}

#[tokio::test]
async fn a_session_with_many_channels_that_its_client_does_not_close_is_replaced() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let mut person = node.connect("alice").await;
    let held = open_channel(&person, port).await.unwrap();
    for _ in 0..MAX_CLOSED_FIRST {
        let mut channel = open_channel(&person, port).await.unwrap();
        channel.eof().await.unwrap();
        while !matches!(channel.wait().await, Some(ChannelMsg::Close) | None) {}
    }
    let refused = open_channel(&person, port).await;
    assert!(matches!(refused, Err(russh::Error::ChannelOpenFailure(ChannelOpenFailure::ResourceShortage))));
    assert!(!person.served.is_finished(), "a stream goes on");
    held.close().await.unwrap();
    let said = person.farewell().await;
    assert!(said.contains("connect again"), "{said}");
}

#[tokio::test]
async fn one_list_is_brought_at_a_time_also_if_its_channel_is_closed_early() {
    let node = TestNode::new();
    let master = node.connect(MASTER).await;
    let under_way = node.revocations.turn.clone().acquire_owned().await.unwrap();
    let mut list = Krl::new(1);
    list.add(node.user_ca.public_key(), Entry::KeyId(b"alice".to_vec())).unwrap();
    let list = SignedList::sign(&node.user_ca, list.encode().unwrap()).unwrap();
    let first = master.begin_exchange().await.unwrap();
    master.handle.data(first.id(), list.encode()).await.unwrap();
    first.close().await.unwrap();
    master.sync().await;
    assert!(master.begin_exchange().await.is_none(), "another one is under way");
    drop(under_way);
    while master.begin_exchange().await.is_none() {
        tokio::task::yield_now().await;
    }
    assert!(!node.connect("alice").await.accepted, "the first list is in force");
}

#[tokio::test]
async fn a_certificate_that_is_revoked_ends_its_sessions_and_no_others() {
    let node = TestNode::new();
    let port = echo_server(&node.tasks).await;
    let (master, mux, _events) = node.connect_master().await;
    let mut stream = mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    let mut person = node.connect("alice").await;
    let _channel = open_channel(&person, port).await.unwrap();
    let mut list = Krl::new(1);
    list.add(node.user_ca.public_key(), Entry::KeyId(b"alice".to_vec())).unwrap();
    master.bring(&SignedList::sign(&node.user_ca, list.encode().unwrap()).unwrap()).await;
    assert_eq!(person.farewell().await, "the certificate of this session is revoked");
    assert_echoes(&mut stream).await;
    assert!(!node.connect("alice").await.accepted);
    assert!(node.connect("bob").await.accepted);
}

#[tokio::test]
async fn people_beyond_the_limit_are_refused_and_masters_are_not() {
    let node = TestNode::new();
    let mut people = Vec::new();
    for _ in 0..MAX_PEOPLE {
        people.push(node.connect("alice").await);
        assert!(people.last().unwrap().accepted);
    }
    assert!(!node.connect("alice").await.accepted);
    assert!(node.connect(MASTER).await.accepted);
    let left = people.pop().unwrap();
    left.handle.disconnect(russh::Disconnect::ByApplication, "", "").await.unwrap();
    let _ = left.ended().await;
    assert!(node.connect("alice").await.accepted);
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused_and_its_master_is_told_why() {
    let node = TestNode::new();
    let (ca, key) = (new_key(), new_key());
    let spec = CertificateSpec::user(&ca, key.public_key());
    let certificate = CertificateSpec { principals: &[MASTER], valid: valid_for(VALID), ..spec }.sign();
    let mut peer = Peer::on(node.accept(None)).await;
    peer.authenticate(MASTER, key, certificate).await;
    assert!(!peer.accepted);
    let said = peer.farewell().await;
    assert!(said.contains("signed by a CA that is not trusted here"), "{said}");
    let ended = peer.ended().await;
    assert!(matches!(ended, Err(SessionError::MasterCertificate(_))), "{ended:?}");
    assert_eq!((node.count_handshakes("ok"), node.count_handshakes("failed")), (0, 1));
}

#[tokio::test]
async fn nothing_but_forwarding_is_served() {
    let node = TestNode::new();
    let person = node.connect("alice").await;
    let session = person.handle.channel_open_session().await;
    let prohibited = ChannelOpenFailure::AdministrativelyProhibited;
    assert!(matches!(session, Err(russh::Error::ChannelOpenFailure(failure)) if failure == prohibited));

    let master = node.connect(MASTER).await;
    let mut channel = master.handle.channel_open_session().await.unwrap();
    channel.request_shell(true).await.unwrap();
    channel.exec(true, "true").await.unwrap();
    channel.request_subsystem(true, "sftp").await.unwrap();
    let mut failures = 0;
    while failures < 3 {
        match channel.wait().await {
            Some(ChannelMsg::Failure) => failures += 1,
            Some(ChannelMsg::WindowAdjusted { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(master.handle.tcpip_forward("127.0.0.1", 0).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_stays_silent_is_dropped_and_gives_way_to_newer_ones() {
    let node = TestNode::new();
    let began = Instant::now();
    let silent = node.accept(None);
    let ended = silent.served.await.unwrap().unwrap();
    assert!(matches!(ended, Err(SessionError::HandshakeTimeout(HANDSHAKE_TIMEOUT))), "{ended:?}");
    assert_eq!(began.elapsed(), HANDSHAKE_TIMEOUT);

    let handshakes = HandshakePermits::new(1);
    let permit = || Some(handshakes.take(IpAddr::from([10, 0, 0, 1])));
    let first = node.accept(permit());
    let second = node.accept(permit());
    let ended = first.served.await.unwrap().unwrap();
    assert!(matches!(ended, Err(SessionError::Evicted)), "{ended:?}");
    drop(second.link);
    assert_eq!(node.count_handshakes("failed"), 2);
}

#[tokio::test]
async fn renewed_certificates_are_installed_unless_the_masters_own_has_expired() {
    let mut node = TestNode::new();
    let key = node.identity.get().host_key().public_key().clone();
    let host = CertificateSpec::host(&node.host_ca, &key);
    let renewed = |hours: u64| CertificateSpec { valid: (NOW, NOW + hours * 3600), ..host }.text();
    let end = |node: &TestNode| node.identity.get().not_after();
    let [present, later] = [1, 2].map(|hours| Some(now() + Duration::from_secs(hours * 3600)));
    assert_eq!(end(&node), present);
    let (master, mux, _events) = node.connect_master().await;
    assert!(mux.send_certificate(&renewed(2)).await);
    master.sync().await;
    // The session is gone before the certificate is installed.
    drop(master);
    let stop = CancellationToken::new();
    let installer = node.installer.take().unwrap();
    let (expired, mux, _events) = node.connect_master().await;
    let port = echo_server(&node.tasks).await;
    let _keeps_the_session = mux.open(&target(port), "test", OPEN_TIMEOUT).await.unwrap();
    tokio::time::pause();
    tokio::time::sleep(AFTER_THE_END).await;
    assert!(mux.send_certificate(&renewed(3)).await);
    expired.sync().await;
    stop.cancel();
    installer.run(stop).await;
    assert_eq!(end(&node), later);
}

#[tokio::test]
async fn callers_go_to_masters_in_turn_and_not_to_one_that_takes_none() {
    let node = TestNode::new();
    // The second one is of an earlier release.
    let (mut first, mut second) = (node.connect(MASTER).await, node.connect(MASTER).await);
    let (first_mux, mut first_events) = first.start_mux().await;
    let (_second_mux, mut second_events) = second.start_mux_v1(Opener::Peer).await;
    let front_ends = node.front_ends.clone();
    let mut open = async || {
        let accept = async {
            let (which, incoming) = tokio::select! {
                incoming = first_events.incoming.recv() => (1, incoming),
                incoming = second_events.incoming.recv() => (2, incoming),
            };
            (which, incoming.unwrap().accept().await.unwrap())
        };
        let (opened, (which, _stream)) = tokio::join!(front_ends.open("test", OPEN_TIMEOUT), accept);
        opened.unwrap();
        which
    };
    let turns = [open().await, open().await];
    assert!(turns == [1, 2] || turns == [2, 1], "{turns:?}");
    first_mux.go_away("the master is stopping").await;
    first.sync().await;
    for _ in 0..3 {
        assert_eq!(open().await, 2);
    }
    drop(second);
    tokio::time::pause();
    let none = front_ends.open("test", OPEN_TIMEOUT).await;
    assert!(none.is_err_and(|error| error.retry_elsewhere()));
}

#[tokio::test]
async fn a_master_that_wants_to_be_called_again_ends_the_session_before_the_key_exchange() {
    let node = TestNode::new();
    let ServedLink { mut link, served, proof } = node.call_home();
    link.write_all(&refusal::come_again(Duration::from_secs(5))).await.unwrap();
    let mut said = Vec::new();
    link.read_to_end(&mut said).await.unwrap();
    assert!(said.starts_with(b"SSH-2.0-node-agent\r\n"));
    drop(link);
    assert!(matches!(served.await.unwrap(), Some(Ok(()))));
    assert!(proof.await.is_err());
}

#[tokio::test]
async fn a_connection_joins_the_session_of_that_name_if_it_is_the_same_master_s() {
    let node = TestNode::new();
    let (first, mux, _events) = node.connect_master().await;
    let session = mux.peer().unwrap().session;
    let mut other = node.connect_other_master().await;
    assert!(!other.greet(session).await.1.can(Hello::JOINED), "another master");
    let mut unknown = node.connect(MASTER).await;
    assert!(!unknown.greet([9; 16]).await.1.can(Hello::JOINED), "a name that nobody knows");
    // The master's key changes with its certificate.
    let mut further = node.connect(MASTER).await;
    let (channel, said) = further.greet(session).await;
    assert!(said.can(Hello::JOINED) && said.session == session);
    assert_eq!(said.instance, mux.peer().unwrap().instance);
    further.join(channel, &mux);
    assert_eq!(mux.further_connections(), 1);

    // It ends with the first one, and nobody joins that session again.
    first.sync().await;
    drop((first, mux));
    assert_eq!(further.farewell().await, "the session that this connection belonged to has ended");
    let mut late = node.connect(MASTER).await;
    assert!(!late.greet(session).await.1.can(Hello::JOINED));
}

/// A link that this node has dialled for a session of its own joins none, and one that it has dialled as a further connection
/// is nothing else.
#[tokio::test]
async fn a_link_is_what_this_node_has_dialled_it_for() {
    let node = TestNode::new();
    let (_first, mux, _events) = node.connect_master().await;
    let session = mux.peer().unwrap().session;
    let mut own = node.answer(node.call_home(), MASTER, new_key(), VALID).await;
    assert!(!own.greet(session).await.1.can(Hello::JOINED));
    let mut called = node.answer(node.call_home_further(), MASTER, new_key(), VALID).await;
    assert!(called.greet(session).await.1.can(Hello::JOINED));
    for subsystem in [Version::V1.subsystem(), FRONT_END_SUBSYSTEM] {
        let late = node.answer(node.call_home_further(), MASTER, new_key(), VALID).await;
        assert!(!late.is_granted(subsystem).await, "{subsystem}");
    }
    let late = node.answer(node.call_home_further(), MASTER, new_key(), VALID).await;
    late.ask([9; 16]).await;
    let ended = late.ended().await;
    assert!(matches!(ended, Err(SessionError::NotFurther)), "{ended:?}");
}
