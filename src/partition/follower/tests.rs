//! A follower against right and wrong leaders.
