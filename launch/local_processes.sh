#!/usr/bin/env bash
# One run by N processes on this machine's CPU: launch/local_processes.sh [--dry-run] N CONFIG OUT [--field value ...]
# --dry-run prints the commands and does nothing. The status is 0, or that of the first process that ended badly; the others are then ended too. Needs bash 5.1.
set -euo pipefail
dry_run=
[[ ${1-} == --dry-run ]] && dry_run=yes && shift
if (( $# < 3 )) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 [--dry-run] N CONFIG OUT [--field value ...]" >&2
  exit 2
fi
n=$1 config=$2 out=$3
shift 3

# The processes meet at a port that is free now. They would all claim the same accelerator.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export HEAL_COORDINATOR=127.0.0.1:$port HEAL_PROCESSES=$n JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

if [[ $dry_run ]]; then
  for ((i = 0; i < n; i++)); do
    printf '%q ' env HEAL_COORDINATOR="$HEAL_COORDINATOR" HEAL_PROCESSES="$n" JAX_PLATFORMS="$JAX_PLATFORMS" \
      HEAL_PROCESS_ID="$i" heal run "$config" --out "$out" "$@"
    echo "&"
  done
  echo wait
  exit
fi

# What has not ended ten seconds after it was asked to is killed.
end() {
  local left
  # shellcheck disable=SC2046 # numbers
  kill $(jobs -p) 2>/dev/null || true
  for ((left = 100; left; left--)); do
    [[ -z $(jobs -rp) ]] && return
    sleep 0.1
  done
  # shellcheck disable=SC2046
  kill -KILL $(jobs -p) 2>/dev/null || true
}

declare -A number=()  # process id -> number in the job
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for ((i = 0; i < n; i++)); do
  HEAL_PROCESS_ID=$i heal run "$config" --out "$out" "$@" &
  number[$!]=$i
done

while (( ${#number[@]} )); do
  status=0
  wait -n -p id "${!number[@]}" || status=$?
  if (( status )); then
    echo "process ${number[$id]} of $n ended with status $status; ending the others" >&2
    unset "number[$id]"
    exit "$status"
  fi
  unset "number[$id]"
done
