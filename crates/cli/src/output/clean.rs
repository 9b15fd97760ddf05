//! Text that came from a guest (or from a file) can hold sequences that drive a terminal: nothing of that kind is
//! printed in a table or an error.

/// One line: control characters and characters that turn the direction of text are shown by their escapes.
#[must_use]
pub fn line(text: &str) -> String {
    escape(text, false)
}

/// Several lines: as [`line`], with line ends and tabs kept.
#[must_use]
pub fn text(text: &str) -> String {
    escape(text, true)
}

fn escape(text: &str, lines: bool) -> String {
    let mut clean = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\t' if lines => clean.push(character),
            _ if drives_a_terminal(character) => clean.extend(character.escape_default()),
            _ => clean.push(character),
        }
    }
    clean
}

fn drives_a_terminal(character: char) -> bool {
    character.is_control()
        || matches!(character,
            // Zero width, and marks, embeddings, overrides and isolates of direction.
            '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{061c}' | '\u{feff}'
            // Line and paragraph separators, tags.
            | '\u{2028}' | '\u{2029}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_can_not_drive_the_terminal() {
        for hostile in ["\x1b]0;owned\x07", "\x1b[2J", "a\rb", "\u{9b}31m", "a\u{202e}b", "\0", "\x7f", "a\u{2028}b"] {
            for clean in [line(hostile), text(hostile)] {
                assert!(!clean.chars().any(drives_a_terminal), "{hostile:?} became {clean:?}");
            }
        }
        assert_eq!(line("\x1b[31m"), "\\u{1b}[31m");
    }

    #[test]
    fn plain_text_stays_as_it_is() {
        assert_eq!(line("grüße 日本 {}"), "grüße 日本 {}");
        assert_eq!(text("a\n\tb"), "a\n\tb");
        assert_eq!(line("a\n\tb"), "a\\n\\tb");
    }
}
