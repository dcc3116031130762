#!/usr/bin/env bash
# Unattended, within 9 minutes on a CUDA machine: the tests marked gpu; at the shape of 8B in bf16, what a step costs,
# eager and as CUDA graphs, and the replayed GSM8k profile, all graphed; then the embedded model's bench in bf16 and
# fp32. Every result is written as it comes.
# Another folder for the results, or another model: OUT=folder MODEL=name benchmarks/gpu.sh
set -uo pipefail
OUT=${OUT:+$(realpath -m "$OUT")}
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
  within 100 "$PYTHON" -m pytest -m gpu
fi
within 90 "$PYTHON" benchmarks/step_cost.py --shape 8B --device cuda --contexts 512 4096 \
  --output "$RESULTS/step_cost_8B_cuda.json"
within 90 "$PYTHON" benchmarks/step_cost.py --shape 8B --device cuda --contexts 512 4096 --compiled \
  --output "$RESULTS/step_cost_8B_cuda_compiled.json"
within 180 "$PYTHON" benchmarks/replay.py --shape 8B --device cuda --profile gsm8k --rounds 3 --compiled \
  --linear 5 --quadratic 4 8 --output "$RESULTS/replay_8B_cuda.json"
# The embedded model as far as time is left: too small to gain much on a GPU, but its outputs are compared there.
for dtype in bfloat16 float32; do
  rm -f "$RESULTS/gpu-$dtype.json" # bench overwrites no report
  within 60 "$PYTHON" -m foretell bench ${MODEL:+--model "$MODEL"} --device cuda --dtype "$dtype" --compiled --rounds 3 --limit 2 --masks 3,8 --prompt-lookup '' \
    --output "$RESULTS/gpu-$dtype.json"
done
exit "$failed"
