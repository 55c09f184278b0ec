//! The port of kubelets, which is the same on all nodes. Nodes of tests share the loopback addresses, so one test at a
//! time has a kubelet there.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    time::Duration,
};

use tokio::sync::{Mutex, MutexGuard};

use crate::process::eventually;

pub const PORT: u16 = 10250;

/// Keeps other tests from listening at [`PORT`] of loopback addresses, or from relying on nobody doing so.
pub async fn reserve() -> MutexGuard<'static, ()> {
    static RESERVED: Mutex<()> = Mutex::const_new(());
    let reserved = RESERVED.lock().await;
    // The runtime of the last test may not have closed its listeners yet.
    for host in 1..=3 {
        let address = SocketAddr::from((Ipv4Addr::new(127, 0, 0, host), PORT));
        eventually("the kubelet's port is free", Duration::from_secs(20), async || {
            TcpListener::bind(address).ok().map(drop)
        })
        .await;
    }
    reserved
}
