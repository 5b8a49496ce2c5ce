//! The program's own code in memory.
//!
//! The invariant: only pages that nobody has written to are given back, so that they are read from the
//! file again, unchanged, by whoever needs them next.

use std::ffi::c_void;

use rustix::mm::Advice;
use rustix::param::page_size;

/// Gives back the memory of the program's code, most of which is needed at the start only: options and
/// their help, and what makes the sandbox. What is executed again is mapped again.
pub(crate) fn give_back() {
    // SAFETY: the callback fits, and takes no argument.
    unsafe { libc::dl_iterate_phdr(Some(give_back_first), std::ptr::null_mut()) };
}

/// Gives back the code of the first object, which is the program, and asks for no other.
unsafe extern "C" fn give_back_first(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _argument: *mut c_void,
) -> libc::c_int {
    // SAFETY: the dynamic loader hands over a valid object during the call.
    let info = unsafe { &*info };
    // SAFETY: it says itself how many there are, and they stay where they are.
    let headers =
        unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    for header in headers {
        let is_code = header.p_flags & (libc::PF_X | libc::PF_W) == libc::PF_X;
        if header.p_type == libc::PT_LOAD && is_code {
            forget(
                info.dlpi_addr.saturating_add(header.p_vaddr),
                header.p_memsz,
            );
        }
    }
    1
}

/// Gives back the whole pages of so many bytes from `start` on, which are mapped from a file to be
/// executed, and not to be written to.
fn forget(start: u64, len: u64) {
    let page = page_size() as u64;
    let first = start.next_multiple_of(page);
    let end = start.saturating_add(len) / page * page;
    let (Ok(first), Ok(len)) = (
        usize::try_from(first),
        usize::try_from(end.saturating_sub(first)),
    ) else {
        return;
    };
    if len == 0 {
        return;
    }
    let code = std::ptr::with_exposed_provenance_mut(first);
    // SAFETY: nobody can have written to these pages, so what is mapped in their place is the same.
    let given = unsafe { rustix::mm::madvise(code, len, Advice::LinuxDontNeed) };
    if let Err(error) = given {
        log::debug!("giving back memory of code: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_that_was_given_back_goes_on() {
        give_back();
        assert_eq!("still here".to_uppercase(), "STILL HERE");
        give_back();
    }
}
