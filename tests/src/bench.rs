//! What benchmarks share: sizes from the environment, figures over rounds, the image they deploy.

use crate::{Cluster, stand_in};
use anyhow::{Context as _, Result, ensure};
use std::fmt;
use std::io::Write as _;
use std::process::Command;

/// A size that the environment may change.
#[must_use]
pub fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Least, middle and greatest of some figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The least.
    pub least: f64,
    /// The middle one; of an even number the greater of the two.
    pub median: f64,
    /// The greatest.
    pub greatest: f64,
}

impl Spread {
    /// Of these figures; all NaN when there are none.
    #[must_use]
    pub fn of(figures: &[f64]) -> Self {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |n: usize| sorted.get(n).copied().unwrap_or(f64::NAN);
        let last = sorted.len().saturating_sub(1);
        Self { least: at(0), median: at(sorted.len() / 2), greatest: at(last) }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} (from {:.3} to {:.3})", self.median, self.least, self.greatest)
    }
}

/// A line of `/proc/ID/status` that is in kB, such as `VmRSS`.
///
/// # Errors
/// When the process or the line is not there.
pub fn status_kib(id: u32, line: &str) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let found = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':'));
    let found = found.with_context(|| format!("process {id} has no {line}"))?;
    let number = found.trim().trim_end_matches(" kB").trim();
    number.parse().with_context(|| format!("{line} is {found}"))
}

/// An image on the machine's engine; its name is taken away when it is dropped.
pub struct Image {
    /// The engine's id of it.
    pub id: String,
    tag: String,
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = Command::new("docker").args(["rmi", &self.tag]).output();
    }
}

/// Builds the image of the stand-in program on the machine's engine and pushes it to the cluster's
/// registry as `name`.
///
/// # Errors
/// When the engine or the registry does not take it.
pub fn stand_in_image(cluster: &Cluster, name: &str) -> Result<Image> {
    let folder = cluster.dir.path().join("stand-in");
    std::fs::create_dir_all(&folder)?;
    std::fs::copy(stand_in::program()?, folder.join("berth-stand-in"))?;
    let text = "FROM scratch\nCOPY berth-stand-in /\nENTRYPOINT [\"/berth-stand-in\"]\n";
    std::fs::write(folder.join("Dockerfile"), text)?;
    let tag = format!("berth-bench/{name}");
    let built = Command::new("docker").args(["build", "-q", "-t", &tag]).arg(&folder).output()?;
    ensure!(built.status.success(), "docker build: {}", String::from_utf8_lossy(&built.stderr));
    let image = Image { id: String::from_utf8(built.stdout)?.trim().to_owned(), tag };
    let mut made =
        std::fs::File::options().append(true).create(true).open(cluster.made_images())?;
    writeln!(made, "{}", image.id)?;
    cluster.berth_ok(&["image", "push", &image.tag, name])?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_least_middle_and_greatest() {
        let spread = Spread::of(&[3.0, 1.0, 2.0]);
        assert_eq!(spread.to_string(), "2.000 (from 1.000 to 3.000)");
    }

    #[test]
    fn a_process_tells_what_it_holds() {
        assert!(status_kib(std::process::id(), "VmRSS").unwrap() > 0.0);
        assert!(status_kib(std::process::id(), "Nothing").is_err());
    }
}
