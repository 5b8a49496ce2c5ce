//! A virtio-fs server: shares a directory of the host with a virtual machine.
//!
//! The crate is a library with a thin binary. Its modules; each uses only those below it:
//!
//! | module | what it does |
//! | --- | --- |
//! | [`cli`] | options as typed |
//! | [`server`] | composition root: start-up in order, supervision, upgrades |
//! | [`recovery`] | supervision, handover to another program, the `--state` file |
//! | [`config`] | the resolved configuration |
//! | [`vhost_user`] | the listening socket; one vhost-user session |
//! | [`embed`] | the device in the process of its VMM |
//! | [`device`] | the virtio-fs device: features, configuration space |
//! | [`worker`] | worker threads, their runtimes and event loop |
//! | [`virtqueue`] | ring → chain → guest buffers; completion, exactly once |
//! | [`guest_memory`] | the guest's memory: regions, dirty log, memory that is taken away |
//! | [`scheduler`] | placement of tasks on threads; independent of virtio |
//! | [`fuse`] | FUSE ABI, decoding, dispatch, replies; independent of virtio |
//! | [`fs`] | the file system trait; the passthrough file system |
//! | [`io`] | asynchronous files and guest buffers, over io_uring and tokio |
//! | [`state`] | the table of a session's state, in shared memory |
//! | [`migration`] | the format of a migrated session, and its transfer over a pipe |
//! | [`sandbox`] | namespaces, root directory, capabilities, Landlock, seccomp |
//! | [`error_chain`] | an error and its causes |
//! | `sys` | thin typed wrappers over system calls |
//!
//! Usable without virtio: [`io::Runtime`], [`io::File`], [`io::GuestBuffer`], and
//! [`scheduler`] with [`worker::Threads`]; `integration/examples/copy_tree.rs` uses them all.

pub mod cli;
pub mod config;
pub mod device;
pub mod embed;
pub mod error_chain;
pub mod fs;
pub mod fuse;
pub mod guest_memory;
pub mod io;
pub mod migration;
pub mod recovery;
pub mod sandbox;
pub mod scheduler;
pub mod server;
pub mod state;
pub mod vhost_user;
pub mod virtqueue;
pub mod worker;

pub(crate) mod sys;
