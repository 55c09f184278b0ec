//! Writes lines on a thread of its own, so that a slow or stuck reader of the log holds up nobody who logs.
//!
//! Whoever logs appends whole lines to a bounded queue, and never waits for the output. While the queue is full, lines
//! are dropped and counted. A line in their place says how many are missing. Urgent lines find room for longer than
//! others.
//!
//! The output is used as it is. It is not made non-blocking, since that would affect other processes that have it.

use std::{
    io::{self, ErrorKind, Write},
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, ThreadId},
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// How long lines are collected before they are written together.
const BATCH_INTERVAL: Duration = Duration::from_millis(5);
/// The pause before another attempt, if the output is non-blocking and has no room.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);
/// The most bytes of several lines that one write has. A pipe takes so many (PIPE_BUF) as a whole, without bytes of other
/// processes in between.
const MAX_WRITE: usize = 4096;
/// The capacity that an empty buffer keeps.
const KEPT_CAPACITY: usize = 64 * 1024;

/// What may wait in a queue. As much again may be under way to the output.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) bytes: usize,
    pub(crate) lines: usize,
}

impl Bounds {
    /// Whether there is room for a line. Urgent lines have an eighth more. Once a line is missing, no other ordinary line
    /// is admitted until the thread has taken the lines before it, so that all missing ones are missing in one place.
    fn admit(self, waiting: &Batch, bytes: usize, urgent: bool) -> bool {
        let limit = |of: usize| if urgent { of + of / 8 } else { of };
        (urgent || waiting.dropped == 0)
            && waiting.lines < limit(self.lines)
            && waiting.text.len() + bytes <= limit(self.bytes)
    }
}

/// A handle to the queue and its thread, which runs until the process ends. It is cheap to clone.
#[derive(Clone)]
pub(crate) struct LogQueue {
    shared: Arc<Shared>,
    writer: ThreadId,
}

struct Shared {
    bounds: Bounds,
    state: Mutex<State>,
    /// Wakes the thread.
    wake: Condvar,
    /// Wakes those who wait until lines have been written.
    written: Condvar,
    lost: Counter,
}

#[derive(Default)]
struct State {
    waiting: Batch,
    /// The number of lines that have ever been appended.
    appended: u64,
    /// How many of them the thread is done with.
    done: u64,
    /// Whether the thread waits for a line.
    is_idle: bool,
    /// The number of callers that wait until lines have been written.
    flushing: usize,
}

#[derive(Default)]
struct Batch {
    text: Vec<u8>,
    lines: usize,
    /// The number of lines that are missing after these.
    dropped: u64,
}

impl Batch {
    fn is_empty(&self) -> bool {
        self.lines == 0 && self.dropped == 0
    }

    fn clear(&mut self) {
        self.text.clear();
        self.text.shrink_to(KEPT_CAPACITY);
        (self.lines, self.dropped) = (0, 0);
    }
}

impl LogQueue {
    /// Starts the thread. `notice` returns the line that says how many lines are missing.
    pub(crate) fn start(
        output: impl Write + Send + 'static,
        bounds: Bounds,
        notice: impl Fn(u64) -> String + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            bounds,
            state: Mutex::default(),
            wake: Condvar::new(),
            written: Condvar::new(),
            lost: Counter::default(),
        });
        let of_thread = shared.clone();
        let thread = thread::Builder::new().name("log".into()).spawn(move || {
            write_lines(&of_thread, output, notice);
        })?;
        Ok(Self { shared, writer: thread.thread().id() })
    }

    /// Appends a line with its end, or several, or drops them if there is no room.
    pub(crate) fn append(&self, line: &[u8], urgent: bool) {
        let mut state = self.shared.lock();
        let admitted = self.shared.bounds.admit(&state.waiting, line.len(), urgent);
        if admitted {
            state.waiting.text.extend_from_slice(line);
            state.waiting.lines += 1;
            state.appended += 1;
        } else {
            state.waiting.dropped += 1;
        }
        // One wake-up is enough for all lines until the thread waits again.
        let wakes = mem::take(&mut state.is_idle);
        drop(state);
        if !admitted {
            self.shared.lost.inc();
        }
        if wakes {
            self.shared.wake.notify_one();
        }
    }

    /// Waits until the lines that were appended before are written, for at most `timeout`. Returns whether they are, or
    /// could not be written.
    pub(crate) fn flush(&self, timeout: Duration) -> bool {
        let mut state = self.shared.lock();
        let wanted = state.appended;
        state.flushing += 1;
        self.shared.wake.notify_one();
        let waited = self.shared.written.wait_timeout_while(state, timeout, |state| state.done < wanted);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.flushing -= 1;
        state.done >= wanted
    }

    /// Whether this is the thread that writes, which must not wait for itself.
    pub(crate) fn is_writer(&self) -> bool {
        thread::current().id() == self.writer
    }

    /// Returns the counter of lines that were dropped or could not be written.
    pub(crate) fn lost(&self) -> Counter {
        self.shared.lost.clone()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for lines, and moves them into an empty batch.
    fn take(&self, batch: &mut Batch) {
        let mut state = self.lock();
        while state.waiting.is_empty() {
            state.is_idle = true;
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.is_idle = false;
        mem::swap(&mut state.waiting, batch);
    }

    /// Notes that a batch is done with, and leaves time for more lines to come: to wake this thread for each of them
    /// would cost more than to write it.
    fn finish(&self, batch: &mut Batch) {
        let mut state = self.lock();
        state.done += batch.lines as u64;
        if state.flushing > 0 {
            self.written.notify_all();
        }
        drop(self.wake.wait_timeout_while(state, BATCH_INTERVAL, |state| state.flushing == 0));
        batch.clear();
    }
}

/// Writes what is appended, for as long as the process runs.
fn write_lines(shared: &Shared, output: impl Write, notice: impl Fn(u64) -> String) {
    let mut output = Output { inner: output, is_torn: false };
    let mut batch = Batch::default();
    let mut unreported = 0;
    loop {
        shared.take(&mut batch);
        let failed = output.write(&batch.text);
        shared.lost.inc_by(failed);
        unreported += batch.dropped + failed;
        if unreported > 0 && output.write(notice(unreported).as_bytes()) == 0 {
            unreported = 0;
        }
        shared.finish(&mut batch);
    }
}

struct Output<W> {
    inner: W,
    /// Whether the last line was written only in part.
    is_torn: bool,
}

impl<W: Write> Output<W> {
    /// Writes lines. Returns the number of those that could not be written.
    fn write(&mut self, mut text: &[u8]) -> u64 {
        let mut failed = 0;
        while !text.is_empty() {
            let (lines, rest) = text.split_at_checked(first_lines(text)).unwrap_or((text, &[]));
            text = rest;
            if self.is_torn {
                self.is_torn = self.put(b"\n") == 0;
            }
            let written = if self.is_torn { 0 } else { self.put(lines) };
            let (done, left) = lines.split_at_checked(written).unwrap_or((lines, &[]));
            failed += left.iter().filter(|byte| **byte == b'\n').count() as u64;
            self.is_torn |= done.last().is_some_and(|last| *last != b'\n');
        }
        failed
    }

    /// Writes as much as it can. Returns how much that was.
    fn put(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
            match self.inner.write(rest) {
                Ok(0) => break,
                Ok(more) => written += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY_INTERVAL),
                Err(_) => break,
            }
        }
        written
    }
}

/// Returns the length of the lines that are written together: of those that fit into one write, or of a longer one alone.
fn first_lines(text: &[u8]) -> usize {
    let is_end = |byte: &u8| *byte == b'\n';
    let Some(head) = text.get(..MAX_WRITE) else { return text.len() };
    let end = head.iter().rposition(is_end).or_else(|| text.iter().position(is_end));
    end.map_or(text.len(), |end| end + 1)
}

/// Appends the lines of one level to a queue. They are urgent if they are errors.
pub(crate) struct LineWriter<'a> {
    queue: &'a LogQueue,
    urgent: bool,
}

impl Write for LineWriter<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.append(line, self.urgent);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogQueue {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> LineWriter<'a> {
        LineWriter { queue: self, urgent: false }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> LineWriter<'a> {
        LineWriter { queue: self, urgent: *metadata.level() == Level::ERROR }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::VecDeque;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    pub(crate) const ROOMY: Bounds = Bounds { bytes: 1 << 20, lines: 1 << 16 };

    /// An output that a test can hold up and make fail.
    #[derive(Clone, Default)]
    pub(crate) struct Pipe(Arc<(Mutex<Held>, Condvar)>);

    #[derive(Default)]
    struct Held {
        is_full: bool,
        /// The number of writes that have begun.
        begun: usize,
        /// What the next writes result in. All others succeed.
        results: VecDeque<Result<usize, ErrorKind>>,
        written: Vec<Vec<u8>>,
    }

    impl Held {
        fn text(&self) -> String {
            String::from_utf8(self.written.concat()).unwrap()
        }
    }

    impl Pipe {
        fn failing(results: impl IntoIterator<Item = Result<usize, ErrorKind>>) -> Self {
            let pipe = Self::default();
            pipe.held().results.extend(results);
            pipe
        }

        fn held(&self) -> MutexGuard<'_, Held> {
            self.0.0.lock().unwrap()
        }

        fn set_full(&self, is_full: bool) {
            self.held().is_full = is_full;
            self.0.1.notify_all();
        }

        fn until(&self, reached: impl Fn(&Held) -> bool) {
            let waited = self.0.1.wait_timeout_while(self.held(), LONG, |held| !reached(held)).unwrap();
            assert!(!waited.1.timed_out(), "{:?}", waited.0.text());
        }

        pub(crate) fn text(&self) -> String {
            self.held().text()
        }
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut held = self.held();
            held.begun += 1;
            self.0.1.notify_all();
            let mut held = self.0.1.wait_while(held, |held| held.is_full).unwrap();
            let written = held.results.pop_front().unwrap_or(Ok(bytes.len()))?;
            held.written.push(bytes[..written].to_vec());
            self.0.1.notify_all();
            Ok(written)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    pub(crate) fn start(pipe: &Pipe, bounds: Bounds) -> LogQueue {
        LogQueue::start(pipe.clone(), bounds, |lines| format!("{lines} missing\n")).unwrap()
    }

    /// A queue whose thread has taken the line "first" and is stuck with it.
    fn stuck(bounds: Bounds) -> (Pipe, LogQueue) {
        let pipe = Pipe::default();
        pipe.set_full(true);
        let queue = start(&pipe, bounds);
        queue.append(b"first\n", false);
        pipe.until(|held| held.begun == 1);
        (pipe, queue)
    }

    #[test]
    fn nobody_waits_for_the_output_and_what_is_missing_is_said_in_its_place() {
        let (pipe, queue) = stuck(Bounds { bytes: 1000, lines: 8 });
        for line in 1..=11 {
            queue.append(format!("{line}\n").as_bytes(), false);
        }
        queue.append(b"urgent\n", true);
        queue.append(b"urgent, too\n", true);
        assert_eq!(queue.lost().get(), 4);
        assert!(!queue.flush(Duration::from_millis(1)), "nothing is written");
        assert_eq!(pipe.text(), "");
        pipe.set_full(false);
        assert!(queue.flush(LONG));
        queue.append(b"last\n", false);
        assert!(queue.flush(LONG));
        assert_eq!(pipe.text(), "first\n1\n2\n3\n4\n5\n6\n7\n8\nurgent\n4 missing\nlast\n");
        assert_eq!(queue.lost().get(), 4);
    }

    #[test]
    fn bytes_are_bounded_and_nothing_overtakes_what_is_missing() {
        let (pipe, queue) = stuck(Bounds { bytes: 16, lines: 100 });
        for line in ["eight 1\n", "eight 2\n", "eight 3\n", "\n"] {
            queue.append(line.as_bytes(), false);
        }
        queue.append(b"!\n", true);
        queue.append(b"!!\n", true);
        pipe.set_full(false);
        assert!(queue.flush(LONG));
        assert_eq!(pipe.text(), "first\neight 1\neight 2\n!\n3 missing\n");

        // A line that is too long for the whole queue is missing at once.
        queue.append(&[b'x'; 17], false);
        pipe.until(|held| held.text().ends_with("1 missing\n"));
        queue.append(b"next\n", false);
        pipe.until(|held| held.text().ends_with("1 missing\nnext\n"));
        assert_eq!(queue.lost().get(), 4);
    }

    #[test]
    fn lines_of_several_threads_stay_whole_and_in_order() {
        let pipe = Pipe::default();
        let queue = start(&pipe, ROOMY);
        let line = |thread: usize, n: usize| format!("{thread} {n} {}\n", "x".repeat(n % 300));
        thread::scope(|scope| {
            for thread in 0..4 {
                let queue = &queue;
                scope.spawn(move || (0..1000).for_each(|n| queue.append(line(thread, n).as_bytes(), false)));
            }
        });
        assert!(queue.flush(LONG));
        let text = pipe.text();
        assert_eq!((text.lines().count(), queue.lost().get()), (4000, 0));
        for thread in 0..4 {
            let own = text.split_inclusive('\n').filter(|line| line.starts_with(&format!("{thread} ")));
            assert!(own.eq((0..1000).map(|n| line(thread, n))), "{thread}");
        }
        assert!(pipe.held().written.iter().all(|piece| piece.ends_with(b"\n") && piece.len() <= MAX_WRITE));
    }

    #[test]
    fn as_many_lines_as_a_pipe_takes_at_once_are_written_together() {
        let (line, long) =
            ([[b'x'; 999].as_slice(), b"\n"].concat(), [[b'x'; 9999].as_slice(), b"\n"].concat());
        for (lines, length) in [
            (vec![], 0),
            (vec![&line], 1000),
            (vec![&line; 4], 4000),
            (vec![&line; 9], 4000),
            (vec![&line, &long, &line], 1000),
            (vec![&long, &line], 10_000),
        ] {
            let text: Vec<u8> = lines.into_iter().flatten().copied().collect();
            assert_eq!(first_lines(&text), length);
        }
    }

    #[test]
    fn what_can_not_be_written_is_counted_and_said_once_it_can() {
        let gone = Err(ErrorKind::BrokenPipe);
        let pipe = Pipe::failing([gone, gone]);
        let queue = start(&pipe, ROOMY);
        queue.append(b"a\n", false);
        assert!(queue.flush(LONG));
        queue.append(b"b\n", false);
        assert!(queue.flush(LONG));
        assert_eq!((pipe.text().as_str(), queue.lost().get()), ("b\n1 missing\n", 1));

        // A line of which a part was written ends where the next one begins.
        let pipe = Pipe::failing([Ok(3), Err(ErrorKind::StorageFull)]);
        let queue = start(&pipe, ROOMY);
        queue.append(b"torn\n", false);
        assert!(queue.flush(LONG));
        assert_eq!((pipe.text().as_str(), queue.lost().get()), ("tor\n1 missing\n", 1));

        let pipe = Pipe::failing([Err(ErrorKind::Interrupted), Err(ErrorKind::WouldBlock), Ok(2)]);
        let queue = start(&pipe, ROOMY);
        queue.append(b"whole\n", false);
        assert!(queue.flush(LONG));
        assert_eq!((pipe.text().as_str(), queue.lost().get()), ("whole\n", 0));
    }
}
