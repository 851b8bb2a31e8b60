#!/usr/bin/env bash
# A TPU VM, one host or a pod slice: launch/tpu_vm.sh [--dry-run] ACTION
#   create                              the slice of launch/env, spot or not
#   run CONFIG OUT [--field value ...]  install and start `heal run` on all hosts; it goes on without the connection
#   log                                 what the first host says, until Ctrl-C
#   stop                                end the run (heal saves; the same `run` goes on)
#   delete                              the slice; what is on the bucket stays
# --dry-run prints the commands and does nothing.

# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
named LAUNCH_PROJECT LAUNCH_ZONE LAUNCH_NAME
tool gcloud "see https://cloud.google.com/sdk/docs/install"
place=(--project="$LAUNCH_PROJECT" --zone="$LAUNCH_ZONE")
tpu_vm=(gcloud compute tpus tpu-vm)

case $1 in
  create)
    require LAUNCH_ACCELERATOR_TYPE LAUNCH_RUNTIME_VERSION
    options=(--accelerator-type="$LAUNCH_ACCELERATOR_TYPE" --version="$LAUNCH_RUNTIME_VERSION" --scopes=https://www.googleapis.com/auth/cloud-platform)
    [[ ${LAUNCH_SPOT:-no} == no ]] || options+=(--spot)
    [[ -z ${LAUNCH_SERVICE_ACCOUNT-} ]] || options+=(--service-account="$LAUNCH_SERVICE_ACCOUNT")
    run "${tpu_vm[@]}" create "$LAUNCH_NAME" "${place[@]}" "${options[@]}"
    ;;
  run)
    shift
    host_script "$@"
    run "${tpu_vm[@]}" ssh "$LAUNCH_NAME" "${place[@]}" --worker=all --command="sudo bash -c $(quoted "$script")"
    ;;
  log)
    run "${tpu_vm[@]}" ssh "$LAUNCH_NAME" "${place[@]}" --worker=0 \
      --command='sudo journalctl --unit=heal --lines=200 --follow --output=cat'
    ;;
  stop) run "${tpu_vm[@]}" ssh "$LAUNCH_NAME" "${place[@]}" --worker=all --command='sudo systemctl stop heal' ;;
  delete) run "${tpu_vm[@]}" delete "$LAUNCH_NAME" "${place[@]}" --quiet ;;
  *) die "$1: no such action; create, run, log, stop or delete" ;;
esac
