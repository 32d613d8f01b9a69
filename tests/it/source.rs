//! Reads Rust source for the architecture test: without comments and literals, and with every path written out.
//!
//! This is not a parser. The module handles enough of the grammar to distinguish `crate::log` in code from the same
//! text in a comment or string. The module also expands trees of imports.

/// A path in the code, such as `std::fs::File`, with the line where the path starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Path {
    /// Line number, from 1.
    pub(crate) line: usize,
    pub(crate) segments: Vec<String>,
}

impl Path {
    /// Returns true if the path starts with these segments, given as `a::b`.
    pub(crate) fn begins(&self, prefix: &str) -> bool {
        let mut segments = self.segments.iter();
        prefix.split("::").all(|wanted| segments.next().is_some_and(|segment| segment == wanted))
    }
}

/// Returns the source with comments and literals blanked, line for line.
pub(crate) fn strip(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_end(&chars, at);
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.push(' ');
            out.extend(chars[at..end].iter().filter(|c| **c == '\n'));
            at = end;
        }
    }
    out
}

/// Returns the end of the comment or literal that starts at `at`, or `at` if none starts there.
fn literal_end(chars: &[char], at: usize) -> usize {
    let next = |n: usize| chars.get(at + n).copied().unwrap_or('\0');
    let after_word = at > 0 && is_word(chars[at - 1]);
    match chars[at] {
        '/' if next(1) == '/' => chars[at..].iter().position(|c| *c == '\n').map_or(chars.len(), |n| at + n),
        '/' if next(1) == '*' => block_comment_end(chars, at),
        '"' => string_end(chars, at + 1),
        'r' | 'b' | 'c' if !after_word => {
            let quote = at + chars[at..].iter().take_while(|c| matches!(c, 'r' | 'b' | 'c')).count().min(2);
            let hashes = chars[quote.min(chars.len())..].iter().take_while(|c| **c == '#').count();
            let raw = chars[at..quote].contains(&'r');
            match chars.get(quote + hashes) {
                Some('"') if raw => raw_string_end(chars, quote + hashes + 1, hashes),
                Some('"') if hashes == 0 => string_end(chars, quote + 1),
                Some('\'') if hashes == 0 && chars[at] == 'b' => char_end(chars, quote).unwrap_or(at),
                _ => at,
            }
        }
        '\'' => char_end(chars, at).unwrap_or(at),
        _ => at,
    }
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at < chars.len() {
        let pair = (chars[at], chars.get(at + 1).copied().unwrap_or('\0'));
        match pair {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

fn string_end(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

fn raw_string_end(chars: &[char], start: usize, hashes: usize) -> usize {
    (start..chars.len())
        .find(|at| chars[*at] == '"' && chars[at + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes)
        .map_or(chars.len(), |at| at + 1 + hashes)
}

/// Returns the end of a character literal; `None` for a lifetime.
fn char_end(chars: &[char], quote: usize) -> Option<usize> {
    if chars.get(quote + 1) == Some(&'\\') {
        let close = chars.iter().skip(quote + 3).position(|c| *c == '\'')?;
        return Some(quote + 3 + close + 1);
    }
    (chars.get(quote + 2) == Some(&'\'')).then_some(quote + 3)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Sep,
    Mark(char),
}

fn tokens(stripped: &str) -> Vec<(usize, Token)> {
    let chars: Vec<char> = stripped.chars().collect();
    let (mut out, mut at, mut line) = (Vec::new(), 0, 1);
    while at < chars.len() {
        let c = chars[at];
        if c == '\n' {
            line += 1;
        }
        if is_word(c) {
            let word: String = chars[at..].iter().take_while(|c| is_word(**c)).collect();
            at += word.chars().count();
            out.push((line, Token::Word(word)));
            continue;
        }
        if c == ':' && chars.get(at + 1) == Some(&':') {
            out.push((line, Token::Sep));
            at += 2;
            continue;
        }
        if !c.is_whitespace() {
            out.push((line, Token::Mark(c)));
        }
        at += 1;
    }
    out
}

/// Returns every path of stripped source: expanded imports, and paths in the code. Single words count too.
pub(crate) fn paths(stripped: &str) -> Vec<Path> {
    let tokens = tokens(stripped);
    let (mut out, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        let follows = |n: usize| tokens.get(at + n).map(|(_, token)| token);
        match &tokens[at].1 {
            Token::Word(word) if word == "use" && follows(1) != Some(&Token::Mark('<')) => {
                at = import(&tokens, at + 1, &[], &mut out);
            }
            Token::Word(_) => at = plain(&tokens, at, &mut out),
            _ => at += 1,
        }
    }
    out
}

/// Adds one path of the code to `out`. Returns the index of the next token.
fn plain(tokens: &[(usize, Token)], start: usize, out: &mut Vec<Path>) -> usize {
    let (mut segments, mut at) = (Vec::new(), start);
    while let Some((_, Token::Word(word))) = tokens.get(at) {
        segments.push(word.clone());
        at += 1;
        let more =
            matches!(tokens.get(at), Some((_, Token::Sep))) && matches!(tokens.get(at + 1), Some((_, Token::Word(_))));
        if !more {
            break;
        }
        at += 1;
    }
    out.push(Path { line: tokens[start].0, segments });
    at
}

/// Adds one tree of imports to `out`, up to the comma, brace or semicolon that ends the tree. Returns the index of the
/// next token.
fn import(tokens: &[(usize, Token)], start: usize, prefix: &[String], out: &mut Vec<Path>) -> usize {
    let (mut segments, mut at) = (prefix.to_vec(), start);
    let line = tokens.get(start).map_or(0, |(line, _)| *line);
    let mut renamed = false;
    loop {
        match tokens.get(at).map(|(_, token)| token) {
            Some(Token::Word(word)) if word == "as" => renamed = true,
            Some(Token::Word(word)) if !renamed => segments.push(word.clone()),
            Some(Token::Word(_) | Token::Sep) => {}
            Some(Token::Mark('*')) => segments.push("*".to_owned()),
            Some(Token::Mark('{')) => return group(tokens, at + 1, &segments, out),
            _ => {
                if segments.len() > prefix.len() {
                    out.push(Path { line, segments });
                }
                return at;
            }
        }
        at += 1;
    }
}

fn group(tokens: &[(usize, Token)], start: usize, prefix: &[String], out: &mut Vec<Path>) -> usize {
    let mut at = start;
    loop {
        match tokens.get(at).map(|(_, token)| token) {
            Some(Token::Mark(',')) => at += 1,
            Some(Token::Mark('}')) => return at + 1,
            None | Some(Token::Mark(_)) => return at,
            _ => at = import(tokens, at, prefix, out),
        }
    }
}

/// Returns stripped source without its `#[cfg(test)]` items, line for line.
pub(crate) fn without_tests(stripped: &str) -> String {
    const GATE: &str = "#[cfg(test)]";
    let mut out = String::with_capacity(stripped.len());
    let mut rest = stripped;
    while let Some(found) = rest.find(GATE) {
        out.push_str(&rest[..found]);
        let item = &rest[found + GATE.len()..];
        let end = item_end(item);
        out.extend(item[..end].chars().filter(|c| *c == '\n'));
        rest = &item[end..];
    }
    out.push_str(rest);
    out
}

/// Returns the end of the first item: its semicolon, or the brace that closes its first brace.
fn item_end(item: &str) -> usize {
    let mut depth = 0;
    for (at, c) in item.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 1 => return at + 1,
            '}' => depth -= 1,
            ';' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    item.len()
}

#[test]
fn comments_and_literals_are_blanked_line_for_line() {
    let source =
        "a // crate::x\nb /* crate::y /* z */ \n */ c \"crate::\\\"s\" r#\"crate::\"r\"# b\"q\" 'x' '\\n' &'a d b'e' f";
    let stripped = strip(source);
    assert_eq!(stripped.lines().count(), source.lines().count());
    assert!(!stripped.contains("crate"), "{stripped}");
    let words: Vec<String> = paths(&stripped).into_iter().flat_map(|path| path.segments).collect();
    assert_eq!(words, ["a", "b", "c", "a", "d", "f"]);
}

#[test]
fn imports_are_expanded() {
    let found: Vec<String> =
        paths("use crate::{limits, model::{self, Offset as O}, log::*};\nfn f() { std::fs::read(x) }")
            .into_iter()
            .map(|path| format!("{}:{}", path.line, path.segments.join("::")))
            .collect();
    assert_eq!(
        found,
        [
            "1:crate::limits",
            "1:crate::model::self",
            "1:crate::model::Offset",
            "1:crate::log::*",
            "2:fn",
            "2:f",
            "2:std::fs::read",
            "2:x"
        ]
    );
}

#[test]
fn captured_lifetime_is_not_an_import() {
    let found = paths("fn f<'a>() -> impl Sized + use<'a> { crate::log::x }");
    assert!(found.iter().any(|path| path.begins("crate::log")), "{found:?}");
}

#[test]
fn test_modules_are_removed() {
    let source = "fn a() {}\n#[cfg(test)]\nmod tests { fn b() { if x { y } } }\n#[cfg(test)] mod more;\nfn c() {}";
    let left = without_tests(source);
    assert!(
        left.contains("fn a") && left.contains("fn c") && !left.contains("fn b") && !left.contains("more"),
        "{left}"
    );
    assert_eq!(left.lines().count(), source.lines().count());
}
