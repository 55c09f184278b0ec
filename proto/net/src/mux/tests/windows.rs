//! Windows that grow on a long path, and the credit of idle streams.

use std::time::Instant;

use super::*;
use crate::stream::Reader;

const MB: u32 = 1024 * 1024;
const RTT: Duration = Duration::from_secs(1);

/// The window that the master grants on a stream.
fn window_of(pair: &Pair, id: u64) -> u32 {
    pair.master.streams().open.get(&id).unwrap().lock().receive.size()
}

/// Carries 1 MB to the master, which takes some of it in each millisecond.
async fn carry((near, far): &mut (Stream, Stream), now: &mut Instant) {
    let bytes = vec![3; MB as usize];
    let takes = async {
        let mut taken = 0;
        while taken < bytes.len() {
            taken += near.reader.fill().await.unwrap().len();
            *now += Duration::from_millis(1);
            let Reader::Mux(reader) = &mut near.reader else { panic!("the multiplexer carries it") };
            reader.taken_at(*now, RTT).await;
        }
    };
    tokio::join!(send(far, &bytes), takes);
}

#[tokio::test]
async fn a_stream_beside_an_idle_one_gets_the_window_that_this_has_had() {
    let mut pair = pair(10);
    let mut streams = [connect(&mut pair).await, connect(&mut pair).await];
    let (ids, mut now) = ([1, 3], Instant::now());
    for active in [0, 1, 0] {
        let mut carried = 0;
        while window_of(&pair, ids[active]) < 64 * MB {
            carry(&mut streams[active], &mut now).await;
            carried += 1;
            assert!(carried < 200, "{} bytes", window_of(&pair, ids[active]));
        }
        assert!(pair.master.budget().left() <= window::INITIAL);
        now += Duration::from_secs(60);
    }
    assert_eq!(window_of(&pair, ids[1]), window::INITIAL);
    drop(streams);
    assert_eq!(pair.master.budget().left(), Budget::total(Version::V2));
}

#[tokio::test]
async fn with_a_peer_of_the_first_version_windows_grow_as_they_did() {
    let mut pair = pair_of(Version::V1, 10);
    let mut streams = [connect(&mut pair).await, connect(&mut pair).await];
    let mut now = Instant::now();
    for active in &mut streams {
        // The ends of a pair take no frame that the first version lacks.
        for _ in 0..40 {
            carry(active, &mut now).await;
        }
        now += Duration::from_secs(60);
    }
    assert_eq!([1, 2].map(|id| window_of(&pair, id)), [16 * MB, 8 * MB]);
}
