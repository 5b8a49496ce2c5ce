//! A virtual machine monitor and a guest's driver, without a virtual machine.
//!
//! It connects to a vhost-user server, shares guest memory and virtqueues with it, and speaks FUSE
//! over them, as each of the existing front ends does. Messages and rings are encoded by hand, so
//! that wrong ones can be sent as well as right ones.
//!
//! ```no_run
//! use vmm::{Options, Profile, fuse::ROOT};
//!
//! let mut vm = Profile::Qemu.connect_path("/run/fs.sock", &Options::default().request_queues(2))?;
//! let mut fs = vmm::fuse::Client::new(&mut vm);
//! fs.init()?;
//! let (file, handle) = fs.create(ROOT, c"a", 0o644)?;
//! fs.write(file.nodeid, handle, 0, b"hello")?;
//! assert_eq!(fs.read(file.nodeid, handle, 0, 5)?, b"hello");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The rooms, each of which uses only those above it: [`event`], [`memory`], [`ring`],
//! [`connection`], [`window`], [`session`] with [`profile`], [`fuse`].

#![deny(missing_docs)]

pub mod connection;
mod error_chain;
pub mod event;
pub mod fuse;
pub mod memory;
pub mod profile;
pub mod ring;
pub mod session;
pub mod window;

pub use connection::Connection;
pub use error_chain::error_chain;
pub use event::Event;
pub use memory::{Buf, Gpa, Memory, Region};
pub use profile::Profile;
pub use ring::Queue;
pub use session::{Options, Session};
pub use window::Window;
