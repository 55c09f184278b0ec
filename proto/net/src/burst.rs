//! Keeps a task that always has bytes to carry from delaying the others of its thread.
//!
//! Tokio lets a task do 128 operations before it takes its turn from it. For one that carries bulk data, these are
//! megabytes, which take milliseconds. A small exchange passes through about eight tasks on its way, so it would wait
//! for that long several times. Short bursts also keep the bytes in the processor's cache from one task to the next.

use std::{
    pin::pin,
    task::{Context, Poll},
};

/// The number of bytes that a task carries before it lets the others run.
const MOST: usize = 64 * 1024;

/// The bytes that a task has carried since the others could run.
#[derive(Debug, Default)]
pub(crate) struct Burst(usize);

impl Burst {
    pub(crate) fn add(&mut self, bytes: usize) {
        self.0 = self.0.saturating_add(bytes);
    }

    /// Pauses after a burst, until the task is polled again. If nothing else wakes the task, that is usually when the others
    /// of its thread have run, with whatever they have woken, and new events of the sockets have been seen.
    pub(crate) fn poll_pause(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.0 < MOST {
            return Poll::Ready(());
        }
        self.0 = 0;
        pin!(tokio::task::yield_now()).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_chain_of_tasks_passes_between_two_bursts() {
        const TASKS: usize = 8;
        static BURSTS: AtomicUsize = AtomicUsize::new(0);
        let tasks = crate::tasks::Tasks::new();
        tasks.spawn(async {
            let mut burst = Burst::default();
            loop {
                for _ in 0..4 {
                    burst.add(MOST / 4);
                }
                BURSTS.fetch_add(1, Ordering::Relaxed);
                poll_fn(|cx| burst.poll_pause(cx)).await;
            }
        });
        let (first, mut last) = mpsc::channel(1);
        for _ in 0..TASKS {
            let (next, after) = mpsc::channel(1);
            let mut before = std::mem::replace(&mut last, after);
            tasks.spawn(async move {
                while let Some(()) = before.recv().await {
                    let _ = next.send(()).await;
                }
            });
        }
        for _ in 0..100 {
            let before = BURSTS.load(Ordering::Relaxed);
            first.send(()).await.unwrap();
            last.recv().await.unwrap();
            let bursts = BURSTS.load(Ordering::Relaxed) - before;
            assert!(bursts <= 1, "{bursts} bursts while {TASKS} tasks passed something on");
        }
        assert!(BURSTS.load(Ordering::Relaxed) > 10, "the bursts go on");
        tasks.cancel();
    }
}
