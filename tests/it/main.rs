//! The one integration binary: real processes, real files, real HTTP.
