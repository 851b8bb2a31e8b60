#!/usr/bin/env bash
# One run by N processes on this machine: launch/local_processes.sh N CONFIG OUT [--field value ...]
# The status is 0, or that of the first process that ended badly; the others are then ended too. Needs bash 5.1.
set -euo pipefail
if (( $# < 3 )) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 N CONFIG OUT [--field value ...]" >&2
  exit 2
fi
n=$1 config=$2 out=$3
shift 3

# The processes meet at a port that is free now.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export HEAL_COORDINATOR=127.0.0.1:$port HEAL_PROCESSES=$n

declare -A number=()  # process id -> number in the job
trap 'kill "${!number[@]}" 2>/dev/null || true; wait' EXIT
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
