//! A target as a process of its own: `target ADDRESS:PORT...` speaks the line protocol there for ever.

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    for address in std::env::args().skip(1) {
        tests::target::serve(address.parse()?).await?;
    }
    std::future::pending().await
}
