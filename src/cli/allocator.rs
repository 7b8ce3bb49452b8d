//! Keeps the memory of activations: the C library's allocator otherwise hands every large buffer back to the system
//! and takes it anew page by page, which was a quarter of the time of a calibration on small windows (9.4 against 14.0
//! CPU seconds) and more resident memory besides.
#![allow(unsafe_code)]

/// Buffers up to this many bytes are kept for reuse.
const KEPT: libc::c_int = 32 << 20;
/// Free memory at the end of the heap that is not handed back.
const SLACK: libc::c_int = 512 << 20;

/// Limits the address space of this process, for good. Does nothing where the system has no such limit.
pub fn limit(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes as libc::rlim_t, rlim_max: bytes as libc::rlim_t };
    // SAFETY: setrlimit reads the structure, which outlives the call. Its result says whether the limit was taken; a refusal
    // leaves the process as it was.
    unsafe {
        libc::setrlimit(libc::RLIMIT_AS, &limit);
        libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 });
    }
}

/// Tunes the allocator; to be called before any thread is started. Does nothing where the C library is another.
pub fn tune() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets two numbers inside the allocator; it is called once, before other threads exist, as its
    // manual asks. Its result says whether the number was taken; a refusal costs time, nothing else.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT);
        libc::mallopt(libc::M_TRIM_THRESHOLD, SLACK);
    }
}

/// Hands memory that lies free between what is in use back to the system; weights that stay and buffers that go would otherwise
/// stretch the heap by a gigabyte in a mixture of a few hundred experts. Does nothing where the C library is another.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the allocator's own locks and touches free memory alone.
    unsafe {
        libc::malloc_trim(0);
    }
}
