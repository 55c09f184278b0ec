//! The stub kube-apiserver as a process of its own, with a kubelet behind it whose log never ends:
//! `apiserver KUBECONFIG` writes that file once it serves.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use tests::{apiserver::ApiServer, http::Base, kubelet::Kubelet};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let kubeconfig: PathBuf = std::env::args_os().nth(1).context("usage: apiserver KUBECONFIG")?.into();
    let kubelet = Kubelet::start(([127, 0, 0, 1], 0).into(), &["127.0.0.1"]).await?;
    let api = ApiServer::start().await?;
    api.set_kubelet(Base::new(&kubelet.url(), Some(&kubelet.ca()))?);
    api.write_kubeconfig(&kubeconfig)?;
    for i in 0_u64.. {
        kubelet.log(&format!("line {i}"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
