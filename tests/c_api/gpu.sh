#!/usr/bin/env bash
# Builds the C and C++ programs of this folder and of examples/ against a libgleaner that was built before, here or
# elsewhere, and runs them on this machine's GPU.   usage: tests/c_api/gpu.sh FOLDER_OF_LIBRARY
set -euo pipefail
cd "$(dirname "$0")/../.."
library=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
question="What is the name of the mayor of Pellinbridge?"
# As tests/c_api/main.rs cuts it: the lines from the evidence on.
sed -n '/The name of the mayor of Pellinbridge/,$p' examples/almanac.txt >"$work/rest.txt"
head -c 3500 "$work/rest.txt" | iconv -c -f utf-8 -t utf-8 >"$work/excerpt.txt"
"$library/gleaner" info >"$work/info.txt"
grep -E '^(build|GPU)' "$work/info.txt"
for source in examples/ask.c examples/ask.cpp examples/low_level.c tests/c_api/callbacks.c tests/c_api/misuse.c; do
    case $source in
        *.cpp) compiler="c++ -std=c++17" ;;
        *) compiler="cc -std=c99" ;;
    esac
    $compiler -D_POSIX_C_SOURCE=200809L -Wall -Wextra -Werror -pthread -Iinclude "$source" -o "$work/program" \
        -L"$library" -lgleaner -Wl,-rpath,"$library"
    echo "== $source"
    case $source in
        examples/*) "$work/program" models/gleaner-demo-16m "$work/excerpt.txt" "$question" ;;
        *) "$work/program" models/gleaner-demo-16m "$work/excerpt.txt" && echo "nothing to say: as it should be" ;;
    esac
done
