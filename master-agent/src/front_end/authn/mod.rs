//! Authentication: who a caller is, one file for each kind of credential.
