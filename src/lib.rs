//! A virtio-fs server: gives a virtual machine a directory of its host.
//!
//! The crate is a library first. The rooms, upper ones use lower ones only:
//!
//! | room | what it does |
//! | --- | --- |
//! | [`cli`] | options as typed |
//! | [`server`] | composition root: the start-up order, once, top to bottom |
//! | [`config`] | options as resolved |
//! | [`vhost_user`] | listening; one vhost-user session |
//! | [`device`] | what a virtio-fs device is |
//! | [`worker`] | the threads, their runtimes, the loop |
//! | [`virtqueue`] | ring → chain → guest buffers; completion, exactly once |
//! | [`scheduler`] | placement and spreading; knows nothing of virtio |
//! | [`fuse`] | ABI, decoding, dispatch, replies; knows nothing of virtio |
//! | [`fs`] | the file system trait; the passthrough |
//! | [`io`] | asynchronous file, guest buffers, over io_uring and tokio |
//! | [`state`] | the one table of what a session holds |
//! | [`sandbox`] | what keeps the server in |
//! | `sys` | thin typed wrappers over system calls |
//!
//! Usable without virtio: [`io::Runtime`], [`io::File`], [`io::GuestBuffer`], and
//! [`scheduler`] with [`worker::Threads`]; see `examples` of each.

pub mod cli;
pub mod config;
pub mod device;
pub mod fs;
pub mod fuse;
pub mod io;
pub mod sandbox;
pub mod scheduler;
pub mod server;
pub mod state;
pub mod vhost_user;
pub mod virtqueue;
pub mod worker;

pub(crate) mod sys;
