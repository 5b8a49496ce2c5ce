//! What the server is asked for once, before the cases: the nodes that it then knows, and open
//! files.
//!
//! The invariant: the nodes of a [`Scene`] stay known and its files stay open until the session
//! ends.

use std::ffi::CString;
use std::sync::Arc;

use vmm::fuse::{Client, FuseError, Guest, ROOT};

use crate::share::{COLD, DATA, DIRECT, FEW, FOLDER, KNOWN, KNOWN_FILES, NEW, name};
use crate::spec::Transfer;

/// An open file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Open {
    pub(crate) nodeid: u64,
    pub(crate) fh: u64,
    /// The flags it was opened with, which Linux repeats in each READ and WRITE.
    pub(crate) flags: u32,
}

/// Nodes and open files that the server knows.
#[derive(Clone, Debug)]
pub(crate) struct Scene {
    pub(crate) data: Open,
    pub(crate) direct: Open,
    pub(crate) known_folder: u64,
    pub(crate) cold_folder: u64,
    pub(crate) few_folder: u64,
    pub(crate) new_folder: u64,
    /// The nodes of the known files, by their numbers.
    pub(crate) known: Arc<[u64]>,
    /// Bytes of each of the two large files.
    pub(crate) file_size: u64,
}

impl Scene {
    /// Looks up and opens everything.
    pub(crate) fn new<G: Guest>(client: &mut Client<G>, file_size: u64) -> Result<Self, FuseError> {
        let folder = find(client, ROOT, FOLDER.as_bytes())?;
        let known_folder = find(client, folder, KNOWN.as_bytes())?;
        let known: Result<Vec<_>, _> = (0..KNOWN_FILES)
            .map(|number| find(client, known_folder, &name(number)))
            .collect();
        Ok(Self {
            data: open(client, folder, DATA, libc::O_RDWR)?,
            direct: open(client, folder, DIRECT, libc::O_RDWR | libc::O_DIRECT)?,
            known_folder,
            cold_folder: find(client, folder, COLD.as_bytes())?,
            few_folder: find(client, folder, FEW.as_bytes())?,
            new_folder: find(client, folder, NEW.as_bytes())?,
            known: known?.into(),
            file_size,
        })
    }

    /// The large file of this kind of transfer.
    pub(crate) fn file(&self, transfer: Transfer) -> Open {
        if transfer.direct {
            self.direct
        } else {
            self.data
        }
    }

    /// A scene without a server, for requests that are never sent.
    pub(crate) fn nowhere(file_size: u64) -> Self {
        let open = Open {
            nodeid: 2,
            fh: 0,
            flags: 0,
        };
        Self {
            data: open,
            direct: open,
            known_folder: 3,
            cold_folder: 4,
            few_folder: 6,
            new_folder: 5,
            known: (10..10 + u64::from(KNOWN_FILES)).collect(),
            file_size,
        }
    }
}

fn find<G: Guest>(client: &mut Client<G>, parent: u64, name: &[u8]) -> Result<u64, FuseError> {
    let name = CString::new(name).unwrap_or_default();
    Ok(client.lookup(parent, &name)?.nodeid)
}

fn open<G: Guest>(
    client: &mut Client<G>,
    folder: u64,
    name: &str,
    flags: i32,
) -> Result<Open, FuseError> {
    let nodeid = find(client, folder, name.as_bytes())?;
    let fh = match client.open(nodeid, flags) {
        Ok(handle) => handle.fh,
        // The server needs no OPEN.
        Err(error) if error.errno() == Some(libc::ENOSYS) => 0,
        // A read-only share, for the cases that only read.
        Err(error)
            if error.errno() == Some(libc::EROFS) && flags & libc::O_ACCMODE == libc::O_RDWR =>
        {
            return open(client, folder, name, flags & !libc::O_ACCMODE);
        }
        Err(error) => return Err(error),
    };
    Ok(Open {
        nodeid,
        fh,
        flags: flags.cast_unsigned(),
    })
}
