#!/usr/bin/env bash
# Writes a model in every format and bit width and compares the log-likelihood that `drawknife eval` finds with what other
# programs' loaders find: transformers with compressed-tensors, gptqmodel, auto-round and gguf, and llama.cpp.
#
# usage: run.sh FOLDER [MODEL TEXT]
# FOLDER keeps a Python environment of several gigabytes; it is made at the first call. MODEL's widths must be multiples of 64.
# llama.cpp is used where `llama-perplexity` is on the PATH or in FOLDER. Exits 1 when two differ by more than 2e-4, or 1e-3
# where the loader computes in 16 bits or with 8-bit activations.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
model=${2:-$root/calibration/model}
text=${3:-$(ls "$root"/calibration/evaluation/*.txt | head -1)}
window=128 tokens=4096
drawknife=${DRAWKNIFE:-$root/target/release/drawknife}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# No more of the text than the windows need.
head -c 40000 "$text" > "$work/text.txt"
text=$work/text.txt

if [ ! -x "$folder/venv/bin/python" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q torch transformers accelerate safetensors compressed-tensors gguf optimum auto-round
    "$folder/venv/bin/pip" install -q --no-build-isolation gptqmodel
fi
python=$folder/venv/bin/python
perplexity=$(command -v llama-perplexity || ls "$folder/llama-perplexity" 2> /dev/null || true)

failed=0
compare() { # name, ours, theirs, limit
    if ! "$python" - "$@" <<'PY'
import sys
name, ours, theirs, limit = sys.argv[1], float(sys.argv[2]), sys.argv[3], float(sys.argv[4])
try:
    off = abs(float(theirs) / ours - 1)
except ValueError:
    off = float("inf")
print(f"{name:<44} {ours:.6f} {theirs:>12.12} {off:.1e} {'ok' if off <= limit else 'DIFFERS'}")
sys.exit(off > limit)
PY
    then failed=1; fi
}

nll() { "$drawknife" eval "$1" --text "$text" --seq $window --max-tokens $tokens "${@:2}" --json | "$python" -c 'import json, sys; print(json.load(sys.stdin)["nll"])'; }

one() { # bits, symmetric, formats
    printf 'version = 1\n[[stage]]\nmethod = "round-to-nearest"\nbits = %s\ngroup = 64\nsymmetric = %s\n' "$1" "$2" > "$work/recipe.toml"
    for format in $3; do
        out=$work/$format-$1-$2
        "$drawknife" compress "$model" -o "$out" --recipe "$work/recipe.toml" --format "$format" --no-eval --quiet > /dev/null
        more=""
        # The loader of compressed-tensors 0.20 takes zero points only so.
        [ "$format-$2" = compressed-tensors-false ] && more=dequantize
        limit=2e-4
        [ "$format" = auto-round ] && limit=1e-3
        # The package gguf does not know blocks of 2 bits yet; llama.cpp does.
        if [ "$format-$1-$2" != gguf-2-true ]; then
            theirs=$("$python" "$here/nll.py" "$out" "$model" "$text" $window $tokens $more 2> "$work/error" | tail -1) || theirs=failed
            compare "$format, $1 bits, symmetric $2" "$(nll "$out")" "${theirs:-failed}" $limit
        fi
        if [ "$format" = gguf ] && [ -n "$perplexity" ]; then
            # Its log is written by a thread that may end before the last line.
            theirs=""
            for _ in 1 2 3; do
                [ -n "$theirs" ] || theirs=$("$perplexity" -m "$out/model.gguf" -f "$text" -c $window -b $window 2>&1 | sed -n 's/.*PPL = \([0-9.]*\).*/\1/p' | tail -1)
            done
            ours=$("$drawknife" eval "$out" --text "$text" --seq $window --protocol llama.cpp --json | "$python" -c 'import json, sys; print(json.load(sys.stdin)["nll"])')
            compare "llama.cpp, $1 bits, symmetric $2" "$ours" "$("$python" -c "import math; print(math.log(${theirs:-1}))")" 1e-3
        fi
    done
}

for bits in 2 3 4 5 6 7 8; do
    case $bits in
        2 | 3 | 8) sym="compressed-tensors gptq auto-round gguf" asym="compressed-tensors gptq_v2" ;;
        4) sym="compressed-tensors gptq auto-round gguf" asym="compressed-tensors gptq_v2 awq gguf" ;;
        *) sym="compressed-tensors gguf" asym="compressed-tensors gguf" ;;
    esac
    one $bits true "$sym"
    one $bits false "$asym"
done
exit $failed
