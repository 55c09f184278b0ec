//! Exclusive claims on addresses and networks: whoever claims a key first keeps it, and the others wait for it.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    hash::Hash,
    net::IpAddr,
};

use ipnet::IpNet;

/// When an object was created, in Unix seconds. Among claims that are seen at the same time, the oldest object's wins.
/// Afterwards nobody can take what another has by claiming it, too.
pub(super) type Age = i64;

/// The age of a claim: that of the object that makes it, then its turn among all claims. Claims of the first lists have
/// the turn 0, as nobody knows which came first.
///
/// Every address of every pod has one, so it is small: `created` counts whole seconds from 1970 to 2106, and claims
/// beyond the 2^32nd share the last turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Since {
    created: u32,
    turn: u32,
}

impl Since {
    pub(super) fn new(created: Age, turn: u32) -> Self {
        Self { created: u32::try_from(created.max(0)).unwrap_or(u32::MAX), turn }
    }
}

/// Exclusive claims on keys. A claim that loses waits for the key.
#[derive(Clone, Debug)]
pub(super) struct Claims<K, O> {
    owners: HashMap<K, (Since, O)>,
    waiting: HashMap<K, BTreeSet<(O, Since)>>,
}

impl<K, O> Default for Claims<K, O> {
    fn default() -> Self {
        Self { owners: HashMap::new(), waiting: HashMap::new() }
    }
}

impl<K: Hash + Eq + Clone, O: Eq + Ord + Clone> Claims<K, O> {
    pub(super) fn get(&self, key: &K) -> Option<&O> {
        self.owners.get(key).map(|(_, owner)| owner)
    }

    /// The turn of the owner's claim.
    pub(super) fn turn(&self, key: &K) -> Option<u32> {
        self.owners.get(key).map(|(since, _)| since.turn)
    }

    /// The first owner, in the order of owners, that waits for the key and does not come before `from`.
    pub(super) fn waiting(&self, key: &K, from: impl FnOnce() -> O) -> Option<&O> {
        self.waiting.get(key)?.range((from(), Since::default())..).next().map(|(owner, _)| owner)
    }

    /// Claims a key. Returns `false` if it stays with another owner: with an older one, or, once `settled`, with whoever
    /// has it. A second claim of the same owner changes nothing.
    pub(super) fn claim(&mut self, key: K, since: Since, owner: O, settled: bool) -> bool {
        match self.owners.entry(key) {
            Entry::Vacant(free) => {
                free.insert((since, owner));
                true
            }
            Entry::Occupied(taken) if taken.get().1 == owner => true,
            Entry::Occupied(mut taken) if !settled && (since, &owner) < (taken.get().0, &taken.get().1) => {
                let key = taken.key().clone();
                let (since, loser) = taken.insert((since, owner));
                self.waiting.entry(key).or_default().insert((loser, since));
                true
            }
            Entry::Occupied(taken) => {
                let waiting = self.waiting.entry(taken.key().clone()).or_default();
                let first = waiting.range((owner.clone(), Since::default())..).next();
                if first.is_none_or(|(first, _)| *first != owner) {
                    waiting.insert((owner, since));
                }
                false
            }
        }
    }

    /// Gives up a key, or stops waiting for it.
    pub(super) fn release(&mut self, key: &K, owner: &O) {
        let owned = self.owners.get(key).is_some_and(|(_, o)| o == owner);
        if owned {
            self.owners.remove(key);
        }
        let Some(waiting) = self.waiting.get_mut(key) else { return };
        let next = match owned {
            true => waiting.iter().min_by_key(|(owner, since)| (since, owner)),
            false => waiting.iter().find(|(waiting, _)| waiting == owner),
        };
        let Some(next) = next.cloned() else { return };
        waiting.remove(&next);
        if owned {
            let (owner, since) = next;
            self.owners.insert(key.clone(), (since, owner));
        }
        if waiting.is_empty() {
            self.waiting.remove(key);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.owners.len()
    }
}

/// Networks with their owners, which finds the longest prefix that contains an address. A cluster has few different
/// prefix lengths, so one hash table for each length is as good as a tree.
#[derive(Clone, Debug)]
pub(super) struct Prefixes<O> {
    v4: BTreeMap<Reverse<u8>, Claims<IpNet, O>>,
    v6: BTreeMap<Reverse<u8>, Claims<IpNet, O>>,
}

impl<O> Default for Prefixes<O> {
    fn default() -> Self {
        Self { v4: BTreeMap::new(), v6: BTreeMap::new() }
    }
}

impl<O: Eq + Ord + Clone> Prefixes<O> {
    fn table(&mut self, net: &IpNet) -> &mut BTreeMap<Reverse<u8>, Claims<IpNet, O>> {
        match net {
            IpNet::V4(_) => &mut self.v4,
            IpNet::V6(_) => &mut self.v6,
        }
    }

    /// As [`Claims::claim`].
    pub(super) fn claim(&mut self, net: IpNet, since: Since, owner: O, settled: bool) -> bool {
        self.table(&net).entry(Reverse(net.prefix_len())).or_default().claim(
            net.trunc(),
            since,
            owner,
            settled,
        )
    }

    pub(super) fn release(&mut self, net: &IpNet, owner: &O) {
        let length = Reverse(net.prefix_len());
        let table = self.table(net);
        if let Some(claims) = table.get_mut(&length) {
            claims.release(&net.trunc(), owner);
            if claims.len() == 0 {
                table.remove(&length);
            }
        }
    }

    pub(super) fn longest(&self, address: IpAddr) -> Option<(IpNet, &O)> {
        self.all(address).next()
    }

    /// The owner whose network holds an address, if it is the only one.
    pub(super) fn only(&self, address: IpAddr) -> Option<&O> {
        let mut owners = self.all(address).map(|(_, owner)| owner);
        let first = owners.next()?;
        owners.all(|other| other == first).then_some(first)
    }

    /// The networks that hold an address, the longest prefix first.
    fn all(&self, address: IpAddr) -> impl Iterator<Item = (IpNet, &O)> {
        let table = match address {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        };
        table.iter().filter_map(move |(Reverse(length), claims)| {
            let net = IpNet::new(address, *length).ok()?.trunc();
            Some((net, claims.get(&net)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_claim_holds_and_the_next_follows() {
        let mut claims = Claims::default();
        let mut claim = |created, owner, settled| claims.claim("a", Since::new(created, 0), owner, settled);
        assert!(claim(5, "five", false));
        assert!(!claim(9, "nine", false));
        assert!(claim(1, "one", false));
        assert!(!claim(7, "seven", false));
        assert!(!claim(0, "late", true));
        assert_eq!(claims.waiting(&"a", || "l"), Some(&"late"));
        assert_eq!(claims.waiting(&"a", || "nine"), Some(&"nine"));
        assert_eq!(claims.waiting(&"a", || "x"), None);
        claims.release(&"a", &"late");
        assert_eq!(claims.get(&"a"), Some(&"one"));
        claims.release(&"a", &"seven");
        claims.release(&"a", &"nobody");
        claims.release(&"a", &"one");
        assert_eq!(claims.get(&"a"), Some(&"five"));
        claims.release(&"a", &"five");
        assert_eq!(claims.get(&"a"), Some(&"nine"));
        claims.release(&"a", &"nine");
        assert_eq!((claims.get(&"a"), claims.len(), claims.waiting.len()), (None, 0, 0));
    }

    #[test]
    fn who_claims_a_key_twice_gives_it_up_at_once() {
        let mut claims = Claims::default();
        for (created, owner) in [(1, "one"), (1, "one"), (2, "two"), (3, "two")] {
            assert_eq!(claims.claim("a", Since::new(created, created as u32), owner, true), owner == "one");
        }
        claims.release(&"a", &"one");
        assert_eq!(claims.get(&"a"), Some(&"two"));
        claims.release(&"a", &"two");
        assert_eq!((claims.get(&"a"), claims.len(), claims.waiting.len()), (None, 0, 0));
    }

    #[test]
    fn the_longest_prefix_is_found() {
        let mut nets = Prefixes::default();
        for net in ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "0.0.0.0/0", "fd00::/8", "fd00:1::/32"] {
            assert!(nets.claim(net.parse().unwrap(), Since::default(), net, false));
        }
        for (address, net) in [
            ("10.1.2.3", "10.1.2.0/24"),
            ("10.1.3.3", "10.1.0.0/16"),
            ("10.2.0.1", "10.0.0.0/8"),
            ("11.0.0.1", "0.0.0.0/0"),
            ("fd00:1::1", "fd00:1::/32"),
            ("fd01::1", "fd00::/8"),
        ] {
            assert_eq!(nets.longest(address.parse().unwrap()), Some((net.parse().unwrap(), &net)));
        }
        assert_eq!(nets.longest("2001:db8::1".parse().unwrap()), None);
        assert_eq!(nets.only("11.0.0.1".parse().unwrap()), Some(&"0.0.0.0/0"));
        assert_eq!(nets.only("10.2.0.1".parse().unwrap()), None);
        assert_eq!(nets.only("2001:db8::1".parse().unwrap()), None);
        nets.release(&"10.1.2.0/24".parse().unwrap(), &"10.1.2.0/24");
        assert_eq!(nets.longest("10.1.2.3".parse().unwrap()).unwrap().1, &"10.1.0.0/16");
        assert_eq!(nets.v4.len(), 3);
    }
}
