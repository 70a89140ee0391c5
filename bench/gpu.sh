#!/usr/bin/env bash
# The GPU tests and then the benchmark, on a machine with a CUDA device and no network.
#
#     bench/gpu.sh [--wheels DIR] [--no-tests] [options of gpu.py]
#
# PYTHON names the interpreter that has PyTorch and transformers; the wheels of peers/wheels.txt bring the rest.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

tests=yes
wheels=()
options=()
while (($#)); do
    case $1 in
    --no-tests) tests=no ;;
    --wheels)
        wheels=(--find-links "$2")
        options+=("$1" "$2")
        shift
        ;;
    *) options+=("$1") ;;
    esac
    shift
done

"$python" -c 'import kvprune.policies' 2>/dev/null ||
    "$python" -m pip install --quiet --no-index "${wheels[@]}" --no-build-isolation -e . || exit

failed=0
if [ $tests = yes ]; then
    "$python" -m pytest -m gpu
    failed=$?
    [ $failed = 5 ] && failed=0 # nothing is marked so
fi
"$python" bench/gpu.py "${options[@]}" || failed=$?
exit $failed
