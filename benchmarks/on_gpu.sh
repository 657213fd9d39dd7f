#!/bin/bash
# The tests that need a GPU, and the pipeline's cost there: writes to $OUT (a folder), about six minutes on one GPU.
set -u
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
export PYTHONPATH="${PYTHONPATH:-}:$PWD" OMP_NUM_THREADS=8 TOKENIZERS_PARALLELISM=false
python3 -c 'import torch, transformers; print(torch.__version__, transformers.__version__, torch.cuda.get_device_name())' > "$out/versions.txt"
[ -n "${NO_TESTS:-}" ] || timeout 200 python3 -m pytest -q -p no:cacheprovider tests/test_gpu.py > "$out/tests.txt" 2>&1
[ -n "${NO_TESTS:-}" ] || tail -n 25 "$out/tests.txt"
timeout 150 python3 benchmarks/cost.py --device cuda --prompts 16 128 1024 --shapes smollm2-30 --out "$out"
timeout 150 python3 benchmarks/cost.py --device cuda --dtype bfloat16 --prompts 16 128 1024 --shapes gemma2-2b --out "$out"
timeout 150 python3 benchmarks/cost.py --device cuda --dtype bfloat16 --prompts 16 128 --shapes gemma2-9b --out "$out"
