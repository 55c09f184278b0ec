//! The process's limit on file descriptors, which bounds the connections that it can accept.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard one. Shells and containers often start processes with a soft limit of 1,024, which
/// is meant for programs that use select(2).
pub fn raise_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit on file descriptors was not raised");
    }
}

/// The number of descriptors that the process may have at once.
pub fn limit() -> usize {
    let limit = getrlimit(Resource::Nofile).current;
    limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        raise_limit();
        let hard = getrlimit(Resource::Nofile).maximum;
        assert_eq!(limit(), hard.map_or(usize::MAX, |hard| hard as usize));
    }
}
