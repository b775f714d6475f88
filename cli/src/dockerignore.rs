//! Which files of a folder are a build's context: `.dockerignore`, by Docker's rules.
//!
//! A pattern is anchored at the folder (unlike git's), the last one that matches decides, `!` takes
//! back, and what lies below a folder that matches is left out with it unless taken back.

use crate::error::{Error, Result};
use globset::{GlobBuilder, GlobMatcher};
use std::path::{Path, PathBuf};

/// Files of one context: more than this is a mistake, such as a home folder.
const MAX_FILES: usize = 200_000;

struct Rule {
    glob: GlobMatcher,
    keep: bool,
}

/// The rules of one `.dockerignore`.
#[derive(Default)]
pub struct Rules(Vec<Rule>);

impl Rules {
    /// Reads the text of a `.dockerignore`.
    ///
    /// # Errors
    /// When a line is no pattern.
    pub fn parse(text: &str) -> Result<Self> {
        let mut rules = Vec::new();
        for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (keep, pattern) = match line.strip_prefix('!') {
                Some(rest) => (true, rest.trim()),
                None => (false, line),
            };
            let pattern = clean(pattern);
            if pattern.is_empty() {
                continue;
            }
            // Braces mean nothing special to Docker.
            let literal = pattern.replace('{', "[{]").replace('}', "[}]");
            let glob = GlobBuilder::new(&literal)
                .literal_separator(true)
                .backslash_escape(true)
                .build()
                .map_err(|e| Error::user(format!(".dockerignore, line {}: {e}", number + 1)))?;
            rules.push(Rule { glob: glob.compile_matcher(), keep });
        }
        Ok(Self(rules))
    }

    /// Whether a path of the context, with `/` between its parts, is left out.
    pub fn excludes(&self, path: &str) -> bool {
        let mut out = false;
        for rule in &self.0 {
            // A rule is about a path when it matches it or a folder above it.
            let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
            let mut above = ends.map(|end| &path[..end]);
            if out == rule.keep && above.any(|part| rule.glob.is_match(part)) {
                out = !rule.keep;
            }
        }
        out
    }

    /// Whether something below a folder that is left out may be taken back.
    fn may_take_back(&self) -> bool {
        self.0.iter().any(|rule| rule.keep)
    }
}

/// Without `/` at either end, `.` and `..`, as Go's path.Clean does.
fn clean(pattern: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in pattern.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// The context's entries in order, relative to the folder; `always` is never left out.
pub fn context(folder: &Path, rules: &Rules, always: &[&str]) -> Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    walk(folder, "", rules, always, &mut out)?;
    Ok(out)
}

fn walk(
    folder: &Path,
    below: &str,
    rules: &Rules,
    always: &[&str],
    out: &mut Vec<PathBuf>,
) -> Result<()> {
    let mut entries: Vec<_> =
        std::fs::read_dir(folder.join(below))?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name();
        let name = name.to_str().ok_or_else(|| {
            Error::user(format!("{} has a name that is not UTF-8", entry.path().display()))
        })?;
        let path = if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
        let excluded = !always.contains(&path.as_str()) && rules.excludes(&path);
        let is_folder = entry.file_type()?.is_dir();
        let needed = always.iter().any(|a| a.starts_with(&format!("{path}/")));
        if !excluded {
            out.push(PathBuf::from(&path));
        }
        if is_folder && (!excluded || rules.may_take_back() || needed) {
            walk(folder, &path, rules, always, out)?;
        }
        if out.len() > MAX_FILES {
            return Err(Error::user(format!("the folder holds more than {MAX_FILES} files")).hint(
                "is it the right folder? .dockerignore leaves out what the image needs not",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_what_they_mean_to_docker() {
        let rules = Rules::parse(
            "# comment\n*/temp*\n*.md\n!README.md\n/target/\n**/__pycache__\nsecret\n\
             !secret/public\n{a}\n?.bin\n",
        )
        .unwrap();
        for (path, excluded) in [
            ("temp", false),
            ("a/temp1", true),
            ("a/b/temp1", false),
            ("a/tempdir/deep/file", true),
            ("notes.md", true),
            ("docs/notes.md", false), // anchored, unlike git's
            ("README.md", false),
            ("target/debug/x", true),
            ("x/target", false),
            ("__pycache__/x", true),
            ("a/b/__pycache__/x", true),
            ("secret/key", true),
            ("secret/public", false),
            ("secret/public/x", false),
            ("{a}", true),
            ("a", false),
            ("x.bin", true),
            ("xy.bin", false),
        ] {
            assert_eq!(rules.excludes(path), excluded, "{path}");
        }
    }

    #[test]
    fn a_context_holds_what_is_not_left_out_and_always_the_dockerfile() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("data/keep")).unwrap();
        for name in ["Dockerfile", "app.py", "data/big", "data/keep/small", ".dockerignore"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let rules = Rules::parse("*\n!app.py\n!data/keep\n").unwrap();
        let found = context(dir.path(), &rules, &["Dockerfile", ".dockerignore"]).unwrap();
        let names: Vec<&str> = found.iter().filter_map(|p| p.to_str()).collect();
        assert_eq!(
            names,
            [".dockerignore", "Dockerfile", "app.py", "data/keep", "data/keep/small"]
        );
    }

    #[test]
    fn a_line_that_is_no_pattern_is_named() {
        let error = Rules::parse("ok\n[z\n").err().unwrap();
        assert!(error.message.contains("line 2"), "{}", error.message);
    }
}
