//! Words for people that more than one program says.

/// How the gateway says that nothing serves the name that was asked for; the name follows.
pub const NO_DEPLOYMENT: &str = "no deployment with a port (spec.ports) serves a model";

/// The reason of a `Pending` for slots that found no host.
pub const NO_HOST_FITS: &str = "NO_HOST_FITS";
/// The reason of a `Pending` for slots that get a replica once the one before is gone.
pub const STOPPING: &str = "STOPPING";

/// The reason of a `Pending` for slots whose replica was found after a restore and is not decided about.
pub const ORPHAN_UNDECIDED: &str = "ORPHAN_UNDECIDED";

/// The reason of a `Pending` for slots in which an older release goes on, because the wanted one did not
/// become ready in its place.
pub const GIVEN_BACK: &str = "GIVEN_BACK";

/// Whether a `Pending` with this reason tells of slots that no replica stands for.
#[must_use]
pub fn is_of_empty_slots(reason: &str) -> bool {
    [NO_HOST_FITS, STOPPING, ORPHAN_UNDECIDED].contains(&reason)
}

/// So many of something: `1 slot`, `3 slots`. What does not fit into a `u64` is told as its greatest.
pub fn counted(count: impl TryInto<u64>, what: &str) -> String {
    match count.try_into().unwrap_or(u64::MAX) {
        1 => format!("1 {what}"),
        many => format!("{many} {what}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::counted;

    #[test]
    fn one_is_one_and_all_else_are_many() {
        let told: Vec<String> = [0_usize, 1, 2].map(|n| counted(n, "slot")).into();
        assert_eq!(told, ["0 slots", "1 slot", "2 slots"]);
        assert_eq!(counted(-1, "slot"), format!("{} slots", u64::MAX));
    }
}
