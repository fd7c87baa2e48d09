//! Declarations of `kernels/kernels.h`, made by bindgen at build time.
#![allow(missing_docs, reason = "kernels.h documents them")]
#![cfg_attr(not(gleaner_nvtx), allow(dead_code, reason = "the ranges, which this build does not have"))]

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
