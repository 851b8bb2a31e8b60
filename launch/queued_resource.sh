#!/usr/bin/env bash
# A slice that is waited for, with the run in its start-up script: launch/queued_resource.sh [--dry-run] ACTION
#   create CONFIG OUT [--field value ...]  ask for the slice of launch/env; the run starts when it comes
#   keep CONFIG OUT [--field value ...]    create, and stay: where spot hosts are taken away, delete and create again;
#                                          delete when the run has ended. Its status is the run's.
#   status                                 such as WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED (taken away)
#   delete                                 the request and its slice; what is on the bucket stays
# `launch/tpu_vm.sh log` and `stop` work on its slice. --dry-run prints the commands and does nothing.

# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
named LAUNCH_PROJECT LAUNCH_ZONE LAUNCH_NAME
tool gcloud "see https://cloud.google.com/sdk/docs/install"
place=(--project="$LAUNCH_PROJECT" --zone="$LAUNCH_ZONE")
queued=(gcloud compute tpus queued-resources)
action=$1
shift

create() {
  run_with "$script" "${queued[@]}" create "$LAUNCH_NAME" "${place[@]}" --node-id="$LAUNCH_NAME" "${options[@]}" \
    --metadata-from-file=startup-script=/dev/stdin
}

status() {
  run "${queued[@]}" describe "$LAUNCH_NAME" "${place[@]}" --format='value(state.state)'
}

delete() {
  run "${queued[@]}" delete "$LAUNCH_NAME" "${place[@]}" --force --quiet
}

ended() {
  run gcloud storage cat "$out.ended" --project="$LAUNCH_PROJECT"
}

case $action in
  create | keep)
    host_script "$@"
    require LAUNCH_ACCELERATOR_TYPE LAUNCH_RUNTIME_VERSION
    options=(--accelerator-type="$LAUNCH_ACCELERATOR_TYPE" --runtime-version="$LAUNCH_RUNTIME_VERSION")
    options+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
    [[ ${LAUNCH_SPOT:-no} == no ]] || options+=(--spot)
    [[ -z ${LAUNCH_SERVICE_ACCOUNT-} ]] || options+=(--service-account="$LAUNCH_SERVICE_ACCOUNT")
    if [[ -z $dry_run ]] && ended >/dev/null 2>&1; then
      die "this run has ended; to run it again: gcloud storage rm $(quoted "$out.ended")"
    fi
    # `keep` may have been interrupted before, and finds its slice.
    if [[ $action == create || -n $dry_run ]] || ! status >/dev/null 2>&1; then create; fi
    ;;&
  keep)
    if [[ -n $dry_run ]]; then
      printf '# every minute, until the second finds the run ended; SUSPENDED: delete and create again\n'
      status
      ended
      delete
      exit
    fi
    gone=
    while sleep "${LAUNCH_POLL_SECONDS:-60}"; do
      # What cannot be asked now is asked again: a slice is deleted for what Google says, not for what it does not say.
      if code=$(ended 2>/dev/null) && [[ $code =~ ^[02]$ ]]; then
        echo "the run has ended with status $code; deleting the slice"
        delete
        exit "$code"
      fi
      case ${gone:-$(status 2>/dev/null || true)} in
        SUSPENDED)
          echo "the slice was taken away; asking for another"
          ! delete || gone=yes
          [[ -z $gone ]] || ! create || gone=
          ;;
        yes) # it was deleted, and could not be asked for then
          ! create || gone=
          ;;
        FAILED)
          echo "the request failed; see: $(quoted "${queued[@]}" describe "$LAUNCH_NAME" "${place[@]}")" >&2
          exit 1
          ;;
      esac
    done
    ;;
  create) ;;
  status) status ;;
  delete) delete ;;
  *) die "$action: no such action; create, keep, status or delete" ;;
esac
