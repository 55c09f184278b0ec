//! One request of a caller: the phases that it passes through, and the handlers that answer it.
//!
//! `pipeline.rs` holds the whole life of a request. Each phase is a file with one function, which takes the request in
//! the state that the phase before it left and returns it in a state of its own (`stages.rs`), so that no phase can be
//! left out or run out of order. The first phase that fails ends the request with a [`Rejection`], and `rejection.rs`
//! decides alone which HTTP answer that is.
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
