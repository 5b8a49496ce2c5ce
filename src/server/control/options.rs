//! The options as the server has resolved them, by the names that they have on the command line.
//!
//! The invariant: each field of the configuration is named here, so a new one isn't forgotten.

use std::time::Duration;

use clap::ValueEnum;
use serde_json::{Value, json};

use crate::config::{Config, Descriptors, Listen, Share};
use crate::fs::passthrough;
use crate::fuse::{Readdirplus, SessionOptions};
use crate::sandbox;

/// A value as it is spelled on the command line.
fn spelled(value: &impl ValueEnum) -> Value {
    let spelling = value.to_possible_value();
    json!(spelling.map(|value| value.get_name().to_owned()))
}

fn seconds(time: Duration) -> Value {
    json!(time.as_secs_f64())
}

/// The options of a server.
pub(in crate::server) fn options(config: &Config) -> Value {
    let Config {
        listen,
        socket_group,
        source: _,
        tag,
        request_queues,
        workers,
        runtime,
        poll,
        state,
        control,
        metrics,
        pid_file,
        replaces_files: _,
        once,
        supervise,
        dax_fs_map,
        descriptors,
        // What holds now may be something else.
        limits: _,
        space,
        sandbox,
        share,
    } = config;
    let Share {
        file_system,
        session,
    } = share;
    let mut all = json!({
        "socket": match listen {
            Listen::Path(path) => Some(path),
            Listen::Inherited(_) => None,
        },
        "fd": match listen {
            Listen::Path(_) => None,
            Listen::Inherited(fd) => Some(fd),
        },
        "socket-group": socket_group,
        "tag": tag.as_ref().map(ToString::to_string),
        "request-queues": request_queues,
        "workers": workers,
        "runtime": spelled(runtime),
        "poll-us": poll.as_micros(),
        "state": state,
        "control": control,
        "metrics": metrics.as_ref().map(ToString::to_string),
        "pid-file": pid_file,
        "once": once,
        "supervise": supervise,
        "dax-fs-map": dax_fs_map,
        "limit-space": space.is_some(),
        "rlimit-nofile": match descriptors {
            Descriptors::Most => json!("hard limit"),
            Descriptors::Inherited => json!(0),
            Descriptors::Limit(limit) | Descriptors::AtLeast(limit) => json!(limit),
        },
    });
    merge(&mut all, sandbox_options(sandbox));
    merge(&mut all, file_system_options(file_system));
    merge(&mut all, session_options(session));
    all
}

/// Adds the members of one object to another.
fn merge(to: &mut Value, from: Value) {
    if let (Value::Object(to), Value::Object(from)) = (to, from) {
        to.extend(from);
    }
}

fn sandbox_options(options: &sandbox::Options) -> Value {
    let sandbox::Options {
        kind,
        seccomp,
        users,
        groups,
        capabilities: _,
        reports: _,
    } = options;
    let ranges = |ranges: &[sandbox::IdRange]| {
        let texts = ranges.iter();
        let text = |range: &sandbox::IdRange| {
            format!(":{}:{}:{}:", range.inside, range.outside, range.count)
        };
        texts.map(text).collect::<Vec<_>>()
    };
    json!({
        "sandbox": spelled(kind),
        "seccomp": spelled(seccomp),
        "uid-map": ranges(users),
        "gid-map": ranges(groups),
    })
}

fn file_system_options(options: &passthrough::Options) -> Value {
    let passthrough::Options {
        inode_file_handles,
        may_open_handles: _,
        max_open_inodes,
        reserved_descriptors: _,
        descriptor_limit: _,
        descriptor_parts: _,
        max_inodes,
        remember_inodes,
        max_handles,
        max_closed_files,
        cache,
        attribute_ttl,
        entry_ttl,
        users: _,
        groups: _,
        xattr,
        xattr_map,
        allow_direct_io,
        preserve_noatime,
        readonly,
        announce_submounts,
        migration,
    } = options;
    let passthrough::MigrationOptions {
        mode,
        on_error,
        verify_handles,
        confirm_paths,
    } = migration;
    json!({
        "inode-file-handles": spelled(inode_file_handles),
        "max-open-inodes": max_open_inodes,
        "max-inodes": max_inodes,
        "remember-inodes": remember_inodes,
        "max-handles": max_handles,
        "max-spare-files": max_closed_files,
        "cache": spelled(cache),
        "attr-timeout": seconds(*attribute_ttl),
        "entry-timeout": seconds(*entry_ttl),
        "xattr": xattr,
        "xattrmap": xattr_map.is_some(),
        "allow-direct-io": allow_direct_io,
        "preserve-noatime": preserve_noatime,
        "readonly": readonly,
        "announce-submounts": announce_submounts,
        "migration-mode": spelled(mode),
        "migration-on-error": spelled(on_error),
        "migration-verify-handles": verify_handles,
        "migration-confirm-paths": confirm_paths,
    })
}

fn session_options(options: &SessionOptions) -> Value {
    let SessionOptions {
        max_write: _,
        readdirplus,
        max_background: _,
        negative_ttl,
        cache_symlinks: _,
        submounts: _,
        kill_set_id,
        security_label,
        posix_acl,
        hide_acls: _,
        writeback,
        no_open,
        no_opendir,
        direct_io_mmap: _,
        posix_locks,
        flock,
        dax,
        lock_wait_limit,
        idmap: _,
    } = options;
    json!({
        "no-readdirplus": *readdirplus == Readdirplus::Never,
        "negative-timeout": seconds(*negative_ttl),
        "killpriv-v2": kill_set_id,
        "security-label": spelled(security_label),
        "posix-acl": spelled(posix_acl),
        "writeback": writeback,
        "no-open": no_open,
        "no-opendir": no_opendir,
        "posix-locks": posix_locks,
        "flock": flock,
        "dax-window": dax.as_ref().map(|dax| dax.window),
        "dax-min-size": dax.as_ref().map(|dax| dax.marked_from),
        "lock-wait-limit": seconds(*lock_wait_limit),
    })
}
