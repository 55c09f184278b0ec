//! The page, which shows in a browser what `top`, `explain` and `compare` show in a terminal.
//!
//! It is served at two sites: below [`ADMIN`] on the admin address, for viewers with a login from the agent's admin
//! socket ([`login`]), and below [`FRONT_END`] on the front end, behind its authentication and authorization. The page
//! loads nothing from other origins and runs only its own scripts. Data that peers influence is sent as JSON, and the
//! page inserts it as text.

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
