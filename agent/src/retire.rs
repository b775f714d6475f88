//! The end of a host that was removed from its cluster with everything on it.
//!
//! Nothing is wanted any more, so the reconciler stops and removes what runs, as it would for an empty
//! set: with each program's grace, and through an engine that is away for a while. What is left then
//! (the bridge, names of images, models, keys) goes here. That it was told is durable before anything
//! goes, and the identity goes last, so that an agent that dies meanwhile goes on where it was.

use crate::containers::bridge;
use crate::engine::Engine;
use crate::fetch::bring::{Fetcher, MODELS};
use crate::state::Shared;
use std::path::Path;
use std::time::Duration;

/// Looks again so often whether something is left: a pace, seen by nobody.
const LOOK: Duration = Duration::from_millis(500);
/// What the agent has in its folder; in the order in which it goes.
const HELD: [&str; 10] = [
    MODELS,
    "pull",
    "set.partial",
    "set",
    "joining.partial",
    "joining",
    "link.partial",
    "link.json",
    "identity.partial",
    "identity",
];

/// Ends once nothing of the cluster is left; never unless the host is told so.
pub async fn emptied(shared: &Shared, engine: &dyn Engine, fetcher: &Fetcher) {
    let mut wiping = shared.wiping.subscribe();
    if wiping.wait_for(|wiping| *wiping).await.is_err() {
        std::future::pending::<()>().await;
    }
    // The set that wanted them may have been replaced while a container was being made.
    while !engine.observe(&shared.cluster).await.is_ok_and(|left| left.is_empty()) {
        tokio::time::sleep(LOOK).await;
    }
    if let Err(error) = engine.remove_network(&bridge(&shared.cluster)).await {
        tracing::warn!(%error, "the bridge could not be removed");
    }
    fetcher.forget_images().await;
    remove_held(shared.store.folder());
}

/// Removes what an agent has in its folder, the identity last.
pub fn remove_held(folder: &Path) {
    for name in HELD {
        remove(&folder.join(name));
    }
}

fn remove(path: &Path) {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(_) => return,
    };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "cannot be removed");
    }
}
