//! The format of a backup file: see `berth/store/v1/backup.proto`.
//!
//! A file is read whole and checked to its end before anybody acts on any of it.

use super::{BackupError, Recovery};
use crate::store::Entry;
use crate::store::folder::FORMAT;
use age::x25519::{Identity, Recipient};
use age::{DecryptError, Decryptor, Encryptor};
use berth_proto::ids::{Digest, Revision};
use berth_proto::record::backup_item::Item;
use berth_proto::record::{
    BackupBlob, BackupEnd, BackupEntry, BackupHeader, BackupItem, ClusterRecord,
};
use prost::Message as _;
use sha2::Digest as _;
use std::io::{self, BufReader, Read, Write};

const MAGIC: &[u8; 8] = b"BRTHBAK1";
/// No item is longer: an entry is less than a write of the ledger, and that is below 4 MiB.
const MAX_ITEM: usize = 4 * 1024 * 1024;

/// What a backup holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Contents {
    /// Whose it is, and the secrets.
    pub header: BackupHeader,
    /// The ledger.
    pub entries: Vec<Entry>,
    /// The registry's blobs, by name.
    pub blobs: Vec<(Digest, u64)>,
}

impl Contents {
    /// What is to be backed up. The ledger's record names the recovery key, so that a restored server
    /// goes on with it.
    #[must_use]
    pub fn new(
        header: BackupHeader,
        mut entries: Vec<Entry>,
        blobs: Vec<(Digest, u64)>,
        recovery: &Recovery,
    ) -> Self {
        for entry in entries.iter_mut().filter(|entry| entry.key == b"cluster") {
            if let Ok(mut cluster) = ClusterRecord::decode(entry.value.as_slice()) {
                cluster.recovery_recipient = recovery.recipient.to_string();
                entry.value = cluster.encode_to_vec();
            }
        }
        Self { header, entries, blobs }
    }
}

/// Counts and sums what goes through.
struct Summed<W> {
    inner: W,
    sum: sha2::Sha256,
}

impl<W: Write> Summed<W> {
    fn item(&mut self, item: Item) -> io::Result<()> {
        self.bytes(&BackupItem { item: Some(item) }.encode_length_delimited_to_vec())
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.update(bytes);
        self.inner.write_all(bytes)
    }
}

struct Counted<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes a backup, encrypted to a recovery key; answers with the file's size in bytes.
///
/// # Errors
/// When `out` does not take it.
pub fn write(contents: &Contents, recipient: &Recipient, out: impl Write) -> io::Result<u64> {
    let encryptor = Encryptor::with_recipients(std::iter::once(recipient as &dyn age::Recipient))
        .map_err(io::Error::other)?;
    let inner = encryptor.wrap_output(Counted { inner: out, bytes: 0 })?;
    let mut out = Summed { inner, sum: sha2::Sha256::new() };
    out.bytes(MAGIC)?;
    out.item(Item::Header(contents.header.clone()))?;
    for entry in &contents.entries {
        let (key, value) = (entry.key.clone(), entry.value.clone());
        out.item(Item::Entry(BackupEntry { key, revision: entry.revision.0, value }))?;
    }
    for (digest, size_bytes) in &contents.blobs {
        let digest = digest.to_string();
        out.item(Item::Blob(BackupBlob { digest, size_bytes: *size_bytes }))?;
    }
    let end = BackupEnd {
        entries: contents.entries.len() as u64,
        blobs: contents.blobs.len() as u64,
        sha256: out.sum.clone().finalize().to_vec(),
    };
    out.item(Item::End(end))?;
    let mut counted = out.inner.finish()?;
    counted.flush()?;
    Ok(counted.bytes)
}

/// Reads what [`write()`] wrote, all of it, and checks it.
///
/// # Errors
/// When the key is none or another's, when the file is no backup, is damaged or cut, or was made by a
/// newer server.
pub fn read(file: impl Read, key: &str) -> Result<Contents, BackupError> {
    let identity: Identity = key.trim().parse().map_err(|_| BackupError::BadKey)?;
    let opened = Decryptor::new_buffered(BufReader::new(file));
    let plain = opened
        .and_then(|d| d.decrypt(std::iter::once(&identity as &dyn age::Identity)))
        .map_err(|error| match error {
            DecryptError::NoMatchingKeys => BackupError::WrongKey,
            DecryptError::DecryptionFailed
            | DecryptError::InvalidMac
            | DecryptError::KeyDecryptionFailed => {
                BackupError::Damaged("its head does not decrypt")
            }
            DecryptError::InvalidHeader
            | DecryptError::UnknownFormat
            | DecryptError::Io(_)
            | DecryptError::ExcessiveWork { .. }
            // The library's own enum, which may grow.
            | _ => BackupError::NotABackup,
        })?;
    let mut input = Input { inner: BufReader::new(plain), sum: sha2::Sha256::new() };
    if input.bytes(MAGIC.len())? != MAGIC {
        return Err(BackupError::NotABackup);
    }
    let Item::Header(header) = input.item()? else {
        return Err(BackupError::Damaged("it has no header"));
    };
    if header.format > FORMAT {
        let (found, version) = (header.format, header.version);
        return Err(BackupError::NewerFormat { found, known: FORMAT, version });
    }
    let mut contents = Contents { header, entries: Vec::new(), blobs: Vec::new() };
    let end = loop {
        let before = input.sum.clone();
        match input.item()? {
            Item::Header(_) => return Err(BackupError::Damaged("it has two headers")),
            Item::Entry(entry) => contents.entries.push(Entry {
                key: entry.key,
                revision: Revision(entry.revision),
                value: entry.value,
            }),
            Item::Blob(blob) => {
                let digest =
                    blob.digest.parse().map_err(|_| BackupError::Damaged("a digest is none"))?;
                contents.blobs.push((digest, blob.size_bytes));
            }
            Item::End(end) if end.sha256 == before.finalize().as_slice() => break end,
            Item::End(_) => return Err(BackupError::Damaged("its checksum is wrong")),
        }
    };
    let counts = (contents.entries.len() as u64, contents.blobs.len() as u64);
    if (end.entries, end.blobs) != counts {
        return Err(BackupError::Damaged("something is missing"));
    }
    // The last byte tells that the encryption is whole, too.
    let mut more = [0];
    match input.inner.read(&mut more) {
        Ok(0) => Ok(contents),
        Ok(_) => Err(BackupError::Damaged("something follows its end")),
        Err(_) => Err(BackupError::Damaged("its last part does not decrypt")),
    }
}

struct Input<R> {
    inner: R,
    sum: sha2::Sha256,
}

impl<R: Read> Input<R> {
    fn bytes(&mut self, n: usize) -> Result<Vec<u8>, BackupError> {
        let mut bytes = vec![0; n];
        self.inner
            .read_exact(&mut bytes)
            .map_err(|_| BackupError::Damaged("a part does not decrypt or is missing"))?;
        self.sum.update(&bytes);
        Ok(bytes)
    }

    fn item(&mut self) -> Result<Item, BackupError> {
        let mut length = 0_usize;
        for shift in (0..28).step_by(7) {
            let byte = self.bytes(1)?[0];
            length |= usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        if length > MAX_ITEM {
            return Err(BackupError::Damaged("an item is too long"));
        }
        let bytes = self.bytes(length)?;
        BackupItem::decode(bytes.as_slice())
            .ok()
            .and_then(|item| item.item)
            .ok_or(BackupError::Damaged("an item is of no known kind"))
    }
}
