#!/bin/sh
# Starts TorchServe inside the serving image, on every archive in the model store or on those that are named.
#
#   entrypoint.sh [ARCHIVE...]       names of files in /models, with or without .mar
#
# TORCHPORT_METRICS_ADDRESS, for example http://0.0.0.0:8082, opens the metrics to Prometheus in another container.
# TORCHPORT_SCHEDULING is continuous (every request reaches the model at once), or batches, TorchServe's own way.
# TORCHPORT_DRAIN_SECONDS is how long requests in flight are answered after SIGTERM.
set -eu

home=/opt/torchport
store=/models

fail() {
    echo "torchport: $*" >&2
    exit 2
}

case ${TORCHPORT_METRICS_ADDRESS:-} in
    "" | http://*:[0-9]*) ;;
    *) fail "TORCHPORT_METRICS_ADDRESS is '$TORCHPORT_METRICS_ADDRESS'; write it like http://0.0.0.0:8082" ;;
esac
scheduling=${TORCHPORT_SCHEDULING:-continuous}
case $scheduling in
    continuous | batches) ;;
    *) fail "TORCHPORT_SCHEDULING is '$scheduling'; choose continuous or batches" ;;
esac
case ${TORCHPORT_DRAIN_SECONDS:-0} in
    *[!0-9]*) fail "TORCHPORT_DRAIN_SECONDS is '$TORCHPORT_DRAIN_SECONDS'; write whole seconds" ;;
esac
[ -n "${TORCHPORT_DRAIN_SECONDS:-}" ] || unset TORCHPORT_DRAIN_SECONDS
[ -r "$store" ] && [ -x "$store" ] ||
    fail "$store cannot be read by uid $(id -u); give others the right to read and enter the mounted folder"
if [ $# -eq 0 ]; then
    set -- "$store"/*.mar
    [ -e "$1" ] || fail "there is no .mar archive in $store; mount a folder of archives there: -v FOLDER:$store:ro"
fi
for archive do
    shift
    name=${archive#"$store"/}
    name=${name%.mar}.mar
    case $name in
        *[/,=]*) fail "'$archive' is not the name of an archive in $store; a name has no '/', ',' or '='" ;;
    esac
    [ -f "$store/$name" ] || fail "there is no archive $name in $store"
    [ -r "$store/$name" ] || fail "$store/$name cannot be read by uid $(id -u); give others the right to read it"
    set -- "$@" "$name"
done
models=$(IFS=,; echo "$*")
(cd "$store" && exec python3 "$home/container.py" check "$@") || exit

# TorchServe writes key_file.json into its working folder. What an earlier start left must not look like this one's.
[ -w . ] || fail "$PWD cannot be written by uid $(id -u); with --read-only, mount a tmpfs there: --tmpfs $PWD"
rm -f key_file.json

# Emptied at every start: after `docker restart` it holds the last run's unpacked archives, and a process id that may
# by now be somebody else's.
[ -w /tmp ] || fail "/tmp cannot be written by uid $(id -u); with --read-only, mount a tmpfs there: --tmpfs /tmp:exec"
export TMPDIR=/tmp/torchport TEMP=/tmp/torchport
rm -rf "$TMPDIR"
mkdir -m 0700 "$TMPDIR"

python3 "$home/container.py" install
served=$store
if [ "$scheduling" = continuous ]; then
    served=$TMPDIR/model_store
    mkdir "$served"
    (cd "$store" && exec python3 "$home/container.py" continuous "$served" "$@") || exit
fi
{
    cat "$home/config.properties"
    echo "metrics_config=$home/metrics.yaml"
    echo "model_store=$served"
    echo "load_models=$models"
    [ -z "${TORCHPORT_METRICS_ADDRESS:-}" ] || echo "metrics_address=$TORCHPORT_METRICS_ADDRESS"
} >config.properties

# The frontend interrupts no model that computes; see docs/decisions/014. Not every machine allows it.
interrupt_nobody="chrt --batch 0"
$interrupt_nobody true 2>/dev/null || interrupt_nobody=

$interrupt_nobody torchserve --start --foreground --no-config-snapshots --model-store "$served" \
    --ts-config config.properties --log-config "$home/log4j2.xml" &
launcher=$!

# The launcher would die of the signal at once, and the container with it; Java answers what is in flight, and stops its
# workers, first.
stopping=
stop() {
    stopping=yes
    kill -TERM "$(cat "$TMPDIR/.model_server.pid" 2>/dev/null || echo "$launcher")" 2>/dev/null || true
}
trap stop TERM INT

# A trapped signal ends `wait`, but not the launcher.
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" || true
done
rm -f key_file.json
[ -n "$stopping" ] || fail "TorchServe ended by itself; the lines above say why"
