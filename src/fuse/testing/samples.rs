//! A valid request for each opcode.

use zerocopy::IntoBytes;

use super::{HANDLE, init_of, on_root};
use crate::fuse::abi::{self, InitFlags, Opcode};

/// One valid request for each supported opcode, on the root.
pub(in crate::fuse) fn samples() -> Vec<(Opcode, Vec<u8>)> {
    let fh = HANDLE.0;
    let sample = |opcode, arguments: &[&[u8]]| (opcode, on_root(opcode, arguments));
    let read = abi::ReadIn {
        fh,
        size: 64,
        ..Default::default()
    };
    let copy = abi::CopyFileRangeIn {
        fh_in: fh,
        nodeid_out: 1,
        fh_out: fh,
        len: 4,
        ..Default::default()
    };
    let rename2 = abi::Rename2In {
        newdir: 1,
        flags: 1,
        padding: 0,
    };
    let forget_one = abi::ForgetOne {
        nodeid: 100,
        nlookup: 1,
    };
    let seek = abi::LseekIn {
        fh,
        whence: 3,
        ..Default::default()
    };
    let lock = abi::LkIn {
        fh,
        ..Default::default()
    };
    let write = abi::WriteIn {
        fh,
        size: 4,
        ..Default::default()
    };
    vec![
        (Opcode::Init, init_of(7, 41, InitFlags::INIT_EXT)),
        sample(
            Opcode::Interrupt,
            &[abi::InterruptIn { unique: 3 }.as_bytes()],
        ),
        sample(Opcode::Lookup, &[b"name\0"]),
        sample(Opcode::Forget, &[abi::ForgetIn { nlookup: 1 }.as_bytes()]),
        sample(
            Opcode::BatchForget,
            &[
                abi::BatchForgetIn { count: 2, dummy: 0 }.as_bytes(),
                forget_one.as_bytes(),
                forget_one.as_bytes(),
            ],
        ),
        sample(Opcode::Getattr, &[abi::GetattrIn::default().as_bytes()]),
        sample(Opcode::Setattr, &[abi::SetattrIn::default().as_bytes()]),
        sample(Opcode::Readlink, &[]),
        sample(Opcode::Symlink, &[b"name\0", b"target\0"]),
        sample(
            Opcode::Mknod,
            &[abi::MknodIn::default().as_bytes(), b"node\0"],
        ),
        sample(
            Opcode::Mkdir,
            &[abi::MkdirIn::default().as_bytes(), b"directory\0"],
        ),
        sample(Opcode::Unlink, &[b"name\0"]),
        sample(Opcode::Rmdir, &[b"name\0"]),
        sample(
            Opcode::Rename,
            &[abi::RenameIn { newdir: 1 }.as_bytes(), b"from\0", b"to\0"],
        ),
        sample(Opcode::Rename2, &[rename2.as_bytes(), b"from\0", b"to\0"]),
        sample(
            Opcode::Link,
            &[abi::LinkIn { oldnodeid: 9 }.as_bytes(), b"link\0"],
        ),
        sample(Opcode::Open, &[abi::OpenIn::default().as_bytes()]),
        sample(Opcode::Opendir, &[abi::OpenIn::default().as_bytes()]),
        sample(
            Opcode::Create,
            &[abi::CreateIn::default().as_bytes(), b"created\0"],
        ),
        sample(Opcode::Read, &[read.as_bytes()]),
        sample(Opcode::Write, &[write.as_bytes(), b"data"]),
        sample(Opcode::Readdir, &[read.as_bytes()]),
        sample(Opcode::Readdirplus, &[read.as_bytes()]),
        sample(Opcode::Statfs, &[]),
        sample(
            Opcode::Release,
            &[abi::ReleaseIn {
                fh,
                ..Default::default()
            }
            .as_bytes()],
        ),
        sample(
            Opcode::Releasedir,
            &[abi::ReleaseIn {
                fh,
                ..Default::default()
            }
            .as_bytes()],
        ),
        sample(
            Opcode::Flush,
            &[abi::FlushIn {
                fh,
                ..Default::default()
            }
            .as_bytes()],
        ),
        sample(Opcode::Statx, &[abi::StatxIn::default().as_bytes()]),
        sample(
            Opcode::Tmpfile,
            &[abi::CreateIn::default().as_bytes(), b"/\0"],
        ),
        sample(Opcode::Syncfs, &[abi::SyncfsIn::default().as_bytes()]),
        sample(Opcode::Ioctl, &[abi::IoctlIn::default().as_bytes()]),
        sample(Opcode::Getlk, &[lock.as_bytes()]),
        sample(Opcode::Setlk, &[lock.as_bytes()]),
        sample(Opcode::Setlkw, &[lock.as_bytes()]),
        sample(
            Opcode::Fsync,
            &[abi::FsyncIn {
                fh,
                ..Default::default()
            }
            .as_bytes()],
        ),
        sample(
            Opcode::Fsyncdir,
            &[abi::FsyncIn {
                fh,
                ..Default::default()
            }
            .as_bytes()],
        ),
        sample(
            Opcode::Setxattr,
            &[
                abi::SetxattrIn { size: 5, flags: 0 }.as_bytes(),
                b"user.a\0",
                b"value",
            ],
        ),
        sample(
            Opcode::Getxattr,
            &[abi::GetxattrIn::default().as_bytes(), b"user.a\0"],
        ),
        sample(Opcode::Listxattr, &[abi::GetxattrIn::default().as_bytes()]),
        sample(Opcode::Removexattr, &[b"user.a\0"]),
        sample(
            Opcode::Access,
            &[abi::AccessIn {
                mask: 4,
                padding: 0,
            }
            .as_bytes()],
        ),
        sample(
            Opcode::Fallocate,
            &[abi::FallocateIn {
                fh,
                length: 8,
                ..Default::default()
            }
            .as_bytes()],
        ),
        sample(Opcode::Lseek, &[seek.as_bytes()]),
        sample(Opcode::CopyFileRange, &[copy.as_bytes()]),
        sample(Opcode::CopyFileRange64, &[copy.as_bytes()]),
        sample(
            Opcode::Setupmapping,
            &[abi::SetupmappingIn {
                fh: u64::MAX,
                flags: abi::setupmapping_flags::READ,
                len: 0x20_0000,
                ..Default::default()
            }
            .as_bytes()],
        ),
        sample(
            Opcode::Removemapping,
            &[
                abi::RemovemappingIn { count: 1 }.as_bytes(),
                abi::RemovemappingOne {
                    moffset: 0,
                    len: 0x20_0000,
                }
                .as_bytes(),
            ],
        ),
        sample(Opcode::Destroy, &[]),
    ]
}
