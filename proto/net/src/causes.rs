//! The text of errors for logs and callers.

use std::error::Error;

/// Returns the text of an error with its causes, which the errors of many libraries leave out of their own text.
pub fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
