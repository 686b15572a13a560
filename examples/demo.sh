#!/usr/bin/env bash
# The main job, start to end: `make demo` runs this. From a trained checkpoint to verified bundles, on real text.
set -euo pipefail
cd "$(dirname "$0")/.."
out=demo-out
rm -rf "$out" && mkdir -p "$out"

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$(printf '%q ' "$@")"; "$@"; }

step "1. What this machine has"
run mra-export doctor

step "2. The trained checkpoint becomes a bundle"
run mra-export export examples/mra-tiny-python "$out/tiny" --engine auto

step "3. Every runtime against PyTorch"
run mra-export verify "$out/tiny" --json "$out/tiny-parity.json"

step "4. Real text"
run mra-export run "$out/tiny" --text "for i in range(<mask>):" --text "def __init__(<mask>, name):"
run mra-export inspect "$out/tiny"

step "5. The same in half precision"
run mra-export export examples/mra-tiny-python "$out/tiny-fp16" --dtype fp16 --engine auto
run mra-export verify "$out/tiny-fp16" --quick

step "6. The published size: 12 layers, 768 wide, 512 tokens (random weights)"
run mra-export init base-512-4 "$out/base-512-4-checkpoint" --seed 0
run mra-export export "$out/base-512-4-checkpoint" "$out/base-512-4" --no-verify
run mra-export verify "$out/base-512-4" --quick

step "Done. The bundles are in $out/: load one with mra_export.MraRuntime.load(\"$out/tiny\")."
