#!/usr/bin/env bash
# Runs the GPU tests on this machine, plainly and under compute-sanitizer, from test programs that were built before:
#   cargo test --release --no-run --test gpu_ops        (with a CUDA toolkit; here or elsewhere)
#   tests/gpu.sh target/release/deps/gpu_ops-*
set -euo pipefail
for program in "$@"; do
    [ -x "$program" ] || continue
    "$program" --include-ignored --nocapture --test-threads 1
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$program" --include-ignored --test-threads 1 --quiet 2>&1 | grep SUMMARY
    done
done
