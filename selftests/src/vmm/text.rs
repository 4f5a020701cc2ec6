// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What lines say.

use std::array;

/// Whether a line is as the pattern says, in which a `*` stands for any text.
pub fn is_like(line: &str, pattern: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else {
        return line == pattern;
    };
    let Some(mut line) = line.strip_prefix(first) else {
        return false;
    };
    let mut pieces: Vec<_> = rest.split('*').collect();
    let last = pieces.pop().unwrap_or_default();
    for piece in pieces {
        match line.find(piece) {
            Some(at) => line = &line[at + piece.len()..],
            None => return false,
        }
    }
    line.ends_with(last)
}

/// The words of a line, which are to be so many.
#[track_caller]
pub fn fields<const N: usize>(line: &str) -> [&str; N] {
    let words: Vec<_> = line.split_whitespace().collect();
    assert_eq!(words.len(), N, "words in {line:?}");
    array::from_fn(|i| words[i])
}

/// A number.
#[track_caller]
pub fn number(word: &str) -> i64 {
    word.parse()
        .unwrap_or_else(|_| panic!("wanted a number, got {word:?}"))
}

/// Fails unless a number is within those bounds, both included.
#[track_caller]
pub fn assert_between(what: &str, low: i64, value: i64, high: i64) {
    assert!(
        (low..=high).contains(&value),
        "{what}: wanted {low} to {high}, got {value}"
    );
}

#[cfg(test)]
mod tests {
    use super::is_like;

    #[test]
    fn patterns() {
        for (line, pattern, wanted) in [
            ("DONE", "DONE", true),
            ("DONE.", "DONE", false),
            ("DONE.", "DONE*", true),
            ("it is DONE", "*DONE", true),
            ("it is DONE.", "*DONE", false),
            ("reload: a.o: note 3", "*reload*a.o*note*", true),
            ("reload: note 3 of a.o", "*reload*a.o*note*", false),
            // What one piece has taken is not there for the next one.
            ("note", "*note*note", false),
        ] {
            assert_eq!(is_like(line, pattern), wanted, "{line:?}, {pattern:?}");
        }
    }
}
