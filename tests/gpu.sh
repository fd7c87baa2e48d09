#!/usr/bin/env bash
# Runs the GPU tests on this machine, plainly and, but for the long ones, under compute-sanitizer. The test programs are
# built before, here or elsewhere, with a CUDA toolkit: cargo test --release --no-run --test gpu_ops --test gpu_reader
#   tests/gpu.sh target/release/deps/gpu_*
set -euo pipefail
for program in "$@"; do
    [ -x "$program" ] || continue
    "$program" --include-ignored --nocapture --test-threads 1
    for tool in memcheck racecheck; do
        # Racecheck is a hundred times slower than the program: one step of each architecture is what it is for.
        skip=(--skip million --skip almanac)
        [ "$tool" = racecheck ] && skip+=(--skip repeat)
        timeout 200 compute-sanitizer --tool "$tool" --error-exitcode 9 "$program" --include-ignored --test-threads 1 \
            --quiet "${skip[@]}" 2>&1 | grep SUMMARY
    done
done
