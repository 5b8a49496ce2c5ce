//! Creates rings: with the flags that make them cheap on this kernel, and restricted to the
//! operations in use.
//!
//! The invariant: a ring that [`ring`] returns accepts only the operations in [`OPERATIONS`], and
//! nothing can be registered with it any more.

use std::io;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{Builder, IoUring, opcode};

/// Completion ring entries for each entry of the submission ring.
const COMPLETIONS_PER_ENTRY: u32 = 4;

/// The operations in use, and their names in the kernel.
pub(in crate::io) const OPERATIONS: [(u8, &str); 7] = [
    (opcode::Readv::CODE, "READV"),
    (opcode::Writev::CODE, "WRITEV"),
    (opcode::Read::CODE, "READ"),
    (opcode::Write::CODE, "WRITE"),
    (opcode::Fsync::CODE, "FSYNC"),
    (opcode::Fallocate::CODE, "FALLOCATE"),
    (opcode::AsyncCancel::CODE, "ASYNC_CANCEL"),
];

/// The flags that entries may have.
const ENTRY_FLAGS: Flags = Flags::ASYNC;

/// Creates a ring of `entries` for use by the calling thread only.
pub(in crate::io) fn ring(entries: u32) -> io::Result<IoUring> {
    let ring = disabled(entries)?;
    close_and_enable(&ring)?;
    Ok(ring)
}

/// Creates a ring that doesn't accept operations yet, with as many cost-saving flags as the kernel
/// supports.
///
/// Completions are posted when the thread enters the kernel by itself, without interrupting it
/// (COOP_TASKRUN, Linux 5.19), and only one thread uses the ring (SINGLE_ISSUER, 6.0).
/// DEFER_TASKRUN is not used: the descriptor of such a ring doesn't become readable by itself, so a
/// thread that sleeps in epoll would need an eventfd, and two more calls for each sleep.
pub(in crate::io) fn disabled(entries: u32) -> io::Result<IoUring> {
    let flag_sets: [fn(&mut Builder); 3] = [
        |setup| {
            cooperative(setup).setup_single_issuer();
        },
        |setup| {
            cooperative(setup);
        },
        |_| (),
    ];
    let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
    for set_flags in flag_sets {
        let mut setup = IoUring::builder();
        setup
            .dontfork()
            .setup_clamp()
            .setup_r_disabled()
            .setup_cqsize(entries.saturating_mul(COMPLETIONS_PER_ENTRY));
        set_flags(&mut setup);
        match setup.build(entries) {
            Ok(ring) => return Ok(ring),
            // This kernel doesn't know one of the flags.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => refused = e,
            Err(e) => return Err(e),
        }
    }
    Err(refused)
}

fn cooperative(setup: &mut Builder) -> &mut Builder {
    setup
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
}

/// Permanently restricts the ring to what is used, and enables it.
pub(in crate::io) fn close_and_enable(ring: &IoUring) -> io::Result<()> {
    let mut allowed: Vec<_> = OPERATIONS
        .iter()
        .map(|&(code, _)| Restriction::sqe_op(code))
        .collect();
    allowed.push(Restriction::sqe_flags_allowed(ENTRY_FLAGS.bits()));
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()
}

#[cfg(test)]
mod tests {
    #![allow(unsafe_code, reason = "entries are pushed by hand")]

    use super::*;
    use io_uring::squeue::Entry;
    use io_uring::{Probe, types};

    fn result_of(ring: &mut IoUring, entry: &Entry) -> i32 {
        // SAFETY: the entries of these tests name no memory.
        unsafe { ring.submission().push(entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn unused_operations_are_refused() {
        if let Err(reason) = crate::io::probe() {
            eprintln!("skipped: {reason}");
            return;
        }
        let mut ring = ring(8).unwrap();
        let cancel = || opcode::AsyncCancel::new(7).build();
        let allowed = opcode::AsyncCancel::new(7).build().flags(Flags::ASYNC);
        assert_eq!(result_of(&mut ring, &cancel()), -libc::ENOENT);
        assert_eq!(result_of(&mut ring, &allowed), -libc::ENOENT);

        let forbidden = [
            opcode::Nop::new().build(),
            opcode::Close::new(types::Fd(-1)).build(),
            opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
            cancel().flags(Flags::IO_DRAIN),
        ];
        for entry in forbidden {
            assert_eq!(result_of(&mut ring, &entry), -libc::EACCES, "{entry:?}");
        }
        let submitter = ring.submitter();
        let registered = [
            submitter.register_probe(&mut Probe::new()),
            submitter.register_files(&[0]),
            submitter.register_personality().map(drop),
            close_and_enable(&ring),
        ];
        for result in registered {
            assert!(result.is_err());
        }
    }

    #[test]
    fn disabled_ring_refuses_operations() {
        if let Err(reason) = crate::io::probe() {
            eprintln!("skipped: {reason}");
            return;
        }
        let mut ring = disabled(8).unwrap();
        let entry = opcode::Nop::new().build();
        // SAFETY: the entry names no memory.
        unsafe { ring.submission().push(&entry) }.unwrap();
        let refused = ring.submit().unwrap_err().raw_os_error();
        assert_eq!(refused, Some(libc::EBADFD));
    }
}
