//! Tests of the server through its socket, and of the library, in one binary: linking one for each
//! file took longer than running most of them.
//!
//! A module is a subject. Tests of a process of their own are files of `tests/` beside this folder,
//! each with its reason: a test here runs as a thread among others, so it changes nothing that is the
//! whole process's (limits, umask, signals, the working directory), and a descriptor that a child is
//! to inherit becomes inheritable in that child only.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod check;
mod compat;
mod control;
mod creation;
mod data;
mod dax;
mod descriptors;
mod diagnostics;
mod documents;
mod ending;
mod frontends;
mod fuse_backend;
mod host_changes;
mod hostile;
mod idmapped;
mod inflight;
mod io;
mod launch;
mod launchers;
mod lifecycle;
mod limit_space;
mod limits;
mod locks;
mod memory_tree;
mod metrics;
mod migration;
mod more_operations;
mod no_open;
mod operations;
mod options;
mod permissions;
mod pool;
mod probes;
mod queues;
#[cfg(feature = "nydus")]
mod rafs;
mod replies;
mod sandbox;
mod served;
mod service_manager;
mod shortage;
mod slow_disk;
mod space;
mod state;
mod supervise;
mod teardown;
mod vfs;
