//! Callers without any credential, on the paths that are listed and no other.

use super::{
    authenticated::Recognized, authenticator::Authenticator, credential::Presented, moment::Moment,
    reason::Reason,
};
use crate::front_end::{
    future::BoxFuture,
    user::{ANONYMOUS, UNAUTHENTICATED, User},
};

pub struct Anonymous {
    paths: Vec<String>,
}

impl Anonymous {
    pub fn new(paths: Vec<String>) -> Self {
        Self { paths }
    }
}

impl Authenticator for Anonymous {
    fn authenticate<'a>(
        &'a self,
        presented: &'a Presented<'a>,
        _: Moment,
    ) -> BoxFuture<'a, Result<Option<Recognized>, Reason>> {
        let nothing = presented.bearer.is_none() && presented.certificates.is_empty();
        let allowed = nothing && self.paths.iter().any(|path| path == presented.path);
        let user = allowed.then(|| User {
            name: ANONYMOUS.to_owned(),
            groups: vec![UNAUTHENTICATED.to_owned()],
            ..User::default()
        });
        Box::pin(std::future::ready(Ok(user.map(Recognized::from))))
    }
}
