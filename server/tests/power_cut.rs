//! Power cuts under write load: no acknowledged write is lost, and every start succeeds by itself.
//!
//! The store is on an ext4 file system of its own in a loop-mounted file. In the middle of the load
//! the file system is shut down without flushing its log (`EXT4_IOC_SHUTDOWN` with NOLOGFLUSH): what
//! was not synced is gone, as when the power goes. Then the writer is killed, the file system is
//! mounted again, and another process opens the store and says what it holds. What it must hold is
//! worked out from the numbers alone, because a batch is a function of its revision.
//!
//! Every seventh time sled's own files are damaged besides, as a disk may; every eleventh time they
//! are gone. Needs root and loop devices; says so when it is skipped. `BERTH_POWER_CUTS` is how many
//! (200 by default).
#![expect(clippy::unwrap_used, reason = "a test's helpers")]

use berth_proto::ids::Revision;
use berth_server::store::embedded::Embedded;
use berth_server::store::{Store as _, StoreError};
use berth_server_core::batching::Batch;
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Tells this binary's child what to do: `write FOLDER` or `read FOLDER`.
const ROLE: &str = "BERTH_POWER_CUT_ROLE";
/// Keys in turn: small enough that most writes replace.
const KEYS: u64 = 400;

/// A number that looks drawn, from another.
fn mixed(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// What is written at a revision: up to four keys, values of up to 9 kB, now and then a removal.
fn batch(revision: u64) -> Batch {
    let ops = (0..1 + mixed(revision) % 4).map(|i| {
        let drawn = mixed(revision * 7 + i);
        let key = format!("key/{:04}", drawn % KEYS).into_bytes();
        let length = usize::try_from((drawn >> 20) % 9_000).unwrap();
        let byte = u8::try_from((drawn >> 40) % 256).unwrap();
        let value = if drawn.is_multiple_of(13) { None } else { Some(vec![byte; length]) };
        (key, value)
    });
    Batch { revision: Revision(revision), ops: ops.collect() }
}

type Held = BTreeMap<Vec<u8>, Vec<u8>>;

fn take(held: &mut Held, revision: u64) {
    for (key, value) in batch(revision).ops {
        match value {
            Some(value) => held.insert(key, value),
            None => held.remove(&key),
        };
    }
}

fn sum<'a>(held: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> u32 {
    held.fold(0, |sum, (key, value)| crc32c::crc32c_append(crc32c::crc32c_append(sum, key), value))
}

/// The writer: groups of batches without end, each acknowledged on standard output.
fn write(folder: &Path) {
    let (mut store, _) = Embedded::open(folder).unwrap();
    let mut out = std::io::stdout().lock();
    loop {
        let next = store.revision().0 + 1;
        let group: Vec<Batch> = (next..=next + mixed(next) % 8).map(batch).collect();
        // The file system under it goes: that ends the load.
        if store.commit(&group).is_err() {
            return;
        }
        writeln!(out, "acknowledged {}", store.revision()).unwrap();
        // As when the ledger is quiet for a moment.
        if next.is_multiple_of(97) && store.checkpoint().is_err() {
            return;
        }
    }
}

/// The reader: opens the store and says what it holds.
fn read(folder: &Path) {
    let (store, opened) = Embedded::open(folder).unwrap();
    let all = store.load(b"").unwrap();
    let sum = sum(all.iter().map(|e| (&e.key[..], &e.value[..])));
    println!("holds {} {} {sum}", store.revision(), all.len());
    println!("rebuilt {} fell-back {}", opened.rebuilt.is_some(), opened.fell_back.is_some());
}

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    output
}

/// Runs a test again where nobody else sees its mounts: a namespace that somebody makes meanwhile
/// would keep a copy of one, and with it the file system that shall be gone. `false`: this is it.
fn is_carried_into_a_namespace(test: &str) -> bool {
    const INSIDE: &str = "BERTH_POWER_CUT_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    let inside = || {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private"]);
        command
    };
    if !inside().arg("true").output().is_ok_and(|output| output.status.success()) {
        assert!(std::env::var_os("CI").is_none(), "{test}: no mount namespace can be made");
        println!("{test}: skipped, no mount namespace can be made here (root? unshare?)");
        return true;
    }
    let mut again = inside();
    again.arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]);
    let status = again.env(INSIDE, "1").status().unwrap();
    assert!(status.success(), "{test} failed in its namespace: {status}");
    true
}

/// A file system of its own, gone when it is dropped.
struct Disk {
    image: PathBuf,
    mount: PathBuf,
}

impl Disk {
    fn make(folder: &Path, bytes: u64) -> Option<Self> {
        let disk = Self { image: folder.join("disk"), mount: folder.join("mount") };
        std::fs::create_dir(&disk.mount).unwrap();
        std::fs::File::create(&disk.image).unwrap().set_len(bytes).unwrap();
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&disk.image).output();
        if !made.is_ok_and(|output| output.status.success()) {
            return None;
        }
        let mounted = disk.try_mount();
        mounted.then_some(disk)
    }

    fn try_mount(&self) -> bool {
        let args = ["-o", "loop", self.image.to_str().unwrap(), self.mount.to_str().unwrap()];
        Command::new("mount").args(args).output().is_ok_and(|output| output.status.success())
    }

    /// The power goes: nothing that was not synced stays.
    fn cut(&self) {
        let words = "use Fcntl; sysopen(my $f, $ARGV[0], O_RDONLY) or die $!; \
                     my $how = pack('L', 2); ioctl($f, 0x8004587d, $how) or die $!;";
        run("perl", &["-e", words, self.mount.to_str().unwrap()]);
    }

    fn unmount(&self) {
        run("umount", &[self.mount.to_str().unwrap()]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.mount).output();
    }
}

fn child(role: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "the_child_does_its_part", "--nocapture", "--include-ignored"]);
    command.env(ROLE, role).env("BERTH_POWER_CUT_FOLDER", folder);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Not a test: what the writer and the reader run. Without a role it has nothing to do.
#[test]
fn the_child_does_its_part() {
    let folder = std::env::var_os("BERTH_POWER_CUT_FOLDER").map(PathBuf::from).unwrap_or_default();
    match std::env::var(ROLE).as_deref() {
        Ok("write") => write(&folder),
        Ok("read") => read(&folder),
        _ => {}
    }
}

fn damage(sled: &Path, cut: u64) {
    if cut.is_multiple_of(11) {
        std::fs::remove_dir_all(sled).unwrap();
    } else if cut.is_multiple_of(7) {
        let file = sled.join("db");
        let mut bytes = std::fs::read(&file).unwrap();
        let (from, to) = (bytes.len() / 3, bytes.len() / 2);
        for byte in &mut bytes[from..to] {
            *byte ^= 0x5a;
        }
        std::fs::write(&file, bytes).unwrap();
    }
}

#[test]
fn no_acknowledged_write_is_lost_by_power_cuts_and_every_start_succeeds() {
    if is_carried_into_a_namespace(
        "no_acknowledged_write_is_lost_by_power_cuts_and_every_start_succeeds",
    ) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::make(dir.path(), 1 << 30) else {
        assert!(std::env::var_os("CI").is_none(), "power_cut: no ext4 can be mounted");
        println!("power_cut: skipped, no loop-mounted ext4 can be made here (root? mkfs.ext4?)");
        return;
    };
    let cuts = std::env::var("BERTH_POWER_CUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    let folder = disk.mount.join("ledger");
    let (mut held, mut known) = (Held::new(), 0_u64);
    let (mut acknowledged, mut rebuilt) = (0_u64, 0);
    for cut in 1..=cuts {
        let mut writer = child("write", &folder).spawn().unwrap();
        let wanted = 1 + mixed(cut) % 60;
        let lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        let news = lines.map_while(Result::ok).filter_map(|line| {
            line.strip_prefix("acknowledged ").and_then(|n| n.parse::<u64>().ok())
        });
        let mut news = news.peekable();
        assert!(news.peek().is_some(), "cut {cut}: the writer did not start");
        for revision in news.by_ref().take(usize::try_from(wanted).unwrap()) {
            acknowledged = revision;
        }
        // As the power does, this stops the writer with the disk: a writer that went on could be told
        // that a sync has succeeded whose journal was given up meanwhile.
        run("kill", &["-STOP", &writer.id().to_string()]);
        disk.cut();
        let _ = writer.kill();
        writer.wait().unwrap();
        // What it had said before counts as well.
        for revision in news {
            acknowledged = revision;
        }
        disk.unmount();
        assert!(disk.try_mount(), "cut {cut}: the file system does not mount again");
        damage(&folder.join("sled"), cut);

        let read = child("read", &folder).output().unwrap();
        let text = String::from_utf8_lossy(&read.stdout).into_owned();
        let said = String::from_utf8_lossy(&read.stderr);
        assert!(read.status.success(), "cut {cut}: the start failed: {text}{said}");
        let line = text.lines().find_map(|l| l.strip_prefix("holds ")).unwrap();
        let numbers: Vec<u64> = line.split(' ').map(|n| n.parse().unwrap()).collect();
        let revision = numbers[0];
        assert!(revision >= acknowledged, "cut {cut}: {acknowledged} was acknowledged, {line}");
        for later in known + 1..=revision {
            take(&mut held, later);
        }
        known = revision;
        assert_eq!(numbers[1], held.len() as u64, "cut {cut}: {line}");
        let expected = sum(held.iter().map(|(k, v)| (&k[..], &v[..])));
        assert_eq!(numbers[2], u64::from(expected), "cut {cut}: {line}");
        assert!(text.contains("fell-back false"), "cut {cut}: {text}");
        rebuilt += u32::from(text.contains("rebuilt true"));
    }
    println!(
        "{cuts} power cuts, {known} batches, {rebuilt} times sled was made anew, nothing lost"
    );
    assert!(cuts < 7 || rebuilt > 0, "damage was never noticed");
}

/// Whether a store holds exactly this.
fn holds(store: &Embedded, held: &Held) -> bool {
    let all = store.load(b"").unwrap();
    all.iter().map(|e| (&e.key, &e.value)).eq(held.iter())
}

#[test]
fn a_disk_that_is_full_at_any_write_loses_nothing_and_the_store_goes_on_when_there_is_room() {
    if is_carried_into_a_namespace(
        "a_disk_that_is_full_at_any_write_loses_nothing_and_the_store_goes_on_when_there_is_room",
    ) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::make(dir.path(), 64 << 20) else {
        assert!(std::env::var_os("CI").is_none(), "full disk: no ext4 can be mounted");
        println!("full disk: skipped, no loop-mounted ext4 can be made here (root? mkfs.ext4?)");
        return;
    };
    let (folder, filler) = (disk.mount.join("ledger"), disk.mount.join("filler"));
    let (mut held, mut refused, mut without_sled) = (Held::new(), 0, 0);
    let mut store = Embedded::open(&folder).unwrap().0;
    for round in 0..12 {
        // So much is left, and whatever writes next finds the end: journal, sled or an export.
        let left = mixed(round) % (3 << 20);
        let room = berth_server::store::folder::free_bytes(&disk.mount).unwrap();
        std::fs::write(&filler, vec![7; usize::try_from(room.saturating_sub(left)).unwrap()]).ok();
        let mut checkpoint = 1;
        loop {
            let next = batch(store.revision().0 + 1);
            let revision = next.revision.0;
            match store.commit(&[next]) {
                Ok(()) => take(&mut held, revision),
                Err(StoreError::Full) => break,
                Err(error) => panic!("round {round}: {error:?}"),
            }
            checkpoint += 1;
            if mixed(revision).is_multiple_of(151) {
                let made = store.checkpoint();
                assert!(matches!(made, Ok(()) | Err(StoreError::Full)), "round {round}: {made:?}");
            }
            assert!(checkpoint < 20_000, "round {round}: the disk never was full");
        }
        refused += 1;
        assert!(holds(&store, &held), "round {round}: on the full disk");
        // A start on the full disk finds all of it.
        drop(store);
        let (again, opened) = Embedded::open(&folder).unwrap();
        store = again;
        assert_eq!(opened.fell_back, None, "round {round}");
        without_sled += u32::from(opened.rebuilt.is_some());
        assert!(holds(&store, &held), "round {round}: after a start on the full disk");
        std::fs::remove_file(&filler).unwrap();
        let next = batch(store.revision().0 + 1);
        let revision = next.revision.0;
        store.commit(&[next]).unwrap();
        take(&mut held, revision);
        // The two exports that the journal waits for.
        store.checkpoint().unwrap();
        store.checkpoint().unwrap();
        assert!(holds(&store, &held), "round {round}: with room again");
    }
    println!("{refused} times full, {without_sled} starts without sled, nothing lost");
}
