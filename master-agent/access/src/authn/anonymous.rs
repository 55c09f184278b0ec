//! The authenticator of callers without any credential, which accepts them only for listed paths.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::{
    authenticated::Recognized, authenticator::Authenticator, credential::Presented, reason::FailureReason,
};
use crate::{
    moment::Moment,
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
    ) -> BoxFuture<'a, Result<Option<Recognized>, FailureReason>> {
        let nothing = presented.bearer.is_none() && presented.certificates.is_empty();
        let allowed = nothing && self.paths.iter().any(|path| path == presented.path);
        let user = allowed.then(|| User {
            name: ANONYMOUS.to_owned(),
            groups: vec![UNAUTHENTICATED.to_owned()],
            ..User::default()
        });
        Box::pin(std::future::ready(Ok(user.map(|user| Recognized::from(Arc::new(user))))))
    }
}
