//! Who is in sync, by example and by chance.
