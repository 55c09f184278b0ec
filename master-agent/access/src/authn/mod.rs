//! Authentication of callers, with one file for each kind of credential.
//!
//! The authenticators are asked in the configured order, and the first that recognises the caller decides. An
//! authenticator that finds a bad credential of its kind returns a [`FailureReason`]. The others are still asked, and
//! if none recognises the caller, the request fails with all reasons. The caller only learns that it failed. The log
//! gets the [`AuthenticationFailure`], which contains no secret. A request without any credential can be anonymous, but
//! a bad credential never makes its caller anonymous.
//!
//! A [`Guard`] limits how often a caller can cause expensive steps, such as verifying a signature or asking a webhook,
//! by guessing. Cheap steps are always taken, and a token that was valid recently does not count as a guess.
//!
//! Each call is given the [`Moment`](crate::moment::Moment) at which it happens.

mod anonymous;
mod authenticated;
mod authenticator;
mod bootstrap;
mod bound;
mod certificates;
mod chain;
pub mod cluster;
mod config;
mod credential;
mod csv;
mod failure;
mod guard;
pub mod jwt;
mod keys;
mod load;
mod oidc;
mod pause;
mod reason;
mod service_account;
mod token_file;
mod webhook;
mod x509;

pub use anonymous::Anonymous;
pub use authenticated::{Authenticated, Recognized, Validity};
pub use authenticator::Authenticator;
pub use bootstrap::{Bootstrap, BootstrapToken, BootstrapTokens, ClusterTokens, FileTokens};
pub use certificates::Certificates;
pub use chain::Authenticators;
pub use config::{
    AuthenticatorConfig, AuthnConfig, BootstrapConfig, CacheConfig, KeysConfig, OidcConfig,
    ServiceAccountConfig, TokenReviewConfig, X509Config,
};
pub use credential::{Presented, strip};
pub use failure::AuthenticationFailure;
pub use guard::Guard;
pub use oidc::Oidc;
pub use reason::FailureReason;
pub use service_account::ServiceAccounts;
pub use token_file::TokenFile;
pub use webhook::TokenReviewer;
pub use x509::X509;

#[cfg(test)]
mod tests;
