//! A VMM with a window, for sessions with DAX: maps nothing, and checks what it is asked for.
//!
//! What must hold: each mapping is of whole pages within the window, cuts no other, and comes with a
//! descriptor of a regular file that gives the access of the mapping and no more; what is removed is
//! there.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use ringfsd::internals::device::{BackChannel, BackChannelError, BackendRequest};
use rustix::fs::{FileType, OFlags};

/// The window's size.
pub const WINDOW: u64 = 8 << 20;

/// The VMM. Refuses some of what it is asked for.
#[derive(Debug, Default)]
pub struct Vmm(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The ends of mappings, by where they begin.
    mapped: BTreeMap<u64, u64>,
    asked: u8,
    /// One of so many requests is refused; 0: none.
    refusals: u8,
    /// It doesn't replace mappings.
    strict: bool,
}

impl Vmm {
    /// One that behaves as `how` says.
    #[must_use]
    pub fn new(how: u8) -> Self {
        Self(Mutex::new(State {
            refusals: how & 7,
            strict: how & 8 != 0,
            ..State::default()
        }))
    }

    /// The number of mappings.
    #[must_use]
    pub fn mappings(&self) -> usize {
        self.0.lock().expect("no panic").mapped.len()
    }
}

impl BackChannel for Vmm {
    fn request(
        &self,
        request: BackendRequest,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), BackChannelError> {
        let mut state = self.0.lock().expect("no panic");
        let refused = Err(BackChannelError::Refused((-12_i64).cast_unsigned()));
        match request {
            BackendRequest::MapSharedMemory(mapping) => {
                let (from, to) = (mapping.offset, mapping.offset + mapping.len);
                assert!(to <= WINDOW && from < to, "{mapping:?}");
                assert_eq!((from | to | mapping.file_offset) % 4096, 0, "{mapping:?}");
                let fd = fd.expect("a descriptor");
                let stat = rustix::fs::fstat(fd).expect("a file");
                assert_eq!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile);
                let access = rustix::fs::fcntl_getfl(fd).expect("flags") & OFlags::RWMODE;
                let needed = if mapping.writable {
                    OFlags::RDWR
                } else {
                    OFlags::RDONLY
                };
                assert_eq!(access, needed);
                for (begin, end) in &state.mapped {
                    let is_apart = *end <= from || to <= *begin;
                    assert!(is_apart || (*begin, *end) == (from, to), "{mapping:?}");
                }
                if state.strict && state.mapped.contains_key(&from) {
                    return refused;
                }
                state.asked = state.asked.wrapping_add(1);
                if state.refusals != 0 && state.asked.is_multiple_of(state.refusals + 1) {
                    return refused;
                }
                state.mapped.insert(from, to);
            }
            BackendRequest::UnmapSharedMemory(mapping) => {
                let end = state.mapped.remove(&mapping.offset);
                assert_eq!(end, Some(mapping.offset + mapping.len), "{mapping:?}");
            }
            request => panic!("{request:?}"),
        }
        Ok(())
    }
}
