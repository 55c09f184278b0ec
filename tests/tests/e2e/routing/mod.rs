//! Which node a target leads to.

mod kubernetes;
