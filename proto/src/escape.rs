//! Text from elsewhere, made safe for a terminal.

/// Text without what a terminal would act on: control characters (but tab) and those that turn the
/// direction of writing are shown as escapes.
#[must_use]
pub fn for_terminal(text: &str) -> String {
    text.chars()
        .map(|c| {
            let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            if (c.is_control() && c != '\t') || turns {
                c.escape_unicode().to_string()
            } else {
                c.to_string()
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_terminal_is_not_told_to_do_anything() {
        assert_eq!(super::for_terminal("a\tb ö"), "a\tb ö");
        assert_eq!(super::for_terminal("\x1b[2J\u{202e}x"), "\\u{1b}[2J\\u{202e}x");
        assert_eq!(super::for_terminal("\u{61c}\u{9b}"), "\\u{61c}\\u{9b}");
    }
}
