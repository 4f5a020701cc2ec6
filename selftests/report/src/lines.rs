// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Lines of code: neither blank, nor comment, nor test.

use std::path::Path;

use crate::{Result, read};

/// Where the tests of one of the kernel's Rust files begin, which are its end.
const TESTS: &str = "#[macros::kunit_tests";

/// Lines of code in a file of C or Rust.
pub fn of_file(path: &Path) -> Result<usize> {
    let text = read(path)?;
    let end = text.find(TESTS).unwrap_or(text.len());
    let nests = path.extension().is_some_and(|name| name == "rs");
    Ok(count(&text[..end], nests))
}

/// The same of a text; comments may be inside of others.
fn count(text: &str, nests: bool) -> usize {
    let mut rest = text;
    let mut depth = 0;
    let mut lines = 0;
    let mut code = false;
    while let Some(first) = rest.chars().next() {
        let mut len = first.len_utf8();
        if first == '\n' {
            lines += usize::from(code);
            code = false;
        } else if depth > 0 && rest.starts_with("*/") {
            depth -= 1;
            len = 2;
        } else if rest.starts_with("/*") && (depth == 0 || nests) {
            depth += 1;
            len = 2;
        } else if depth > 0 {
            // Of a comment.
        } else if rest.starts_with("//") {
            len = rest.find('\n').unwrap_or(rest.len());
        } else {
            code |= !first.is_whitespace();
            len = literal(rest).unwrap_or(len);
            lines += rest[..len].matches('\n').count();
        }
        rest = &rest[len..];
    }
    lines + usize::from(code)
}

/// The length of the string or character that a text begins with, if it does.
fn literal(text: &str) -> Option<usize> {
    let quote = text.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            // A lifetime of Rust's.
            _ if quote == '\'' && at > 1 && !text.starts_with("'\\") => return None,
            _ => (),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_blank_lines_do_not_count() {
        let text =
            "/* one\n * two */\n\nint a; /* three */\n// four\n\tint b; // five\n/**/ int c;\n";
        assert_eq!(count(text, false), 3);
    }

    #[test]
    fn comments_inside_comments() {
        let text = "/* /* */\nfn a() {}\n*/\nfn b() {}\n";
        assert_eq!((count(text, true), count(text, false)), (1, 3));
    }

    #[test]
    fn what_looks_like_a_comment_in_a_literal() {
        let text = "a(\"/*\");\nb('\"');\nc('\\'');\nd(\"\\\"//\",\n  'x');\n/* e */\n";
        assert_eq!(count(text, false), 5);
        let text = "fn a<'a>(b: &'a str) {\n    c(\"x\ny\") // d\n}\n// '\n";
        assert_eq!(count(text, true), 4);
    }
}
