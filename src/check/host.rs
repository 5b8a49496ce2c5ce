//! Tests what the kernel and the user can do: engines, sandboxes, limits.
//!
//! Where the server's start would find it out, a variant of the configuration is rehearsed. The
//! invariant: a finding names the cause that the kernel gives, and the option that follows.

use std::fs::read_to_string;

use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, UnshareFlags};

use super::rehearsal::{in_own_process, rehearse};
use super::report::Finding;
use crate::config::{Config, Listen};
use crate::fs::passthrough::InodeFileHandles;
use crate::io::Engine;
use crate::sandbox::{Kind, Seccomp};
use crate::server;
use crate::sys::landlock;
use crate::sys::process::unshare_namespaces;

/// Tests the host for a server with this configuration.
pub(super) fn test(config: Config) -> Vec<Finding> {
    // Whether these can be used is known from the rehearsal of the configuration itself.
    let config = Config {
        listen: Listen::Inherited(-1),
        state: None,
        pid_file: None,
        supervise: false,
        ..config
    };
    let mut findings = vec![kernel(), user(), io_uring()];
    findings.push(sandbox(&config, Kind::Namespace, "namespace sandbox"));
    findings.push(sandbox(&config, Kind::Chroot, "chroot sandbox"));
    findings.push(user_namespaces());
    findings.push(subordinate_ids());
    findings.push(seccomp(&config));
    findings.push(landlock());
    findings.push(file_handles(&config));
    findings.push(labels());
    findings.push(descriptors());
    findings.extend(limits());
    findings.push(memory());
    findings
}

fn kernel() -> Finding {
    let name = rustix::system::uname();
    let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
    let (release, machine) = (text(name.release()), text(name.machine()));
    Finding::note("kernel", format!("Linux {release} on {machine}"))
}

/// The capabilities that this process can use.
fn capabilities() -> CapabilitySet {
    rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective)
}

/// Whether the process is in a user namespace that has other ids than the host.
fn is_in_user_namespace() -> bool {
    let map = read_to_string("/proc/self/uid_map").unwrap_or_default();
    let numbers: Vec<_> = map.split_whitespace().collect();
    !numbers.is_empty() && numbers != ["0", "0", "4294967295"]
}

fn user() -> Finding {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let mut text = format!("user {}, group {}", uid.as_raw(), gid.as_raw());
    if is_in_user_namespace() {
        text.push_str(", in a user namespace");
    }
    let held = capabilities();
    let all = CapabilitySet::all();
    let wanted = [
        (CapabilitySet::SYS_ADMIN, "sys_admin"),
        (CapabilitySet::SYS_CHROOT, "sys_chroot"),
        (CapabilitySet::DAC_READ_SEARCH, "dac_read_search"),
        (CapabilitySet::DAC_OVERRIDE, "dac_override"),
        (CapabilitySet::CHOWN, "chown"),
        (CapabilitySet::SETUID, "setuid"),
        (CapabilitySet::SETGID, "setgid"),
        (CapabilitySet::MKNOD, "mknod"),
        (CapabilitySet::FOWNER, "fowner"),
        (CapabilitySet::FSETID, "fsetid"),
        (CapabilitySet::SETFCAP, "setfcap"),
    ];
    let missing: Vec<_> = wanted
        .iter()
        .filter(|(capability, _)| !held.contains(*capability))
        .map(|(_, name)| *name)
        .collect();
    if (held & all).is_empty() {
        return Finding::note("user", format!("{text}; no capabilities")).advising(
            "files that the guest creates belong to this user, unless --uid-map and --gid-map map \
             more ids",
        );
    }
    if missing.is_empty() {
        return Finding::note(
            "user",
            format!("{text}; all capabilities that a server uses"),
        );
    }
    Finding::note("user", format!("{text}; lacks {}", missing.join(", ")))
}

fn io_uring() -> Finding {
    match Engine::Uring.probe() {
        Ok(()) => Finding::yes(
            "io_uring",
            "set up, with all operations that the server uses",
        ),
        Err(error) => Finding::no("io_uring", crate::error_chain::one_line(&error))
            .advising("--runtime auto and tokio use threads instead"),
    }
}

/// Whether the server would start in a sandbox of this kind.
fn sandbox(config: &Config, kind: Kind, name: &'static str) -> Finding {
    let mut config = config.clone();
    config.sandbox.kind = kind;
    if kind != Kind::Namespace {
        config.sandbox.users.clear();
        config.sandbox.groups.clear();
    }
    let option = match kind {
        Kind::Namespace => "--sandbox namespace (the default)",
        Kind::Chroot => "--sandbox chroot",
        Kind::None => "--sandbox none",
    };
    match rehearse(config).failure {
        None => Finding::yes(name, format!("the server can start with {option}")),
        Some(reason) => Finding::no(name, reason),
    }
}

/// Whether an ordinary user could make user namespaces.
fn user_namespaces() -> Finding {
    let name = "user namespaces";
    let made = in_own_process(|_| {
        unshare_namespaces(UnshareFlags::NEWUSER)
            .map(|()| 0)
            .map_err(|error| error.to_string())
    });
    match made {
        Ok((0, _)) => Finding::yes(name, "this user can make them"),
        Ok((_, log)) => {
            let reason = log.into_iter().next().map(|record| record.text);
            Finding::no(
                name,
                format!(
                    "{} (sysctls user.max_user_namespaces, kernel.unprivileged_userns_clone, \
                     kernel.apparmor_restrict_unprivileged_userns; a container's seccomp profile)",
                    reason.unwrap_or_default()
                ),
            )
            .advising("--sandbox namespace needs root, and --uid-map can't be used")
        }
        Err(error) => Finding::unknown(name, error.to_string()),
    }
}

/// The ids that `/etc/subuid` and `/etc/subgid` give to this user.
fn subordinate_ids() -> Finding {
    let name = "subordinate ids";
    let uid = rustix::process::geteuid();
    if uid.is_root() && !is_in_user_namespace() {
        return Finding::note(name, "root needs none: it maps any ids");
    }
    let uid = uid.as_raw().to_string();
    let user = read_to_string("/etc/passwd").unwrap_or_default();
    let user = user.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    });
    let range = |file| {
        let text = read_to_string(file).ok()?;
        text.lines().find_map(|line| {
            let (owner, rest) = line.split_once(':')?;
            let (first, count) = rest.split_once(':')?;
            let is_own = owner == uid || Some(owner) == user.as_deref();
            is_own.then(|| (first.to_owned(), count.trim().to_owned()))
        })
    };
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let has = |program| std::env::split_paths(&paths).any(|path| path.join(program).is_file());
    match (range("/etc/subuid"), range("/etc/subgid")) {
        (Some((uid, uids)), Some((gid, gids))) if has("newuidmap") && has("newgidmap") => {
            Finding::yes(
                name,
                format!("users from {uid} ({uids}), groups from {gid} ({gids})"),
            )
            .advising(format!(
                "--uid-map :0:{uid}:{uids}: --gid-map :0:{gid}:{gids}: lets files have several \
                     owners"
            ))
        }
        (Some(_), Some(_)) => Finding::no(name, "newuidmap and newgidmap aren't installed")
            .advising("install them (package uidmap) to use --uid-map and --gid-map"),
        _ => Finding::no(name, "/etc/subuid and /etc/subgid give this user no ids").advising(
            "without them only one user and one group can own files (--uid-map and --gid-map)",
        ),
    }
}

fn seccomp(config: &Config) -> Finding {
    let status = read_to_string("/proc/self/status").unwrap_or_default();
    let launcher = status.lines().any(|line| {
        line.strip_prefix("Seccomp:")
            .is_some_and(|mode| mode.trim() == "2")
    });
    let context = if launcher {
        "; this process has a filter of its launcher too"
    } else {
        ""
    };
    let rehearsed = |action| {
        let mut config = config.clone();
        config.sandbox.seccomp = action;
        rehearse(config).failure
    };
    match rehearsed(Seccomp::Kill) {
        None => Finding::yes("seccomp", format!("the filter can be installed{context}")),
        // Then this isn't the cause.
        Some(_) if rehearsed(Seccomp::None).is_some() => Finding::unknown(
            "seccomp",
            format!("the start fails with and without the filter{context}"),
        ),
        Some(reason) => Finding::no("seccomp", format!("{reason}{context}"))
            .advising("--seccomp none does without the filter"),
    }
}

fn landlock() -> Finding {
    match landlock::version() {
        Ok(version @ 2..) => Finding::yes("Landlock", format!("version {version}"))
            .advising("the server uses it, except where files are opened by handle"),
        Ok(version) => Finding::no(
            "Landlock",
            format!("version {version} forbids renames between directories; version 2 is needed"),
        ),
        Err(rustix::io::Errno::OPNOTSUPP) => Finding::no(
            "Landlock",
            "the kernel has it, and was started without (lsm= on its command line)",
        ),
        Err(error) => Finding::no(
            "Landlock",
            format!("this kernel doesn't have it ({error}); Linux 5.19 or later has"),
        )
        .advising("the server runs without it, and says so in its log"),
    }
}

/// Whether the server would start if file handles were mandatory.
fn file_handles(config: &Config) -> Finding {
    let mut config = config.clone();
    config.share.session.no_open = false;
    config.share.file_system.inode_file_handles = InodeFileHandles::Never;
    let without = rehearse(config.clone()).failure;
    config.share.file_system.inode_file_handles = InodeFileHandles::Mandatory;
    match (rehearse(config).failure, without) {
        (None, _) => Finding::yes("file handles", "they can be opened in the shared directory")
            .advising("--inode-file-handles prefer keeps inodes without a descriptor each"),
        (Some(reason), None) => Finding::no("file handles", reason)
            .advising("inodes have a descriptor each: see the limit of descriptors below"),
        (Some(_), Some(_)) => Finding::unknown("file handles", "the start fails without them too"),
    }
}

fn labels() -> Finding {
    let enforcing = read_to_string("/sys/fs/selinux/enforce");
    let mode = match enforcing.as_deref().map(str::trim) {
        Ok("1") => "enforcing",
        Ok(_) => "permissive",
        Err(_) => {
            return Finding::note("SELinux", "not active on this host").advising(
                "--security-label works nevertheless, if attributes of security.* can be set",
            );
        }
    };
    let context = read_to_string("/proc/self/attr/current").unwrap_or_default();
    let context = context.trim_end_matches(['\0', '\n']);
    Finding::note("SELinux", format!("{mode}; this process runs as {context}")).advising(
        "the shared directory has to have a label that this context may use; --security-label needs \
         --modcaps=+sys_admin, or --xattrmap to store the guest's labels under another name",
    )
}

fn descriptors() -> Finding {
    let limit = getrlimit(Resource::Nofile);
    let text = |value: Option<u64>| value.map_or("unlimited".to_owned(), |value| value.to_string());
    let most = read_to_string("/proc/sys/fs/nr_open").unwrap_or_default();
    let hard = limit.maximum;
    let detail = format!(
        "soft limit {}, hard limit {}, fs.nr_open {}",
        text(limit.current),
        text(hard),
        most.trim()
    );
    let finding = Finding::note("descriptors", detail);
    match hard {
        Some(hard) if hard < 65536 => finding.advising(
            "few: raise the hard limit (LimitNOFILE=, ulimit -Hn), or use --inode-file-handles prefer",
        ),
        _ => finding,
    }
}

/// Limits that are set and that a server notices.
fn limits() -> Vec<Finding> {
    let all = [
        (
            Resource::Memlock,
            "locked memory",
            "rings count on some kernels: LimitMEMLOCK=",
        ),
        (
            Resource::Fsize,
            "file size",
            "the guest gets EFBIG beyond it: LimitFSIZE=",
        ),
        (
            Resource::As,
            "address space",
            "a control group's limit is better: LimitAS=",
        ),
        (
            Resource::Data,
            "data",
            "a control group's limit is better: LimitDATA=",
        ),
        (
            Resource::Nproc,
            "processes",
            "threads count, and all of the user: LimitNPROC=",
        ),
        (
            Resource::Cpu,
            "processor time",
            "the kernel kills the server then: LimitCPU=",
        ),
    ];
    let finite = all.into_iter().filter_map(|(resource, name, advice)| {
        let limit = getrlimit(resource).maximum?;
        let unit = match resource {
            Resource::Nproc => "",
            Resource::Cpu => " seconds",
            _ => " bytes",
        };
        Some(Finding::note(name, format!("limited to {limit}{unit}")).advising(advice))
    });
    finite.collect()
}

fn memory() -> Finding {
    match server::memory_of_control_group() {
        None => Finding::note("control group", "no limit of memory"),
        Some((limit, path)) => Finding::note(
            "control group",
            format!("{} allows {limit} bytes", path.display()),
        )
        .advising("--max-inodes is lowered to what this memory suffices for"),
    }
}
