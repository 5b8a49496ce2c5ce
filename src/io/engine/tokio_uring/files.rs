//! Descriptors as files of tokio-uring, which can't be taken back from it.
//!
//! Such a file is nothing but a descriptor's number, and closes the descriptor when it is dropped.
//! So one file is made for each number, is used for whatever is open under that number, and is never
//! dropped. When a runtime ends, its files are kept for the next one. The invariant: an operation
//! that uses a file keeps the descriptor of that number open.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use ::tokio_uring::fs::File;

use crate::io::descriptor::Descriptor;

/// A file that doesn't close its descriptor.
pub(super) struct Unowned(ManuallyDrop<File>);

impl Deref for Unowned {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

/// The files of one runtime, by the number of the descriptor.
#[derive(Default)]
pub(super) struct Files(Vec<Option<Rc<Unowned>>>);

// SAFETY: the only values that change threads are those in `IDLE`, whose files have no other owner
// (`recycle` checks it), and the files have nothing that belongs to a thread: a number, and a
// count of owners.
unsafe impl Send for Files {}

/// The files of runtimes that have ended.
static IDLE: Mutex<Vec<Files>> = Mutex::new(Vec::new());

impl Files {
    /// The files of an earlier runtime, if there are any.
    pub(super) fn take() -> Self {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        idle.pop().unwrap_or_default()
    }

    /// Keeps the files for another runtime. Those that an operation still uses are leaked.
    ///
    /// tokio-uring's own clones of a file are in the futures of operations, which own the `Rc`, and
    /// in its driver, which has gone with the runtime.
    pub(super) fn recycle(mut self) {
        for file in &mut self.0 {
            if file.as_ref().is_some_and(|file| Rc::strong_count(file) > 1) {
                *file = None;
            }
        }
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(self);
    }

    /// The file for a descriptor; the caller keeps that open as long as an operation uses it.
    pub(super) fn get(&mut self, descriptor: &Descriptor) -> Rc<Unowned> {
        let number = descriptor.as_raw_fd();
        let at = usize::try_from(number).expect("invariant: an open descriptor isn't negative");
        if self.0.len() <= at {
            self.0.resize(at + 1, None);
        }
        let file = self.0[at].get_or_insert_with(|| {
            // SAFETY: the file is never dropped, so it never closes the descriptor, which belongs
            // to `descriptor`.
            Rc::new(Unowned(ManuallyDrop::new(unsafe {
                File::from_raw_fd(number)
            })))
        });
        Rc::clone(file)
    }
}
