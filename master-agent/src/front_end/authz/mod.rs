//! Authorization: what a user may, one file for each source of rights.
