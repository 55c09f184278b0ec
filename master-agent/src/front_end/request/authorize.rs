//! Phase 5: decides whether the caller may do what it asks for, and on whose behalf the request goes on.
//!
//! kube-apiserver authorizes the requests that it answers itself. Requests that the front end answers are authorized
//! here, and so is every impersonation, since kube-apiserver does not learn of it.

use access::{authn::Validity, authz::Verdict};

use super::{
    call_home::{limited_as, reject_other_node},
    join_token::JOIN_TOKEN,
    rejection::Rejection,
    stages::{Authorized, Handler, Reserved, Resolved},
};
use crate::front_end::{connection::Connection, recorder::Recorder};

pub(super) async fn authorize(
    connection: &Connection,
    request: Reserved,
    record: &mut Recorder,
) -> Result<(Handler, Authorized), Rejection> {
    let Reserved { request, mut seat } = request;
    let may_last = request.may_last();
    let Resolved { head, body, mut caller, info, hop, handler, long_running } = request;
    let (authenticated, validity) = (caller.user.clone(), std::mem::take(&mut caller.validity));
    let user = match &handler {
        Handler::CallHome(_) if caller.authenticator == JOIN_TOKEN => {
            record.decided(&joining());
            // A token is for one host, whatever name its holder gives.
            seat = connection
                .front_end
                .limits
                .upgraded(seat, &authenticated.name)
                .map_err(Rejection::TooMany)?;
            caller.user
        }
        Handler::CallHome(call_home) => {
            let authorized = connection.authorize(&head, caller, &info, true, record).await;
            let user = authorized.map_err(Rejection::NotAuthorized)?;
            // The caller may impersonate a node.
            reject_other_node(connection, call_home, &user, &info, record)?;
            let name = limited_as(&authenticated, &info);
            seat = connection.front_end.limits.upgraded(seat, &name).map_err(Rejection::TooMany)?;
            user
        }
        Handler::ProxyUrl(_) | Handler::Page(_) => {
            let authorized = connection.authorize(&head, caller, &info, true, record).await;
            authorized.map_err(Rejection::NotAuthorized)?
        }
        Handler::Upstream => {
            let authorized = connection.authorize(&head, caller, &info, false, record).await;
            authorized.map_err(Rejection::NotAuthorized)?
        }
    };
    record.allowed();
    let validity = if may_last { validity } else { Validity::default() };
    let request =
        Authorized { head, body, info, hop, long_running, seat, caller: authenticated, user, validity };
    Ok((handler, request))
}

/// Returns the verdict for a caller with a join token, which always allows joining.
fn joining() -> Verdict {
    Verdict { allowed: true, authorizer: Some(JOIN_TOKEN), rule: "joining".to_owned(), reason: String::new() }
}
