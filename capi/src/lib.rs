//! Gleaner as a C library. The contract of every function is in `include/gleaner.h`; this crate keeps it with the public
//! API of the `gleaner` crate, as any other program would.
//!
//! | module | holds |
//! |---|---|
//! | `args` | what comes from C, and what goes there: the only places that follow its pointers |
//! | `status` | status codes, last errors, the guard that no panic passes |
//! | `engine`, `document`, `ask` | the first tier |
//! | `plan`, `read` | the second |

mod args;
mod ask;
mod document;
mod engine;
mod plan;
mod read;
mod status;

use std::ffi::{CStr, c_char};

/// `GLEANER_ABI_VERSION` of the header that this library keeps.
const ABI_VERSION: u32 = 1;

const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => panic!("a version holds no NUL"),
};

#[unsafe(no_mangle)]
extern "C" fn gleaner_version() -> *const c_char {
    VERSION.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn gleaner_check_abi(abi_version: u32) -> status::Status {
    status::call(|| {
        if abi_version == ABI_VERSION {
            return Ok(());
        }
        Err(status::Failure::argument(format!(
            "this program was compiled for ABI {abi_version} of gleaner, but the library is {} with ABI {ABI_VERSION}; compile it with the library's header",
            env!("CARGO_PKG_VERSION")
        )))
    })
}
