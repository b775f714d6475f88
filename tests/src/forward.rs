//! A forwarder in user space that makes a link long: what comes in on one side goes out on the other after a
//! given time, in order and at whatever rate it came. Kernels without netem have no other way.

use anyhow::Result;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Bytes read at once; a link holds at most [`CHUNKS`] of them in each direction.
const CHUNK: usize = 16 * 1024;
/// 16 MiB on their way.
const CHUNKS: usize = 1024;

/// A listener whose connections are forwarded until it is dropped; those that stand go on until an end of
/// them closes.
#[derive(Debug)]
pub struct Forwarder {
    /// Where it listens.
    pub address: String,
    over: Arc<AtomicBool>,
}

impl Forwarder {
    /// Listens on a port of its own at `ip` and forwards to `to`, `HOST:PORT`; each byte arrives `delay`
    /// later than it was sent, in both directions.
    ///
    /// # Errors
    /// When there is no port.
    pub fn start(ip: &str, to: &str, delay: Duration) -> Result<Self> {
        let listener = TcpListener::bind((ip, 0))?;
        let address = listener.local_addr()?.to_string();
        let over = Arc::new(AtomicBool::new(false));
        let (to, ended) = (to.to_owned(), Arc::clone(&over));
        std::thread::spawn(move || {
            for near in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(near), Ok(far)) = (near, TcpStream::connect(&to)) else { continue };
                let (Ok(near2), Ok(far2)) = (near.try_clone(), far.try_clone()) else { continue };
                carry(near, far, delay);
                carry(far2, near2, delay);
            }
        });
        Ok(Self { address, over })
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // It looks once somebody comes.
        let _ = TcpStream::connect(&self.address);
    }
}

/// One direction: a reader that stamps what it reads, and a writer that waits until it is due.
fn carry(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (tx, rx) = mpsc::sync_channel::<(Instant, Vec<u8>)>(CHUNKS);
    std::thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if tx.send((Instant::now() + delay, buffer[..n].to_vec())).is_err() {
                break;
            }
        }
    });
    std::thread::spawn(move || {
        let (_never, quiet) = mpsc::channel::<()>();
        for (due, bytes) in rx {
            let _ = quiet.recv_timeout(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
}
