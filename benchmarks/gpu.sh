#!/usr/bin/env bash
# Unattended, within 9 minutes on a CUDA machine: the tests marked gpu, then the embedded model's bench in fp32 and bf16.
# Another folder for the results, or another model: OUT=folder MODEL=name benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
RESULTS=${OUT:-benchmarks/results}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
END=$((SECONDS + 520))
failed=0
mkdir -p "$RESULTS"

nvidia-smi || { echo "gpu.sh: there is no CUDA device here" >&2; exit 1; }

# Runs a command for at most $1 seconds and never past the end of the nine minutes.
within() {
  local left=$((END - SECONDS)) limit=$1
  shift
  if ((left < 10)); then echo "gpu.sh: no time left for: $*" >&2; failed=1; return; fi
  timeout "$((limit < left ? limit : left))" "$@" || { echo "gpu.sh: failed ($?): $*" >&2; failed=1; }
}

if grep -rqE 'mark\.gpu' tests; then
  within 150 "$PYTHON" -m pytest -m gpu
fi
for dtype in float32 bfloat16; do
  within 180 "$PYTHON" -m foretell bench ${MODEL:+--model "$MODEL"} --device cuda --dtype "$dtype" --rounds 5 --limit 5 \
    --output "$RESULTS/gpu-$dtype.json"
done
exit "$failed"
