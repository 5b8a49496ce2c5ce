//! Plays a front end to a server and prints what it sees:
//! `session PROFILE SOCKET [REQUEST-QUEUES]`.

use std::error::Error;
use std::process::ExitCode;

use vmm::fuse::{Client, Layout, ROOT};
use vmm::{Options, Profile};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (Some(profile), Some(path)) = (args.next(), args.next()) else {
        eprintln!("usage: session PROFILE SOCKET [REQUEST-QUEUES]");
        return ExitCode::from(2);
    };
    let known = Profile::ALL
        .into_iter()
        .find(|known| format!("{known:?}").eq_ignore_ascii_case(&profile));
    let Some(known) = known else {
        eprintln!("no profile {profile}; there are {:?}", Profile::ALL);
        return ExitCode::from(2);
    };
    let mut options = Options::default();
    if let Some(queues) = args.next().and_then(|queues| queues.parse().ok()) {
        options = options.request_queues(queues);
    }
    match run(known, &path, &options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", vmm::error_chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(profile: Profile, path: &str, options: &Options) -> Result<(), Box<dyn Error>> {
    let mut vm = profile.connect_path(path, options)?;
    println!("features {:#x}", vm.features);
    println!("protocol features {:#x}", vm.connection.protocol_features());
    println!("queues {} of {}", vm.queues.len(), vm.queues[0].size());
    if let Some(config) = &vm.config {
        let tag = String::from_utf8_lossy(config.tag());
        println!("tag {tag:?}, {} request queues", config.num_request_queues);
    }

    let mut fs = Client::new(&mut vm);
    let init = fs.init()?;
    println!(
        "INIT 7.{} flags {:#x} max_write {}",
        init.minor, init.flags, init.max_write
    );
    let root = fs.getattr(ROOT)?;
    println!(
        "GETATTR root inode {} mode {:o}",
        root.attr.ino, root.attr.mode
    );

    let (file, handle) = fs.create(ROOT, c"ringfsd-vmm-example", 0o644)?;
    println!("CREATE nodeid {} handle {}", file.nodeid, handle.fh);
    let bytes: Vec<u8> = (0..=250).cycle().take(100_000).collect();
    println!("WRITE {}", fs.write(file.nodeid, handle, 0, &bytes)?);
    let same = fs.read(file.nodeid, handle, 0, 100_000)? == bytes;
    println!("READ the same: {same}");
    fs.set_layout(Layout::odd(&[1, 15, 333]));
    let part = fs.read(file.nodeid, handle, 50_000, 100_000)?;
    println!("READ past the end {} bytes", part.len());
    fs.set_layout(Layout::linux());
    let reads: Result<Vec<_>, _> = (0..8)
        .map(|i| fs.submit_read(file.nodeid, handle, i * 8192, 8192))
        .collect();
    let mut lens = Vec::new();
    for pending in reads? {
        lens.push(fs.collect(pending)?.bytes.len());
    }
    println!("READ 8 at once {lens:?}");
    fs.release(file.nodeid, handle)?;

    let found = fs.lookup(ROOT, c"ringfsd-vmm-example")?;
    println!("LOOKUP nodeid {} size {}", found.nodeid, found.attr.size);
    let handle = fs.open(found.nodeid, libc::O_RDONLY)?;
    println!("OPEN handle {} flags {:#x}", handle.fh, handle.open_flags);
    fs.release(found.nodeid, handle)?;
    match fs.lookup(ROOT, c"there is no such name") {
        Err(error) => println!("LOOKUP of nothing: {error}"),
        Ok(entry) => println!("LOOKUP of nothing: nodeid {}", entry.nodeid),
    }

    let handle = fs.opendir(ROOT)?;
    for plus in fs.readdirplus_all(ROOT, handle)? {
        let name = plus.entry.name.display();
        println!("READDIRPLUS {name} nodeid {}", plus.node.nodeid);
    }
    fs.releasedir(ROOT, handle)?;
    fs.forget(found.nodeid, 1)?;
    fs.unlink(ROOT, c"ringfsd-vmm-example")?;
    println!("STATFS {} free blocks", fs.statfs(ROOT)?.bfree);
    println!("rings stop at {:?}", vm.stop()?);
    Ok(())
}
