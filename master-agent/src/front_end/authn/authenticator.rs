//! What every authenticator does: it says whose credential of its kind is presented.

use super::{authenticated::Recognized, credential::Presented, moment::Moment, reason::Reason};
use crate::front_end::future::BoxFuture;

/// One kind of credential.
pub trait Authenticator: Send + Sync {
    /// `None` where nothing is presented that is of this kind.
    fn authenticate<'a>(
        &'a self,
        presented: &'a Presented<'a>,
        now: Moment,
    ) -> BoxFuture<'a, Result<Option<Recognized>, Reason>>;

    /// Whether who a bearer token is may be remembered for a while: where finding out is costly, and nothing but
    /// the token, the files and the time decide.
    fn remembers(&self) -> bool {
        false
    }
}
