//! Long lines for people: broken between words.

use unicode_width::UnicodeWidthStr;

/// Least columns of text in a line: a terminal that is narrower breaks it itself.
const LEAST: usize = 20;

/// A text of one line as lines of at most `width` columns, from the second on behind `indent` blanks. A word that is longer stays whole.
pub fn wrap(text: &str, width: usize, indent: usize) -> String {
    let width = width.max(indent + LEAST);
    let mut lines = String::with_capacity(text.len() + 16);
    let mut used = 0;
    // Blanks at the beginning belong to the text.
    let words = text.trim_start_matches(' ');
    let begins = text.len() - words.len();
    for (index, word) in words.split(' ').enumerate() {
        let needed = word.width();
        if index == 0 {
            lines.extend(std::iter::repeat_n(' ', begins));
            used = begins;
        } else if used + 1 + needed > width {
            lines.push('\n');
            lines.extend(std::iter::repeat_n(' ', indent));
            used = indent;
        } else {
            lines.push(' ');
            used += 1;
        }
        lines.push_str(word);
        used += needed;
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_between_words_and_fit() {
        let text = "warning: one two three four five six seven eight nine ten eleven twelve";
        let wrapped = wrap(text, 30, 4);
        assert!(wrapped.lines().count() > 2 && wrapped.lines().all(|line| line.width() <= 30), "{wrapped}");
        assert!(wrapped.lines().skip(1).all(|line| line.starts_with("    ") && !line.starts_with("     ")));
        assert_eq!(wrapped.split_whitespace().collect::<Vec<_>>(), text.split_whitespace().collect::<Vec<_>>());
        assert_eq!(wrap("  cure: a", 80, 8), "  cure: a");
        let long = "x".repeat(100);
        assert_eq!(wrap(&format!("a {long} b"), 40, 2), format!("a\n  {long}\n  b"));
    }
}
