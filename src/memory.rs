//! Memory: mimalloc, and what is large straight from the kernel, RocksDB's too.
//!
//! Where a request is dropped with bytes of its body unread, tiny_http allocates as many, zeroed, and
//! touches few of them. An allocator that takes them from memory it has used before clears them first,
//! all of them: 32 clients whose uploads of up to 4 MiB were refused took 900 MB. Fresh pages of the
//! kernel are zero, and cost nothing until they are touched.

use std::alloc::{GlobalAlloc, Layout};
use std::ptr::{copy_nonoverlapping, null_mut};

use mimalloc::MiMalloc;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

pub struct Allocator;

/// From how many bytes on a block is pages of its own.
const LARGE: usize = 128 << 10;

/// RocksDB's memory is malloc's, which takes ever larger blocks from among the small ones once it was
/// given such blocks back, and keeps them: a master would grow for half an hour.
pub fn keep_malloc_from_hoarding() {
    // SAFETY: it sets a number.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE as i32)
    };
}

/// The kernel aligns to pages.
fn is_large(layout: &Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= 4096
}

// SAFETY: each block goes back to where its layout says that it came from.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !is_large(&layout) {
            return unsafe { MiMalloc.alloc(layout) };
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // A client may declare more than there is.
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let mapped = unsafe { mmap_anonymous(null_mut(), layout.size(), access, flags) };
        mapped.map_or(null_mut(), |block| block.cast())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        unsafe {
            if is_large(&layout) { self.alloc(layout) } else { MiMalloc.alloc_zeroed(layout) }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if is_large(&layout) {
            let _ = unsafe { munmap(block.cast(), layout.size()) };
        } else {
            unsafe { MiMalloc.dealloc(block, layout) }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        unsafe {
            let new = Layout::from_size_align_unchecked(size, layout.align());
            if !is_large(&layout) && !is_large(&new) {
                return MiMalloc.realloc(block, layout, size);
            }
            let to = self.alloc(new);
            if !to.is_null() {
                copy_nonoverlapping(block, to, size.min(layout.size()));
                self.dealloc(block, layout);
            }
            to
        }
    }
}
