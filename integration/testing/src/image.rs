//! File systems in files, mounted in a mount namespace of the process that uses them.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes a file system of `size` bytes in the file `image` of `dir`, by the program and arguments
/// `mkfs`.
///
/// # Errors
///
/// The program can't be run, or fails: the error has its output.
///
/// # Panics
///
/// If the file can't be created.
pub fn make_image(dir: &Path, mkfs: &[&str], size: u64) -> io::Result<()> {
    let image = dir.join("image");
    std::fs::File::create(&image)
        .and_then(|file| file.set_len(size))
        .unwrap();
    let made = Command::new(mkfs[0])
        .args(&mkfs[1..])
        .arg(&image)
        .output()?;
    if made.status.success() {
        Ok(())
    } else {
        let reason = String::from_utf8_lossy(&made.stderr);
        Err(io::Error::other(format!("{}: {reason}", mkfs[0])))
    }
}

/// A shell that runs `script` in a mount namespace of its own, where the image in `dir` is mounted
/// at `mnt`, a directory of `dir`, as a file system of the type `kind` and with the mount options
/// `options`. In the script `$0` is `dir`, and the arguments that are added follow.
///
/// # Panics
///
/// If the directory can't be made.
#[must_use]
pub fn in_mounted_image(dir: &Path, kind: &str, options: &str, script: &str) -> Command {
    std::fs::create_dir_all(dir.join("mnt")).unwrap();
    let script =
        format!("mount -n -t {kind} -o loop,{options} \"$0/image\" \"$0/mnt\" && {script}");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).arg(dir);
    command.stdin(Stdio::null()).env_remove("RINGFSD_LOG");
    command
}
