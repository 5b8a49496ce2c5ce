//! Images for the tests: a directory of all that a file system can have, and an image of it.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use testing::{is_root, pattern};

/// Bytes of the largest file: several chunks, the last one not full.
pub(super) const LARGE: usize = 3 * (1 << 20) + 12345;

/// A directory, and an image of it.
pub(super) struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    /// Makes an image with these arguments of a directory that `fill` fills.
    pub(super) fn of(fill: impl Fn(&Path), arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = Self { dir };
        fs::create_dir(image.source()).unwrap();
        fill(&image.source());
        let status = Command::new(builder())
            .args([image.source(), image.dir.path().join("image")])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        fs::create_dir(image.cache()).unwrap();
        image
    }

    pub(super) fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    pub(super) fn bootstrap(&self) -> PathBuf {
        self.dir.path().join("image/bootstrap")
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.dir.path().join("image/blobs")
    }

    pub(super) fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// The only blob.
    pub(super) fn blob(&self) -> PathBuf {
        let mut blobs = fs::read_dir(self.blobs()).unwrap();
        let blob = blobs.next().unwrap().unwrap().path();
        assert!(blobs.next().is_none());
        blob
    }

    /// The file that the cache keeps the blob's data in.
    pub(super) fn cached(&self) -> PathBuf {
        let mut name = self.blob().file_name().unwrap().to_os_string();
        name.push(".blob.data");
        self.cache().join(name)
    }
}

/// Inverts one byte of a file in each `step` bytes of `range`.
pub(super) fn damage(path: &Path, range: std::ops::Range<u64>, step: usize) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    for at in range.step_by(step) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[!byte[0]], at).unwrap();
    }
}

/// The program that makes images, which is built when it is first needed.
fn builder() -> &'static Path {
    static BUILDER: OnceLock<PathBuf> = OnceLock::new();
    BUILDER.get_or_init(|| {
        let target = testing::program().ancestors().nth(2).unwrap();
        let manifest =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/rafs-image/Cargo.toml");
        let status = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
            .args(["build", "--quiet", "--locked", "--manifest-path"])
            .arg(manifest)
            .arg("--target-dir")
            .arg(target)
            .status()
            .unwrap();
        assert!(status.success());
        target.join("debug/ringfsd-rafs-image")
    })
}

/// Fills a directory with files of each kind.
pub(super) fn everything(dir: &Path) {
    let at = |name: &str| dir.join(name);
    fs::write(at("small"), "hello\n").unwrap();
    fs::hard_link(at("small"), at("linked")).unwrap();
    fs::write(at("empty"), "").unwrap();
    fs::write(at("large"), pattern(LARGE, 1)).unwrap();
    // Chunks that several files have are stored once.
    fs::write(at("same"), pattern(2 << 20, 1)).unwrap();
    fs::write(at("text"), b"a line of text\n".repeat(100_000)).unwrap();
    let sparse = fs::File::create(at("sparse")).unwrap();
    sparse.write_all_at(b"data", 1_500_000).unwrap();
    sparse.set_len(4 << 20).unwrap();
    symlink("small", at("link")).unwrap();
    symlink("x/".repeat(1500), at("long link")).unwrap();
    fs::create_dir_all(at("deep/1/2/3/4/5/6/7/8")).unwrap();
    fs::write(at("deep/1/2/3/4/5/6/7/8/file"), "deep").unwrap();
    fs::create_dir(at("empty dir")).unwrap();
    fs::create_dir(at("many")).unwrap();
    for number in 0..2000 {
        fs::write(at(&format!("many/{number}")), format!("{number}")).unwrap();
    }
    for name in [" ", "-", "\n", "ü", "a\\b", "..."] {
        fs::write(at(name), name).unwrap();
    }
    fs::write(dir.join(std::ffi::OsStr::from_bytes(b"\xff\x01")), "").unwrap();
    fs::write(at(&"n".repeat(255)), "longest").unwrap();
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let value = [7_u8; 1000];
    for (name, value) in [("user.long", &value[..]), ("user.empty", &[])] {
        rustix::fs::setxattr(at("small"), name, value, XattrFlags::empty()).unwrap();
    }
    for (name, mode) in [("small", 0o4751), ("deep", 0o1777), ("text", 0)] {
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    if is_root() {
        let device = rustix::fs::makedev(259, 70000);
        rustix::fs::mknodat(CWD, at("block"), FileType::BlockDevice, Mode::RUSR, device).unwrap();
        let device = rustix::fs::makedev(5, 1);
        rustix::fs::mknodat(
            CWD,
            at("char"),
            FileType::CharacterDevice,
            Mode::RUSR,
            device,
        )
        .unwrap();
        chown(at("large"), Some(1000), Some(70000)).unwrap();
    }
    let old = Timespec {
        tv_sec: 981_173_106,
        tv_nsec: 789_000_001,
    };
    let times = Timestamps {
        last_access: old,
        last_modification: old,
    };
    for name in ["large", "deep", "link"] {
        rustix::fs::utimensat(CWD, at(name), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}
