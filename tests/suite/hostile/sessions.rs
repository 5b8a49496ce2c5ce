//! INIT and DESTROY: twice, never, wrong, and in the middle of everything else.

use testing::{Server, each_runtime};
use vmm::fuse::ROOT;
use vmm::fuse::wire::{InitIn, InitOut, OpenIn, OpenOut, opcode};
use vmm::fuse::{Call, Client};
use vmm::{Options, Profile};
use zerocopy::IntoBytes;

use super::scene::{Back, Scene, memory, request};

fn init(major: u32, minor: u32) -> Vec<u8> {
    let init = InitIn {
        major,
        minor,
        max_readahead: 1 << 17,
        flags: !(1 << 31),
        flags2: u32::MAX,
        unused: [u32::MAX; 11],
    };
    request(opcode::INIT, 0, init.as_bytes())
}

#[each_runtime]
fn only_init_and_destroy_change_fuse_session(runtime: &str) {
    let mut scene = Scene::new(runtime);
    let agreed = Back::Reply(size_of::<InitOut>() as u32);
    let getattr = request(opcode::GETATTR, ROOT, &[0; 16]);
    let destroy = request(opcode::DESTROY, 0, &[]);
    let eio = Back::Errno(libc::EIO);
    // After DESTROY there is no session, however often it is said.
    for _ in 0..2 {
        assert_eq!(scene.request(&destroy), Back::Reply(0));
        for (number, args) in [
            (opcode::GETATTR, &[0; 16][..]),
            (opcode::LOOKUP, b"file\0"),
            (opcode::STATFS, b""),
            (opcode::OPENDIR, &[0; 8]),
            (opcode::CREATE, b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0new\0"),
        ] {
            assert_eq!(scene.request(&request(number, ROOT, args)), eio, "{number}");
        }
        let forget = request(opcode::FORGET, ROOT, &[0xff; 8]);
        assert_eq!(scene.request(&forget), Back::Empty);
    }
    assert!(!scene.server.share().join("new").exists());
    // INITs that can't be leave it so.
    for (name, bytes, back) in [
        ("major 6", init(6, 45), Back::Errno(libc::EPROTO)),
        ("major 0", init(0, 0), Back::Errno(libc::EPROTO)),
        ("minor 0", init(7, 0), Back::Errno(libc::EPROTO)),
        (
            "cut short",
            request(opcode::INIT, 0, &[7, 0, 0, 0]),
            Back::Errno(libc::EINVAL),
        ),
        (
            "without arguments",
            request(opcode::INIT, 0, &[]),
            Back::Errno(libc::EINVAL),
        ),
        ("a newer major", init(8, 0), agreed),
        ("major 2^32 - 1", init(u32::MAX, 0), agreed),
    ] {
        assert_eq!(scene.request(&bytes), back, "{name}");
        assert_eq!(scene.request(&getattr), eio, "after {name}");
    }
    assert_eq!(
        scene.request_with_room(&init(7, 45), 79),
        Back::Errno(libc::EINVAL)
    );
    assert_eq!(scene.request(&getattr), eio);
    // Twice is a new guest: what the old one had is gone.
    assert_eq!(scene.request(&init(7, 45)), agreed);
    let file = scene.fs.lookup(ROOT, c"file").unwrap();
    let handle = scene.fs.open(file.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(scene.request(&init(7, u32::MAX)), agreed);
    let stale = scene.fs.open(file.nodeid, libc::O_RDONLY).unwrap_err();
    assert_eq!(stale.errno(), Some(libc::ESTALE));
    let closed = scene.fs.read(file.nodeid, handle, 0, 1).unwrap_err();
    assert_eq!(closed.errno(), Some(libc::EBADF));
    scene.is_well("INIT and DESTROY");
    never(runtime);
}

/// A session without INIT at all.
fn never(runtime: &str) {
    let mut server = Server::start(&["--runtime", runtime]);
    let session = Profile::Simple
        .connect(server.connect(), &memory())
        .unwrap();
    let mut fs = Client::new(session);
    for _ in 0..100 {
        assert_eq!(fs.getattr(ROOT).unwrap_err().errno(), Some(libc::EIO));
    }
    drop(fs);
    server.wait_until_it_listens();
}

/// INIT on one queue while others open a file: what of these comes before is gone with the old
/// session, what comes after doesn't know the file. Nothing is in between.
#[each_runtime]
fn repeated_init_resets_session_during_requests(runtime: &str) {
    let args = [
        "--runtime",
        runtime,
        "--request-queues",
        "3",
        "--workers",
        "3",
    ];
    let server = Server::start(&args);
    std::fs::write(server.share().join("file"), "content").unwrap();
    let options = Options::default().request_queues(3);
    let mut fs = server.session(Profile::Simple, &options);
    let open = OpenIn::default();
    let mut opened = 0;
    for round in 0..300 {
        let file = fs.lookup(ROOT, c"file").unwrap();
        let pending: Vec<_> = (0..64)
            .map(|at| {
                let call = Call::new(opcode::OPEN, file.nodeid).arg(open.as_bytes());
                let call = call.reply_of::<OpenOut>().on_queue(2 + at % 2);
                fs.submit(call).unwrap()
            })
            .collect();
        fs.use_queue(1);
        fs.init().unwrap();
        for open in pending {
            match fs.collect(open) {
                Ok(_) => opened += 1,
                Err(error) => assert_eq!(error.errno(), Some(libc::ESTALE)),
            }
        }
        assert_eq!(server.descriptors_of("file"), 0, "round {round}");
    }
    assert!(opened > 0, "none came before INIT");
    fs.getattr(ROOT).unwrap();
}
