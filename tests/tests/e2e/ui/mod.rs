//! The terminal view and the page.

mod page;
mod top;
