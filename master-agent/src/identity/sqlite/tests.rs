use std::os::unix::fs::PermissionsExt;

use russh::keys::PrivateKey;

use super::*;
use crate::identity::tests::{TempDir, new_key};

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
}

fn node(s: &str) -> NodeName {
    s.parse().unwrap()
}

/// The grant for a name that the inventory lists without addresses.
fn listed(_: &NodeName) -> Grant {
    Grant { listed: true, addresses: Vec::new() }
}

#[test]
fn of_many_hosts_with_one_token_one_succeeds() {
    let dir = TempDir::new();
    let store = SqliteStore::open(&dir.0).unwrap();
    for round in 0..20 {
        let id = format!("token{round}");
        store.add_token(&id, &[7; 32], None, at(60)).unwrap();
        // Half of them through connections of their own, as other processes have them.
        let won = std::thread::scope(|scope| {
            let tasks: Vec<_> = (0..8)
                .map(|i| {
                    let (id, store, dir) = (&id, &store, &dir.0);
                    scope.spawn(move || {
                        let asked = node(&format!("n{round}-{i}"));
                        let own = (i % 2 == 0).then(|| SqliteStore::open(dir).unwrap());
                        let store = own.as_ref().unwrap_or(store);
                        store.redeem(id, &[7; 32], Some(&asked), "SHA256:k", at(0), &listed)
                    })
                })
                .collect();
            tasks.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
        });
        let (won, lost): (Vec<_>, Vec<_>) = won.into_iter().partition(Result::is_ok);
        assert_eq!(won.len(), 1);
        assert!(lost.iter().all(|r| matches!(r, Err(TokenError::Used))), "{lost:?}");
    }
}

#[test]
fn records_outlive_the_process_in_files_only_their_owner_can_read() {
    let dir = TempDir::new();
    let key = new_key();
    let address = "10.0.0.5".parse().unwrap();
    {
        let store = SqliteStore::open(&dir.0).unwrap();
        store.remember_node(&node("n1"), key.public_key(), &[address]).unwrap();
        assert_eq!(store.remember_first_use(&node("n2"), "SHA256:a").unwrap(), "SHA256:a");
        assert_eq!(store.remember_first_use(&node("n2"), "SHA256:b").unwrap(), "SHA256:a");
    }
    let store = SqliteStore::open(&dir.0).unwrap();
    assert_eq!(store.joined_key(&node("n1")), Some(fingerprint(key.public_key())));
    assert_eq!(store.address_owner(&address).unwrap(), Some(node("n1")));
    assert_eq!(store.first_use_key(&node("n2")).as_deref(), Some("SHA256:a"), "the first stays");
    let again = new_key();
    store.remember_node(&node("n1"), again.public_key(), &[]).unwrap();
    assert_eq!(store.joined_key(&node("n1")), Some(fingerprint(again.public_key())));
    assert_eq!(store.address_owner(&address).unwrap(), None);
    assert!(store.forget_node(&node("n1")).unwrap());
    assert!(!store.forget_node(&node("n1")).unwrap());
    assert_eq!(store.joined_key(&node("n1")), None);
    for entry in std::fs::read_dir(&dir.0).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
    }
}

/// Returns the keys that a new process would read.
fn stored(dir: &TempDir) -> Known {
    SqliteStore::open(&dir.0).unwrap().known.into_inner().unwrap()
}

#[test]
fn memory_has_what_this_and_other_processes_have_committed() {
    let dir = TempDir::new();
    let (store, other) = (SqliteStore::open(&dir.0).unwrap(), SqliteStore::open(&dir.0).unwrap());
    let (first, second) = (new_key(), new_key());
    let remember = |store: &SqliteStore, key: &PrivateKey| {
        store.remember_node(&node("n1"), key.public_key(), &[]).unwrap();
    };
    let mut changes = store.changes();
    remember(&store, &second);
    assert!(!changes.has_changed().unwrap(), "the first key of a node concerns nobody");
    remember(&store, &first);
    assert!(changes.has_changed().unwrap());
    assert!(!store.refresh().unwrap(), "its own changes are known already");
    assert_eq!(*store.known.read().unwrap(), stored(&dir));
    changes.mark_unchanged();

    remember(&other, &second);
    other.remember_first_use(&node("n2"), "SHA256:a").unwrap();
    assert_eq!(store.joined_key(&node("n1")), Some(fingerprint(first.public_key())));
    assert!(!changes.has_changed().unwrap());
    // A change of its own leaves what it has not read yet to the next refresh.
    store.remember_first_use(&node("n3"), "SHA256:c").unwrap();
    assert!(store.refresh().unwrap());
    assert!(changes.has_changed().unwrap());
    assert_eq!(store.joined_key(&node("n1")), Some(fingerprint(second.public_key())));
    assert_eq!(*store.known.read().unwrap(), stored(&dir));

    assert!(other.forget_node(&node("n1")).unwrap());
    assert!(store.refresh().unwrap());
    assert_eq!(store.joined_key(&node("n1")), None);
    assert!(!store.refresh().unwrap());
}

#[test]
fn only_what_can_concern_a_tunnel_wakes_those_who_wait() {
    let dir = TempDir::new();
    let (store, other) = (SqliteStore::open(&dir.0).unwrap(), SqliteStore::open(&dir.0).unwrap());
    let mut changes = store.changes();
    let (first, second) = (new_key(), new_key());
    let remember = |store: &SqliteStore, name: &str, key: &PrivateKey| {
        store.remember_node(&node(name), key.public_key(), &[]).unwrap();
    };
    let revoke = |store: &SqliteStore, version: u64| {
        store.change_revocations(&mut |_| Ok(Some((version, vec![])))).unwrap();
    };
    let mut woken = |what: &str, change: &dyn Fn(&SqliteStore)| {
        [&store, &other].map(|by| {
            change(by);
            assert_eq!(store.refresh().unwrap(), std::ptr::eq(by, &other), "{what}");
            let woken = changes.has_changed().unwrap();
            changes.mark_unchanged();
            woken
        })
    };
    let number = std::cell::Cell::new(0);
    let next = || {
        number.set(number.get() + 1);
        number.get()
    };
    let join = |by: &SqliteStore| remember(by, &format!("n{}", next()), &first);
    assert_eq!(woken("first keys", &join), [false, false]);
    assert_eq!(woken("the same keys again", &|by| remember(by, "n1", &first)), [false, false]);
    let keys = std::cell::RefCell::new(vec![&first, &second]);
    let replace = |by: &SqliteStore| remember(by, "n1", keys.borrow_mut().pop().unwrap());
    assert_eq!(woken("other keys", &replace), [true, true]);
    let token = |by: &SqliteStore| by.add_token(&next().to_string(), &[1; 32], None, at(60)).unwrap();
    assert_eq!(woken("tokens", &token), [false, false]);
    assert_eq!(woken("revocations", &|by| revoke(by, next())), [true, true]);
    let forget = |by: &SqliteStore| {
        let known = if std::ptr::eq(by, &other) { "n2" } else { "n1" };
        assert!(by.forget_node(&node(known)).unwrap());
    };
    assert_eq!(woken("forgotten nodes", &forget), [true, true]);
    let drain = |by: &SqliteStore| {
        by.set_drain(&node("n1"), Some(at(next()))).unwrap();
    };
    assert_eq!(woken("drains", &drain), [true, true]);
}

#[test]
fn a_drain_lasts_until_it_is_undone() {
    let dir = TempDir::new();
    let store = SqliteStore::open(&dir.0).unwrap();
    let until = at(60) + Duration::from_millis(7);
    assert!(!store.set_drain(&node("n1"), Some(at(1))).unwrap());
    assert!(store.set_drain(&node("n1"), Some(until)).unwrap(), "the later one takes its place");
    let drained = HashMap::from([(node("n1"), until)]);
    assert_eq!(store.drains(), drained);
    drop(store);
    let store = SqliteStore::open(&dir.0).unwrap();
    assert_eq!(store.drains(), drained);
    assert!(store.set_drain(&node("n1"), None).unwrap());
    assert!(!store.set_drain(&node("n1"), None).unwrap());
    assert_eq!(store.drains(), HashMap::new());
    assert_eq!(*store.known.read().unwrap(), stored(&dir));
}

#[test]
fn a_host_whose_answer_was_lost_asks_again_and_nobody_else_does() {
    let dir = TempDir::new();
    let store = SqliteStore::open(&dir.0).unwrap();
    let (key, other) = (new_key(), new_key());
    let (shown, others) = (fingerprint(key.public_key()), fingerprint(other.public_key()));
    for (id, bound) in [("bound", Some(node("n1"))), ("unbound", None)] {
        store.add_token(id, &[1; 32], bound.as_ref(), at(60)).unwrap();
        let redeem = |secret: u8, asked: Option<&str>, key: &str, seconds: u64| {
            let asked = asked.map(node);
            let redeemed = store.redeem(id, &[secret; 32], asked.as_ref(), key, at(seconds), &listed);
            redeemed.map(|(node, _)| node)
        };
        assert_eq!(redeem(1, Some("n1"), &shown, 0).unwrap(), node("n1"));
        assert_eq!(redeem(1, Some("n1"), &shown, 1).unwrap(), node("n1"));
        assert_eq!(redeem(1, None, &shown, 59).unwrap(), node("n1"));
        assert_eq!(store.check(id, &[1; 32], at(59)).unwrap(), Some(node("n1")));
        for (secret, asked, key, seconds) in
            [(1, Some("n1"), &others, 1), (1, Some("n2"), &shown, 1), (1, Some("n1"), &shown, 60)]
        {
            let refused = redeem(secret, asked, key, seconds);
            assert!(matches!(refused, Err(TokenError::Used)), "{id}: {refused:?}");
        }
        assert!(matches!(redeem(2, Some("n1"), &shown, 1), Err(TokenError::Unknown)));
        assert!(matches!(store.check(id, &[2; 32], at(1)), Err(TokenError::Unknown)));
        assert!(matches!(store.check(id, &[1; 32], at(60)), Err(TokenError::Expired)));
        // A used token is worth nothing once its node has joined with another key or was forgotten.
        store.remember_node(&node("n1"), other.public_key(), &[]).unwrap();
        assert!(matches!(redeem(1, Some("n1"), &shown, 1), Err(TokenError::Used)));
        assert!(store.forget_node(&node("n1")).unwrap());
        for key in [&shown, &others] {
            assert!(matches!(redeem(1, Some("n1"), key, 1), Err(TokenError::Used)));
        }
    }
}

#[test]
fn a_join_that_finds_the_disk_full_leaves_the_token_as_it_was() {
    let dir = TempDir::new();
    let store = SqliteStore::open(&dir.0).unwrap();
    store.add_token("a", &[1; 32], None, at(60)).unwrap();
    let most_pages = |count: u32| {
        let set = format!("PRAGMA max_page_count = {count}");
        store.database().connection.execute_batch(&set).unwrap();
    };
    let join = |grant: &dyn Fn(&NodeName) -> Grant| {
        store.redeem("a", &[1; 32], Some(&node("n1")), "SHA256:k", at(0), grant)
    };
    // The token and the node fit into the pages that are there, and the addresses do not.
    most_pages(1);
    let full = join(&|_| Grant {
        listed: true,
        addresses: (0..2_000_u32).map(|i| i.to_be_bytes().into()).collect(),
    });
    assert!(matches!(&full, Err(TokenError::Store(why)) if why.contains("full")), "{full:?}");
    assert_eq!((store.joined_key(&node("n1")), stored(&dir).joined.len()), (None, 0));
    assert_eq!(store.tokens(at(0)).unwrap()[0].used_by, None);
    most_pages(1_000_000);
    assert_eq!(join(&listed).unwrap(), (node("n1"), Vec::new()));
    assert_eq!(stored(&dir).joined.get(&node("n1")).map(String::as_str), Some("SHA256:k"));
}

#[test]
fn two_processes_agree_on_the_key_of_first_use() {
    let dir = TempDir::new();
    let (store, other) = (SqliteStore::open(&dir.0).unwrap(), SqliteStore::open(&dir.0).unwrap());
    assert_eq!(other.remember_first_use(&node("n1"), "SHA256:a").unwrap(), "SHA256:a");
    assert_eq!(store.first_use_key(&node("n1")), None, "not noticed yet");
    assert_eq!(store.remember_first_use(&node("n1"), "SHA256:b").unwrap(), "SHA256:a");
    assert_eq!(store.first_use_key(&node("n1")).as_deref(), Some("SHA256:a"));
}

#[test]
fn expired_tokens_are_told_apart_for_a_week_and_then_forgotten() {
    let dir = TempDir::new();
    let store = SqliteStore::open(&dir.0).unwrap();
    store.add_token("a", &[1; 32], Some(&node("n1")), at(60)).unwrap();
    assert_eq!(store.tokens(at(59)).unwrap().len(), 1);
    assert_eq!(store.tokens(at(60)).unwrap(), []);
    let late = store.redeem("a", &[1; 32], None, "SHA256:k", at(60), &listed);
    assert!(matches!(late, Err(TokenError::Expired)), "{late:?}");
    store.tokens(at(60 + 7 * 24 * 3600)).unwrap();
    let gone = store.redeem("a", &[1; 32], None, "SHA256:k", at(60 + 7 * 24 * 3600), &listed);
    assert!(matches!(gone, Err(TokenError::Unknown)), "{gone:?}");
}

#[test]
fn a_token_whose_binding_cannot_be_read_is_refused() {
    let dir = TempDir::new();
    let store = SqliteStore::open(&dir.0).unwrap();
    store.add_token("a", &[1; 32], Some(&node("n1")), at(60)).unwrap();
    store.database().connection.execute("UPDATE tokens SET node = 'N_1'", []).unwrap();
    let got = store.redeem("a", &[1; 32], Some(&node("n2")), "SHA256:k", at(0), &listed);
    assert!(matches!(got, Err(TokenError::Store(_))), "{got:?}");
}

/// As builds before 0.1.0 wrote it, of which the first did not know of revocations.
#[test]
fn the_tables_of_version_1_are_brought_to_the_present_one() {
    let dir = TempDir::new();
    let key = new_key();
    let former = "
        DROP TABLE revocations; DROP TABLE nodes; DROP TABLE drains;
        CREATE TABLE nodes (
            name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, public_key TEXT NOT NULL,
            joined INTEGER NOT NULL, not_after INTEGER NOT NULL
        ) STRICT;
        INSERT INTO nodes VALUES ('n1', 'SHA256:a', 'ssh-ed25519 x', 1, 2);
        PRAGMA user_version = 1;";
    SqliteStore::open(&dir.0).unwrap().database().connection.execute_batch(former).unwrap();
    // Several processes may begin with it.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| SqliteStore::open(&dir.0).unwrap());
        }
    });
    let store = SqliteStore::open(&dir.0).unwrap();
    assert_eq!(store.revocations().unwrap(), None);
    assert_eq!(store.joined_key(&node("n1")).as_deref(), Some("SHA256:a"));
    store.remember_node(&node("n1"), key.public_key(), &[]).unwrap();
    assert_eq!(stored(&dir).joined.get(&node("n1")), Some(&fingerprint(key.public_key())));
}

#[test]
fn a_newer_schema_is_left_alone() {
    let dir = TempDir::new();
    SqliteStore::open(&dir.0)
        .unwrap()
        .database()
        .connection
        .execute_batch("PRAGMA user_version = 99")
        .unwrap();
    assert!(SqliteStore::open(&dir.0).unwrap_err().to_string().contains("newer master-agent"));
}
