//! Releases the memory of the program's code (its text pages).
//!
//! The invariant: only pages that were never written to are released. When they are needed again,
//! the kernel reads them from the file, unchanged.

use std::ffi::c_void;

use rustix::mm::Advice;
use rustix::param::page_size;

/// Releases the memory of the program's code. Most of it is needed at the start only, such as
/// options, their help, and the sandbox. Code that is executed again is read again.
pub(crate) fn release() {
    // SAFETY: the callback fits, and takes no argument.
    unsafe { libc::dl_iterate_phdr(Some(release_first_object), std::ptr::null_mut()) };
}

/// Releases the code of the first object, which is the program, and ends the iteration.
unsafe extern "C" fn release_first_object(
    info: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _argument: *mut c_void,
) -> libc::c_int {
    // SAFETY: the dynamic loader passes an object that is valid during the call.
    let info = unsafe { &*info };
    // SAFETY: the object has `dlpi_phnum` headers, which stay mapped.
    let headers =
        unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    for header in headers {
        let is_code = header.p_flags & (libc::PF_X | libc::PF_W) == libc::PF_X;
        if header.p_type == libc::PT_LOAD && is_code {
            release_range(
                info.dlpi_addr.saturating_add(header.p_vaddr),
                header.p_memsz,
            );
        }
    }
    1
}

/// Releases the whole pages in `start..start + len`, which are mapped from a file, executable and
/// not writable.
fn release_range(start: u64, len: u64) {
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
    // SAFETY: these pages can't have been written to, so the kernel maps the same content again.
    let result = unsafe { rustix::mm::madvise(code, len, Advice::LinuxDontNeed) };
    if let Err(error) = result {
        log::debug!("releasing memory of code: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_code_still_runs() {
        release();
        assert_eq!("still here".to_uppercase(), "STILL HERE");
        release();
    }
}
