//! Ranges for NVIDIA's profilers (NVTX): what the host is doing, by the names of the road of a question. They nest, in
//! the domain `gleaner`.
//!
//! In builds without them (`nvtx` off, or no CUDA) nothing is left. With them and no profiler a range is one load and a
//! branch, and its name is not even formatted.

/// Opens a range, named as by [`format!`], which ends when the value is dropped.
macro_rules! range {
    ($($name:tt)*) => {
        $crate::range::Range::new(format_args!($($name)*))
    };
}
pub(crate) use range;

#[cfg(gleaner_nvtx)]
pub(crate) use nvtx::Range;

#[cfg(gleaner_nvtx)]
#[allow(unsafe_code)]
mod nvtx {
    use std::ffi::{c_char, c_void};
    use std::fmt::{Arguments, Write};
    use std::marker::PhantomData;
    use std::ptr::NonNull;
    use std::sync::LazyLock;

    use crate::cuda::ffi;

    struct Domain(NonNull<c_void>);

    // SAFETY: a name for the profiler, which takes it from any thread.
    unsafe impl Send for Domain {}
    // SAFETY: as above.
    unsafe impl Sync for Domain {}

    /// `None` if no profiler listens.
    static DOMAIN: LazyLock<Option<Domain>> = LazyLock::new(|| {
        // SAFETY: takes nothing.
        NonNull::new(unsafe { ffi::gleaner_range_domain() }).map(Domain)
    });

    /// Longest name of a range, in bytes; what is longer is cut.
    const NAME: usize = 63;

    struct Name {
        bytes: [u8; NAME + 1],
        len: usize,
    }

    impl Write for Name {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            let len = text.len().min(NAME - self.len);
            self.bytes[self.len..self.len + len].copy_from_slice(&text.as_bytes()[..len]);
            self.len += len;
            Ok(())
        }
    }

    /// A range of this thread, to its drop; it stays on the thread.
    pub(crate) struct Range(PhantomData<*const ()>);

    impl Range {
        #[inline]
        pub(crate) fn new(name: Arguments) -> Range {
            if let Some(domain) = &*DOMAIN {
                push(domain, name);
            }
            Range(PhantomData)
        }
    }

    #[cold]
    fn push(domain: &Domain, name: Arguments) {
        let mut text = Name { bytes: [0; NAME + 1], len: 0 };
        // It takes all text there is.
        let _ = text.write_fmt(name);
        // SAFETY: a domain that the profiler returned; the name ends with a zero and is copied by the profiler.
        unsafe { ffi::gleaner_range_push(domain.0.as_ptr(), text.bytes.as_ptr().cast::<c_char>()) }
    }

    impl Drop for Range {
        #[inline]
        fn drop(&mut self) {
            if let Some(domain) = &*DOMAIN {
                // SAFETY: a domain that the profiler returned; `new` pushed on this thread, and ranges end in the order
                // of their scopes.
                unsafe { ffi::gleaner_range_pop(domain.0.as_ptr()) }
            }
        }
    }
}

/// Nothing.
#[cfg(not(gleaner_nvtx))]
pub(crate) struct Range;

#[cfg(not(gleaner_nvtx))]
impl Range {
    #[inline]
    pub(crate) fn new(_: std::fmt::Arguments) -> Range {
        Range
    }
}

#[cfg(not(gleaner_nvtx))]
impl Drop for Range {
    /// Nothing, but as there is a drop to call in the other builds, it may be called in this one.
    #[inline]
    fn drop(&mut self) {}
}
