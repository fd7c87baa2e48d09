#!/usr/bin/env bash
# Runs a command and keeps what it printed in benches/results/NAME.txt, under the date, the machine, the commit and the
# command itself.   usage: benches/record.sh NAME COMMAND...
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
shift
out=benches/results/$name.txt
mkdir -p benches/results
{
    echo "date:    $(date -u +%F)"
    echo "device:  $(lscpu | sed -n 's/^Model name: *//p' | head -1), $(nproc) cores$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | sed 's/^/; /')"
    echo "commit:  ${GLEANER_COMMIT:-$(git describe --always)$(git diff --quiet HEAD -- . ":!benches/results" || echo -dirty)}"
    echo "command: $*"
    echo
    "$@" 2>&1
} | tee "$out"
