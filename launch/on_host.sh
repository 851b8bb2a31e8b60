#!/usr/bin/env bash
# What each host of a TPU VM or queued resource does, as root, at every start: install, fetch inputs, start the run.
# tpu_vm.sh sends it; queued_resource.sh makes it the start-up script, so that a host which comes back after maintenance
# goes on by itself. Both put before it: package, inputs, out, compile_cache, config (its text) and fields=(...).
# The run is the systemd unit `heal`: it survives the connection, gets SIGTERM on shutdown, and is started again when it
# fails (a peer is gone: status 1; stopped: 143), but not where it was told something wrong (2).
set -euo pipefail
: "${package?}" "${inputs?}" "${out?}" "${compile_cache?}" "${config?}"
export HOME=${HOME:-/root} # start-up scripts have none
root=${HEAL_ROOT:-/opt/heal}
state=$(systemctl show --property=ActiveState --value heal)
if [[ ! $state =~ ^(inactive|failed)$ ]]; then
  echo "a run is under way here ($state); stop it first: launch/tpu_vm.sh stop" >&2
  exit 1
fi
mkdir -p "$root"
cd "$root"

# The hosts' own Python is 3.10: uv brings a newer one. A second start finds all there, but for a wheel that was replaced.
where=$package identity=$package
if [[ $package == gs://* ]]; then
  mkdir -p wheel
  gcloud storage cp "$package" wheel/
  where=file://$root/wheel/${package##*/}
  identity="$package $(sha256sum <"wheel/${package##*/}")"
fi
if [[ $(cat installed 2>/dev/null) != "$identity" ]]; then
  rm -rf installed venv
  python3 -m pip install --quiet --target uv --upgrade uv
  uv/bin/uv venv --quiet --python 3.12 venv
  uv/bin/uv pip install --quiet --python venv/bin/python "heal-jax[tpu,gcs] @ $where"
  printf '%s' "$identity" >installed
fi

if [[ -n $inputs ]]; then
  mkdir -p inputs
  gcloud storage rsync --recursive "$inputs" inputs
fi

printf '%s\n' "$config" >config.yaml
export PYTHONUNBUFFERED=1
export HEAL_COORDINATOR=auto # JAX finds the hosts of the slice in the VM's metadata
[[ -z $compile_cache ]] || export JAX_COMPILATION_CACHE_DIR=$compile_cache
{
  printf '#!/usr/bin/env bash\n'
  export -p | grep -E '^declare -x (HEAL_COORDINATOR|JAX_COMPILATION_CACHE_DIR|PYTHONUNBUFFERED)='
  printf 'exec'
  # shellcheck disable=SC2154 # set by who sends this
  printf ' %q' "$root/venv/bin/heal" run config.yaml --out "$out" ${fields[@]+"${fields[@]}"}
  printf '\n'
} >start
# systemd says how the run ended; an end for good is noted beside OUT, for `queued_resource.sh keep`.
{
  printf '#!/usr/bin/env bash\nended=%q\n' "$out.ended"
  # shellcheck disable=SC2016 # expanded when it runs
  printf '%s\n' '[[ $EXIT_CODE == exited && $EXIT_STATUS =~ ^[02]$ ]] || exit 0' \
    'printf "%s\n" "$EXIT_STATUS" | gcloud storage cp - "$ended"'
} >stopped
chmod 700 start stopped

# Spot hosts have 30 s after the notice; heal takes 10.
systemd-run --unit=heal --collect --working-directory="$root" \
  --property=Restart=on-failure --property=RestartSec=30 --property=RestartPreventExitStatus=2 \
  --property=StartLimitIntervalSec=1d --property=StartLimitBurst=50 \
  --property=KillMode=mixed --property=TimeoutStopSec=25 --property="ExecStopPost=$root/stopped" \
  "$root/start"
