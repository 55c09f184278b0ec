//! A copy of a request, which is sent again if a kept connection fails. It is made of almost every request and hardly
//! ever used, so it is a few bytes in one piece, while a copy of a header map would be one allocation for each value.

use hyper::{
    Method, Request, Uri,
    header::{HeaderName, HeaderValue},
};

use super::body::RequestBody;

/// The methods of requests that may be sent twice.
const HARMLESS: [Method; 3] = [Method::GET, Method::HEAD, Method::OPTIONS];

/// A request without a body.
pub(super) struct Repeat {
    method: Method,
    uri: Uri,
    /// The headers in lines of `NAME:VALUE`. No name contains a colon, and no value contains a line feed.
    headers: Vec<u8>,
}

impl Repeat {
    /// Copies a request, if it is safe to send it twice.
    pub(super) fn of(request: &Request<RequestBody>) -> Option<Self> {
        if !HARMLESS.contains(request.method()) || !request.body().is_empty() {
            return None;
        }
        let lines =
            || request.headers().iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
        let size: usize = lines().map(|(name, value)| name.len() + value.len() + 2).sum();
        let mut headers = Vec::with_capacity(size);
        for (name, value) in lines() {
            headers.extend_from_slice(name);
            headers.push(b':');
            headers.extend_from_slice(value);
            headers.push(b'\n');
        }
        Some(Self { method: request.method().clone(), uri: request.uri().clone(), headers })
    }

    /// Returns the request.
    pub(super) fn into_request(self) -> Option<Request<RequestBody>> {
        let mut request = Request::new(RequestBody::empty());
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        for line in self.headers.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let colon = line.iter().position(|byte| *byte == b':')?;
            let (name, value) = (line.get(..colon)?, line.get(colon + 1..)?);
            let (name, value) = (HeaderName::from_bytes(name).ok()?, HeaderValue::from_bytes(value).ok()?);
            request.headers_mut().append(name, value);
        }
        Some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: Method) -> Request<RequestBody> {
        let mut request = Request::new(RequestBody::empty());
        *request.method_mut() = method;
        *request.uri_mut() = "/api/v1/pods?watch=1".parse().unwrap();
        let lines: [(&'static str, &[u8]); 5] = [
            ("x-remote-group", b"a"),
            ("accept", b"application/json;q=0.9, */*"),
            ("x-remote-group", b"b:c,d"),
            ("x-empty", b""),
            ("x_own", b"\ttab and \xffbytes "),
        ];
        for (name, value) in lines {
            let value = HeaderValue::from_bytes(value).unwrap();
            request.headers_mut().append(HeaderName::from_static(name), value);
        }
        request
    }

    #[test]
    fn a_copy_is_the_same_request() {
        for method in HARMLESS {
            let request = request(method);
            let again = Repeat::of(&request).unwrap().into_request().unwrap();
            assert_eq!((again.method(), again.uri()), (request.method(), request.uri()));
            assert_eq!(again.headers(), request.headers());
            assert!(again.body().is_empty());
        }
        let bare = Request::new(RequestBody::empty());
        assert!(Repeat::of(&bare).unwrap().into_request().unwrap().headers().is_empty());
    }

    #[test]
    fn a_request_that_changes_something_is_not_repeated() {
        for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::CONNECT] {
            assert!(Repeat::of(&request(method)).is_none());
        }
    }
}
