//! Refusals by the rule of a node's policy. Nodes choose the names of rules, so their number and length are bounded.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};

/// Rules with a series of their own.
const RULES: usize = 50;
/// Bytes of a rule's name.
const NAME: usize = 63;
/// Stands for all other rules.
const OTHER: &str = "other";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RuleLabels {
    pub rule: String,
}

#[derive(Clone, Debug, Default)]
pub struct PolicyRules {
    counts: Family<RuleLabels, Counter>,
    known: Arc<Mutex<HashSet<String>>>,
}

impl PolicyRules {
    pub fn count(&self, rule: &str) {
        let rule = if self.has_own_series(rule) { rule } else { OTHER };
        self.counts.get_or_create(&RuleLabels { rule: rule.to_owned() }).inc();
    }

    fn has_own_series(&self, rule: &str) -> bool {
        let usual = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if rule.is_empty() || rule.len() > NAME || !rule.chars().all(usual) {
            return false;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.contains(rule) || known.len() < RULES && known.insert(rule.to_owned())
    }

    pub fn family(&self) -> Family<RuleLabels, Counter> {
        self.counts.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_series_is_bounded() {
        let rules = PolicyRules::default();
        let of = |rule: &str| rules.counts.get_or_create(&RuleLabels { rule: rule.to_owned() }).get();
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
