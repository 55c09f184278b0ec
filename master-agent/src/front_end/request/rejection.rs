//! The reasons for which a phase or a handler rejects a request, and their mapping to HTTP answers.

use access::request_info::Unreadable;
use hyper::StatusCode;
use proto::name::InvalidNodeName;

use crate::{
    front_end::{
        audit::Outcome,
        headers::{AmbiguousHead, UnsendableIdentity},
        upstream::{BodyError, UpstreamError},
    },
    http::status::StatusError,
};

/// Why a request is rejected. The caller gets the text.
#[derive(Debug, thiserror::Error)]
pub(super) enum Rejection {
    #[error("{0}")]
    AmbiguousHead(#[from] AmbiguousHead),
    /// The caller's address, user or failed attempts to authenticate have reached a limit.
    #[error("{0}")]
    TooMany(StatusError),
    /// A browser sent the request to the plain port on behalf of a web page.
    #[error("{0}")]
    FromWebPage(String),
    /// The caller is not recognised. Only the log contains the reason.
    #[error("Unauthorized")]
    Unauthenticated,
    #[error("the {0} can't be checked at the moment, please try again later")]
    CredentialUnchecked(&'static str),
    #[error("{0}")]
    Unreadable(#[from] Unreadable),
    #[error("{0}")]
    InvalidNodeName(#[from] InvalidNodeName),
    #[error("the request can't be recorded at the moment")]
    NotRecorded,
    /// An authorizer denies the request, or its impersonation headers are malformed.
    #[error("{0}")]
    NotAuthorized(StatusError),
    #[error("forbidden: {0}")]
    Forbidden(String),
    #[error("nodes call home on the HTTPS port only")]
    CallHomeElsewhere,
    #[error("a call home is a POST request over HTTP/1.1 with Upgrade: master-agent-link")]
    NoLinkRequested,
    #[error("a call home has no body")]
    CallHomeWithBody,
    /// The number is that of the seconds after which the node has to come again.
    #[error("too many nodes call home at once: come again in {0} s")]
    TooManyCalls(u32),
    #[error("the master-agent is stopping")]
    Stopping,
    #[error("only upgrades to websocket and SPDY/3.1 are supported")]
    UnknownUpgrade,
    /// The target of a proxy URL could not be reached, or the proxy URL is wrong.
    #[error("{0}")]
    ProxyUrl(StatusError),
    #[error("{0}")]
    UnsendableIdentity(#[from] UnsendableIdentity),
    #[error("{0}")]
    Body(BodyError),
    #[error("no API server can be reached")]
    UpstreamUnreachable,
    #[error("the connection to the API server broke off")]
    UpstreamBroken,
    #[error("the API server did not answer in time")]
    UpstreamTimedOut,
    #[error("the API server changed to another protocol without being asked")]
    UnrequestedUpgrade,
    /// A phase or the handler has panicked. Only the log contains the reason.
    #[error("the request failed because of an internal error")]
    Panicked,
}

impl Rejection {
    /// Returns the outcome for the audit record. `None` keeps the outcome that the phases have recorded.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        match self {
            Self::TooMany(_) | Self::TooManyCalls(_) | Self::NotRecorded => Some(Outcome::Limited),
            Self::Unauthenticated => Some(Outcome::Unauthenticated),
            Self::AmbiguousHead(_)
            | Self::FromWebPage(_)
            | Self::CredentialUnchecked(_)
            | Self::Unreadable(_)
            | Self::InvalidNodeName(_)
            | Self::NotAuthorized(_)
            | Self::Forbidden(_)
            | Self::CallHomeElsewhere
            | Self::NoLinkRequested
            | Self::CallHomeWithBody
            | Self::Stopping
            | Self::UnknownUpgrade
            | Self::ProxyUrl(_)
            | Self::UnsendableIdentity(_)
            | Self::Body(_)
            | Self::UpstreamUnreachable
            | Self::UpstreamBroken
            | Self::UpstreamTimedOut
            | Self::UnrequestedUpgrade
            | Self::Panicked => None,
        }
    }
}

/// The number of seconds after which another attempt may succeed.
const RETRY_AFTER: u32 = 1;

impl From<Rejection> for StatusError {
    fn from(rejection: Rejection) -> Self {
        let message = rejection.to_string();
        match rejection {
            Rejection::TooMany(failure)
            | Rejection::NotAuthorized(failure)
            | Rejection::ProxyUrl(failure) => failure,
            Rejection::TooManyCalls(seconds) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, message).retry_after(seconds)
            }
            Rejection::AmbiguousHead(_)
            | Rejection::Unreadable(_)
            | Rejection::InvalidNodeName(_)
            | Rejection::NoLinkRequested
            | Rejection::CallHomeWithBody
            | Rejection::UnknownUpgrade
            | Rejection::Body(BodyError::Broken(_)) => Self::new(StatusCode::BAD_REQUEST, message),
            Rejection::Unauthenticated => Self::new(StatusCode::UNAUTHORIZED, message),
            Rejection::FromWebPage(_)
            | Rejection::Forbidden(_)
            | Rejection::CallHomeElsewhere
            | Rejection::UnsendableIdentity(_) => Self::new(StatusCode::FORBIDDEN, message),
            Rejection::Body(BodyError::Stalled) => Self::new(StatusCode::REQUEST_TIMEOUT, message),
            Rejection::Body(BodyError::TooLarge) => Self::new(StatusCode::PAYLOAD_TOO_LARGE, message),
            Rejection::UpstreamBroken | Rejection::UnrequestedUpgrade => {
                Self::new(StatusCode::BAD_GATEWAY, message)
            }
            Rejection::CredentialUnchecked(_)
            | Rejection::NotRecorded
            | Rejection::Stopping
            | Rejection::UpstreamUnreachable => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, message).retry_after(RETRY_AFTER)
            }
            Rejection::UpstreamTimedOut => Self::new(StatusCode::GATEWAY_TIMEOUT, message),
            Rejection::Panicked => Self::new(StatusCode::INTERNAL_SERVER_ERROR, message),
        }
    }
}

impl From<UpstreamError> for Rejection {
    fn from(error: UpstreamError) -> Self {
        match error {
            UpstreamError::Unreachable(_) => Self::UpstreamUnreachable,
            UpstreamError::Body(error) => Self::Body(error),
            UpstreamError::Broken(_) => Self::UpstreamBroken,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upstream(error: UpstreamError) -> Rejection {
        error.into()
    }

    #[test]
    fn every_rejection_has_its_answer() {
        let limited = StatusError::new(StatusCode::TOO_MANY_REQUESTS, "too many").retry_after(7);
        for (rejection, code, retry_after, outcome) in [
            (Rejection::from(AmbiguousHead::ManyHosts), 400, None, None),
            (Rejection::TooMany(limited), 429, Some(7), Some(Outcome::Limited)),
            (Rejection::Unauthenticated, 401, None, Some(Outcome::Unauthenticated)),
            (Rejection::CredentialUnchecked("credential"), 503, Some(1), None),
            (Rejection::NotRecorded, 503, Some(1), Some(Outcome::Limited)),
            (Rejection::Forbidden("no".to_owned()), 403, None, None),
            (Rejection::from(UnsendableIdentity), 403, None, None),
            (Rejection::TooManyCalls(17), 503, Some(17), Some(Outcome::Limited)),
            (Rejection::Stopping, 503, Some(1), None),
            (upstream(UpstreamError::Unreachable("refused".to_owned())), 503, Some(1), None),
            (upstream(UpstreamError::Broken("reset".to_owned())), 502, None, None),
            (upstream(UpstreamError::Body(BodyError::TooLarge)), 413, None, None),
            (upstream(UpstreamError::Body(BodyError::Stalled)), 408, None, None),
            (upstream(UpstreamError::Body(BodyError::Broken("cut".to_owned()))), 400, None, None),
            (Rejection::UpstreamTimedOut, 504, None, None),
            (Rejection::Panicked, 500, None, None),
        ] {
            assert_eq!(rejection.outcome(), outcome, "{rejection:?}");
            let shown = format!("{rejection:?}");
            let answer = StatusError::from(rejection);
            assert_eq!((answer.code.as_u16(), answer.retry_after), (code, retry_after), "{shown}");
        }
        let answer = StatusError::from(upstream(UpstreamError::Unreachable("10.0.0.1 refused".to_owned())));
        assert!(!answer.message.contains("10.0.0.1"), "callers learn no addresses: {}", answer.message);
    }
}
