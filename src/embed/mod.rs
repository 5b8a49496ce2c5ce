//! The virtio-fs device for a VMM, or any daemon, that runs it in its own process.
//!
//! A [`VirtioFs`] serves a file system on the virtqueues of a guest whose memory the process has
//! mapped, with threads of its own. The VMM keeps the transport: registers, interrupts, and the
//! addresses of the rings. Guest memory is any [`vm_memory::GuestMemory`], mapped from files or
//! anonymously, or [raw addresses](Memory::from_raw_regions); ring addresses are guest-physical.
//! With the feature `rust-vmm` the queues of `virtio-queue` and the eventfds of `vmm-sys-util`
//! convert to and from the types here, and `VhostUserDevice` runs in the daemon of
//! `vhost-user-backend`.
//!
//! The invariant: a queue runs only between a start and a stop that the VMM has asked for, and after
//! a stop all chains taken off it have been returned.
//!
//! # Life of a device
//!
//! | VMM | device | threads |
//! | --- | --- | --- |
//! | builds its devices | [`VirtioFs::new`] | none |
//! | the driver has set `DRIVER_OK` | [`activate`](VirtioFs::activate) | started |
//! | pauses the VM, takes a snapshot | [`pause`](VirtioFs::pause), [`save`](VirtioFs::save) | asleep |
//! | resumes the VM | [`resume`](VirtioFs::resume) | |
//! | restores a snapshot elsewhere | [`load`](VirtioFs::load), then `activate` | started |
//! | the driver resets the device | [`reset`](VirtioFs::reset) | asleep |
//! | removes the device | drop | ended |
//!
//! # Example
//!
//! ```
//! use std::num::NonZeroU16;
//! use std::sync::Arc;
//!
//! use ringfsd::embed::{
//!     Call, Kick, LimitSettings, Memory, Options, QueueSetup, RingState, VirtioFs,
//! };
//! use ringfsd::fs::passthrough::{self, Passthrough};
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! # let directory = std::env::temp_dir();
//! // The file system, and the device that serves it.
//! let fs = Arc::new(Passthrough::new(&directory, passthrough::Options::default())?);
//! let mut device = VirtioFs::new(
//!     fs,
//!     Options {
//!         tag: Some("shared".parse()?),
//!         request_queues: NonZeroU16::MIN,
//!         ..Options::default()
//!     },
//! )?;
//!
//! // What the guest reads in the configuration space.
//! let mut tag = [0; 6];
//! device.read_config(0, &mut tag);
//! assert_eq!(&tag, b"shared");
//!
//! // The guest's driver has set up its queues.
//! let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
//! let kick = Kick::new()?;
//! let ring = RingState { size: 256, descriptors: 0, available: 0x1000, used: 0x2000, ..Default::default() };
//! let queue = QueueSetup { ring, kick: kick.clone(), call: Call::function(|| { /* inject an interrupt */ }) };
//! device.activate(Memory::of(memory)?, device.features(), [(1, queue)])?;
//!
//! // The guest has written to the queue's doorbell.
//! kick.notify();
//!
//! // What the guest asks for is counted, and can be limited while it runs. Any thread may do this.
//! let (metrics, limits) = (device.metrics().clone(), device.limits().clone());
//! limits.set(LimitSettings {
//!     operations: Some("10000,burst=500".parse()?),
//!     ..LimitSettings::default()
//! });
//! let snapshot = metrics.snapshot();
//! println!("{} requests", snapshot.requests());
//! assert!(snapshot.to_open_metrics().contains("ringfsd_workers{share=\"shared\"} 1"));
//!
//! // A snapshot of the VM: the queues' positions, and the guest's session.
//! let rings = device.pause();
//! let session = device.save()?;
//! assert_eq!(rings, [(1, ring)]);
//! assert!(!session.is_empty());
//! device.resume()?;
//!
//! // The driver has reset the device.
//! device.reset();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What the process has to do itself
//!
//! The device changes nothing that belongs to the whole process. The program `ringfsd` prepares its
//! process for what follows; a VMM does so for its own.
//!
//! - **Isolation**: there is no sandbox here. Confine the process, and allow the system calls of the
//!   device's threads in its filters.
//! - **Lost pages**: if the file behind guest memory is truncated, or a page is lost, an access raises
//!   SIGBUS in the process. The device neither handles nor blocks the signal.
//! - **Descriptors**: a guest holds up to three quarters of `RLIMIT_NOFILE`, which
//!   [`passthrough::Options::max_open_inodes`](crate::fs::passthrough::Options::max_open_inodes) and
//!   `max_handles` lower.
//! - **Credentials**: to create files as the guest's users, the device's threads switch their own user
//!   and group, which needs `CAP_SETUID` and `CAP_SETGID` when they start; a process without them
//!   serves everything as its own user. File handles need `CAP_DAC_READ_SEARCH`.
//! - **`SIGURG`**: if the session's options let guests wait for locks (`posix_locks`, `flock`), the
//!   first wait installs a handler that does nothing, by which waits are interrupted.
//! - **Huge files**: `RLIMIT_FSIZE` ends the process by SIGXFSZ unless it is unlimited or the signal is
//!   ignored.

mod device;
mod error;
mod queue;
#[cfg(feature = "rust-vmm")]
mod rust_vmm;
#[cfg(feature = "rust-vmm")]
mod vhost_user_device;
#[cfg(feature = "rust-vmm")]
mod vring;

pub use self::device::{Options, VirtioFs};
pub use self::error::DeviceError;
pub use self::queue::{Kick, QueueSetup, RingState};
#[cfg(feature = "rust-vmm")]
pub use self::vhost_user_device::{VhostUserDevice, VhostUserDeviceError};
#[cfg(feature = "rust-vmm")]
pub use self::vring::DirectVring;

pub use crate::dax::{DaxOptions, NamePattern, NamePatternError, NamePatterns};
pub use crate::device::{
    BackChannel, BackChannelError, BackendRequest, CONFIG_LEN, SharedMapping, Tag, TagError,
};
pub use crate::fuse::{Readdirplus, SessionOptions, Wanted};
pub use crate::guest_memory::{ChangeLog, GuestAddress, Memory, MemoryError};
pub use crate::io::Choice;
pub use crate::limits::{Limits, NoRate, Rate, Settings as LimitSettings};
pub use crate::virtqueue::{Call, QueueIndex};
