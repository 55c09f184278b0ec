//! The query of a request for a collection.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

use super::{path::escapes_are_whole, unreadable::Unreadable};

/// The longest query of a list or watch, in bytes.
const MAX_QUERY: usize = 16 * 1024;

/// One term of a field selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldRequirement {
    pub field: String,
    /// Whether the operator is `=` or `==`, rather than `!=`.
    pub equal: bool,
    pub value: String,
}

/// The parts of a query that decide about the verb and the name of a list.
pub(super) struct ListQuery<'a> {
    pub(super) watch: bool,
    pub(super) field_selector: Option<Cow<'a, str>>,
}

/// Reads the query of a list as kube-apiserver does. kube-apiserver drops pairs that it can't parse and uses the first
/// of several pairs with the same key. Such queries are rejected here.
pub(super) fn list_query(query: &str) -> Result<ListQuery<'_>, Unreadable> {
    if query.len() > MAX_QUERY {
        return Err(Unreadable("query is too long"));
    }
    if query.contains(';') || !escapes_are_whole(query) {
        return Err(Unreadable("query has a semicolon or a malformed escape"));
    }
    let (mut watch, mut field_selector) = (None, None);
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let wanted = match &*decode_form(key)? {
            "watch" => &mut watch,
            "fieldSelector" => &mut field_selector,
            _ => continue,
        };
        if wanted.replace(decode_form(value)?).is_some() {
            return Err(Unreadable("query has watch or fieldSelector twice"));
        }
    }
    // Every other value is true, including the empty one.
    let watch = watch.is_some_and(|watch| !matches!(watch.to_ascii_lowercase().as_str(), "false" | "0"));
    Ok(ListQuery { watch, field_selector })
}

fn decode_form(text: &str) -> Result<Cow<'_, str>, Unreadable> {
    if !text.contains(['+', '%']) {
        return Ok(text.into());
    }
    let spaced = text.replace('+', " ");
    let decoded = percent_decode_str(&spaced).decode_utf8();
    Ok(decoded.map_err(|_| Unreadable("query is not UTF-8 text"))?.into_owned().into())
}

pub(super) fn field_requirements(selector: &str) -> Result<Vec<FieldRequirement>, Unreadable> {
    // A backslash escapes a comma, an equals sign or a backslash in a value, none of which is in any name.
    if selector.contains('\\') {
        return Err(Unreadable("field selector has a backslash"));
    }
    let terms = selector.split(',').filter(|term| !term.is_empty());
    terms
        .map(|term| {
            let (field, value) =
                term.split_once('=').ok_or(Unreadable("field selector has a term without ="))?;
            let (field, equal) = match field.strip_suffix('!') {
                Some(field) => (field, false),
                None => (field, true),
            };
            let value = if equal { value.strip_prefix('=').unwrap_or(value) } else { value };
            if value.contains('=') {
                return Err(Unreadable("field selector has a term with more than one ="));
            }
            Ok(FieldRequirement { field: field.to_owned(), equal, value: value.to_owned() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_queries_are_rejected() {
        assert!(list_query(&"a".repeat(MAX_QUERY + 1)).is_err());
        assert!(list_query(&"a".repeat(MAX_QUERY)).is_ok());
    }
}
