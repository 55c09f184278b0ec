//! Refusals by the rule of a node's policy. What a rule is called is the node's word, so it is bounded.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};

/// Rules that have a series of their own.
const RULES: usize = 50;
/// Bytes of a rule's name.
const NAME: usize = 63;
/// All other rules.
const OTHER: &str = "other";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Rule {
    pub rule: String,
}

#[derive(Clone, Debug, Default)]
pub struct Rules {
    counts: Family<Rule, Counter>,
    known: Arc<Mutex<HashSet<String>>>,
}

impl Rules {
    pub fn count(&self, rule: &str) {
        let rule = if self.is_counted_alone(rule) { rule } else { OTHER };
        self.counts.get_or_create(&Rule { rule: rule.to_owned() }).inc();
    }

    fn is_counted_alone(&self, rule: &str) -> bool {
        let usual = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if rule.is_empty() || rule.len() > NAME || !rule.chars().all(usual) {
            return false;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.contains(rule) || known.len() < RULES && known.insert(rule.to_owned())
    }

    pub fn family(&self) -> Family<Rule, Counter> {
        self.counts.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_rules_nodes_name_the_series_are_few() {
        let rules = Rules::default();
        let of = |rule: &str| rules.counts.get_or_create(&Rule { rule: rule.to_owned() }).get();
        rules.count("default");
        rules.count("x\" y\n");
        rules.count(&"x".repeat(64));
        rules.count("");
        assert_eq!(of(OTHER), 3);
        for i in 0..1000 {
            rules.count(&format!("rule-{i}"));
        }
        rules.count("default");
        assert_eq!((of("default"), of("rule-48"), of(OTHER)), (2, 1, 3 + 1000 - 49));
        assert_eq!(rules.known.lock().unwrap().len(), RULES);
    }
}
