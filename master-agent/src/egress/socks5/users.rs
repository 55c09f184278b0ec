//! The users file of SOCKS5, and the verification of passwords against it.
//!
//! The file has the salted hash (Argon2id) of each password. Computing a hash is slow on purpose and must not become a
//! denial of service: few hashes are computed at once, on threads that carry no streams; few more may wait; and each
//! address may cause few per second. A verdict is cached under a key that only this process has, so a caller with many
//! connections pays once and waits for nobody afterwards. A verdict is valid only for the network of the caller that it was
//! computed for, so a guess from elsewhere always meets these limits. An unknown name costs as much as a known one.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use access::rates::{Rates, network};
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

/// The number of hashes that are computed at once. Each takes 19 MiB of memory.
const AT_ONCE: usize = 2;
/// Callers that may wait for a hash, including those whose hash is being computed.
const WAITING: usize = 64;
/// The number of hashes that one address may cause per second, and in a burst. Right passwords do not count.
const PER_SECOND: u32 = 1;
const BURST: u32 = 10;
/// Cached verdicts of each kind.
const CACHED: usize = 4096;
/// The most bytes that RFC 1929 has room for in a name or a password.
const LONGEST: usize = 255;
/// The most that a hash in the users file may cost.
const MAX_MEMORY_KIB: u32 = 128 * 1024;
const MAX_PASSES: u32 = 16;
const MAX_LANES: u32 = 16;

/// Stands in for a user's hash if there are no users.
const NOBODY: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Why a login fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    #[error("wrong user name or password")]
    Wrong,
    #[error("too many wrong passwords from this address")]
    TooMany,
    #[error("too many passwords are waiting to be verified")]
    Busy,
}

/// The users file: lines of `NAME:HASH`, where `#` begins a comment. It is read for every login, so changes take effect at
/// once.
pub struct Users {
    path: PathBuf,
    verification: Arc<Verification>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct User {
    name: String,
    hash: String,
}

/// Identifies a login attempt: a MAC of the name, the password, the hash and the network of the caller.
type AttemptId = [u8; 32];

type Verify = dyn Fn(&[u8], &str) -> bool + Send + Sync;

struct Verification {
    verify: Box<Verify>,
    key: Zeroizing<[u8; 32]>,
    at_once: Arc<Semaphore>,
    waiting: Semaphore,
    attempts: Rates<IpAddr>,
    verdicts: Mutex<Verdicts>,
    /// Attempts whose hash is being computed; further callers with the same attempt wait for the result.
    pending: Mutex<HashMap<AttemptId, Arc<OnceCell<bool>>>>,
}

#[derive(Default)]
struct Verdicts {
    right: HashSet<AttemptId>,
    wrong: HashSet<AttemptId>,
}

/// One caller's share in a pending attempt.
struct PendingAttempt<'a> {
    verification: &'a Verification,
    id: AttemptId,
    right: Arc<OnceCell<bool>>,
}

impl Users {
    /// Fails if the file is accessible to others or malformed.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        read(path)?;
        Ok(Self::with(path, |password, hash| {
            PasswordHash::new(hash)
                .is_ok_and(|hash| Argon2::default().verify_password(password, &hash).is_ok())
        }))
    }

    fn with(path: &Path, verify: impl Fn(&[u8], &str) -> bool + Send + Sync + 'static) -> Self {
        let verification = Verification {
            verify: Box::new(verify),
            key: Zeroizing::new(rand::random()),
            at_once: Arc::new(Semaphore::new(AT_ONCE)),
            waiting: Semaphore::new(WAITING),
            attempts: Rates::new(PER_SECOND, BURST, Instant::now()),
            verdicts: Mutex::default(),
            pending: Mutex::default(),
        };
        Self { path: path.to_owned(), verification: Arc::new(verification) }
    }

    /// Verifies the password of a caller at `peer`.
    pub async fn login(
        &self,
        name: &str,
        password: Zeroizing<Vec<u8>>,
        peer: IpAddr,
    ) -> Result<(), LoginError> {
        let path = self.path.clone();
        let users = tokio::task::spawn_blocking(move || read(&path)).await;
        let users = users.unwrap_or_else(|e| Err(e.into())).unwrap_or_else(|error| {
            tracing::error!(%error, "can't read the users file, so nobody can log in");
            Vec::new()
        });
        let user = users.iter().find(|user| user.name == name);
        let verification = &self.verification;
        let id = verification.attempt_id(name, &password, user.map_or("", |user| &user.hash), peer);
        if let Some(right) = verification.cached(&id) {
            return login_result(right);
        }
        let hash = user.or(users.first()).map_or(NOBODY, |user| &user.hash).to_owned();
        let attempt = Attempt { id, password, hash, user_exists: user.is_some(), peer };
        let pending = verification.join(id);
        let right = pending.right.get_or_try_init(|| verification.compute(attempt)).await?;
        login_result(*right)
    }
}

fn login_result(right: bool) -> Result<(), LoginError> {
    if right { Ok(()) } else { Err(LoginError::Wrong) }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A password to be verified.
struct Attempt {
    id: AttemptId,
    password: Zeroizing<Vec<u8>>,
    /// The hash that the password is compared with, also if the user does not exist.
    hash: String,
    user_exists: bool,
    peer: IpAddr,
}

impl Verification {
    fn attempt_id(&self, name: &str, password: &[u8], hash: &str, peer: IpAddr) -> AttemptId {
        // HMAC takes keys of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&*self.key) else { return rand::random() };
        for part in [name.as_bytes(), password, hash.as_bytes(), network(peer).to_string().as_bytes()] {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }

    fn cached(&self, id: &AttemptId) -> Option<bool> {
        let verdicts = lock(&self.verdicts);
        let right = verdicts.right.contains(id);
        (right || verdicts.wrong.contains(id)).then_some(right)
    }

    fn cache(&self, id: AttemptId, right: bool) {
        let mut verdicts = lock(&self.verdicts);
        let cached = if right { &mut verdicts.right } else { &mut verdicts.wrong };
        if cached.len() >= CACHED {
            cached.clear();
        }
        cached.insert(id);
    }

    fn join(&self, id: AttemptId) -> PendingAttempt<'_> {
        let right = lock(&self.pending).entry(id).or_default().clone();
        PendingAttempt { verification: self, id, right }
    }

    /// Computes the hash. An attempt counts as wrong until it is known to be right, so that concurrent guesses are no
    /// cheaper than sequential ones.
    async fn compute(self: &Arc<Self>, attempt: Attempt) -> Result<bool, LoginError> {
        let Attempt { id, password, hash, user_exists, peer } = attempt;
        // The first caller may have left after it had caused the computation.
        if let Some(right) = self.cached(&id) {
            return Ok(right);
        }
        let source = network(peer);
        let give_back = || self.attempts.give_back(&source, Instant::now());
        self.attempts.take(&source, Instant::now()).map_err(|_| LoginError::TooMany)?;
        let Ok(_waiting) = self.waiting.try_acquire() else {
            give_back();
            return Err(LoginError::Busy);
        };
        let Ok(permit) = self.at_once.clone().acquire_owned().await else { return Err(LoginError::Busy) };
        let verification = self.clone();
        // The computation outlives its caller, so callers that leave early cause no more computations than others.
        let computed = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let right = (verification.verify)(&password, &hash) && user_exists;
            verification.cache(id, right);
            right
        });
        let right = computed.await.unwrap_or(false);
        if right {
            give_back();
        }
        Ok(right)
    }
}

impl Drop for PendingAttempt<'_> {
    fn drop(&mut self) {
        let mut pending = lock(&self.verification.pending);
        // The remaining references are this one and that of the map.
        if Arc::strong_count(&self.right) <= 2 {
            pending.remove(&self.id);
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<User>> {
    let text = secret_file::read_given(path)?;
    parse(&text).map_err(|(line, error)| anyhow::anyhow!("{}:{line}: {error}", path.display()))
}

/// Parses the users file. An error has the number of the line, never its text.
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
            return Err(fail("the name is given twice"));
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
            "SHA-256 hashes are no longer accepted, as their passwords are quickly guessed: make a new line with `master-agent hash-password NAME`",
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

/// Makes the line of a user for the users file.
pub fn line(name: &str, password: &[u8]) -> anyhow::Result<String> {
    check_name(name).map_err(anyhow::Error::msg)?;
    if name.starts_with('#') {
        bail!("a name can't begin with #, which begins a comment");
    }
    if !(1..=LONGEST).contains(&password.len()) {
        bail!("a SOCKS5 password has 1 to {LONGEST} bytes, and this one has {}", password.len());
    }
    let salt: [u8; 16] = rand::random();
    let hash =
        Argon2::default().hash_password_with_salt(password, &salt).context("can't hash the password")?;
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

    /// A hash whose salt is the password, which is all that the tests compare.
    fn hash_of(password: &str) -> String {
        NOBODY.replacen("AAAAAAAAAAAAAAAAAAAAAA", &format!("{password:A<22}"), 1)
    }

    /// Users whose passwords are compared in no time, and the number of comparisons.
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
            (format!("alice:{NOBODY}\nalice:{NOBODY}"), 2, "given twice"),
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
    async fn changes_of_the_file_take_effect_at_once() {
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
        assert_eq!(computed.load(Ordering::Relaxed), before, "the verdict is cached");
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
            // The password is compared with the first user's hash, and matches it.
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
        assert!(lock(&users.verification.pending).is_empty());
        // A cached verdict is worth nothing at another address.
        let before = computed.load(Ordering::Relaxed);
        assert_eq!(login(&users, "alice", "a", "192.0.2.2").await, Ok(()));
        assert_eq!(computed.load(Ordering::Relaxed), before + 1);
    }

    #[tokio::test]
    async fn a_flood_of_guesses_causes_few_computations_and_delays_nobody_else() {
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
        // A caller at another address is served at once.
        assert_eq!(login(&users, "alice", "a", "192.0.2.2").await, Ok(()));
    }

    #[tokio::test]
    async fn while_hashes_are_stuck_known_callers_log_in_and_the_queue_is_bounded() {
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
        // These find the queue full.
        for _ in 0..2 * WAITING {
            assert_eq!(flood.join_next().await.unwrap().unwrap(), Err(LoginError::Busy));
        }
        for _ in 0..100 {
            assert_eq!(login(&users, "alice", "a", "192.0.2.1").await, Ok(()));
        }
        assert_eq!(login(&users, "alice", "b", "192.0.2.1").await, Err(LoginError::Busy));
        assert!(computed.load(Ordering::Relaxed) <= 1 + AT_ONCE);
        // Callers that leave cause no further computations.
        flood.abort_all();
        while flood.join_next().await.is_some() {}
        for _ in 0..AT_ONCE {
            let _ = free.send(());
        }
        drop(free);
        assert_eq!(login(&users, "alice", "a", "192.0.2.1").await, Ok(()));
        assert!(
            computed.load(Ordering::Relaxed) <= 1 + AT_ONCE && lock(&users.verification.pending).is_empty()
        );
    }
}
