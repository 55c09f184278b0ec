//! Who has what, where two may claim the same: the one who came first keeps it.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, hash_map::Entry},
    hash::Hash,
    net::IpAddr,
};

use ipnet::IpNet;

/// When an object was made, in Unix seconds. Of claims that are seen at the same time, the oldest object's is the
/// good one; afterwards nobody can take what another has by claiming it too.
pub type Age = i64;

/// Exclusive claims on keys. Those who lose wait for the key.
#[derive(Clone, Debug)]
pub struct Claims<K, O> {
    owners: HashMap<K, (Age, O)>,
    waiting: HashMap<K, Vec<(Age, O)>>,
}

impl<K, O> Default for Claims<K, O> {
    fn default() -> Self {
        Self { owners: HashMap::new(), waiting: HashMap::new() }
    }
}

impl<K: Hash + Eq + Clone, O: Eq + Ord + Clone> Claims<K, O> {
    pub fn get(&self, key: &K) -> Option<&O> {
        self.owners.get(key).map(|(_, owner)| owner)
    }

    /// `false` when the key stays with another: with an older one, and once `settled` with whoever has it.
    pub fn claim(&mut self, key: K, age: Age, owner: O, settled: bool) -> bool {
        match self.owners.entry(key) {
            Entry::Vacant(free) => {
                free.insert((age, owner));
                true
            }
            Entry::Occupied(mut taken) if !settled && (age, &owner) < (taken.get().0, &taken.get().1) => {
                let key = taken.key().clone();
                let loser = taken.insert((age, owner));
                self.waiting.entry(key).or_default().push(loser);
                true
            }
            Entry::Occupied(taken) => {
                let key = taken.key().clone();
                self.waiting.entry(key).or_default().push((age, owner));
                false
            }
        }
    }

    /// Gives a key, or the wait for it, up.
    pub fn release(&mut self, key: &K, owner: &O) {
        let owned = self.owners.get(key).is_some_and(|(_, o)| o == owner);
        if owned {
            self.owners.remove(key);
        }
        let Some(waiting) = self.waiting.get_mut(key) else { return };
        if owned {
            waiting.sort();
            self.owners.insert(key.clone(), waiting.remove(0));
        } else if let Some(at) = waiting.iter().position(|(_, o)| o == owner) {
            waiting.remove(at);
        }
        if waiting.is_empty() {
            self.waiting.remove(key);
        }
    }

    pub fn len(&self) -> usize {
        self.owners.len()
    }
}

/// Networks with their owners, asked for the longest prefix that contains an address. A cluster has few
/// different prefix lengths, so one hash table for each is as good as a tree.
#[derive(Clone, Debug)]
pub struct Prefixes<O> {
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
    pub fn claim(&mut self, net: IpNet, age: Age, owner: O, settled: bool) -> bool {
        self.table(&net).entry(Reverse(net.prefix_len())).or_default().claim(net.trunc(), age, owner, settled)
    }

    pub fn release(&mut self, net: &IpNet, owner: &O) {
        let length = Reverse(net.prefix_len());
        let table = self.table(net);
        if let Some(claims) = table.get_mut(&length) {
            claims.release(&net.trunc(), owner);
            if claims.len() == 0 {
                table.remove(&length);
            }
        }
    }

    pub fn longest(&self, address: IpAddr) -> Option<(IpNet, &O)> {
        let table = match address {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        };
        table.iter().find_map(|(Reverse(length), claims)| {
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
        assert!(claims.claim("a", 5, "five", false));
        assert!(!claims.claim("a", 9, "nine", false));
        assert!(claims.claim("a", 1, "one", false));
        assert!(!claims.claim("a", 7, "seven", false));
        assert!(!claims.claim("a", 0, "late", true));
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
    fn the_longest_prefix_is_found() {
        let mut nets = Prefixes::default();
        for net in ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "0.0.0.0/0", "fd00::/8", "fd00:1::/32"] {
            assert!(nets.claim(net.parse().unwrap(), 0, net, false));
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
        nets.release(&"10.1.2.0/24".parse().unwrap(), &"10.1.2.0/24");
        assert_eq!(nets.longest("10.1.2.3".parse().unwrap()).unwrap().1, &"10.1.0.0/16");
        assert_eq!(nets.v4.len(), 3);
    }
}
