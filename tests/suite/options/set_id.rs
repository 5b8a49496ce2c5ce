//! Set-ID bits of files that are changed, with `--killpriv-v2` and without.

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
    assert_eq!(agreed(&[], offered), 0);
    let server = Server::start(&["--killpriv-v2"]);
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
fn change_without_kill_flag_clears_set_id_bits() {
    for (args, left) in [(&[][..], 0o6777), (&["--killpriv-v2"], 0o777)] {
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
