//! The path of packets that the benchmark measures on.

use std::time::Duration;

use tests::{
    packet_path::{Conditions, PacketPath},
    pattern::Checker,
    target,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// TCP repairs what the path does to packets: all bytes arrive although packets are lost and queues overflow.
#[tokio::test]
async fn tcp_carries_every_byte_over_a_lossy_path_of_packets() {
    const BYTES: u64 = 4 << 20;
    let conditions = Conditions { queue: 12_000.0, ..Conditions::new(Duration::from_millis(4), 200e6, 0.01) };
    let path = PacketPath::start(conditions, 1, None).unwrap();
    let address = {
        let _far = path.far.enter().unwrap();
        target::serve((path.far_address, 0).into()).await.unwrap()
    };
    let mut socket = {
        let _near = path.near.enter().unwrap();
        TcpStream::connect(address).await.unwrap()
    };
    socket.write_all(format!("source {BYTES}\n").as_bytes()).await.unwrap();
    let (mut checker, mut buffer) = (Checker::default(), vec![0; 64 * 1024]);
    loop {
        match socket.read(&mut buffer).await.unwrap() {
            0 => break,
            n => checker.check(&buffer[..n]),
        }
    }
    assert_eq!(checker.offset(), BYTES);
    let traffic = path.traffic();
    assert!(traffic.passed > BYTES / 1500 && traffic.lost > 0 && traffic.overflowed > 0, "{traffic:?}");
    println!("  {traffic:?}, {:.2} s of the hop", path.cpu());
}
