#!/usr/bin/env bash
# A JobSet on a GKE cluster with JobSet installed and a TPU node pool: launch/gke_jobset.sh [--dry-run] ACTION
#   create CONFIG OUT [--field value ...]  start the run; CONFIG is a path in the image, such as configs/paper.yaml
#   log                                    what the first host says, until Ctrl-C
#   delete                                 the JobSet; what is on the bucket stays
# --dry-run prints the commands, with the manifest, and does nothing.

# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
named LAUNCH_NAME LAUNCH_KUBE_CONTEXT
tool kubectl "gcloud components install kubectl gke-gcloud-auth-plugin"
kubectl=(kubectl --context="$LAUNCH_KUBE_CONTEXT")

# A string as JSON, which YAML reads as the same string.
json() {
  local s=$1
  s=${s//\\/\\\\} s=${s//\"/\\\"} s=${s//$'\n'/\\n} s=${s//$'\t'/\\t} s=${s//$'\r'/\\r}
  [[ $s != *[[:cntrl:]]* ]] || die "${1@Q}: control characters cannot be passed on"
  printf '"%s"' "$s"
}

# A word of a container's command, where Kubernetes reads $(NAME) as a variable and $$ as a dollar.
word() {
  json "${1//\$/\$\$}"
}

manifest() {
  local hosts=1 part spot='' cache='' mounted='' mount='' volumes='' field bucket folder
  for part in ${LAUNCH_TOPOLOGY//x/ }; do hosts=$((hosts * part)); done
  ((hosts % LAUNCH_CHIPS_PER_HOST == 0)) ||
    die "LAUNCH_CHIPS_PER_HOST=$LAUNCH_CHIPS_PER_HOST does not divide the $hosts chips of LAUNCH_TOPOLOGY=$LAUNCH_TOPOLOGY"
  hosts=$((hosts / LAUNCH_CHIPS_PER_HOST))
  [[ ${LAUNCH_SPOT:-no} == no ]] || spot='
                cloud.google.com/gke-spot: "true"
              tolerations: # GKE adds the one for google.com/tpu
                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
  [[ -z ${LAUNCH_COMPILE_CACHE-} ]] || cache="
                    - {name: JAX_COMPILATION_CACHE_DIR, value: $(word "$LAUNCH_COMPILE_CACHE")}"
  if [[ -n ${LAUNCH_INPUTS-} ]]; then # read through Cloud Storage FUSE
    folder=${LAUNCH_INPUTS#gs://} bucket=${folder%%/*} folder=${folder#"$bucket"} folder=${folder#/}
    mounted='
            metadata:
              annotations: {gke-gcsfuse/volumes: "true"}'
    mount='
                  volumeMounts:
                    - {name: inputs, mountPath: /app/inputs, readOnly: true}'
    volumes="
              volumes:
                - name: inputs
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    readOnly: true
                    volumeAttributes: {bucketName: $(json "$bucket"), mountOptions: $(json "implicit-dirs${folder:+,only-dir=${folder%/}}")}"
  fi
  cat <<MANIFEST
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $LAUNCH_NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool # one slice, not parts of two
spec:
  network: {enableDNSHostnames: true} # the hosts of TPU_WORKER_HOSTNAMES, which GKE sets and HEAL_COORDINATOR=auto reads
  failurePolicy:
    maxRestarts: $LAUNCH_MAX_RESTARTS # all hosts start again together, and go on where they stopped
    rules:
      - name: badInput
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $hosts
          parallelism: $hosts
          backoffLimit: 0 # a host that ends badly (1: a peer is gone; 143: terminated) ends the others
          podFailurePolicy:
            rules:
              - action: FailJob # status 2: something heal was told is wrong, and would be wrong again
                onExitCodes: {containerName: heal, operator: In, values: [2]}
          template:$mounted
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 30 # heal takes up to 10
              serviceAccountName: $(json "${LAUNCH_KUBE_SERVICE_ACCOUNT:-default}")
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(json "$LAUNCH_GKE_ACCELERATOR")
                cloud.google.com/gke-tpu-topology: $(json "$LAUNCH_TOPOLOGY")$spot
              containers:
                - name: heal
                  image: $(json "$LAUNCH_IMAGE")
                  command: [heal]
                  args:
                    - run
$(for field in "$config" --out "$out" ${fields[@]+"${fields[@]}"}; do printf '                    - %s\n' "$(word "$field")"; done)
                  env:
                    - {name: HEAL_COORDINATOR, value: auto}$cache
                  securityContext: # a TPU's device files are root's, and it locks memory
                    runAsUser: 0
                    capabilities: {add: [SYS_RESOURCE]}
                  resources:
                    limits: {google.com/tpu: $LAUNCH_CHIPS_PER_HOST}$mount$volumes
MANIFEST
}

case $1 in
  create)
    shift
    run_arguments "$@"
    require LAUNCH_IMAGE LAUNCH_GKE_ACCELERATOR LAUNCH_TOPOLOGY LAUNCH_CHIPS_PER_HOST LAUNCH_MAX_RESTARTS
    like LAUNCH_TOPOLOGY '[1-9][0-9]?(x[1-9][0-9]?){1,2}' 'a shape such as 4x4 or 2x2x4'
    like LAUNCH_CHIPS_PER_HOST '[1-8]' 'a number from 1 to 8'
    like LAUNCH_MAX_RESTARTS '[0-9]{1,6}' 'a number'
    [[ -z ${LAUNCH_INPUTS-} ]] || like LAUNCH_INPUTS 'gs://[a-z0-9][a-z0-9._-]+(/[^,[:space:]]*)?' gs://BUCKET/DIR
    text=$(manifest)
    run_with "$text" "${kubectl[@]}" create --filename=- # refuses one that is there
    ;;
  log)
    run "${kubectl[@]}" logs --follow --tail=200 \
      --selector="jobset.sigs.k8s.io/jobset-name=$LAUNCH_NAME,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete) run "${kubectl[@]}" delete jobset "$LAUNCH_NAME" ;;
  *) die "$1: no such action; create, log or delete" ;;
esac
