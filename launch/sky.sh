#!/usr/bin/env bash
# A SkyPilot managed job, which finds another slice when spot hosts are taken away: launch/sky.sh [--dry-run] ACTION
#   launch CONFIG OUT [--field value ...]  start the run; CONFIG is a path in this checkout, which is copied to the hosts
#   log                                    what it says, until Ctrl-C
#   cancel                                 the job and its slice; what is on the bucket stays
# --dry-run prints the commands and does nothing.

# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
named LAUNCH_NAME
tool sky "pip install 'skypilot[gcp]', then sky check"
cd "$launch/.."

case $1 in
  launch)
    shift
    run_arguments "$@"
    require LAUNCH_ZONE LAUNCH_ACCELERATOR_TYPE LAUNCH_RUNTIME_VERSION
    like LAUNCH_ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-west4-a'
    [[ $config != /* && -r $config ]] || die "$config: a config in $PWD is expected"
    spot=--use-spot
    [[ ${LAUNCH_SPOT:-no} == yes ]] || spot=--no-use-spot
    like LAUNCH_RUNTIME_VERSION '[-a-z0-9.]+' 'a TPU runtime version'
    # The command line has no flag for the TPU's runtime version.
    job=(sed "s/RUNTIME_VERSION/$LAUNCH_RUNTIME_VERSION/" launch/sky.yaml)
    command=(sky jobs launch --yes --detach-run --name="$LAUNCH_NAME" --infra="gcp/${LAUNCH_ZONE%-*}/$LAUNCH_ZONE"
      --gpus="tpu-$LAUNCH_ACCELERATOR_TYPE" "$spot"
      --env="JAX_COMPILATION_CACHE_DIR=${LAUNCH_COMPILE_CACHE-}" --env="INPUTS=${LAUNCH_INPUTS-}"
      --env="ARGUMENTS=$(quoted run "$config" --out "$out" ${fields[@]+"${fields[@]}"})")
    if [[ -n $dry_run ]]; then
      # shellcheck disable=SC2016 # for the shell that it is pasted into
      printf 'job=$(mktemp -d)/heal.yaml\n%s >"$job"\n%s "$job"\n' "$(run "${job[@]}")" "$(run "${command[@]}")"
    else
      directory=$(mktemp -d)
      trap 'rm -r "$directory"' EXIT
      "${job[@]}" >"$directory/heal.yaml"
      run "${command[@]}" "$directory/heal.yaml"
    fi
    ;;
  log) run sky jobs logs --name="$LAUNCH_NAME" ;;
  cancel) run sky jobs cancel --yes --name="$LAUNCH_NAME" ;;
  *) die "$1: no such action; launch, log or cancel" ;;
esac
