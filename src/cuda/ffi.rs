//! Declarations of `kernels/kernels.h`, made by bindgen at build time.
#![allow(missing_docs, reason = "kernels.h documents them")]

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
