//! The program that end-to-end tests deploy, built static once and packed as an image.

use anyhow::{Context as _, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// The static program; built by the first test that asks.
///
/// # Errors
/// When it cannot be built.
pub fn program() -> Result<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let source = crate::root().join("tests/stand_in/main.rs");
    let folder = crate::bin_dir()?.join("stand-in");
    let built = folder.join("berth-stand-in");
    let changed = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified());
    if built.exists() && changed(&built)? >= changed(&source)? {
        return Ok(built);
    }
    std::fs::create_dir_all(&folder)?;
    let fresh = folder.join(format!("berth-stand-in.{}", std::process::id()));
    let target = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    let output = Command::new("rustc")
        .args(["--edition", "2024", "-O", "-C", "strip=symbols", "--target", &target, "-o"])
        .arg(&fresh)
        .arg(&source)
        .output()
        .context("cannot run rustc")?;
    ensure!(output.status.success(), "rustc: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(&fresh, &built)?;
    Ok(built)
}

/// Writes the root filesystem of an image that holds the program, and a file of so many MiB that
/// no compression makes smaller.
///
/// # Errors
/// When it cannot be written.
pub fn archive(folder: &Path, ballast_mib: u64) -> Result<PathBuf> {
    let rootfs = folder.join("rootfs");
    std::fs::create_dir_all(&rootfs)?;
    std::fs::copy(program()?, rootfs.join("berth-stand-in"))?;
    if ballast_mib > 0 {
        let random = std::fs::File::open("/dev/urandom")?;
        let mut random = std::io::Read::take(random, ballast_mib * 1024 * 1024);
        std::io::copy(&mut random, &mut std::fs::File::create(rootfs.join("ballast"))?)?;
    }
    let archive = folder.join("rootfs.tar");
    let output =
        Command::new("tar").arg("-C").arg(&rootfs).arg("-cf").arg(&archive).arg(".").output()?;
    ensure!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::remove_dir_all(&rootfs)?;
    Ok(archive)
}
