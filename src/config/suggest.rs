//! Finds the names that a misspelled name may mean. Settings, variables, topics and racks use the same measure.

use std::cmp::Ordering;

/// Minimum similarity, from 0 to 1, of a misspelled name and a suggested name.
const MIN_SIMILARITY: f64 = 0.8;

/// Maximum length of names, in bytes, whose edits are counted. The work grows with the square of the length.
const MAX_COUNTED_BYTES: usize = 40;

/// Maximum number of names that are compared, which bounds the work for a suggestion.
const MAX_COMPARED_NAMES: usize = 10_000;

/// Returns at most `max` of the names that are similar to `wanted`, the most similar first. `text` returns the text of
/// a name. Only the first 10,000 names are compared.
pub fn closest_names<T>(
    wanted: &str,
    names: impl IntoIterator<Item = T>,
    text: impl Fn(&T) -> &str,
    max: usize,
) -> Vec<T> {
    let wanted = wanted.to_lowercase();
    let names = names.into_iter().take(MAX_COMPARED_NAMES).map(|name| (similarity(&wanted, text(&name)), name));
    let mut close: Vec<(f64, T)> = names.filter(|(score, _)| *score >= MIN_SIMILARITY).collect();
    close.sort_by(|a, b| match b.0.total_cmp(&a.0) {
        Ordering::Equal => text(&a.1).cmp(text(&b.1)),
        unequal => unequal,
    });
    close.into_iter().take(max).map(|(_, name)| name).collect()
}

/// Returns the similarity of two names, from 0 to 1, without regard to case; `wanted` is in lower case. This is the
/// measure of Jaro and Winkler, or a fixed value for one or two edits if that is higher. In short names, the measure
/// gives a low value for one or two edits.
fn similarity(wanted: &str, name: &str) -> f64 {
    let name = name.to_lowercase();
    if wanted == name {
        return 1.0;
    }
    let (longer, shorter) = (wanted.len().max(name.len()), wanted.len().min(name.len()));
    let mut by_edits = 0.0;
    if shorter > 1 && longer <= MAX_COUNTED_BYTES && longer - shorter <= 2 {
        by_edits = match strsim::osa_distance(wanted, &name) {
            1 => 0.95,
            2 if longer > 3 => MIN_SIMILARITY,
            _ => 0.0,
        };
    }
    strsim::jaro_winkler(wanted, &name).max(by_edits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closest<'a>(wanted: &str, names: &[&'a str]) -> Vec<&'a str> {
        closest_names(wanted, names.iter().copied(), |name| name, 3)
    }

    #[test]
    fn edits_of_each_kind_are_found_in_short_names() {
        let names = ["log", "p1", "be", "one", "orders", "orders-dead", "audit"];
        assert_eq!(closest("lgo", &names), ["log"], "two letters exchanged");
        assert_eq!(closest("LOG", &names), ["log"], "another case");
        assert_eq!(closest("pp1", &names), ["p1"], "one letter more");
        assert_eq!(closest("p", &["p1"]), ["p1"], "one letter less");
        assert_eq!(closest("pl", &names), ["p1"], "another letter");
        assert_eq!(closest("nobe", &names), ["one", "be"], "two edits");
        assert_eq!(closest("Ordres", &names)[0], "orders");
        assert_eq!(closest("orders_dead", &names), ["orders-dead", "orders"]);
    }

    #[test]
    fn dissimilar_name_gets_no_suggestion() {
        let names = ["log", "p1", "be", "one", "orders", "audit"];
        for far in ["zzz", "xy", "metrics", "", "a", &"n".repeat(100_000)] {
            assert_eq!(closest(far, &names), [""; 0], "{far}");
        }
    }

    #[test]
    fn closest_names_come_first_up_to_max() {
        let names = ["abcd4", "abcd3", "abcde", "abcd", "abcdx"];
        assert_eq!(closest("abcde", &names)[0], "abcde");
        assert_eq!(closest("abcde", &names).len(), 3);
    }
}
