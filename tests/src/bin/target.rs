//! Serves the target's line protocol from a process of its own, for as long as it runs: `target ADDRESS:PORT...`.

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    for address in std::env::args().skip(1) {
        tests::target::serve(address.parse()?).await?;
    }
    std::future::pending().await
}
