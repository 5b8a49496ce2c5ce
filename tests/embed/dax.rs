//! A DAX window in the process of the VMM: the VMM maps what the device asks for.

use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ringfsd::embed::{
    BackChannel, BackChannelError, BackendRequest, DaxOptions, NamePatterns, Options,
    SessionOptions, VirtioFs,
};
use vmm::Window;
use vmm::fuse::wire::init;
use vmm::fuse::{Client, LINUX_OFFERS, ROOT};
use vmm::window::{Behaviour, Mapping};

use crate::guest::{Driver, engines, options, passthrough};

/// What a Linux guest maps at once.
const RANGE: u64 = 2 << 20;

/// The VMM's part: it maps into its window, without a message.
#[derive(Debug)]
struct Vmm(Arc<Window>);

impl BackChannel for Vmm {
    fn request(
        &self,
        request: BackendRequest,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), BackChannelError> {
        match (request, fd) {
            (BackendRequest::MapSharedMemory(asked), Some(fd)) => {
                assert_eq!(asked.region, 0);
                let mapping = Mapping {
                    len: asked.len,
                    file_offset: asked.file_offset,
                    writable: asked.writable,
                };
                self.0.map(asked.offset, mapping, fd)?;
            }
            (BackendRequest::UnmapSharedMemory(asked), None) => {
                self.0.unmap(asked.offset, asked.len)?;
            }
            other => panic!("{other:?}"),
        }
        Ok(())
    }
}

#[test]
fn guest_maps_files_into_the_window_of_its_vmm() {
    for engine in engines() {
        let share = tempfile::tempdir().unwrap();
        let path = share.path().join("file");
        let content: Vec<u8> = (0..=u8::MAX).cycle().take(3 << 20).collect();
        std::fs::write(&path, &content).unwrap();
        let window = Window::new(4 * RANGE, Behaviour::default()).unwrap();
        let dax = DaxOptions {
            window: 4 * RANGE,
            marked_from: 0,
            names: NamePatterns::default(),
            writable: true,
        };
        let options = Options {
            session: SessionOptions {
                dax: Some(dax),
                ..SessionOptions::default()
            },
            ..options(engine)
        };
        let mut device = VirtioFs::new(passthrough(share.path()), options).unwrap();
        device.connect(Arc::new(Vmm(Arc::clone(&window))));
        let driver = Driver::new();
        driver.activate(&mut device);
        let mut guest = Client::new(driver);
        let offers = LINUX_OFFERS | init::MAP_ALIGNMENT | init::HAS_INODE_DAX;
        guest.init_offering(offers).unwrap();
        let node = guest.lookup(ROOT, c"file").unwrap().nodeid;

        guest.setup_mapping(node, (0, RANGE), RANGE, true).unwrap();
        let mut bytes = vec![0; 4096];
        assert_eq!(window.read(RANGE + 8192, &mut bytes).unwrap(), 4096);
        assert_eq!(bytes, content[8192..12288]);
        assert_eq!(window.write(RANGE + 5, b"guest").unwrap(), 5);
        let file = std::fs::File::open(&path).unwrap();
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, 5).unwrap();
        assert_eq!(&bytes, b"guest");

        guest.setup_mapping(node, (0, RANGE), 0, false).unwrap();
        assert_eq!(window.mappings().len(), 2);
        guest.remove_mappings(node, &[(0, RANGE)]).unwrap();
        assert_eq!(window.mappings().into_keys().collect::<Vec<_>>(), [RANGE]);

        // What the guest leaves behind is removed.
        device.reset();
        drop(device);
        assert!(window.mappings().is_empty());
    }
}
