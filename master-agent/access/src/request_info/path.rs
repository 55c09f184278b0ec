//! The path of a request, split into segments.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

use super::unreadable::Unreadable;

/// The longest path, in bytes.
const MAX_PATH: usize = 16 * 1024;

/// A part of a path between slashes.
pub(super) struct Segment<'a> {
    /// The decoded segment, in which bytes that are not UTF-8 are replaced. [`Segment::text`] rejects them.
    pub(super) decoded: Cow<'a, str>,
    /// The path from the slash before this segment to its end, as the caller wrote it.
    pub(super) from_here: &'a str,
    /// Why the segment can't be interpreted.
    fault: Option<&'static str>,
}

impl Segment<'_> {
    /// Returns the decoded segment, if it can be interpreted.
    pub(super) fn text(&self) -> Result<String, Unreadable> {
        self.as_text().map(str::to_owned)
    }

    /// Returns the same without a copy.
    pub(super) fn as_text(&self) -> Result<&str, Unreadable> {
        match self.fault {
            None => Ok(&self.decoded),
            Some(fault) => Err(Unreadable(fault)),
        }
    }
}

/// Splits a path. One slash at its end has no meaning.
pub(super) fn segments(path: &str) -> Result<Vec<Segment<'_>>, Unreadable> {
    if path.len() > MAX_PATH {
        return Err(Unreadable("path is too long"));
    }
    if !path.starts_with('/') {
        return Err(Unreadable("path does not begin with a slash"));
    }
    if !path.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#' | b'\\')) {
        return Err(Unreadable("path has characters that must be escaped"));
    }
    if !escapes_are_whole(path) {
        return Err(Unreadable("path has a malformed escape"));
    }
    let mut segments = Vec::new();
    let mut at = 0;
    while let Some(from_here) = path.get(at..).filter(|rest| rest.starts_with('/')) {
        let raw = from_here.get(1..).unwrap_or_default().split('/').next().unwrap_or_default();
        at += 1 + raw.len();
        if raw.is_empty() && at == path.len() {
            break;
        }
        let bytes: Cow<'_, [u8]> = percent_decode_str(raw).into();
        if matches!(&*bytes, b"." | b"..") {
            return Err(Unreadable("path has a segment that is . or .."));
        }
        let (decoded, whole) = match bytes {
            // Without escapes, the segment is a part of the path, which is ASCII.
            Cow::Borrowed(_) => (Cow::Borrowed(raw), true),
            Cow::Owned(bytes) => match String::from_utf8(bytes) {
                Ok(text) => (Cow::Owned(text), true),
                Err(error) => (Cow::Owned(String::from_utf8_lossy(error.as_bytes()).into_owned()), false),
            },
        };
        let fault = if decoded.is_empty() {
            Some("path has an empty segment")
        } else if !whole {
            Some("path is not UTF-8 text")
        } else if decoded.contains(['/', '\\', '%']) || decoded.chars().any(char::is_control) {
            Some("path has an escaped slash, backslash, percent sign or control character")
        } else {
            None
        };
        segments.push(Segment { decoded, from_here, fault });
    }
    Ok(segments)
}

/// Whether every percent sign is followed by two hexadecimal digits.
pub(crate) fn escapes_are_whole(text: &str) -> bool {
    text.split('%').skip(1).all(|after| {
        let mut digits = after.bytes().take(2);
        digits.next().is_some_and(|b| b.is_ascii_hexdigit())
            && digits.next().is_some_and(|b| b.is_ascii_hexdigit())
    })
}

/// Decodes the path behind a proxy, if all servers interpret it alike. kube-apiserver decodes the path and then cleans
/// it. Its target may decode it twice, merge slashes, treat `\` as `/`, or drop the text after a `;`.
pub fn read_alike(tail: &str) -> Option<String> {
    let decoded = percent_decode_str(tail).decode_utf8().ok()?.into_owned();
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'%' | b'\\' | b';' | b'?' | b'#');
    let slashes = |text: &str| text.bytes().filter(|byte| *byte == b'/').count();
    let mut segments = decoded.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        if matches!(segment, "." | "..") || segment.is_empty() && segments.peek().is_some() {
            return None;
        }
    }
    (decoded.bytes().all(plain) && slashes(&decoded) == slashes(tail)).then_some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_paths_are_rejected() {
        assert!(segments(&format!("/{}", "a".repeat(MAX_PATH))).is_err());
        assert!(segments(&format!("/{}", "a".repeat(MAX_PATH - 1))).is_ok());
    }
}
