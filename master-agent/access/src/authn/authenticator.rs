//! The interface of all authenticators.

use futures_util::future::BoxFuture;

use super::{authenticated::Recognized, credential::Presented, reason::Reason};
use crate::moment::Moment;

/// Recognises one kind of credential.
pub trait Authenticator: Send + Sync {
    /// Whose credential is presented. `None` means that there is no credential of this kind, an error that it is bad.
    fn authenticate<'a>(
        &'a self,
        presented: &'a Presented<'a>,
        now: Moment,
    ) -> BoxFuture<'a, Result<Option<Recognized>, Reason>>;

    /// Whether the result for a bearer token may be remembered for a while. That makes sense if authentication is costly
    /// and depends only on the token, the files and the time.
    fn remembers(&self) -> bool {
        false
    }
}
