# shellcheck shell=bash
# What the launchers share: settings, --dry-run, quoting. They source it; it does nothing by itself.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "needs bash 4.4 or newer, this is $BASH_VERSION"

# LAUNCH_* from launch/env, where the environment does not have them. Values are taken as they are, never evaluated.
read_settings() {
  local file=${LAUNCH_ENV:-$launch/env} line name number=0 known
  [[ -e $file || -n ${LAUNCH_ENV-} ]] || return 0
  [[ -r $file ]] || die "$file: cannot be read; copy launch/env.example there"
  known=$'\n'$(<"$launch/env.example")
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    name=${line%%=*}
    [[ $line == *=* && $name =~ ^LAUNCH_[A-Z_]+$ ]] || die "$file:$number: LAUNCH_NAME=VALUE is expected"
    [[ $known == *$'\n'"$name="* ]] || die "$file:$number: there is no $name; see launch/env.example"
    [[ -v $name ]] || printf -v "$name" '%s' "${line#*=}"
  done <"$file"
}

# require NAME...: these settings are there. Both `unset` and empty count as missing.
require() {
  local name
  for name; do
    [[ -n ${!name-} ]] || die "$name is not set; put it into launch/env (see launch/env.example)"
  done
}

# like NAME PATTERN WHAT: the setting has the form that the other side takes.
like() {
  local value=${!1-}
  [[ $value =~ ^($2)$ ]] || die "$1=${value@Q}: $3 is expected"
}

# tool NAME ADVICE: the program is there. A dry run does without.
tool() {
  [[ -n $dry_run ]] || command -v "$1" >/dev/null || die "$1 is not installed; $2"
}

# run COMMAND...: do it, or print it as a shell would take it.
run() {
  if [[ -z $dry_run ]]; then
    "$@"
  else
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
  fi
}

# run_with TEXT COMMAND...: the same, with the text on standard input.
run_with() {
  local text=$1 end=END
  shift
  if [[ -z $dry_run ]]; then
    "$@" <<<"$text"
  else
    while [[ $'\n'$text$'\n' == *$'\n'"$end"$'\n'* ]]; do end+=_; done
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    printf " <<'%s'\n%s\n%s\n" "$end" "$text" "$end"
  fi
}

# quoted WORD...: the words as one line for a shell.
quoted() {
  local line
  printf -v line ' %q' "$@"
  printf '%s' "${line:1}"
}

# run_arguments CONFIG OUT [--field value ...]: sets config, out and fields.
run_arguments() {
  (($# >= 2)) || die "CONFIG OUT [--field value ...] are expected, OUT as a folder in LAUNCH_BUCKET or gs://BUCKET/DIR"
  # shellcheck disable=SC2034 # read by those who source this
  config=$1 out=$2 fields=("${@:3}")
  [[ $config == *.yaml || $config == *.yml ]] || die "$config: a config file ending in .yaml is expected"
  if [[ $out != gs://* ]]; then
    require LAUNCH_BUCKET
    like LAUNCH_BUCKET 'gs://[^[:space:]]+' gs://BUCKET
    out=${LAUNCH_BUCKET%/}/$out
  fi
  out=${out%/}
  [[ $out =~ ^gs://[a-z0-9][a-z0-9._-]+/[^[:cntrl:]]+$ ]] || die "${out@Q}: gs://BUCKET/DIR is expected"
}

# host_script CONFIG OUT [--field value ...]: sets `script`, which is on_host.sh with its values before it.
host_script() {
  run_arguments "$@"
  require LAUNCH_PACKAGE
  like LAUNCH_PACKAGE '(gs|https|git\+https)://[^[:space:]]+' 'gs://..., https://... or git+https://...'
  [[ -r $config ]] || die "$config: cannot be read"
  # shellcheck disable=SC2034
  script=$(
    printf '#!/usr/bin/env bash\n'
    printf '%s=%q\n' package "$LAUNCH_PACKAGE" inputs "${LAUNCH_INPUTS-}" out "$out" \
      compile_cache "${LAUNCH_COMPILE_CACHE-}" config "$(<"$config")"
    printf 'fields=(%s)\n' "$( ((${#fields[@]} == 0)) || quoted "${fields[@]}")"
    cat "$launch/on_host.sh"
  )
}

# What the launchers with a name and a place for it all need.
named() {
  require "$@"
  like LAUNCH_NAME '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'up to 40 small letters, digits and -, a letter first,'
  [[ ${LAUNCH_SPOT:-no} =~ ^(yes|no)$ ]] || die "LAUNCH_SPOT=${LAUNCH_SPOT@Q}: yes or no is expected"
}

# usage: what is above the first empty line of the script, without its first line.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

dry_run=
[[ ${1-} == --dry-run ]] && dry_run=yes && shift
case ${1-} in
  '' | -h | --help)
    usage
    [[ -n ${1-} ]] && exit 0
    exit 2
    ;;
esac
read_settings
