//! The errors that the agent itself answers, as Kubernetes `Status` objects, which clients of kube-apiserver show to
//! their users.

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Response, StatusCode, header};
use proto::DialError;
use serde_json::json;

/// The error with which the agent itself answers a request in place of the target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct StatusError {
    pub code: StatusCode,
    pub message: String,
    /// The number of seconds after which another attempt may succeed.
    pub retry_after: Option<u32>,
}

impl StatusError {
    pub fn new(code: StatusCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None }
    }

    #[must_use]
    pub fn retry_after(self, seconds: u32) -> Self {
        Self { retry_after: Some(seconds), ..self }
    }

    /// Creates the error of a target, or of a proxy in front of it, that does not follow the protocol.
    pub fn bad_gateway(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, message)
    }

    /// Creates the error of a target that can't be looked up. To its caller, a target without a route does not exist.
    pub fn unknown(error: &DialError) -> Self {
        let failure = Self::from(error);
        let unknown = matches!(error, DialError::NoRoute(_));
        if unknown { Self { code: StatusCode::NOT_FOUND, ..failure } } else { failure }
    }

    /// Returns the response, whose body is the `Status` object.
    pub fn response(&self) -> Response<Full<Bytes>> {
        let status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": reason(self.code),
            "code": self.code.as_u16(),
        });
        let mut response = Response::new(Full::new(Bytes::from(status.to_string())));
        *response.status_mut() = self.code;
        let json = header::HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

impl From<&DialError> for StatusError {
    fn from(error: &DialError) -> Self {
        let code = match error {
            DialError::BadTarget(_) => StatusCode::BAD_REQUEST,
            DialError::Policy { .. } => StatusCode::FORBIDDEN,
            DialError::TooManyStreams(_) => StatusCode::TOO_MANY_REQUESTS,
            DialError::NoRoute(_)
            | DialError::Refused(_)
            | DialError::Resolve(_)
            | DialError::Unreachable(_) => StatusCode::BAD_GATEWAY,
            DialError::Cancelled | DialError::NoTunnel { .. } | DialError::TunnelLost { .. } => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            DialError::TimedOut(_) => StatusCode::GATEWAY_TIMEOUT,
        };
        Self::new(code, error.to_string())
    }
}

/// Returns the reason that the Kubernetes API gives for a code.
fn reason(code: StatusCode) -> &'static str {
    match code {
        StatusCode::BAD_REQUEST => "BadRequest",
        StatusCode::UNAUTHORIZED => "Unauthorized",
        StatusCode::FORBIDDEN => "Forbidden",
        StatusCode::NOT_FOUND => "NotFound",
        StatusCode::PAYLOAD_TOO_LARGE => "RequestEntityTooLarge",
        StatusCode::TOO_MANY_REQUESTS => "TooManyRequests",
        StatusCode::BAD_GATEWAY => "BadGateway",
        StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailable",
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => "Timeout",
        StatusCode::NOT_IMPLEMENTED => "NotImplemented",
        _ => "InternalError",
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn a_failure_is_a_status_object() {
        let error = DialError::Policy { rule: "link-local".into(), reason: "169.254.0.0/16 \"no\"".into() };
        let response = StatusError::from(&error).response();
        assert_eq!(
            (response.status().as_u16(), &response.headers()["content-type"]),
            (403, &"application/json".parse().unwrap())
        );
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let status: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            status,
            json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 403, "reason": "Forbidden",
                "message": "refused by node policy (rule link-local): 169.254.0.0/16 \"no\"",
            })
        );
    }

    #[test]
    fn every_dial_error_has_a_code() {
        let text = || "x".to_owned();
        for (error, code) in [
            (DialError::BadTarget(text()), 400),
            (DialError::TooManyStreams(text()), 429),
            (DialError::Cancelled, 503),
            (DialError::NoRoute(text()), 502),
            (DialError::NoTunnel { node: text(), state: text() }, 503),
            (DialError::TunnelLost { node: text(), reason: text() }, 503),
            (DialError::Refused(text()), 502),
            (DialError::Resolve(text()), 502),
            (DialError::Unreachable(text()), 502),
            (DialError::TimedOut(text()), 504),
        ] {
            assert_eq!(StatusError::from(&error).code, code, "{error:?}");
        }
        assert_eq!(StatusError::unknown(&DialError::NoRoute(text())).code, 404);
        assert_eq!(StatusError::unknown(&DialError::TimedOut(text())).code, 504);
    }
}
