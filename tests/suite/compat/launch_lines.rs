//! The command lines of programs that start virtiofsd, each with the environment that it gives,
//! compared with virtiofsd: what the launcher waits for, the files beside the socket, what the guest
//! sees, and how the server ends. Each test names the release whose source has the line.

mod launcher;

use rustix::process::Signal;
use vmm::Profile;

use super::Program;
use launcher::{Directory, Ending, Launcher, Wait, compare};

const LISTENING: Wait = Wait::Line("Waiting for vhost-user socket connection");

/// Kata Containers 4.1.0, Go runtime: kills the server when it stops the sandbox.
#[test]
fn kata_go() {
    for line in [
        "--syslog --cache=auto --shared-dir=%share --fd=3",
        "--syslog --cache=auto --shared-dir=%share --fd=3 --inode-file-handles=prefer",
        "--syslog --cache=never --shared-dir=%share --fd=3 --thread-pool-size=1 -o announce_submounts",
    ] {
        compare(&Launcher {
            line,
            fd: Some(3),
            endings: &[Ending::Vmm, Ending::Signal(Signal::KILL)],
            ..Launcher::default()
        });
    }
}

/// Kata Containers 4.1.0, Rust runtime.
#[test]
fn kata_rust() {
    for (line, directory, umask) in [
        (
            "--socket-path %socket --shared-dir %share --cache auto --sandbox none --seccomp none \
             --inode-file-handles=never --xattr",
            Directory::Root,
            0o022,
        ),
        // Rootless: the path of the socket is relative.
        (
            "--socket-path socket --shared-dir %share --cache never --sandbox none --seccomp none \
             --inode-file-handles=prefer",
            Directory::Socket,
            0,
        ),
    ] {
        compare(&Launcher {
            line,
            wait: LISTENING,
            directory,
            umask,
            vmm: Profile::Dragonball,
            endings: &[Ending::Vmm, Ending::Signal(Signal::KILL)],
            ..Launcher::default()
        });
    }
}

/// libvirt 9 and later, which uses virtiofsd's `separate-options`; the first line has all that the
/// domain's XML can ask for.
#[test]
fn libvirt() {
    for line in [
        "--fd=25 --shared-dir %share --cache always --sandbox chroot --xattr --thread-pool-size=4 \
         --rlimit-nofile=%limit --log-level debug",
        "--fd=25 --shared-dir %share --cache never",
    ] {
        compare(&Launcher {
            line,
            fd: Some(25),
            ..Launcher::default()
        });
    }
}

/// libvirt in a session of a user without subordinate ids.
#[test]
fn libvirt_of_a_user() {
    compare(&Launcher {
        line: "--fd=25 --shared-dir %share --uid-map=:0:65534:1: --gid-map=:0:65534:1:",
        fd: Some(25),
        user: Some(testing::USER),
        ..Launcher::default()
    });
}

/// libvirt without `separate-options`.
#[test]
fn older_libvirt() {
    for line in [
        "--fd=25 -o source=%share,cache=none,xattr,no_flock,no_posix_lock --thread-pool-size=1 -d",
        "--fd=25 -o source=%share,cache=always,sandbox=chroot,no_xattr",
    ] {
        compare(&Launcher {
            line,
            fd: Some(25),
            ..Launcher::default()
        });
    }
}

/// Podman 5, `podman machine` with QEMU: in the share, with a quiet log.
#[test]
fn podman_machine() {
    for user in [None, Some(testing::USER)] {
        compare(&Launcher {
            line: "--sandbox none --socket-path %socket --shared-dir . --seccomp=none",
            wait: Wait::Socket,
            directory: Directory::Share,
            environment: "RUST_LOG=ERROR",
            user,
            ..Launcher::default()
        });
    }
}

/// Proxmox, qemu-server 9.2.6: forks twice, so nobody sees the status.
#[test]
fn proxmox() {
    for line in [
        "--fd=12 --shared-dir=%share --announce-submounts --syslog",
        "--fd=12 --shared-dir=%share --xattr --posix-acl --announce-submounts --allow-direct-io \
         --cache=metadata --writeback --syslog",
    ] {
        compare(&Launcher {
            line,
            fd: Some(12),
            wrapper: "setsid --fork",
            endings: &[Ending::Vmm],
            ..Launcher::default()
        });
    }
}

/// Incus 7.3: a virtual machine, and one whose ids are mapped.
#[test]
fn incus() {
    for line in [
        "--fd=3 --cache=never --shared-dir=%share --posix-acl=auto",
        "--fd=3 --cache=metadata --shared-dir=%share --posix-acl",
        "--fd=3 --cache=always --shared-dir=%share --translate-uid=map:0:1000000:1000000000 \
         --translate-uid=forbid-guest:0:0 --translate-gid=map:0:1000000:1000000000 \
         --translate-gid=forbid-guest:0:0 --translate-uid=forbid-guest:1000000000:3294967295 \
         --translate-gid=forbid-guest:1000000000:3294967295",
    ] {
        compare(&Launcher {
            line,
            fd: Some(3),
            ..Launcher::default()
        });
    }
}

/// systemd-vmspawn, main branch of 2026: a directory, one of a user, and one in a user namespace.
#[test]
fn vmspawn() {
    for (line, wrapper) in [
        (
            "--shared-dir %share --xattr --fd 3 --no-announce-submounts --log-level=error \
             --modcaps=-mknod",
            "",
        ),
        (
            "--shared-dir %share --xattr --fd 3 --no-announce-submounts --log-level=error \
             --modcaps=-mknod --translate-uid map:60000:1000:1 --translate-gid map:60000:1000:1",
            "",
        ),
        (
            "--shared-dir %share --xattr --fd 3 --no-announce-submounts --log-level=error \
             --modcaps=-mknod",
            "unshare --user --map-root-user --mount",
        ),
    ] {
        compare(&Launcher {
            line,
            fd: Some(3),
            wrapper,
            ..Launcher::default()
        });
    }
}

/// Earlier systemd-vmspawn, by an ordinary user.
#[test]
fn older_vmspawn() {
    compare(&Launcher {
        line: "--shared-dir %share --xattr --fd 3 --no-announce-submounts --uid-map :0:65534:1: \
               --gid-map :0:65534:1:",
        fd: Some(3),
        user: Some(testing::USER),
        ..Launcher::default()
    });
}

/// mkosi 26: as root and in a user namespace, also with a guest that labels files. The lines without
/// `--modcaps` are of earlier releases.
#[test]
fn mkosi() {
    for (line, wrapper) in [
        (
            "--shared-dir %share --xattr --no-announce-submounts --sandbox=chroot \
             --inode-file-handles=prefer --log-level=error --modcaps=-mknod --fd 3",
            "",
        ),
        (
            "--shared-dir %share --xattr --no-announce-submounts --sandbox=chroot \
             --inode-file-handles=never --log-level=error --modcaps=-mknod --security-label --fd 3",
            "unshare --user --map-root-user",
        ),
        (
            "--shared-dir %share --xattr --no-announce-submounts --sandbox=chroot --security-label \
             --fd 3",
            "",
        ),
        (
            "--shared-dir %share --xattr --no-announce-submounts --sandbox=chroot --fd 3",
            "unshare --user --map-root-user",
        ),
    ] {
        compare(&Launcher {
            line,
            fd: Some(3),
            wrapper,
            ..Launcher::default()
        });
    }
}

/// microvm.nix 0.5.0 and later.
#[test]
fn microvm_nix() {
    compare(&Launcher {
        line: "--socket-path=%socket --socket-group=daemon --shared-dir=%share --rlimit-nofile %limit \
               --thread-pool-size 2 --posix-acl --xattr --cache=auto --inode-file-handles=prefer",
        wait: Wait::Socket,
        ..Launcher::default()
    });
}

/// virtme-ng 1.41: shares everything, and waits for the PID file.
#[test]
fn virtme_ng() {
    for (line, user) in [
        (
            "--syslog --no-announce-submounts --socket-path %socket --shared-dir / --sandbox none \
             --cache always",
            None,
        ),
        (
            "--syslog --no-announce-submounts --readonly --socket-path %socket --shared-dir / \
             --sandbox none --cache always",
            Some(testing::USER),
        ),
    ] {
        compare(&Launcher {
            line,
            wait: Wait::PidFile,
            umask: 0o002,
            user,
            shares_all: true,
            ..Launcher::default()
        });
    }
}

/// crun-vm 0.3.0: libvirt's line through a script.
#[test]
fn crun_vm() {
    compare(&Launcher {
        line: "--fd=25 --shared-dir %share --cache always --sandbox chroot",
        fd: Some(25),
        script: Some("%program --modcaps=-mknod:-setfcap \"$@\"\n"),
        endings: &[Ending::Vmm],
        ..Launcher::default()
    });
}

/// Cloud Hypervisor's manual.
#[test]
fn cloud_hypervisor() {
    compare(&Launcher {
        line: "--log-level error --seccomp none --cache=never --socket-path=%socket \
               --shared-dir=%share --thread-pool-size=4",
        wait: Wait::Socket,
        vmm: Profile::CloudHypervisor,
        ..Launcher::default()
    });
}

/// Lima 2.2.0: as an ordinary user.
#[test]
fn lima() {
    let mut programs = vec![Program::persona()];
    programs.extend(Program::virtiofsd());
    for program in programs {
        let version = program.command().arg("--version").output().unwrap();
        assert_eq!(version.status.code(), Some(0));
    }
    for user in [None, Some(testing::USER)] {
        compare(&Launcher {
            line: "--socket-path %socket --shared-dir %share",
            wait: Wait::Socket,
            user,
            ..Launcher::default()
        });
    }
}

/// The modes of the socket and the PID file don't depend on the umask.
#[test]
fn files_have_the_same_modes_with_any_umask() {
    for umask in [0, 0o002, 0o077, 0o777] {
        for line in [
            "--socket-path %socket --shared-dir %share",
            "--socket-path %socket --shared-dir %share --socket-group=daemon",
        ] {
            compare(&Launcher {
                line,
                wait: LISTENING,
                umask,
                endings: &[Ending::Vmm],
                ..Launcher::default()
            });
        }
    }
}
