use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsFd;

use rustix::fs::MemfdFlags;

use super::*;

fn two_regions() -> Memory {
    Memory::new(&[
        Region::new(0x1000, 0x1000),
        Region::new(0x2000, 0x1000)
            .file_offset(0x123)
            .user_address(0xdead_0000),
    ])
    .unwrap()
}

#[test]
fn a_write_across_touching_regions_reads_back_whole() {
    let memory = two_regions();
    memory.write(Gpa(0x1ffe), b"word").unwrap();
    assert_eq!(memory.read_vec(Gpa(0x1ffe), 4).unwrap(), b"word");
    assert_eq!(memory.read_vec(Gpa(0x2000), 2).unwrap(), b"rd");
}

#[test]
fn a_pointer_across_two_regions_is_refused() {
    let memory = two_regions();
    assert!(memory.pointer(Gpa(0x1ffe), 2).is_ok());
    assert!(memory.pointer(Gpa(0x1ffe), 3).is_err());
}

#[test]
fn an_access_past_the_end_is_refused() {
    let memory = two_regions();
    assert!(memory.write(Gpa(0x2fff), b"ab").is_err());
    assert!(memory.read(Gpa(0xfff), &mut [0]).is_err());
    assert!(memory.read(Gpa(u64::MAX), &mut [0; 2]).is_err());
}

#[test]
fn what_is_written_is_in_the_memfd_at_the_offset() {
    let memory = two_regions();
    memory.write(Gpa(0x2010), b"x").unwrap();
    let mut bytes = [0];
    let fd = memory.regions()[1].fd();
    rustix::io::pread(fd, &mut bytes, 0x133).unwrap();
    assert_eq!(&bytes, b"x");
}

#[test]
fn user_addresses_follow_the_region() {
    let memory = two_regions();
    assert_eq!(memory.user_address(Gpa(0x2008)).unwrap(), 0xdead_0008);
    let here = memory.pointer(Gpa(0x1010), 1).unwrap().addr() as u64;
    assert_eq!(memory.user_address(Gpa(0x1010)).unwrap(), here);
    assert!(memory.user_address(Gpa(0x3000)).is_err());
}

#[test]
fn allocation_aligns_and_spills_to_the_next_region() {
    let memory = two_regions();
    assert_eq!(memory.alloc(1, 1).unwrap(), Gpa(0x1000));
    let mark = memory.mark();
    assert_eq!(memory.alloc(16, 64).unwrap(), Gpa(0x1040));
    assert_eq!(memory.alloc(0xff0, 16).unwrap(), Gpa(0x2000));
    assert!(memory.alloc(0x1000, 1).is_err());
    memory.reset_to(&mark);
    assert_eq!(memory.alloc(16, 64).unwrap(), Gpa(0x1040));
    assert_eq!(memory.alloc_in(1, 16, 16).unwrap(), Gpa(0x2000));
    memory.reset();
    assert_eq!(memory.alloc(1, 1).unwrap(), Gpa(0x1000));
}

#[test]
fn values_and_fills_read_back() {
    let memory = two_regions();
    memory.write_obj(Gpa(0x1001), &0x0102_0304_u32).unwrap();
    assert_eq!(memory.read_obj::<u32>(Gpa(0x1001)).unwrap(), 0x0102_0304);
    memory.fill(Gpa(0x1ff0), 32, 7).unwrap();
    assert_eq!(memory.read_vec(Gpa(0x1ff0), 32).unwrap(), [7; 32]);
}

#[test]
fn files_move_straight_in_and_out() {
    let memory = two_regions();
    let fd = rustix::fs::memfd_create("file", MemfdFlags::CLOEXEC).unwrap();
    let mut file = std::fs::File::from(fd);
    file.write_all(b"payload").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let read = memory.read_from(file.as_fd(), Buf::new(Gpa(0x1000), 64));
    assert_eq!(read.unwrap(), 7);
    let wrote = memory.write_to(file.as_fd(), Buf::new(Gpa(0x1000), 7));
    assert_eq!(wrote.unwrap(), 7);
    assert_eq!(file.metadata().unwrap().len(), 14);
}
