//! The hot paths whose instructions `tests/run.sh instructions` counts and compares with `tests/data/instructions.txt`.
//!
//! callgrind counts what a benchmark executes, without its setup, whatever else the machine does. A difference of a few
//! percent is therefore one of the code or of the compiler. To keep it that way:
//!
//! - Each benchmark repeats what it measures, so that the first time weighs little.
//! - Little is copied, since the C library copies with other instructions on another CPU.
//! - No cryptography, sockets or threads are involved.
//! - Hash tables are asked for many keys, since they are seeded at random.
//! - Nothing depends on how fast the time passes: it is passed in, or so little is sent that no window and no queue
//!   changes.
//!
//! The attribute `library_benchmark` refuses doc comments, so the comments of the benchmarks are ordinary ones.

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use access::{
    authz::{Attributes, Decision, rbac},
    request_info::RequestInfo,
    user::User,
};
use bytes::{Bytes, BytesMut};
use gungraun::{Callgrind, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group, main};
use master_agent::routing::{
    Routes,
    cluster::{Endpoint, EndpointSlice, Kind, Node, Object, Pod, Service, ServicePort},
};
use prost::Message;
use proto::{
    Target, connect,
    konnectivity::Packet,
    mux::{
        Version,
        frame::{self, Credit, Decoder, Frame, Hello},
        ids::Numbering,
        order::Early,
        window,
    },
    policy::{Policy, Rule, Verdict},
};
use proto_net::{
    gate::Gate,
    mux::{Feeder, Mux, SendFrame, Settings, hello},
    stalls,
    stream::Stream,
    tasks::Tasks,
};
use tests::process::TempDir;
use tokio::runtime::{self, Runtime};

/// How often a benchmark repeats what takes few instructions.
const TIMES: usize = 100;
/// The first stream that a master opens.
const STREAM: u64 = 1;

// Encoding and decoding of the multiplexer's frames.

/// The bytes of a message that fits into a packet of the network.
const MESSAGE: usize = 512;
const PACKET: usize = 32 * 1024;

fn message() -> Vec<u8> {
    vec![7u8; MESSAGE]
}

/// DATA frames of one stream, one after the other.
fn data_frames(count: usize, size: usize) -> Bytes {
    let payload = vec![7u8; size];
    let mut frames = BytesMut::new();
    for i in 0..count {
        let mut frame = frame::start_data(Version::V2, size);
        frame.extend_from_slice(&payload);
        frames.extend_from_slice(&frame::finish_data(Version::V2, frame, STREAM, (i * size) as u64));
    }
    frames.freeze()
}

/// The frames of a few short streams, apart from their data.
fn control_frames() -> Vec<Frame<'static>> {
    let of_stream = |i: u64| {
        let (stream, limit) = (2 * i + 1, u64::from(window::INITIAL));
        let (target, origin) = ("10.0.0.1:10250".to_owned(), "connect-unix uid=0".to_owned());
        [
            Frame::Open { stream, timeout_ms: 9_000, limit, target, origin },
            Frame::Opened { stream, limit },
            Frame::Credit { stream, credit: Credit::UpTo(2 * limit) },
            Frame::Eof { stream, end: Some(limit) },
        ]
    };
    (0..25).flat_map(of_stream).collect()
}

fn encoded_control_frames() -> Bytes {
    let mut encoded = BytesMut::new();
    for frame in control_frames() {
        encoded.extend_from_slice(&frame::encode(Version::V2, &frame));
    }
    encoded.freeze()
}

/// Decodes frames that come in the packets of an SSH session, which end anywhere in them.
fn decode_all(frames: &[u8]) {
    let mut decoder = Decoder::new(Version::V2);
    for mut packet in frames.chunks(PACKET) {
        while let Some(frame) = decoder.decode(&mut packet).expect("frames") {
            black_box(&frame);
        }
        assert!(packet.is_empty());
    }
}

#[library_benchmark(setup = message)]
fn encode_data(message: Vec<u8>) -> Vec<u8> {
    for i in 0..TIMES {
        let mut frame = frame::start_data(Version::V2, message.len());
        frame.extend_from_slice(&message);
        black_box(frame::finish_data(Version::V2, frame, STREAM, (i * MESSAGE) as u64));
    }
    message
}

#[library_benchmark(setup = data_frames)]
#[bench::large(100, 32 * 1024)]
#[bench::small(100, 64)]
fn decode_data(frames: Bytes) -> Bytes {
    decode_all(&frames);
    frames
}

#[library_benchmark(setup = control_frames)]
fn encode_control(frames: Vec<Frame<'static>>) -> Vec<Frame<'static>> {
    for frame in &frames {
        black_box(frame::encode(Version::V2, frame));
    }
    frames
}

#[library_benchmark(setup = encoded_control_frames)]
fn decode_control(frames: Bytes) -> Bytes {
    decode_all(&frames);
    frames
}

library_benchmark_group!(
    name = frames,
    benchmarks = [encode_data, decode_data, encode_control, decode_control]
);

// Flow control and order of one direction of a stream.

/// The size of a read from a stream, and how often it is read.
const READ: usize = 32 * 1024;
const READS: u32 = 1_000;
const ROUND_TRIP: Duration = Duration::from_millis(1);

fn new_window() -> (window::Receive, Instant) {
    let now = Instant::now();
    (window::Receive::new(Version::V2, now), now)
}

const PIECE: usize = 64;
const PIECES: usize = 200;

/// The pieces of a direction with their offsets. Over two connections, each comes before the one in front of it.
fn pieces(connections: usize) -> Vec<(u64, Vec<u8>)> {
    let mut pieces: Vec<_> = (0..PIECES).map(|i| ((i * PIECE) as u64, vec![7u8; PIECE])).collect();
    for together in pieces.chunks_mut(connections) {
        together.reverse();
    }
    pieces
}

// A reader takes 320 MB/s, so the window grows at first.
#[library_benchmark(setup = new_window)]
fn grant(new: (window::Receive, Instant)) -> window::Receive {
    let (mut receive, began) = new;
    let mut granted = 0;
    for i in 0..READS {
        let now = began + ROUND_TRIP / 10 * i;
        let taken = receive.on_taken(black_box(READ), now, ROUND_TRIP, |_, by| by);
        if let Some(grant) = taken.grant {
            granted = grant.limit;
        }
    }
    assert!(granted > 0);
    receive
}

#[library_benchmark(setup = pieces)]
#[bench::one_connection(1)]
#[bench::two_connections(2)]
fn put_in_order(pieces: Vec<(u64, Vec<u8>)>) -> Vec<(u64, Vec<u8>)> {
    let (mut early, mut received) = (Early::default(), 0);
    for (offset, bytes) in &pieces {
        if early.on_data(*offset, bytes, received).expect("data in order") {
            received += bytes.len() as u64;
            while let Some(more) = early.next(&mut received) {
                black_box(more);
            }
        }
    }
    assert!(received == (PIECES * PIECE) as u64);
    pieces
}

library_benchmark_group!(name = windows, benchmarks = [grant, put_in_order]);

// What the multiplexer does with the bytes of a stream, between the SSH session and the relay.

/// Messages on a stream. Together they are less than what is granted anew, and than what a gate admits of bytes that do not
/// leave.
const MESSAGES: usize = 100;

/// The node's end of a tunnel with one stream, whose frames vanish.
struct End {
    runtime: Runtime,
    _tasks: Tasks,
    feeder: Feeder,
    stream: Stream,
    message: Vec<u8>,
    /// The DATA frames of the peer.
    frames: Vec<Bytes>,
}

fn node_end() -> End {
    let runtime = runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let tasks = Tasks::new();
    let settings = Settings {
        numbering: Numbering::Halves { is_client: false },
        max_opened: 8,
        max_accepted: 8,
        stalls: stalls::ByDirection::default(),
        peer: Some(hello(Hello::FRONT_END, [1; 16])),
    };
    let send: SendFrame = Box::new(|_frame: Bytes| Box::pin(async { true }));
    let open = Frame::Open {
        stream: STREAM,
        timeout_ms: 9_000,
        limit: u64::from(window::INITIAL),
        target: "10.0.0.1:10250".to_owned(),
        origin: "test".to_owned(),
    };
    let (feeder, stream) = runtime.block_on(async {
        let (_, mut feeder, mut events) = Mux::new(settings, Gate::default(), send, &tasks);
        feeder.feed(&frame::encode(Version::V2, &open)).expect("an OPEN");
        let incoming = events.incoming.recv().await.expect("a stream");
        (feeder, incoming.accept().await.expect("a tunnel"))
    });
    let data = data_frames(MESSAGES, MESSAGE);
    let frames = data.chunks(data.len() / MESSAGES).map(Bytes::copy_from_slice).collect();
    End { runtime, _tasks: tasks, feeder, stream, message: message(), frames }
}

// An async block inside of a benchmark would not be counted: callgrind stops counting where a function begins whose path
// contains that of the benchmark.

async fn feed_and_take(feeder: &mut Feeder, stream: &mut Stream, frames: &[Bytes]) {
    for frame in frames {
        feeder.feed(frame).expect("DATA");
        assert!(stream.reader.fill().await.expect("bytes").len() == MESSAGE);
        stream.reader.taken().await.expect("a tunnel");
    }
}

async fn send_messages(stream: &mut Stream, message: &[u8]) {
    for _ in 0..MESSAGES {
        assert!(stream.writer.room().await.expect("a window") >= MESSAGE);
        let mut buffer = stream.writer.buffer(MESSAGE);
        buffer.extend_from_slice(message);
        stream.writer.send(buffer).await.expect("a tunnel");
    }
}

#[library_benchmark(setup = node_end)]
fn receive(end: End) -> End {
    let mut end = end;
    let End { runtime, feeder, stream, frames, .. } = &mut end;
    runtime.block_on(feed_and_take(feeder, stream, frames));
    end
}

#[library_benchmark(setup = node_end)]
fn send(end: End) -> End {
    let mut end = end;
    let End { runtime, stream, message, .. } = &mut end;
    runtime.block_on(send_messages(stream, message));
    end
}

library_benchmark_group!(name = streams, benchmarks = [receive, send]);

// What kube-apiserver sends to the egress listeners.

/// Recorded from kube-apiserver.
const CONNECT: &[u8] = include_bytes!("../data/captures/http-connect-uds-1.client.bin");

/// The packets of a short connection.
fn packets() -> Vec<Packet> {
    vec![
        Packet::dial_request(7_188_621_719_815_055_000, "10.0.0.1:10250"),
        Packet::dialled(7_188_621_719_815_055_000, 3),
        Packet::data(3, Bytes::from_static(&[7; 64])),
        Packet::close_request(3),
        Packet::close_response(3, String::new()),
    ]
}

fn encoded_packets() -> Vec<Bytes> {
    packets().iter().map(|packet| Bytes::from(packet.encode_to_vec())).collect()
}

#[library_benchmark]
fn parse_connect() {
    for _ in 0..TIMES {
        let request = connect::parse(black_box(CONNECT)).expect("a CONNECT request");
        assert!(black_box(request).is_some());
    }
}

#[library_benchmark(setup = packets)]
fn encode_packets(packets: Vec<Packet>) -> Vec<Packet> {
    let mut encoded = BytesMut::new();
    for _ in 0..TIMES {
        encoded.clear();
        for packet in &packets {
            packet.encode(&mut encoded).expect("room");
        }
        black_box(&encoded);
    }
    packets
}

#[library_benchmark(setup = encoded_packets)]
fn decode_packets(encoded: Vec<Bytes>) -> Vec<Bytes> {
    for _ in 0..TIMES {
        for bytes in &encoded {
            let packet = Packet::decode(bytes.clone()).expect("a packet");
            assert!(black_box(packet.into_payload()).is_some());
        }
    }
    encoded
}

library_benchmark_group!(name = egress, benchmarks = [parse_connect, encode_packets, decode_packets]);

// The decision of a node about each stream.

/// A policy, an address, and whether the policy allows it.
struct Case {
    policy: Policy,
    address: IpAddr,
    allowed: bool,
}

/// A policy of 20 rules, of which the last one or none decides.
fn case(address: &str, allowed: bool) -> Case {
    let rule = |i: usize| Rule {
        name: format!("pod-cidr-{i}"),
        net: format!("10.{i}.0.0/16").parse().expect("a network"),
        ports: 1..=u16::MAX,
    };
    let policy = Policy { rules: (0..20).map(rule).collect() };
    Case { policy, address: address.parse().expect("an address"), allowed }
}

#[library_benchmark(setup = case)]
#[bench::allowed("10.19.0.7", true)]
#[bench::refused("192.0.2.7", false)]
fn decide(case: Case) -> Case {
    for _ in 0..TIMES {
        let verdict = case.policy.decide(black_box(case.address), 8080);
        assert!(matches!(black_box(verdict), Verdict::Allow { .. }) == case.allowed);
    }
    case
}

library_benchmark_group!(name = node_policy, benchmarks = decide);

// What a request of the front end asks for, and whether its caller may.

const RULES_OF_ROLE: usize = 4;
const ROLES: usize = 50;

/// RBAC objects that give one group 200 rules. Only the last one is about deployments.
fn rbac_objects() -> String {
    let mut objects = String::new();
    for role in 0..ROLES {
        objects += &format!(
            "---\napiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\n\
             metadata: {{name: role-{role:02}}}\nrules:\n"
        );
        for rule in 0..RULES_OF_ROLE {
            let is_last = (role, rule) == (ROLES - 1, RULES_OF_ROLE - 1);
            let resource = if is_last { "deployments".to_owned() } else { format!("things-{role}-{rule}") };
            objects +=
                &format!("- {{apiGroups: [apps], resources: [{resource}], verbs: [list, watch, get]}}\n");
        }
        objects += &format!(
            "---\napiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\n\
             metadata: {{name: binding-{role:02}}}\nsubjects: [{{kind: Group, name: developers}}]\n\
             roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: role-{role:02}}}\n"
        );
    }
    objects
}

/// A caller with these rights, and what they ask for.
struct Asked {
    policy: rbac::Policy,
    user: User,
    request: RequestInfo,
}

fn asked() -> Asked {
    let dir = TempDir::new("instructions").expect("a directory");
    let file = dir.path().join("rbac.yaml");
    std::fs::write(&file, rbac_objects()).expect("a file");
    let policy = rbac::Policy::read(&[file]).expect("RBAC objects");
    assert!(policy.warnings.is_empty());
    let groups = ["developers", "system:authenticated"].map(str::to_owned).to_vec();
    let user = User { name: "jane".to_owned(), groups, ..User::default() };
    let path = "/apis/apps/v1/namespaces/default/deployments/web";
    let request = RequestInfo::resolve("GET", path, None, false).expect("a request");
    Asked { policy, user, request }
}

#[library_benchmark]
#[bench::get("/api/v1/namespaces/default/pods/web-7d9f8b6c5-x2x4z/log", "container=web")]
#[bench::watch("/api/v1/pods", "fieldSelector=spec.nodeName%3Dnode-1&resourceVersion=0&watch=true")]
fn resolve_request(path: &'static str, query: &'static str) {
    for _ in 0..TIMES {
        let request = RequestInfo::resolve("GET", black_box(path), Some(black_box(query)), false);
        assert!(black_box(request).is_ok_and(|request| request.is_resource));
    }
}

#[library_benchmark(setup = asked)]
fn authorize(asked: Asked) -> Asked {
    let attributes = Attributes { user: &asked.user, request: &asked.request };
    for _ in 0..TIMES {
        let decision = asked.policy.decide(black_box(&attributes));
        assert!(matches!(black_box(decision), Decision::Allow { .. }));
    }
    asked
}

library_benchmark_group!(name = requests, benchmarks = [resolve_request, authorize]);

// The way to a target, of which every dial asks.

/// The number of nodes, of pods and of services.
const NODES: u32 = 1_000;
const ENDPOINTS: u32 = 3;

/// By what a target is asked for.
#[derive(Clone, Copy)]
enum By {
    NodeName,
    PodAddress,
    ServiceAddress,
}

fn node_name(i: u32) -> String {
    format!("node-{i}")
}

fn pod_network(i: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + (i << 8))
}

fn pod_address(i: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(pod_network(i)) + 2)
}

fn service_address(i: u32) -> Ipv4Addr {
    Ipv4Addr::from(0xac10_0000 + i + 1)
}

/// A node, its pod, a service, and the endpoints of that.
fn objects(i: u32) -> [Object; 4] {
    let endpoint = |i: u32| Endpoint {
        address: pod_address(i % NODES).into(),
        node: node_name(i % NODES).parse().ok(),
        hostname: None,
        ready: true,
    };
    let created = i64::from(i);
    [
        Object::Node(Node {
            name: node_name(i).parse().expect("a node name"),
            created,
            addresses: vec![Ipv4Addr::from(0xc0a8_0000 + i + 1).into()],
            cidrs: vec![format!("{}/24", pod_network(i)).parse().expect("a network")],
            kubelet_port: 10250,
        }),
        Object::Pod(Pod {
            key: format!("default/app-{i}-7d9f8b6c5-x2x4z").into(),
            created,
            node: node_name(i).parse().ok(),
            addresses: vec![pod_address(i).into()],
            host_network: false,
            ended: false,
            first_port: Some(8080),
        }),
        Object::Service(Service {
            key: format!("default/service-{i}").into(),
            created,
            addresses: vec![service_address(i).into()],
            ports: vec![ServicePort { name: "http".to_owned(), port: 80 }],
            external_name: None,
        }),
        Object::EndpointSlice(EndpointSlice {
            key: format!("default/service-{i}-abcde").into(),
            service: format!("default/service-{i}").into(),
            ports: vec![("http".to_owned(), Some(8080))],
            endpoints: (i..i + ENDPOINTS).map(endpoint).collect(),
        }),
    ]
}

/// The routes of a cluster, and a target for each of its nodes.
fn routes_and_targets(by: By) -> (Routes, Vec<Target>) {
    let mut routes = Routes { cluster_domain: "cluster.local".to_owned(), ..Routes::default() };
    for object in (0..NODES).flat_map(objects) {
        routes.cluster.apply(object);
    }
    for kind in Kind::ALL {
        routes.cluster.settle(kind);
    }
    let target = |i: u32| {
        let text = match by {
            By::NodeName => format!("{}:10250", node_name(i)),
            By::PodAddress => format!("{}:8080", pod_address(i)),
            By::ServiceAddress => format!("{}:80", service_address(i)),
        };
        text.parse().expect("a target")
    };
    let targets = (0..NODES).map(target).collect();
    (routes, targets)
}

#[library_benchmark(setup = routes_and_targets)]
#[bench::node_name(By::NodeName)]
#[bench::pod_address(By::PodAddress)]
#[bench::service_address(By::ServiceAddress)]
fn find_route(input: (Routes, Vec<Target>)) -> (Routes, Vec<Target>) {
    let (routes, targets) = &input;
    for target in targets {
        assert!(black_box(routes.find(target)).is_ok());
    }
    input
}

library_benchmark_group!(name = routing, benchmarks = find_route);

main!(
    config = LibraryBenchmarkConfig::default().tool(Callgrind::with_args(["--cache-sim=no"])),
    library_benchmark_groups = [frames, windows, streams, egress, node_policy, requests, routing]
);
