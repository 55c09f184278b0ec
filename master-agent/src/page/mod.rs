//! The page: what `top`, `explain` and `compare` show, in a browser.
//!
//! One handler, in two places: below [`ADMIN`] of the admin address, for whoever had the agent's admin socket print a
//! login ([`login`]); below [`FRONT_END`] of the front end, behind its authentication and authorization. What is served
//! needs no other origin and runs no script but its own. What peers have a part in is sent as JSON, and becomes text.

mod answer;
mod front_end;
mod guard;
mod live;
mod login;
mod paths;
mod response;
mod sessions;
mod state;

pub use login::{serve, token};
pub use paths::{ADMIN, FRONT_END};
pub use state::Page;
