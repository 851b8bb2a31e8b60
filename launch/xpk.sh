#!/usr/bin/env bash
# A workload on a GKE cluster that xpk made: launch/xpk.sh [--dry-run] ACTION
#   create CONFIG OUT [--field value ...]  start the run; CONFIG is a path in the image, such as configs/paper.yaml
#   list                                   the cluster's workloads
#   delete                                 the workload; what is on the bucket stays
# --dry-run prints the commands and does nothing.

# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
named LAUNCH_PROJECT LAUNCH_ZONE LAUNCH_NAME LAUNCH_CLUSTER
tool xpk "pip install xpk"
place=(--project="$LAUNCH_PROJECT" --zone="$LAUNCH_ZONE" --cluster="$LAUNCH_CLUSTER")

case $1 in
  create)
    shift
    run_arguments "$@"
    require LAUNCH_IMAGE LAUNCH_ACCELERATOR_TYPE LAUNCH_MAX_RESTARTS
    like LAUNCH_MAX_RESTARTS '[0-9]+' 'a number'
    # exec: xpk then passes SIGTERM on to heal itself. Its --env does not quote values, so they are set here.
    environment=(HEAL_COORDINATOR=auto)
    [[ -z ${LAUNCH_COMPILE_CACHE-} ]] || environment+=("JAX_COMPILATION_CACHE_DIR=$LAUNCH_COMPILE_CACHE")
    command="exec env $(quoted "${environment[@]}" heal run "$config" --out "$out" ${fields[@]+"${fields[@]}"})"
    # The text becomes a container's command, where Kubernetes reads $(NAME) as a variable and $$ as a dollar.
    command=${command//\$/\$\$}
    # xpk starts again after 127-255 (heal: 143, terminated); 1 is heal's status where a peer is gone. 2 ends the workload.
    run xpk workload create "${place[@]}" --workload="$LAUNCH_NAME" --docker-image="$LAUNCH_IMAGE" \
      --tpu-type="$LAUNCH_ACCELERATOR_TYPE" --num-slices=1 --max-restarts="$LAUNCH_MAX_RESTARTS" \
      --restart-on-exit-codes=1 --termination-grace-period-seconds=30 --command="$command"
    ;;
  list) run xpk workload list "${place[@]}" ;;
  delete) run xpk workload delete "${place[@]}" --workload="$LAUNCH_NAME" --force ;;
  *) die "$1: no such action; create, list or delete" ;;
esac
