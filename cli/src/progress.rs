//! How something goes, on standard error: redrawn in place on a terminal, a line per change elsewhere.

use crate::style::{Ink, Paint, Stream};
use std::collections::BTreeMap;
use std::io::Write as _;

/// Lines of one redrawn picture. More replicas than this are counted instead.
const LINES: usize = 16;

/// One thing that is followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// What it is about; stays the same.
    pub key: String,
    /// Its state in full, safe for a terminal.
    pub text: String,
    /// Its state without what moves all the time: outside of terminals a line is said when this
    /// changes.
    pub coarse: String,
    /// How it goes.
    pub ink: Ink,
}

/// What was said, and what is drawn.
pub struct Board {
    live: bool,
    drawn: usize,
    said: BTreeMap<String, String>,
    groups: BTreeMap<usize, Vec<Line>>,
}

impl Board {
    /// For standard error as it is.
    pub fn new() -> Self {
        Self::with(Stream::Stderr.is_terminal())
    }

    fn with(live: bool) -> Self {
        Self { live, drawn: 0, said: BTreeMap::new(), groups: BTreeMap::new() }
    }

    /// The state of one group; the lines of others stay.
    pub fn show(&mut self, group: usize, lines: Vec<Line>) {
        let new = self.news(&lines);
        if self.live {
            self.groups.insert(group, lines);
            self.draw();
        } else {
            for text in new {
                eprintln!("{text}");
            }
        }
    }

    /// Which of these lines say something that was not said. A state without what was known of it
    /// before, as that of a transfer between two looks, says less.
    fn news(&mut self, lines: &[Line]) -> Vec<String> {
        let mut out = Vec::new();
        for line in lines {
            let said = self.said.get(&line.key).and_then(|said| said.strip_prefix(&line.coarse));
            if !said.is_some_and(|more| more.is_empty() || more.starts_with(' ')) {
                self.said.insert(line.key.clone(), line.coarse.clone());
                out.push(line.text.clone());
            }
        }
        out
    }

    /// A group is done: its lines go, and this stays.
    pub fn end(&mut self, group: usize, words: &str) {
        self.groups.remove(&group);
        self.note(words);
    }

    /// Words that stay.
    pub fn note(&mut self, words: &str) {
        self.erase();
        eprintln!("{words}");
        if self.live {
            self.draw();
        }
    }

    /// The last words: nothing is drawn any more.
    pub fn leave(&mut self, words: &str) {
        self.groups.clear();
        self.note(words);
    }

    fn erase(&mut self) {
        if self.drawn > 0 {
            // Up to the first line of the picture, and all below it away.
            let _ = write!(std::io::stderr(), "\x1b[{}A\x1b[J", self.drawn);
            self.drawn = 0;
        }
    }

    fn draw(&mut self) {
        self.erase();
        let columns = columns();
        let lines = self.picture();
        let mut text = String::new();
        for (ink, line) in &lines {
            let cut: String = line.chars().take(columns.saturating_sub(1)).collect();
            text.push_str(&Paint { on: Stream::Stderr, ink: *ink, text: &cut }.to_string());
            text.push('\n');
        }
        let _ = std::io::stderr().write_all(text.as_bytes());
        self.drawn = lines.len();
    }

    fn picture(&self) -> Vec<(Ink, String)> {
        let all: Vec<&Line> = self.groups.values().flatten().collect();
        let mut out: Vec<(Ink, String)> =
            all.iter().take(LINES).map(|line| (line.ink, line.text.clone())).collect();
        if all.len() > LINES {
            out.push((Ink::Note, format!("  ... and {} more", all.len() - LINES)));
        }
        out
    }
}

/// The width of standard error's terminal.
fn columns() -> usize {
    rustix::termios::tcgetwinsize(std::io::stderr())
        .ok()
        .map(|size| usize::from(size.ws_col))
        .filter(|columns| *columns > 0)
        .unwrap_or(80)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(key: &str, text: &str, coarse: &str) -> Line {
        Line { key: key.into(), text: text.into(), coarse: coarse.into(), ink: Ink::Busy }
    }

    #[test]
    fn a_pipe_gets_a_line_only_when_something_changed() {
        let mut board = Board::with(false);
        let first = [line("a", "a: 41 %", "fetching 40"), line("b", "b: starting", "starting")];
        assert_eq!(board.news(&first), ["a: 41 %", "b: starting"]);
        assert_eq!(board.news(&[line("a", "a: 43 %", "fetching 40")]), Vec::<String>::new());
        assert_eq!(board.news(&[line("a", "a: 51 %", "fetching 50")]), ["a: 51 %"]);
        assert_eq!(board.news(&first[1..]), Vec::<String>::new());
        assert_eq!(board.news(&[line("a", "a: fetching", "fetching")]), Vec::<String>::new());
        assert_eq!(board.news(&[line("a", "a: 61 %", "fetching 60")]), ["a: 61 %"]);
        assert_eq!(board.news(&[line("a", "a: starting", "starting")]), ["a: starting"]);
    }

    #[test]
    fn a_picture_is_bounded() {
        let mut board = Board::with(true);
        let many = (0..100).map(|i| line(&i.to_string(), "x", "x")).collect();
        board.groups.insert(0, many);
        let picture = board.picture();
        assert_eq!(picture.len(), LINES + 1);
        assert!(picture[LINES].1.contains("84 more"));
    }
}
