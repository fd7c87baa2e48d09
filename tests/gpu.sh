#!/usr/bin/env bash
# Runs the GPU tests on this machine, plainly and, but for the long ones, under compute-sanitizer. The test programs are
# built before, here or elsewhere, with a CUDA toolkit: cargo test --release --no-run --test gpu_ops --test gpu_reader
#   tests/gpu.sh target/release/deps/gpu_*
set -euo pipefail
plain=()
[ -n "${GLEANER_GOLDEN:-}" ] || plain=(--skip environment)
sanitize() {
    local tool=$1
    shift
    timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 "$program" --include-ignored --test-threads 1 \
        --quiet "$@" 2>&1 | grep SUMMARY
}
for program in "$@"; do
    [ -x "$program" ] || continue
    "$program" --include-ignored --nocapture --test-threads 1 "${plain[@]}"
    # Racecheck is a hundred times slower than the program: of the reader it gets one step of each architecture, and a
    # whole document of two.
    case $(basename "$program") in
        gpu_reader*)
            sanitize memcheck --skip million --skip almanac --skip environment
            sanitize racecheck architectures a_small_document
            ;;
        *)
            sanitize memcheck --skip reading_lengths
            sanitize racecheck --skip reading_lengths --skip long_contexts
            ;;
    esac
done
