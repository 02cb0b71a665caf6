#!/bin/sh
# molora on one CUDA device, in under 12 minutes: promises, then training and decoding at Phi-4-mini's full shape.
#
#     sh benchmarks/device.sh [FOLDER]        writes device.json and a log of each part into FOLDER (default: .)
#
# PYTHON names the interpreter. ARGUMENTS is added to every call: ARGUMENTS='--device cpu --dtype float32 --size tiny'
# tries the script without a device. Nothing is installed or fetched. A part that fails or takes too long does not stop the others.
set -u
cd "$(dirname "$0")/.." || exit 1
folder=$(cd "${1:-.}" && pwd) || exit 1
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
"$python" -c 'import torch, transformers, peft, accelerate, timm; print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)' || exit 1

failed=
# Seconds that each part may take; 690 in all.
for part in promises:180 resume:60 training:270 decoding:180; do
    name=${part%%:*}
    log=$folder/device-$name.log
    # shellcheck disable=SC2086
    timeout --kill-after=5 "${part##*:}" "$python" -m benchmarks.device "$name" --json "$folder/device.json" ${ARGUMENTS:-} \
        >"$log" 2>&1 || failed="$failed $name"
    tail -n 4 "$log"
done
if [ -n "$failed" ]; then
    echo "failed:$failed; see the logs in $folder" >&2
    exit 1
fi
