//! The interface of all authenticators.

use futures_util::future::BoxFuture;

use super::{authenticated::Recognized, credential::Presented, reason::FailureReason};
use crate::moment::Moment;

/// Recognises one kind of credential.
pub trait Authenticator: Send + Sync {
    /// Returns the user whose credential is presented. `None` means that no credential of this kind is presented, and
    /// an error that it is bad.
    fn authenticate<'a>(
        &'a self,
        presented: &'a Presented<'a>,
        now: Moment,
    ) -> BoxFuture<'a, Result<Option<Recognized>, FailureReason>>;

    /// Whether the result for a bearer token may be cached. This makes sense if authentication is costly and depends
    /// only on the token, the files and the time.
    fn remembers(&self) -> bool {
        false
    }
}
