//! Colours, only where a person sees them.

use std::fmt;
use std::io::IsTerminal as _;

/// Where text goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Data.
    Stdout,
    /// Everything else.
    Stderr,
}

impl Stream {
    /// Whether a person looks at it.
    pub fn is_terminal(self) -> bool {
        match self {
            Self::Stdout => std::io::stdout().is_terminal(),
            Self::Stderr => std::io::stderr().is_terminal(),
        }
    }

    /// Whether colours are wanted there: a terminal that can, and no `NO_COLOR` (no-color.org: set
    /// to anything but nothing).
    pub fn coloured(self) -> bool {
        let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
        self.is_terminal()
            && !set("NO_COLOR")
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
    }
}

/// What a colour says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ink {
    /// Went wrong.
    Bad,
    /// Went well.
    Good,
    /// Goes on.
    Busy,
    /// Beside the point.
    Note,
    /// The n-th source of many.
    Source(usize),
}

/// Sources get these in turn: cyan, green, yellow, blue, magenta, and their bright forms.
const SOURCES: [&str; 10] = ["36", "32", "33", "34", "35", "96", "92", "93", "94", "95"];

impl Ink {
    fn code(self) -> &'static str {
        match self {
            Self::Bad => "1;31",
            Self::Good => "32",
            Self::Busy => "33",
            Self::Note => "2",
            Self::Source(n) => SOURCES[n % SOURCES.len()],
        }
    }
}

/// Text in a colour, where the stream has colours.
pub struct Paint<'a> {
    /// Where it goes.
    pub on: Stream,
    /// Its colour.
    pub ink: Ink,
    /// The text, which must be safe for a terminal already.
    pub text: &'a str,
}

impl fmt::Display for Paint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.on.coloured() {
            write!(f, "\x1b[{}m{}\x1b[0m", self.ink.code(), self.text)
        } else {
            f.write_str(self.text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_gets_no_colours() {
        // Tests run with their output captured or redirected in CI; on a terminal NO_COLOR decides.
        if !Stream::Stdout.is_terminal() {
            let text = Paint { on: Stream::Stdout, ink: Ink::Bad, text: "x" }.to_string();
            assert_eq!(text, "x");
        }
        assert_eq!(Ink::Source(0).code(), Ink::Source(SOURCES.len()).code());
    }
}
