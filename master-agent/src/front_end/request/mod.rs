//! The phases through which a request passes, and the handlers that answer it.
//!
//! `pipeline.rs` shows the whole life of a request. Each phase is a file with one function, which takes the type that
//! the previous phase returns, and returns a type of its own (`stages.rs`). Therefore no phase can be left out or run
//! out of order. The first phase that fails ends the request with a [`Rejection`], and `rejection.rs` alone maps
//! rejections to HTTP answers.
//!
//! [`Rejection`]: rejection::Rejection

mod admit;
mod authorize;
mod call_home;
mod handled;
mod identify;
mod join_token;
mod link;
mod page;
mod pipeline;
mod proxy_url;
mod rejection;
mod reserve;
mod resolve;
mod stages;
mod upstream;

#[cfg(test)]
mod tests;
