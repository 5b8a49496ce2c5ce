//! Requests for open files: data, ranges and locks.

use vmm::fuse::wire::{CopyFileRangeIn, FileLock, IoctlIn, WriteIn, fopen, opcode, request_flag};
use vmm::fuse::{Call, Handle};
use zerocopy::IntoBytes;

use super::{Observer, USER};

impl Observer {
    fn open(&mut self, what: &str, node: u64, flags: i32) -> Option<Handle> {
        let handle = self.fs.open(node, flags);
        let opened = handle.as_ref().ok().copied();
        self.see(&format!("OPEN {what}"), handle, |handle| {
            // The guest may leave out FLUSH, which virtiofsd never says.
            format!("flags {:#x}", handle.open_flags & !fopen::NOFLUSH)
        });
        opened
    }

    pub(super) fn data(&mut self) {
        let file = self.lookup(c"file");
        let root = self.root;
        for (what, flags) in [
            ("to read", libc::O_RDONLY),
            ("to write", libc::O_WRONLY),
            ("to append", libc::O_WRONLY | libc::O_APPEND),
            ("with O_NOATIME", libc::O_RDONLY | libc::O_NOATIME),
            ("with O_SYNC", libc::O_RDWR | libc::O_SYNC),
        ] {
            if let Some(handle) = self.open(what, file, flags) {
                let read = self.fs.read(file, handle, 0, 9);
                self.see(&format!("READ {what}"), read, |bytes| format!("{bytes:?}"));
                let written = self.fs.write(file, handle, 5, b" !");
                self.see(&format!("WRITE {what}"), written, |len| len.to_string());
                let flushed = self.fs.flush(file, handle);
                self.done(&format!("FLUSH {what}"), flushed);
                let released = self.fs.release(file, handle);
                self.done(&format!("RELEASE {what}"), released);
            }
        }
        self.open("of a directory", root, libc::O_RDONLY);
        let link = self.lookup(c"link");
        self.open("of a link", link, libc::O_RDONLY);
        let wrong = self.fs.read(file, Handle::raw(1 << 40), 0, 9);
        self.see("READ without a handle", wrong, |bytes| format!("{bytes:?}"));
        let sparse = self.lookup(c"sparse");
        if let Some(handle) = self.open("with O_DIRECT", sparse, libc::O_RDWR | libc::O_DIRECT) {
            for len in [4096, 5] {
                let read = self.fs.read(sparse, handle, 0, len);
                let what = format!("READ {len} with O_DIRECT");
                self.see(&what, read, |bytes| bytes.len().to_string());
            }
        }
        if let Some(handle) = self.open("of a sparse file", sparse, libc::O_RDWR) {
            self.ranges(sparse, handle);
            let synced = self.fs.fsync(sparse, handle, true);
            self.done("FSYNC", synced);
        }
        let program = self.lookup(c"program");
        let truncating = libc::O_WRONLY | libc::O_TRUNC;
        if let Some(handle) = self.open("of a set-ID program", program, truncating) {
            let mode = self.fs.getattr(program);
            self.see_attr("GETATTR of the truncated program", mode);
            let _ = self.fs.chmod(program, 0o6755);
            self.fs.act_as(USER, USER);
            let asked = WriteIn {
                fh: handle.fh,
                size: 2,
                write_flags: request_flag::WRITE_KILL_SUIDGID,
                ..WriteIn::default()
            };
            let call = Call::new(opcode::WRITE, program).arg(asked.as_bytes());
            let written = self.fs.request(call.arg(b"#!").reply(8));
            self.done("WRITE with KILL_SUIDGID", written);
            self.fs.act_as(0, 0);
            let mode = self.fs.getattr(program);
            self.see_attr("GETATTR of the written program", mode);
        }
    }

    fn ranges(&mut self, node: u64, handle: Handle) {
        for (name, whence) in [
            ("SEEK_SET", libc::SEEK_SET),
            ("SEEK_END", libc::SEEK_END),
            ("SEEK_DATA", libc::SEEK_DATA),
            ("SEEK_HOLE", libc::SEEK_HOLE),
            ("of another kind", 77),
        ] {
            let found = self.fs.lseek(node, handle, 0, whence);
            self.see(&format!("LSEEK {name}"), found, |at| at.to_string());
        }
        let found = self.fs.lseek(node, handle, 1 << 30, libc::SEEK_DATA);
        self.see("LSEEK past the end", found, |at| at.to_string());
        for (name, mode) in [
            ("", 0),
            (" KEEP_SIZE", libc::FALLOC_FL_KEEP_SIZE),
            (
                " PUNCH_HOLE",
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            ),
            (" ZERO_RANGE", libc::FALLOC_FL_ZERO_RANGE),
            (" COLLAPSE_RANGE", libc::FALLOC_FL_COLLAPSE_RANGE),
            (" of another kind", 1 << 20),
        ] {
            let end = if name.is_empty() { 2 << 20 } else { 8192 };
            let result = self.fs.fallocate(node, handle, mode, 4096..end);
            self.done(&format!("FALLOCATE{name}"), result);
        }
        let asked = CopyFileRangeIn {
            fh_in: handle.fh,
            nodeid_out: node,
            fh_out: handle.fh,
            off_out: 65536,
            len: 4096,
            ..CopyFileRangeIn::default()
        };
        let copied = self.fs.copy_file_range(node, &asked);
        self.see("COPY_FILE_RANGE", copied, |len| len.to_string());
        let copied = self.fs.copy_file_range_64(node, &asked);
        self.see("COPY_FILE_RANGE_64", copied, |len| len.to_string());
        let overlapping = CopyFileRangeIn {
            off_out: 1,
            ..asked
        };
        let copied = self.fs.copy_file_range(node, &overlapping);
        self.see("COPY_FILE_RANGE onto itself", copied, |len| len.to_string());
        let lock = FileLock {
            start: 0,
            end: 9,
            r#type: libc::F_WRLCK.cast_unsigned(),
            pid: 1,
        };
        let conflicting = self.fs.getlk(node, handle, 1, lock);
        self.done("GETLK", conflicting);
        let locked = self.fs.setlk(node, handle, 1, lock);
        self.done("SETLK", locked);
        let waiting = self.fs.submit_setlkw(node, handle, 1, lock).unwrap();
        let locked = self.fs.collect(waiting);
        self.done("SETLKW", locked);
        let asked = IoctlIn {
            fh: handle.fh,
            // FS_IOC_GETFLAGS
            cmd: 0x8008_6601,
            out_size: 8,
            ..IoctlIn::default()
        };
        let call = Call::new(opcode::IOCTL, node).arg(asked.as_bytes());
        let result = self.fs.request(call.reply(24));
        self.done("IOCTL", result);
    }
}
