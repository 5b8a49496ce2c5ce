//! A migration stream from another server: any bytes, loaded into a file system and a session.
//!
//! What must hold: it is loaded as a whole or not at all; after it is saved again it describes the
//! same inodes; nothing outside of the shared directory is reached, and nothing is left behind.

use std::sync::Arc;

use ringfsd::fs::passthrough::{MigrationOptions, OnMigrationError, Options, Passthrough};
use ringfsd::internals::fuse::{Session, SessionOptions};
use ringfsd::internals::migration::stream;

use crate::count;
use crate::share::Share;

/// What is shared between inputs.
struct Scene {
    sessions: [Session<Passthrough>; 2],
    share: Share,
}

impl Scene {
    fn new() -> Self {
        let share = Share::new();
        let path = share.path();
        std::fs::create_dir_all(path.join("d/d")).expect("directories");
        for name in ["f", "d/f", "d/d/f", "d/link"] {
            std::fs::write(path.join(name), name).expect("a file");
        }
        std::os::unix::fs::symlink("..", path.join("d/up")).expect("a link");
        let session = |on_error| {
            let options = Options {
                migration: MigrationOptions {
                    on_error,
                    ..MigrationOptions::default()
                },
                ..Share::options()
            };
            let fs = Passthrough::new(&path, options).expect("a file system");
            Session::new(Arc::new(fs), SessionOptions::default())
        };
        let sessions = [OnMigrationError::Abort, OnMigrationError::GuestError].map(session);
        // Files as long as a state says shall fail.
        Share::limit_files();
        Self { sessions, share }
    }
}

/// One input: the bytes of a state but for its checksum.
pub fn run(data: &[u8]) {
    thread_local! {
        static SCENE: Scene = Scene::new();
    }
    count::add(1);
    // As it is, which is almost never a state; and as if it were one.
    let _ = stream::decode(data);
    let bytes = stream::sealed(data);
    let Ok(snapshot) = stream::decode(&bytes) else {
        return;
    };
    let again = stream::encode(&snapshot).expect("it was not too long");
    assert_eq!(stream::decode(&again).as_ref(), Ok(&snapshot));
    SCENE.with(|scene| {
        for session in &scene.sessions {
            let loaded = session.load(&bytes);
            let fs = session.file_system();
            if loaded.is_ok() {
                assert!(fs.known_inodes() <= snapshot.inodes.len() + 1);
                assert!(fs.open_handles() <= snapshot.opens.len());
                let saved = session.save().expect("it can be saved");
                stream::decode(&saved).expect("and be read");
            }
            session.reset();
            assert_eq!((fs.known_inodes(), fs.open_handles()), (1, 0));
        }
        let there = std::fs::read_dir(scene.share.path());
        assert_eq!(there.expect("the share").count(), 2, "nothing is left");
        scene.share.check_outside();
    });
}
