//! FUSE decoding: any bytes, with a request at each position.
//!
//! What must hold: no panic, and the result is what the room promises.

use ringfsd::internals::fuse::abi::InitFlags;
use ringfsd::internals::fuse::request::{HEADER_LEN, Operation, bytes_wanted, decode_as};

use crate::count;
use crate::source::Source;

/// One input: requests, each with its length before it and with a header that is made whole or
/// not.
pub fn run(data: &[u8]) {
    let mut source = Source::new(data);
    let mut requests = 0;
    let mut bytes = Vec::new();
    while !source.is_empty() {
        let how = source.u8();
        let opcode = source.u8();
        let len = usize::from(source.u16() & 0x3ff);
        let body = source.bytes(len);
        bytes.clear();
        if how & 1 == 0 {
            let told = match how & 6 {
                0 | 2 => HEADER_LEN + body.len(),
                4 => usize::from(how) << 3,
                _ => usize::MAX & 0xffff_ffff,
            };
            bytes.extend_from_slice(&u32::try_from(told).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend_from_slice(&u32::from(opcode).to_le_bytes());
            bytes.extend_from_slice(&[1; 8]);
            bytes.extend_from_slice(&u64::from(how >> 3).to_le_bytes());
            bytes.extend_from_slice(&[0; 12]);
            let extensions = if how & 0x80 != 0 {
                u16::from(opcode)
            } else {
                0
            };
            bytes.extend_from_slice(&extensions.to_le_bytes());
            bytes.extend_from_slice(&[0; 2]);
        }
        bytes.extend_from_slice(body);
        // Each request also without its last bytes.
        for cut in [0, 1, 8] {
            requests += 1;
            // With all that a guest may have agreed on, or nothing.
            let agreed = InitFlags::from_bits(if how & 8 != 0 { u64::MAX } else { 0 });
            one(&bytes[..bytes.len().saturating_sub(cut)], agreed);
        }
    }
    count::add(requests);
}

fn one(bytes: &[u8], agreed: InitFlags) {
    let (header, behind) = bytes.split_at(bytes.len().min(HEADER_LEN));
    let Ok(wanted) = bytes_wanted(header, behind.len()) else {
        return;
    };
    assert!(wanted <= behind.len());
    let Ok(request) = decode_as(&bytes[..header.len() + wanted], agreed) else {
        return;
    };
    match request.operation {
        Operation::Lookup { name }
        | Operation::Mkdir { name, .. }
        | Operation::Mknod { name, .. }
        | Operation::Create { name, .. }
        | Operation::Symlink { name, .. }
        | Operation::Link { name, .. }
        | Operation::Unlink { name }
        | Operation::Rmdir { name } => entry(name),
        Operation::Rename { from, to, .. } => {
            entry(from);
            entry(to.1);
        }
        Operation::BatchForget(forgets) => {
            assert!(forgets.iter().count() * 16 <= wanted);
        }
        Operation::Read(range) | Operation::Write { range, .. } => {
            assert!(i64::try_from(range.offset + u64::from(range.size)).is_ok());
        }
        Operation::Setxattr { value, .. } => assert!(value.len() <= 65_536),
        _ => {}
    }
}

/// What may name an entry of a directory, and nothing else.
fn entry(name: &std::ffi::CStr) {
    let name = name.to_bytes();
    assert!(!name.is_empty() && name.len() <= 255, "{name:?}");
    assert!(
        !name.contains(&b'/') && name != b"." && name != b"..",
        "{name:?}"
    );
}
