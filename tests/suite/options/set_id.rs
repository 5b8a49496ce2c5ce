//! Set-ID bits and capabilities of files that are changed, with `--killpriv-v2`, which is the default,
//! and without.

use ringfsd::io::Engine;
use testing::Server;
use vmm::Session;
use vmm::fuse::wire::{
    CopyFileRangeIn, OpenIn, OpenOut, SetattrIn, WriteIn, WriteOut, init, opcode, request_flag,
    setattr,
};
use vmm::fuse::{Call, Client, LINUX_OFFERS, ROOT};
use zerocopy::IntoBytes;

use super::{agreed, session};

/// A guest that tells who asks, whatever it asks for.
const BEFORE_6_12: u64 = LINUX_OFFERS & !init::ALLOW_IDMAP;

#[test]
fn write_with_kill_flag_clears_set_id_bits() {
    let offered = init::HANDLE_KILLPRIV_V2;
    for (args, flag) in [
        (&[][..], offered),
        (&["--writeback"], offered),
        (&["--no-killpriv-v2"], 0),
        (&["--no-xattr"], 0),
        (&["--no-xattr", "--killpriv-v2"], offered),
        (&["--xattrmap", ":map::user.guest.:"], 0),
    ] {
        assert_eq!(agreed(args, offered), flag, "{args:?}");
    }
    let server = Server::start(&[]);
    let mut fs = session(&server);
    fs.init_offering(BEFORE_6_12).unwrap();
    assert!(fs.has(offered));
    let (file, handle) = fs.create(ROOT, c"file", 0o755).unwrap();
    let node = file.nodeid;
    let mode = |fs: &mut Client<Session>| fs.getattr(node).unwrap().attr.mode & 0o7777;

    // A superuser's write keeps them, unless the guest says that it is none.
    for (flags, left) in [(0, 0o6777), (request_flag::WRITE_KILL_SUIDGID, 0o777)] {
        fs.chmod(node, 0o6777).unwrap();
        let asked = WriteIn {
            fh: handle.fh,
            size: 4,
            write_flags: flags,
            ..WriteIn::default()
        };
        let call = Call::new(opcode::WRITE, node).arg(asked.as_bytes());
        fs.request(call.arg(b"data").reply_of::<WriteOut>())
            .unwrap();
        assert_eq!(mode(&mut fs), left);
    }
    // Without group execution the bit means something else.
    fs.chmod(node, 0o6767).unwrap();
    let asked = WriteIn {
        fh: handle.fh,
        size: 4,
        write_flags: request_flag::WRITE_KILL_SUIDGID,
        ..WriteIn::default()
    };
    let call = Call::new(opcode::WRITE, node).arg(asked.as_bytes());
    fs.request(call.arg(b"data").reply_of::<WriteOut>())
        .unwrap();
    assert_eq!(mode(&mut fs), 0o2767);

    for (flag, left) in [(0, 0o6777), (setattr::KILL_SUIDGID, 0o777)] {
        fs.chmod(node, 0o6777).unwrap();
        let asked = SetattrIn {
            valid: setattr::SIZE | flag,
            size: 1,
            ..SetattrIn::default()
        };
        fs.setattr(node, &asked).unwrap();
        assert_eq!(mode(&mut fs), left);
    }
    for (open_flags, left) in [(0, 0o6777), (request_flag::OPEN_KILL_SUIDGID, 0o777)] {
        fs.chmod(node, 0o6777).unwrap();
        let asked = OpenIn {
            flags: (libc::O_WRONLY | libc::O_TRUNC).cast_unsigned(),
            open_flags,
        };
        let call = Call::new(opcode::OPEN, node).arg(asked.as_bytes());
        fs.request(call.reply_of::<OpenOut>()).unwrap();
        assert_eq!(mode(&mut fs), left);
    }
}

#[test]
fn fallocate_and_copy_by_user_clear_set_id_bits() {
    for (args, left) in [(&["--no-killpriv-v2"][..], 0o6777), (&[], 0o777)] {
        let server = Server::start(args);
        let mut fs = session(&server);
        fs.init_offering(BEFORE_6_12).unwrap();
        let (file, handle) = fs.create(ROOT, c"file", 0o755).unwrap();
        let node = file.nodeid;
        fs.write(node, handle, 0, b"data").unwrap();
        let copy = CopyFileRangeIn {
            fh_in: handle.fh,
            nodeid_out: node,
            fh_out: handle.fh,
            off_out: 4,
            len: 4,
            ..CopyFileRangeIn::default()
        };
        for (uid, left) in [(0, 0o6777), (1000, left)] {
            let mode = |fs: &mut Client<Session>| fs.getattr(node).unwrap().attr.mode & 0o7777;
            fs.chmod(node, 0o6777).unwrap();
            fs.act_as(uid, uid);
            fs.fallocate(node, handle, 0, 0..100).unwrap();
            assert_eq!(mode(&mut fs), left, "{args:?} {uid}");
            fs.act_as(0, 0);
            fs.chmod(node, 0o6777).unwrap();
            fs.act_as(uid, uid);
            assert_eq!(fs.copy_file_range(node, &copy).unwrap(), 4);
            assert_eq!(mode(&mut fs), left, "{args:?} {uid}");
        }
    }
}

/// What Linux sends before a write, an allocation or a copy by a caller that may not keep the bits.
#[test]
fn empty_setattr_clears_set_id_bits() {
    for (args, left) in [(&["--no-killpriv-v2"][..], 0o6777), (&[], 0o777)] {
        let server = Server::start(args);
        let mut fs = session(&server);
        let (file, handle) = fs.create(ROOT, c"file", 0o755).unwrap();
        let node = file.nodeid;
        fs.chmod(node, 0o6777).unwrap();
        let by_handle = SetattrIn {
            valid: setattr::FH,
            fh: handle.fh,
            ..SetattrIn::default()
        };
        for asked in [SetattrIn::default(), by_handle] {
            fs.chmod(node, 0o6777).unwrap();
            let changed = fs.setattr(node, &asked).unwrap();
            assert_eq!(changed.attr.mode & 0o7777, left, "{args:?}");
        }
        // A directory's bit means something else.
        let dir = fs.mkdir(ROOT, c"dir", 0o755).unwrap().nodeid;
        fs.chmod(dir, 0o2755).unwrap();
        let changed = fs.setattr(dir, &SetattrIn::default()).unwrap();
        assert_eq!(changed.attr.mode & 0o7777, 0o2755);
    }
}

/// Linux doesn't change the mode that it has cached when a WRITE clears the bits.
#[test]
fn attributes_with_set_id_bits_are_not_cached() {
    let server = Server::start(&["--cache", "always"]);
    let mut fs = session(&server);
    let (file, _) = fs.create(ROOT, c"file", 0o755).unwrap();
    let day = 86400;
    assert_eq!((file.entry_valid, file.attr_valid), (day, day));
    for (mode, seconds) in [
        (0o755, day),
        (0o4755, 0),
        (0o2755, 0),
        (0o2745, day),
        (0o4644, 0),
    ] {
        let changed = fs.chmod(file.nodeid, mode).unwrap();
        let read = fs.getattr(file.nodeid).unwrap();
        let found = fs.lookup(ROOT, c"file").unwrap();
        let times = [changed.attr_valid, read.attr_valid, found.attr_valid];
        assert_eq!(times, [seconds; 3], "{mode:o}");
        assert_eq!(found.entry_valid, day);
    }
    let dir = fs.mkdir(ROOT, c"dir", 0o755).unwrap().nodeid;
    assert_eq!(fs.chmod(dir, 0o2755).unwrap().attr_valid, day);
}

/// Linux asks for the attribute once for each file. If another guest, or the host, sets it later, the
/// host removes it.
#[test]
fn capabilities_go_with_every_change() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return;
    }
    const NAME: &std::ffi::CStr = c"security.capability";
    // Revision 2, effective: CAP_CHOWN, permitted.
    let mut value = [0; 20];
    value[..8].copy_from_slice(&[1, 0, 0, 2, 1, 0, 0, 0]);
    for runtime in Engine::ALL.iter().map(Engine::to_string) {
        for killpriv in ["--killpriv-v2", "--no-killpriv-v2"] {
            let server = Server::start(&["--runtime", &runtime, killpriv]);
            let mut fs = session(&server);
            let (file, handle) = fs.create(ROOT, c"file", 0o755).unwrap();
            let node = file.nodeid;
            fs.write(node, handle, 0, b"datadata").unwrap();
            let copy = CopyFileRangeIn {
                fh_in: handle.fh,
                nodeid_out: node,
                fh_out: handle.fh,
                off_out: 4,
                len: 4,
                ..CopyFileRangeIn::default()
            };
            for change in ["write", "truncate", "chown", "allocate", "copy"] {
                fs.setxattr(node, NAME, &value, 0).unwrap();
                assert_eq!(fs.getxattr(node, NAME).unwrap(), value);
                match change {
                    "write" => assert_eq!(fs.write(node, handle, 0, b"x").unwrap(), 1),
                    "truncate" => assert_eq!(fs.truncate(node, 8).unwrap().attr.size, 8),
                    "chown" => assert_eq!(fs.chown(node, 7, 7).unwrap().attr.uid, 7),
                    "allocate" => fs.fallocate(node, handle, 0, 0..100).unwrap(),
                    _ => assert_eq!(fs.copy_file_range(node, &copy).unwrap(), 4),
                }
                let left = fs.getxattr(node, NAME).unwrap_err().errno();
                assert_eq!(left, Some(libc::ENODATA), "{change}, {runtime}, {killpriv}");
            }
        }
    }
}
