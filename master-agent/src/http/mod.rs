//! What the front door of proxy URLs and the front end have in common as HTTP servers and proxies.

pub mod hop;
pub mod status;
pub mod watched;
