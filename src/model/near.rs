//! Names that somebody may have meant: one measure for topics, settings and variables.

use std::cmp::Ordering;

/// How alike two names must be for one to be a slip of the other, from 0 to 1.
const NEAR: f64 = 0.8;

/// Longest names, in bytes, whose slips are counted: the work grows with the square.
const COUNTED_BYTES: usize = 40;

/// Most names that are looked at. Where there are more, a hint is not worth looking at all of them.
const LOOKED_AT: usize = 10_000;

/// The names that look most like `wanted`, the nearest first, at most `most` of them.
pub fn nearest<T>(wanted: &str, names: impl IntoIterator<Item = T>, text: impl Fn(&T) -> &str, most: usize) -> Vec<T> {
    let wanted = wanted.to_lowercase();
    let names = names.into_iter().take(LOOKED_AT).map(|name| (likeness(&wanted, text(&name)), name));
    let mut near: Vec<(f64, T)> = names.filter(|(score, _)| *score >= NEAR).collect();
    near.sort_by(|a, b| match b.0.total_cmp(&a.0) {
        Ordering::Equal => text(&a.1).cmp(text(&b.1)),
        unequal => unequal,
    });
    near.into_iter().take(most).map(|(_, name)| name).collect()
}

/// How alike two names are, from 0 to 1; the first in lower case. Jaro and Winkler's measure is made for longer names:
/// in short ones a slip or two (a letter more, less, other, or two exchanged) are enough to look unlike anything, so
/// they count by themselves.
fn likeness(wanted: &str, name: &str) -> f64 {
    let name = name.to_lowercase();
    if wanted == name {
        return 1.0;
    }
    let (longer, shorter) = (wanted.len().max(name.len()), wanted.len().min(name.len()));
    let mut slips = 0.0;
    if shorter > 1 && longer <= COUNTED_BYTES && longer - shorter <= 2 {
        slips = match strsim::osa_distance(wanted, &name) {
            1 => 0.95,
            2 if longer > 3 => NEAR,
            _ => 0.0,
        };
    }
    strsim::jaro_winkler(wanted, &name).max(slips)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near<'a>(wanted: &str, names: &[&'a str]) -> Vec<&'a str> {
        nearest(wanted, names.iter().copied(), |name| name, 3)
    }

    #[test]
    fn slips_of_every_kind_are_found_in_short_names_too() {
        let names = ["log", "p1", "be", "one", "orders", "orders-dead", "audit"];
        assert_eq!(near("lgo", &names), ["log"], "two letters exchanged");
        assert_eq!(near("LOG", &names), ["log"], "another case");
        assert_eq!(near("pp1", &names), ["p1"], "one letter more");
        assert_eq!(near("p", &["p1"]), ["p1"], "one letter less");
        assert_eq!(near("pl", &names), ["p1"], "another letter");
        assert_eq!(near("nobe", &names), ["one", "be"], "two slips");
        assert_eq!(near("Ordres", &names)[0], "orders");
        assert_eq!(near("orders_dead", &names), ["orders-dead", "orders"]);
    }

    #[test]
    fn what_looks_like_nothing_stays_without_a_hint() {
        let names = ["log", "p1", "be", "one", "orders", "audit"];
        for far in ["zzz", "xy", "metrics", "", "a", &"n".repeat(100_000)] {
            assert_eq!(near(far, &names), [""; 0], "{far}");
        }
    }

    #[test]
    fn the_nearest_come_first_and_no_more_than_asked_for() {
        let names = ["abcd4", "abcd3", "abcde", "abcd", "abcdx"];
        assert_eq!(near("abcde", &names)[0], "abcde");
        assert_eq!(near("abcde", &names).len(), 3);
    }
}
