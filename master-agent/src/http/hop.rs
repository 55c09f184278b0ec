//! The headers that concern a single connection, and what a message asks of its connection.

use hyper::{
    HeaderMap,
    header::{self, HeaderName, HeaderValue},
};

/// The headers that concern a single connection (RFC 9110, section 7.6.1), besides those that `Connection` names.
static HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The hop-by-hop headers of a request, which concern its connection alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hop {
    /// The protocols that the request asks to change to.
    pub upgrade: Option<HeaderValue>,
    pub chunked: bool,
    pub trailers: bool,
}

impl Hop {
    pub fn of(headers: &HeaderMap) -> Self {
        let wanted = tokens(headers, &header::CONNECTION).any(|t| t.eq_ignore_ascii_case("upgrade"));
        Self {
            upgrade: headers.get(header::UPGRADE).filter(|_| wanted).cloned(),
            chunked: headers.contains_key(header::TRANSFER_ENCODING),
            trailers: tokens(headers, &header::TE).any(|t| t.eq_ignore_ascii_case("trailers")),
        }
    }
}

/// Rejects transfer codings other than `chunked`, which could not be passed on as they are.
pub fn refuse_other_encodings(headers: &HeaderMap) -> Result<(), String> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(only), None) if only.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(()),
        (Some(_), _) => Err("no Transfer-Encoding but chunked is served here".to_owned()),
    }
}

/// Removes the headers that concern the connection alone.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> =
        tokens(headers, &header::CONNECTION).filter_map(|t| HeaderName::try_from(t).ok()).collect();
    remove_all(headers, |name| HOP_BY_HOP.contains(name) || named.contains(name));
}

/// Removes all headers whose names meet a condition. Looking up each of many names would take longer, since most
/// messages have none of them.
pub fn remove_all(headers: &mut HeaderMap, such: impl Fn(&HeaderName) -> bool) {
    let gone: Vec<HeaderName> = headers.keys().filter(|name| such(name)).cloned().collect();
    for name in &gone {
        headers.remove(name);
    }
}

/// Returns the elements of a header whose value is a list.
pub fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> + use<'a> {
    let values = headers.get_all(name).iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).map(str::trim).filter(|t| !t.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_chunked_coding_is_accepted() {
        let check = |lines: &[(&str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                let name = HeaderName::try_from(*name).unwrap();
                headers.append(name, HeaderValue::try_from(*value).unwrap());
            }
            refuse_other_encodings(&headers).is_ok()
        };
        let te = "Transfer-Encoding";
        assert!(check(&[]) && check(&[(te, "Chunked")]));
        assert!(
            !check(&[(te, "gzip, chunked")])
                && !check(&[(te, "chunked"), (te, "chunked")])
                && !check(&[(te, "identity")])
        );
    }
}
