//! Callers with a password: the users file, and the check of a password against it.
//!
//! The file has the salted hash (Argon2id) of each password. To compute one is slow on purpose, so that must not become
//! an attack of its own: a few are computed at once, on threads that carry no streams; few more wait; and one address
//! can ask for few in a time. A verdict is remembered under a key that the process alone has, so a caller with many
//! connections pays once, and waits for nobody when it comes again. It counts for the address it was reached for, so a
//! guess from elsewhere always meets these limits. A name that is not in the file costs as much as one that is.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::{Context, bail};
use argon2::{
    Argon2, Params,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use hmac::{Hmac, KeyInit, Mac};
use proto_config::secret_file;
use sha2::Sha256;
use tokio::sync::{OnceCell, Semaphore};
use zeroize::Zeroizing;

use crate::rate::{Rates, network};

/// Hashes that are computed at once. Each takes 19 MiB while it is.
const AT_ONCE: usize = 2;
/// Callers that may wait for a hash, those included whose hash is computed.
const WAITING: usize = 64;
/// Hashes that one address may ask for in the long run and at once, those of right passwords not counted.
const PER_SECOND: u32 = 1;
const BURST: u32 = 10;
/// Verdicts of each kind that are remembered.
const REMEMBERED: usize = 4096;
/// RFC 1929 has room for no more bytes of a name, or of a password.
const LONGEST: usize = 255;
/// The most that a hash in the users file may cost.
const MAX_MEMORY_KIB: u32 = 128 * 1024;
const MAX_PASSES: u32 = 16;
const MAX_LANES: u32 = 16;

/// In place of a user's hash where there is no user at all.
const NOBODY: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Why a caller is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    #[error("wrong user name or password")]
    Wrong,
    #[error("too many wrong passwords from this address")]
    TooMany,
    #[error("too many passwords wait to be checked")]
    Busy,
}

/// The users file: lines of `NAME:HASH`; `#` begins a comment. It is read again for every caller, so that changes count
/// at once.
pub struct Users {
    path: PathBuf,
    checks: Arc<Checks>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct User {
    name: String,
    hash: String,
}

/// A name, a password, the hash they are compared with and an address, under the process's key.
type Mark = [u8; 32];

type Verify = dyn Fn(&[u8], &str) -> bool + Send + Sync;

struct Checks {
    verify: Box<Verify>,
    key: Zeroizing<[u8; 32]>,
    at_once: Arc<Semaphore>,
    waiting: Semaphore,
    attempts: Rates<IpAddr>,
    verdicts: Mutex<Verdicts>,
    /// A question that is already under way is shared: later callers wait for its answer.
    asked: Mutex<HashMap<Mark, Arc<OnceCell<bool>>>>,
}

#[derive(Default)]
struct Verdicts {
    right: HashSet<Mark>,
    wrong: HashSet<Mark>,
}

/// One caller's part in a question.
struct Question<'a> {
    checks: &'a Checks,
    mark: Mark,
    answer: Arc<OnceCell<bool>>,
}

impl Users {
    /// Fails when the file is open to others, or is no users file.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        read(path)?;
        Ok(Self::with(path, |password, hash| {
            PasswordHash::new(hash)
                .is_ok_and(|hash| Argon2::default().verify_password(password, &hash).is_ok())
        }))
    }

    fn with(path: &Path, verify: impl Fn(&[u8], &str) -> bool + Send + Sync + 'static) -> Self {
        let checks = Checks {
            verify: Box::new(verify),
            key: Zeroizing::new(rand::random()),
            at_once: Arc::new(Semaphore::new(AT_ONCE)),
            waiting: Semaphore::new(WAITING),
            attempts: Rates::new(PER_SECOND, BURST, Instant::now()),
            verdicts: Mutex::default(),
            asked: Mutex::default(),
        };
        Self { path: path.to_owned(), checks: Arc::new(checks) }
    }

    /// Whether a caller from `peer` may come in.
    pub async fn login(
        &self,
        name: &str,
        password: Zeroizing<Vec<u8>>,
        peer: IpAddr,
    ) -> Result<(), LoginError> {
        let path = self.path.clone();
        let users = tokio::task::spawn_blocking(move || read(&path)).await;
        let users = users.unwrap_or_else(|e| Err(e.into())).unwrap_or_else(|error| {
            tracing::error!(%error, "nobody can log in: the users file can't be read");
            Vec::new()
        });
        let user = users.iter().find(|user| user.name == name);
        let checks = &self.checks;
        let mark = checks.mark(name, &password, user.map_or("", |user| &user.hash), peer);
        if let Some(right) = checks.known(&mark) {
            return verdict(right);
        }
        let hash = user.or(users.first()).map_or(NOBODY, |user| &user.hash).to_owned();
        let question = checks.ask(mark);
        let asked =
            question.answer.get_or_try_init(|| checks.compute(mark, password, hash, user.is_some(), peer));
        verdict(*asked.await?)
    }
}

fn verdict(right: bool) -> Result<(), LoginError> {
    if right { Ok(()) } else { Err(LoginError::Wrong) }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Checks {
    fn mark(&self, name: &str, password: &[u8], hash: &str, peer: IpAddr) -> Mark {
        // HMAC takes keys of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&*self.key) else { return rand::random() };
        for part in [name.as_bytes(), password, hash.as_bytes(), network(peer).to_string().as_bytes()] {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }

    fn known(&self, mark: &Mark) -> Option<bool> {
        let verdicts = lock(&self.verdicts);
        let right = verdicts.right.contains(mark);
        (right || verdicts.wrong.contains(mark)).then_some(right)
    }

    fn remember(&self, mark: Mark, right: bool) {
        let mut verdicts = lock(&self.verdicts);
        let of_kind = if right { &mut verdicts.right } else { &mut verdicts.wrong };
        if of_kind.len() >= REMEMBERED {
            of_kind.clear();
        }
        of_kind.insert(mark);
    }

    fn ask(&self, mark: Mark) -> Question<'_> {
        Question { checks: self, mark, answer: lock(&self.asked).entry(mark).or_default().clone() }
    }

    /// An attempt counts as a wrong one until it is known to be right: guesses at once are no more than guesses one
    /// after the other.
    async fn compute(
        self: &Arc<Self>,
        mark: Mark,
        password: Zeroizing<Vec<u8>>,
        hash: String,
        exists: bool,
        peer: IpAddr,
    ) -> Result<bool, LoginError> {
        // The first caller may have left, and the answer may have arrived meanwhile.
        if let Some(right) = self.known(&mark) {
            return Ok(right);
        }
        let source = network(peer);
        let give_back = || self.attempts.give_back(source, Instant::now());
        self.attempts.take(source, Instant::now()).map_err(|_| LoginError::TooMany)?;
        let Ok(_place) = self.waiting.try_acquire() else {
            give_back();
            return Err(LoginError::Busy);
        };
        let Ok(permit) = self.at_once.clone().acquire_owned().await else { return Err(LoginError::Busy) };
        let checks = self.clone();
        // Not ended with its caller, so callers that leave at once get no more computed than others.
        let computed = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let right = (checks.verify)(&password, &hash) && exists;
            checks.remember(mark, right);
            right
        });
        let right = computed.await.unwrap_or(false);
        if right {
            give_back();
        }
        Ok(right)
    }
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        let mut asked = lock(&self.checks.asked);
        // This one, and the map's.
        if Arc::strong_count(&self.answer) <= 2 {
            asked.remove(&self.mark);
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<User>> {
    let text = secret_file::read_given(path)?;
    parse(&text).map_err(|(line, error)| anyhow::anyhow!("{}:{line}: {error}", path.display()))
}

/// The error has the line's number and never its text.
fn parse(text: &str) -> Result<Vec<User>, (usize, &'static str)> {
    let mut users: Vec<User> = Vec::new();
    let mut names = HashSet::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let fail = |message| (i + 1, message);
        let (name, hash) = line.rsplit_once(':').ok_or(fail("expected NAME:HASH"))?;
        check_name(name).map_err(fail)?;
        check_hash(hash).map_err(fail)?;
        if !names.insert(name) {
            return Err(fail("the name was given before"));
        }
        users.push(User { name: name.to_owned(), hash: hash.to_owned() });
    }
    Ok(users)
}

fn check_name(name: &str) -> Result<(), &'static str> {
    match name.len() {
        1..=LONGEST if name.chars().all(|c| c.is_ascii_graphic()) => Ok(()),
        _ => Err("a name has 1 to 255 printable ASCII characters"),
    }
}

fn check_hash(hash: &str) -> Result<(), &'static str> {
    if hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(
            "the SHA-256 of a password is not taken any more, as it is quickly guessed: make a new line with `master-agent hash-password NAME`",
        );
    }
    let hash = PasswordHash::new(hash).ok();
    let hash = hash.filter(|hash| hash.algorithm.as_str() == "argon2id");
    let hash = hash.filter(|hash| hash.salt.is_some() && hash.hash.is_some());
    let params = hash.and_then(|hash| Params::try_from(&hash).ok());
    let Some(params) = params else {
        return Err("expected NAME:$argon2id$..., as `master-agent hash-password NAME` prints it");
    };
    let costs = [params.m_cost(), params.t_cost(), params.p_cost()];
    if costs.into_iter().zip([MAX_MEMORY_KIB, MAX_PASSES, MAX_LANES]).any(|(cost, most)| cost > most) {
        return Err("the hash costs more than m=131072,t=16,p=16");
    }
    Ok(())
}

/// The line of a user in the users file.
pub fn line(name: &str, password: &[u8]) -> anyhow::Result<String> {
    check_name(name).map_err(anyhow::Error::msg)?;
    if name.starts_with('#') {
        bail!("a name can't begin with #, which begins a comment");
    }
    if !(1..=LONGEST).contains(&password.len()) {
        bail!("SOCKS5 has room for passwords of 1 to {LONGEST} bytes, and this one has {}", password.len());
    }
    let salt: [u8; 16] = rand::random();
    let hash = Argon2::default().hash_password_with_salt(password, &salt).context("can't hash")?;
    Ok(format!("{name}:{hash}"))
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    use super::*;

    struct File(PathBuf);

    impl File {
        fn new(text: &str) -> Self {
            let name = format!("socks5-users-{:016x}", rand::random::<u64>());
            let file = Self(std::env::temp_dir().join(name));
            file.write(text);
            file
        }

        fn write(&self, text: &str) {
            secret_file::replace(&self.0, text.as_bytes()).unwrap();
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    /// A hash with this salt, which the tests' own check takes for the password.
    fn hash_of(password: &str) -> String {
        NOBODY.replacen("AAAAAAAAAAAAAAAAAAAAAA", &format!("{password:A<22}"), 1)
    }

    /// Users whose passwords are compared in no time, and how many were.
    fn counted(file: &File) -> (Users, Arc<AtomicUsize>) {
        let computed = Arc::<AtomicUsize>::default();
        let count = computed.clone();
        let users = Users::with(&file.0, move |password, hash| {
            count.fetch_add(1, Ordering::Relaxed);
            hash == hash_of(std::str::from_utf8(password).unwrap())
        });
        (users, computed)
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    async fn login(users: &Users, name: &str, password: &str, peer: &str) -> Result<(), LoginError> {
        users.login(name, Zeroizing::new(password.as_bytes().to_vec()), address(peer)).await
    }

    #[test]
    fn users_are_read_strictly() {
        let text = format!("# people\n\n alice:{NOBODY} \nb:ob:{NOBODY}\n");
        let names: Vec<_> = parse(&text).unwrap().into_iter().map(|user| user.name).collect();
        assert_eq!(names, ["alice", "b:ob"]);
        let sha256 = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";
        for (text, line, says) in [
            ("alice".to_owned(), 1, "NAME:HASH"),
            (format!("alice:{NOBODY}\nalice:{NOBODY}"), 2, "given before"),
            (format!("\n:{NOBODY}"), 2, "printable"),
            (format!("al ice:{NOBODY}"), 1, "printable"),
            (format!("alice:{sha256}"), 1, "master-agent hash-password NAME"),
            (format!("alice:{}", sha256.to_uppercase()), 1, "master-agent hash-password NAME"),
            ("alice:password".to_owned(), 1, "master-agent hash-password NAME"),
            (format!("alice:{}", &NOBODY[..50]), 1, "$argon2id$"),
            (format!("alice:{}", NOBODY.replace("argon2id", "argon2i")), 1, "$argon2id$"),
            (format!("alice:{}", NOBODY.replace("argon2id", "scrypt")), 1, "$argon2id$"),
            (format!("alice:{}", NOBODY.replace("m=19456", "m=4194304")), 1, "costs more"),
            (format!("alice:{}", NOBODY.replace("t=2", "t=1000")), 1, "costs more"),
        ] {
            let (at, error) = parse(&text).unwrap_err();
            assert!(at == line && error.contains(says), "{text}: {at}: {error}");
        }
    }

    #[tokio::test]
    async fn passwords() {
        let file = File::new("");
        let lines = format!("{}\n{}\n", line("alice", b"secret").unwrap(), line("bob", b"b").unwrap());
        assert!(!lines.contains("secret") && lines.starts_with("alice:$argon2id$v=19$m=19456,t=2,p=1$"));
        assert_ne!(line("alice", b"secret").unwrap(), lines.lines().next().unwrap(), "a salt");
        file.write(&lines);
        let users = Users::load(&file.0).unwrap();
        for (name, password, right) in [
            ("alice", "secret", true),
            ("bob", "b", true),
            ("alice", "b", false),
            ("alice", "", false),
            ("eve", "secret", false),
        ] {
            let verdict = if right { Ok(()) } else { Err(LoginError::Wrong) };
            assert_eq!(login(&users, name, password, "::1").await, verdict, "{name} {password}");
        }
        for (name, password) in [("", "x"), ("a b", "x"), ("#a", "x"), ("a", ""), ("a", &"x".repeat(256))] {
            assert!(line(name, password.as_bytes()).is_err(), "{name:?}");
        }
    }

    #[tokio::test]
    async fn what_has_changed_counts_at_once() {
        let right = |password: &str| format!("alice:{}\n", hash_of(password));
        let file = File::new(&right("one"));
        let (users, computed) = counted(&file);
        assert_eq!(login(&users, "alice", "one", "::1").await, Ok(()));
        file.write(&right("two"));
        assert_eq!(login(&users, "alice", "one", "::1").await, Err(LoginError::Wrong));
        assert_eq!(login(&users, "alice", "two", "::1").await, Ok(()));
        file.write("");
        assert_eq!(login(&users, "alice", "two", "::1").await, Err(LoginError::Wrong));
        file.write(&right("one"));
        let before = computed.load(Ordering::Relaxed);
        assert_eq!(login(&users, "alice", "one", "::1").await, Ok(()));
        assert_eq!(computed.load(Ordering::Relaxed), before, "it is as it was");
        std::fs::set_permissions(&file.0, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        assert_eq!(login(&users, "alice", "one", "::1").await, Err(LoginError::Wrong));
        assert!(Users::load(&file.0).is_err());
    }

    #[tokio::test]
    async fn each_password_is_hashed_once_and_an_unknown_name_costs_the_same() {
        let file = File::new(&format!("alice:{}\nbob:{}\n", hash_of("a"), hash_of("b")));
        let (users, computed) = counted(&file);
        let users = Arc::new(users);
        for (name, password, verdict) in [
            ("alice", "a", Ok(())),
            ("bob", "b", Ok(())),
            ("bob", "a", Err(LoginError::Wrong)),
            // Compared with the first user's hash, and right for that.
            ("eve", "a", Err(LoginError::Wrong)),
            ("eve", "b", Err(LoginError::Wrong)),
        ] {
            let before = computed.load(Ordering::Relaxed);
            let mut crowd = tokio::task::JoinSet::new();
            for _ in 0..100 {
                let users = users.clone();
                crowd.spawn(async move { login(&users, name, password, "192.0.2.1").await });
            }
            let verdicts = crowd.join_all().await;
            assert!(verdicts.iter().all(|one| *one == verdict), "{name} {password}: {verdicts:?}");
            assert_eq!(computed.load(Ordering::Relaxed), before + 1, "{name} {password}");
        }
        assert!(lock(&users.checks.asked).is_empty());
        // A right password is no news to a guesser at another address.
        let before = computed.load(Ordering::Relaxed);
        assert_eq!(login(&users, "alice", "a", "192.0.2.2").await, Ok(()));
        assert_eq!(computed.load(Ordering::Relaxed), before + 1);
    }

    #[tokio::test]
    async fn a_flood_of_guesses_gets_little_computed_and_holds_up_nobody_else() {
        let file = File::new(&format!("alice:{}\n", hash_of("a")));
        let (users, computed) = counted(&file);
        assert_eq!(login(&users, "alice", "a", "192.0.2.1").await, Ok(()));
        let began = Instant::now();
        let mut refused = 0;
        for i in 0..1000 {
            match login(&users, "alice", &format!("guess{i}"), "192.0.2.9").await {
                Err(LoginError::TooMany) => refused += 1,
                other => assert_eq!(other, Err(LoginError::Wrong)),
            }
        }
        let allowed = BURST as usize + began.elapsed().as_secs() as usize + 1;
        let computed = computed.load(Ordering::Relaxed) - 1;
        assert!(computed <= allowed && refused + computed == 1000, "{computed} of {allowed}, {refused}");
        // Somebody else, even for the first time.
        assert_eq!(login(&users, "alice", "a", "192.0.2.2").await, Ok(()));
    }

    #[tokio::test]
    async fn while_every_hash_takes_for_ever_a_known_caller_comes_in_and_the_queue_is_bounded() {
        let file = File::new(&format!("alice:{}\n", hash_of("a")));
        let computed = Arc::<AtomicUsize>::default();
        let (free, gate) = mpsc::channel::<()>();
        let (count, gate) = (computed.clone(), Mutex::new(gate));
        let users = Arc::new(Users::with(&file.0, move |password, _| {
            count.fetch_add(1, Ordering::Relaxed);
            password == b"a" || lock(&gate).recv().is_err()
        }));
        assert_eq!(login(&users, "alice", "a", "192.0.2.1").await, Ok(()));
        let mut flood = tokio::task::JoinSet::new();
        for i in 0..3 * WAITING {
            let users = users.clone();
            flood.spawn(async move { login(&users, "alice", &format!("{i}"), &format!("10.0.{i}.1")).await });
        }
        // Those for whom there is no place to wait.
        for _ in 0..2 * WAITING {
            assert_eq!(flood.join_next().await.unwrap().unwrap(), Err(LoginError::Busy));
        }
        for _ in 0..100 {
            assert_eq!(login(&users, "alice", "a", "192.0.2.1").await, Ok(()));
        }
        assert_eq!(login(&users, "alice", "b", "192.0.2.1").await, Err(LoginError::Busy));
        assert!(computed.load(Ordering::Relaxed) <= 1 + AT_ONCE);
        // Callers that leave get nothing more computed.
        flood.abort_all();
        while flood.join_next().await.is_some() {}
        for _ in 0..AT_ONCE {
            let _ = free.send(());
        }
        drop(free);
        assert_eq!(login(&users, "alice", "a", "192.0.2.1").await, Ok(()));
        assert!(computed.load(Ordering::Relaxed) <= 1 + AT_ONCE && lock(&users.checks.asked).is_empty());
    }
}
