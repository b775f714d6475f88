//! Tells the agent when it was built: no clock is right that says less.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

fn main() {
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=Cargo.toml");
    // For builds that must come out the same each time.
    println!("cargo::rerun-if-env-changed=SOURCE_DATE_EPOCH");
    let given = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d: Duration| d.as_secs());
    println!("cargo::rustc-env=BERTH_BUILT_UNIX_S={}", given.unwrap_or_else(now));
}
