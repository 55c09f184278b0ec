use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::Mutex,
};

use serde_json::Value;

use super::{record::tests::record, *};

const LONG_RUNNING: usize = 100;

struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("audit-{:016x}", rand::random::<u64>()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn config(file: PathBuf) -> AuditConfig {
    AuditConfig {
        file: Some(file),
        max_bytes: 1 << 20,
        keep: 3,
        queue: 16,
        unauthenticated_queue: 16,
        wait: Duration::from_millis(1),
        on_full: OnFull::Refuse,
    }
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn names(dir: &Dir) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(&dir.0).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_file_is_rotated_and_only_its_owner_reads_it() {
    let dir = Dir::new();
    let path = dir.file("audit.log");
    fs::write(&path, "{}\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let line = record().line().len() as u64;
    // The old line and two more, then three in each.
    let settings = AuditConfig { max_bytes: 3 * line, ..config(path.clone()) };
    let lost = Counter::default();
    let (audit, writer) = Audit::start(&settings, LONG_RUNNING, lost.clone()).unwrap();
    for code in 100..117 {
        // Not so fast that the queue is full.
        let permit = loop {
            if let Ok(permit) = audit.reserve(Queue::Authenticated).await {
                break permit;
            }
        };
        audit.record(&Record { code, ..record() }, Queue::Authenticated, permit);
    }
    assert!(writer.close(Duration::from_secs(60)).await);
    assert_eq!(lost.get(), 0);
    assert_eq!(names(&dir), ["audit.log", "audit.log.1", "audit.log.2", "audit.log.3"]);
    let codes = |name: &str| -> Vec<_> {
        lines(&dir.file(name)).iter().map(|line| line["code"].as_u64().unwrap_or_default()).collect()
    };
    assert_eq!(codes("audit.log.3"), [105, 106, 107]);
    assert_eq!(codes("audit.log.2"), [108, 109, 110]);
    assert_eq!(codes("audit.log.1"), [111, 112, 113]);
    assert_eq!(codes("audit.log"), [114, 115, 116]);
    for name in names(&dir) {
        assert_eq!(fs::metadata(dir.file(&name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
    }
    audit.record(&record(), Queue::Authenticated, None);
    audit.record(&record(), Queue::Unauthenticated, None);
    assert_eq!(lost.get(), 2, "it is closed");
}

/// Writes straight, so that nothing depends on the thread.
fn write_now(output: &mut Output, codes: std::ops::Range<u16>) -> u64 {
    let mut lost = 0;
    output.write(codes.map(|code| Record { code, ..record() }.line()), &mut |records, _| lost += records);
    lost
}

#[test]
fn a_full_disk_loses_lines_and_nothing_else() {
    let dir = Dir::new();
    let (link, good) = (dir.file("link"), dir.file("good"));
    let link_to = |target: &Path| {
        let _ = fs::remove_file(&link);
        symlink(target, &link).unwrap();
    };
    link_to(Path::new("/dev/full"));
    let mut output = Output::file(link.clone(), 100, 3).unwrap();
    assert_eq!(write_now(&mut output, 0..3), 3);
    assert_eq!(write_now(&mut output, 3..5), 2);
    link_to(&good);
    assert_eq!(write_now(&mut output, 5..6), 0, "it goes on once there is room");
    assert_eq!(lines(&good)[0]["code"], 5);
    // A directory in its place can't even be opened.
    fs::remove_file(&link).unwrap();
    fs::create_dir(&link).unwrap();
    assert_eq!(write_now(&mut output, 6..8), 2);
    let mode = fs::metadata("/dev/full").unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o666, "devices are left as they are");
}

#[test]
fn a_file_moved_away_is_begun_anew() {
    let dir = Dir::new();
    let path = dir.file("audit.log");
    let mut output = Output::file(path.clone(), 1 << 20, 3).unwrap();
    write_now(&mut output, 1..2);
    fs::rename(&path, dir.file("moved")).unwrap();
    write_now(&mut output, 2..3);
    fs::remove_file(&path).unwrap();
    write_now(&mut output, 3..4);
    assert_eq!(lines(&dir.file("moved"))[0]["code"], 1);
    assert_eq!(lines(&path)[0]["code"], 3);
}

#[test]
fn a_rotation_that_fails_keeps_the_file() {
    let dir = Dir::new();
    let path = dir.file("audit.log");
    // A directory that is not empty can't be replaced by a file.
    fs::create_dir_all(dir.file("audit.log.1/x")).unwrap();
    let line = record().line().len() as u64;
    let mut output = Output::file(path.clone(), 2 * line, 1).unwrap();
    assert_eq!(write_now(&mut output, 100..109), 0);
    assert_eq!(lines(&path).len(), 9);
}

/// What was written, and for how many more bytes there is room.
#[derive(Clone, Default)]
struct Disk(Arc<Mutex<(Vec<u8>, usize)>>);

impl std::io::Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut disk = self.0.lock().unwrap();
        let part = disk.1.min(bytes.len());
        if part == 0 {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        disk.0.extend_from_slice(&bytes[..part]);
        disk.1 -= part;
        Ok(part)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_line_written_in_part_does_not_spoil_the_next() {
    let disk = Disk::default();
    let mut output = Output::stream(disk.clone());
    let mut room = |bytes: usize, codes| {
        disk.0.lock().unwrap().1 = bytes;
        write_now(&mut output, codes)
    };
    let line = record().line().len();
    assert_eq!(room(line + 10, 401..404), 2, "one and a part");
    assert_eq!(room(0, 404..406), 2);
    assert_eq!(room(1, 406..408), 2, "the end of the part and no more");
    assert_eq!(room(1000 * line, 408..410), 0);
    let text = String::from_utf8(disk.0.lock().unwrap().0.clone()).unwrap();
    let read = |line: &str| serde_json::from_str::<Value>(line).ok().map(|v| v["code"].as_u64().unwrap());
    assert_eq!(text.lines().map(read).collect::<Vec<_>>(), [Some(401), None, Some(408), Some(409)]);
}

#[tokio::test(start_paused = true)]
async fn what_is_served_is_recorded_and_unauthenticated_callers_take_no_room_of_others() {
    let settings = AuditConfig { queue: 3, unauthenticated_queue: 2, ..config(PathBuf::new()) };
    let lost = Counter::default();
    // Nobody takes lines out of this queue yet.
    let (audit, mut lines) = Audit::new(&settings, LONG_RUNNING, lost.clone());
    let unauthenticated = |code| {
        audit.record(&Record { code, ..record() }, Queue::Unauthenticated, None);
    };
    (0..1000).for_each(unauthenticated);
    assert_eq!(lost.get(), 998);
    for _ in 0..2 {
        assert_eq!(audit.reserve(Queue::Unauthenticated).await.err(), Some(QueueFull));
    }
    let mut long_running = Vec::new();
    while let Ok(permit) = audit.reserve(Queue::LongRunning).await {
        long_running.push(permit.unwrap());
    }
    assert_eq!(long_running.len(), LONG_RUNNING + 3, "each has room, and so have the lines of three others");
    long_running.truncate(LONG_RUNNING);
    let mut served = Vec::new();
    while let Ok(permit) = audit.reserve(Queue::Authenticated).await {
        served.push(permit.unwrap());
    }
    assert_eq!(served.len(), 3, "of those under way, each has its room");
    // One that is refused has none, and takes none of theirs.
    audit.record(&record(), Queue::Authenticated, None);
    assert_eq!(lost.get(), 999);
    for permit in served {
        audit.record(&Record { code: 200, ..record() }, Queue::Authenticated, Some(permit));
    }
    assert_eq!(lost.get(), 999);
    assert_eq!(audit.reserve(Queue::Authenticated).await.err(), Some(QueueFull), "until they are written");
    for permit in long_running {
        audit.record(&Record { code: 201, ..record() }, Queue::LongRunning, Some(permit));
    }
    let waiting = audit.reserve(Queue::Authenticated);
    let writing = async {
        let mut written = Vec::new();
        while written.len() < 105 {
            let Some(Message::Line(line, permit)) = lines.recv().await else { panic!("no line") };
            written.push(line);
            drop(permit);
        }
        written
    };
    let (permit, written) = tokio::join!(waiting, writing);
    assert!(permit.unwrap().is_some(), "whoever waits gets the first that is free");
    let of = |code| written.iter().filter(|line| line.contains(&format!("\"code\":{code},"))).count();
    assert_eq!((of(200), of(201)), (3, 100));
    assert_eq!(lost.get(), 999);
}

/// Records requests until one gets no room, and returns the number of those that were recorded.
async fn fill(audit: &Audit, record: &Record<'_>) -> usize {
    let mut recorded = 0;
    while let Ok(permit) = audit.reserve(Queue::Authenticated).await {
        audit.record(record, Queue::Authenticated, permit);
        recorded += 1;
    }
    recorded
}

#[tokio::test(start_paused = true)]
async fn long_lines_fill_a_queue_by_their_bytes_until_they_are_written() {
    // There is room for 8 KiB, and a line has more than a quarter of that.
    let settings = AuditConfig { queue: 8, unauthenticated_queue: 8, ..config(PathBuf::new()) };
    let path = format!("/{}", "p".repeat(2000));
    let long = Record { path: &path, ..record() };
    assert!((2048..2700).contains(&long.line().len()));
    let lost = Counter::default();
    let (audit, mut lines) = Audit::new(&settings, LONG_RUNNING, lost.clone());
    for _ in 0..10 {
        let permit = audit.reserve(Queue::LongRunning).await.unwrap();
        // A request that has ended is recorded as one of its user, with the room of the queue in which it was reserved.
        audit.record(&long, Queue::Authenticated, permit);
    }
    let served = audit.reserve(Queue::Authenticated).await.unwrap();
    assert_eq!(fill(&audit, &long).await, 4, "those that last take no room of others");
    audit.record(&long, Queue::Authenticated, None);
    assert_eq!(lost.get(), 1, "it had reserved no room");
    audit.record(&long, Queue::Authenticated, served);
    assert_eq!(lost.get(), 1, "it was served, so it is recorded");
    for other in [Queue::LongRunning, Queue::Unauthenticated] {
        assert!(audit.reserve(other).await.is_ok(), "{other:?}");
    }

    // Five lines wait. Once two of them have been written, there is room again.
    for _ in 0..10 + 1 {
        drop(lines.recv().await.unwrap());
    }
    assert_eq!(audit.reserve(Queue::Authenticated).await.err(), Some(QueueFull));
    let (permit, ()) = tokio::join!(audit.reserve(Queue::Authenticated), async {
        drop(lines.recv().await.unwrap());
    });
    assert!(permit.unwrap().is_some(), "whoever waits gets the room of a line that is written");
    while lines.try_recv().is_ok() {}
    assert_eq!(fill(&audit, &long).await, 4, "all bytes have been given back");
}

#[tokio::test(start_paused = true)]
async fn requests_go_on_unrecorded_where_that_is_configured() {
    let settings = AuditConfig { queue: 1, on_full: OnFull::Drop, ..config(PathBuf::new()) };
    let lost = Counter::default();
    let (audit, _lines) = Audit::new(&settings, LONG_RUNNING, lost.clone());
    let permit = audit.reserve(Queue::Authenticated).await.unwrap();
    assert!(permit.is_some());
    assert!(audit.reserve(Queue::Authenticated).await.unwrap().is_none());
    audit.record(&record(), Queue::Authenticated, None);
    assert_eq!(lost.get(), 1);
}

#[tokio::test]
async fn the_audit_log_says_what_was_lost_once_it_can() {
    let dir = Dir::new();
    let path = dir.file("audit.log");
    let settings = AuditConfig { unauthenticated_queue: 1, ..config(path.clone()) };
    let lost = Counter::default();
    let (audit, writer) = Audit::start(&settings, LONG_RUNNING, lost.clone()).unwrap();
    let permit = audit.reserve(Queue::Unauthenticated).await.unwrap();
    for _ in 0..7 {
        audit.record(&record(), Queue::Unauthenticated, None);
    }
    audit.record(&record(), Queue::Unauthenticated, permit);
    assert!(writer.close(Duration::from_secs(60)).await);
    assert_eq!(lost.get(), 7);
    let said = lines(&path).iter().filter_map(|line| line["lost"].as_u64()).sum::<u64>();
    assert_eq!((lines(&path).len(), said), (2, 7), "{:?}", lines(&path));
    assert_eq!(audit.reserve(Queue::Unauthenticated).await.map(|permit| permit.is_some()), Ok(true));

    // On a full disk it is not forgotten.
    let disk = Disk::default();
    let mut output = Output::stream(disk.clone());
    let (audit, _lines) = Audit::new(&settings, LONG_RUNNING, Counter::default());
    audit.lost.add(3, "test");
    audit.lost.report(&mut output);
    audit.lost.add(2, "test");
    disk.0.lock().unwrap().1 = 1 << 20;
    audit.lost.report(&mut output);
    audit.lost.report(&mut output);
    let text = String::from_utf8(disk.0.lock().unwrap().0.clone()).unwrap();
    assert_eq!(text.matches("\"lost\":5}\n").count(), 1, "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn paths_that_can_not_be_used_are_known_at_once() {
    let dir = Dir::new();
    for path in [dir.0.clone(), dir.file("none/audit.log")] {
        let error = Audit::start(&config(path.clone()), LONG_RUNNING, Counter::default()).err().unwrap();
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
}
