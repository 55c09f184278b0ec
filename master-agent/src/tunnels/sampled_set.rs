//! A set from which a few members can be sampled without visiting all of them.

use std::{collections::HashMap, hash::Hash};

/// A set of members by key. A walk begins at a random member, so a caller that takes the first suitable ones does not
/// always take the same ones.
#[derive(Debug)]
pub(super) struct SampledSet<K, V> {
    positions: HashMap<K, usize>,
    members: Vec<(K, V)>,
}

impl<K, V> Default for SampledSet<K, V> {
    fn default() -> Self {
        Self { positions: HashMap::new(), members: Vec::new() }
    }
}

impl<K: Clone + Eq + Hash, V> SampledSet<K, V> {
    /// Adds a member, or replaces the member with this key.
    pub(super) fn insert(&mut self, key: K, value: V) {
        match self.positions.get(&key).and_then(|at| self.members.get_mut(*at)) {
            Some(member) => member.1 = value,
            None => {
                self.positions.insert(key.clone(), self.members.len());
                self.members.push((key, value));
            }
        }
    }

    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.positions.get(key).and_then(|at| self.members.get(*at)).map(|(_, value)| value)
    }

    pub(super) fn remove(&mut self, key: &K) {
        let Some(at) = self.positions.remove(key) else { return };
        self.members.swap_remove(at);
        if let Some((moved, _)) = self.members.get(at) {
            self.positions.insert(moved.clone(), at);
        }
    }

    /// Returns all members, beginning at the position that `random` from 0 to 1 chooses.
    pub(super) fn walk(&self, random: f64) -> impl Iterator<Item = &V> {
        let start = (self.members.len() as f64 * random.clamp(0.0, 1.0)) as usize;
        let (before, after) = self.members.split_at(start.min(self.members.len()));
        after.iter().chain(before).map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_come_and_go_and_a_walk_meets_each_once() {
        let mut set = SampledSet::default();
        for i in 0..10 {
            set.insert(i, i * 10);
        }
        set.insert(3, 33);
        for gone in [0, 9, 5, 5] {
            set.remove(&gone);
        }
        for random in [0.0, 0.3, 0.99, 1.0] {
            let mut met: Vec<i32> = set.walk(random).copied().collect();
            met.sort_unstable();
            assert_eq!(met, [10, 20, 33, 40, 60, 70, 80], "{random}");
        }
        assert!((1..9).filter(|i| *i != 5).all(|i| set.get(&i).is_some()));
        assert_eq!((set.get(&3), set.get(&5)), (Some(&33), None));
        let first: Vec<i32> =
            [0.0, 0.5].iter().filter_map(|random| set.walk(*random).next().copied()).collect();
        assert_ne!(first.first(), first.last());
    }
}
