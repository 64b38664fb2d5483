#!/usr/bin/env bash
# Submits stages to the Ray cluster at $RAY_API_SERVER_ADDRESS, each when the one before has ended well:
#
#   jobs/submit.sh STAGE[,STAGE…] CONFIG [PRESET.yaml] [section.key=value …]
#   jobs/submit.sh shard,cache,distill,evaluate,register configs/demo.yaml storage.root=s3://bucket/demo
#
# Logs go to stderr, each stage's line of JSON to stdout. A stage that fails ends the chain with its exit code (1); the
# same command goes on where it ended. Ctrl-C leaves the job running; what it prints first says how to stop it.
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
stages=$1
shift
cd "$(dirname "$0")/.."
for stage in ${stages//,/ }; do
  if [ ! -f "jobs/$stage.py" ]; then
    echo "error: '$stage' is no stage; python -m jobs lists them" >&2
    exit 2
  fi
done
ray=$([ -x .venv/bin/ray ] && echo .venv/bin/ray || echo ray)

environment=$(mktemp --suffix .yaml)
trap 'rm -f "$environment"' EXIT
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
{ cat cluster/runtime-env.yaml; printf 'env_vars:\n  SLOTMATCH_REVISION: "%s"\n' "$revision"; } >"$environment"

for stage in ${stages//,/ }; do
  id="slotmatch-$stage-$(date +%Y%m%d-%H%M%S)-$$"
  echo "--- $stage: ray job stop $id ends it, ray job logs -f $id follows it" >&2
  # `tee /dev/stderr` would empty a file that stderr goes to.
  code=0
  summary=$("$ray" job submit --submission-id "$id" --working-dir . --runtime-env "$environment" \
    -- python -m "jobs.$stage" "$@" | tee >(cat >&2) | { grep '^{"job": ' || true; } | tail -n 1) || code=$?
  [ -z "$summary" ] || echo "$summary"
  # A job that was stopped is no error to `ray job submit`.
  if [ $code -ne 0 ] || [[ $summary != *'"status": "ok"'* ]]; then exit 1; fi
done
