//! Names that a user may have meant: one measure of similarity for topics, settings and variables.

use std::cmp::Ordering;

/// Minimum similarity, from 0 to 1, of a name that is suggested.
const MIN_SIMILARITY: f64 = 0.8;

/// Maximum length, in bytes, of names whose typing errors are counted. The work grows with the square of the length.
const MAX_COUNTED_BYTES: usize = 40;

/// Maximum number of names that are compared. A search of more names would cost more than a suggestion is worth.
const MAX_COMPARED: usize = 10_000;

/// Returns at most `max` of the names that are most similar to `wanted`, the most similar first.
pub fn nearest<T>(wanted: &str, names: impl IntoIterator<Item = T>, text: impl Fn(&T) -> &str, max: usize) -> Vec<T> {
    let wanted = wanted.to_lowercase();
    let names = names.into_iter().take(MAX_COMPARED).map(|name| (similarity(&wanted, text(&name)), name));
    let mut near: Vec<(f64, T)> = names.filter(|(score, _)| *score >= MIN_SIMILARITY).collect();
    near.sort_by(|a, b| match b.0.total_cmp(&a.0) {
        Ordering::Equal => text(&a.1).cmp(text(&b.1)),
        unequal => unequal,
    });
    near.into_iter().take(max).map(|(_, name)| name).collect()
}

/// Returns the similarity of two names, from 0 to 1. `wanted` is in lower case. The measure of Jaro and Winkler is made
/// for longer names: one or two typing errors in a short name give a low value. So these errors are also counted.
fn similarity(wanted: &str, name: &str) -> f64 {
    let name = name.to_lowercase();
    if wanted == name {
        return 1.0;
    }
    let (longer, shorter) = (wanted.len().max(name.len()), wanted.len().min(name.len()));
    let mut by_errors = 0.0;
    if shorter > 1 && longer <= MAX_COUNTED_BYTES && longer - shorter <= 2 {
        by_errors = match strsim::osa_distance(wanted, &name) {
            1 => 0.95,
            2 if longer > 3 => MIN_SIMILARITY,
            _ => 0.0,
        };
    }
    strsim::jaro_winkler(wanted, &name).max(by_errors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near<'a>(wanted: &str, names: &[&'a str]) -> Vec<&'a str> {
        nearest(wanted, names.iter().copied(), |name| name, 3)
    }

    #[test]
    fn typing_errors_in_short_names_are_found() {
        let names = ["log", "p1", "be", "one", "orders", "orders-dead", "audit"];
        assert_eq!(near("lgo", &names), ["log"], "two letters exchanged");
        assert_eq!(near("LOG", &names), ["log"], "another case");
        assert_eq!(near("pp1", &names), ["p1"], "one letter more");
        assert_eq!(near("p", &["p1"]), ["p1"], "one letter less");
        assert_eq!(near("pl", &names), ["p1"], "another letter");
        assert_eq!(near("nobe", &names), ["one", "be"], "two errors");
        assert_eq!(near("Ordres", &names)[0], "orders");
        assert_eq!(near("orders_dead", &names), ["orders-dead", "orders"]);
    }

    #[test]
    fn dissimilar_names_are_not_suggested() {
        let names = ["log", "p1", "be", "one", "orders", "audit"];
        for far in ["zzz", "xy", "metrics", "", "a", &"n".repeat(100_000)] {
            assert_eq!(near(far, &names), [""; 0], "{far}");
        }
    }

    #[test]
    fn closest_names_come_first_up_to_maximum() {
        let names = ["abcd4", "abcd3", "abcde", "abcd", "abcdx"];
        assert_eq!(near("abcde", &names)[0], "abcde");
        assert_eq!(near("abcde", &names).len(), 3);
    }
}
