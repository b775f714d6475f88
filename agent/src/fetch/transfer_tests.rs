//! Transfers over a real connection that breaks, onto a real disk.

use super::super::testing::{FakeRegistry, RoomFor, noise};
use super::*;
use berth_agent_core::transfer::STALL_MS;

fn job<'a>(spool: &Spool, blobs: Vec<Blob>, room: &'a RoomFor) -> Job<'a> {
    Job { spool: spool.clone(), repository: "r", blobs, room, wanted: &|| true, tell: &|_| {} }
}

#[tokio::test]
async fn cuts_cost_nothing_and_a_dead_process_costs_a_chunk() {
    let registry = FakeRegistry::start().await;
    let bytes = noise(4 * CHUNK_BYTES as usize + 12_345, 1);
    let digest = registry.put(&bytes);
    let blob = Blob { digest: digest.clone(), size_bytes: bytes.len() as u64 };
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path()).unwrap();
    let transfers = Transfers::new(registry.client.clone(), None);
    let room = RoomFor(u64::MAX);

    // The process dies when a chunk and a bit are there: the future is dropped.
    let (died, seen) = tokio::sync::oneshot::channel();
    let died = Mutex::new(Some(died));
    let tell = |seen: Seen| {
        if matches!(seen, Seen::Prefix(n) if n > CHUNK_BYTES + 100_000)
            && let Some(died) = died.lock().take()
        {
            died.send(()).ok();
        }
    };
    let mut first = job(&spool, vec![blob.clone()], &room);
    first.tell = &tell;
    registry.cut(&[CHUNK_BYTES as usize + 700_000]);
    tokio::select! {
        result = transfers.run(first) => panic!("it should not have ended: {result:?}"),
        _ = seen => {}
    }
    assert!(
        matches!(spool.look(&blob).unwrap(), berth_agent_core::transfer::Held::Chunks(c) if c.contains(&0))
    );

    // The next process goes on; its connection is cut in the middle of chunks, twice.
    let transfers = Transfers::new(registry.client.clone(), None);
    registry.cut(&[CHUNK_BYTES as usize + 1_000_000, 2_000_000]);
    transfers.run(job(&spool, vec![blob], &room)).await.unwrap();
    assert_eq!(std::fs::read(spool.whole(&digest)).unwrap(), bytes);
    let size = bytes.len() as u64;
    let most = size + size / 50 + CHUNK_BYTES;
    assert!(registry.sent() <= most, "{} of {size} bytes, at most {most}", registry.sent());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn what_is_here_is_not_asked_for_and_what_has_no_room_neither() {
    let registry = FakeRegistry::start().await;
    let digest = registry.put(b"hello");
    let blob = Blob { digest, size_bytes: 5 };
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path()).unwrap();
    let transfers = Transfers::new(registry.client.clone(), None);
    let full = transfers.run(job(&spool, vec![blob.clone()], &RoomFor(4))).await;
    assert_eq!(full, Err(Failure::NoRoom { need_bytes: 5, free_bytes: 4 }));
    assert_eq!(registry.answers(), 0);
    transfers.run(job(&spool, vec![blob.clone()], &RoomFor(5))).await.unwrap();
    transfers.run(job(&spool, vec![blob], &RoomFor(0))).await.unwrap();
    assert_eq!(registry.answers(), 1);
}

#[tokio::test]
async fn a_blob_that_is_not_there_or_is_another_is_told() {
    let registry = FakeRegistry::start().await;
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path()).unwrap();
    let transfers = Transfers::new(registry.client.clone(), None);
    let room = RoomFor(u64::MAX);
    let missing = Blob { digest: Digest::of(b"missing"), size_bytes: 7 };
    let said = transfers.run(job(&spool, vec![missing], &room)).await;
    assert!(matches!(said, Err(Failure::Refused(why)) if why.contains("404")));
    let good = registry.put(b"good");
    let short = Blob { digest: good.clone(), size_bytes: 3 };
    let said = transfers.run(job(&spool, vec![short], &room)).await;
    assert_eq!(said, Err(Failure::Wrong(good.clone())));
    assert!(!spool.partial(&good).exists() && !spool.whole(&good).exists());
}

#[tokio::test]
async fn a_cap_slows_a_transfer_down() {
    let registry = FakeRegistry::start().await;
    let bytes = noise(600_000, 2);
    let blob = Blob { digest: registry.put(&bytes), size_bytes: bytes.len() as u64 };
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path()).unwrap();
    let transfers = Transfers::new(registry.client.clone(), NonZeroU64::new(400_000));
    let begun = Instant::now();
    transfers.run(job(&spool, vec![blob], &RoomFor(u64::MAX))).await.unwrap();
    // 1.5 s at that rate, less a burst of 0.25 s, and less the last piece (at most a burst), which
    // is paid for after it came.
    assert!(begun.elapsed() >= Duration::from_millis(1_000), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_registry_that_falls_silent_is_given_up_after_the_stall_and_gone_on_with_from_there() {
    let registry = FakeRegistry::start().await;
    let bytes = noise(1_000_000, 4);
    let half = 512 * 1024;
    let blob = Blob { digest: registry.put(&bytes), size_bytes: bytes.len() as u64 };
    let dir = tempfile::tempdir().unwrap();
    let spool = Spool::open(dir.path()).unwrap();
    let transfers = Transfers::new(registry.client.clone(), None);
    let room = RoomFor(u64::MAX);
    let (told, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let tell = |one: Seen| {
        let _ = told.send(one);
    };
    registry.hold(Some(half));
    let mut job = job(&spool, vec![blob.clone()], &room);
    job.tell = &tell;
    let silence = async {
        while seen.recv().await.unwrap() != Seen::Prefix(half as u64) {}
        // From here on time passes only while all wait for it.
        tokio::time::pause();
        let begun = Instant::now();
        let why = loop {
            if let Seen::Trouble { why, .. } = seen.recv().await.unwrap() {
                break why;
            }
        };
        let silent = begun.elapsed();
        tokio::time::resume();
        registry.hold(None);
        (why, silent)
    };
    let (done, (why, silent)) = tokio::join!(transfers.run(job), silence);
    done.unwrap();
    assert_eq!(why, "the registry sent nothing for 30 s");
    // The last piece came shortly before the clock stood still.
    let stall = Duration::from_millis(STALL_MS);
    assert!((stall - Duration::from_secs(5)..=stall + WRITE_AFTER).contains(&silent), "{silent:?}");
    assert_eq!(std::fs::read(spool.whole(&blob.digest)).unwrap(), bytes);
    assert_eq!(registry.answers(), 2);
}
