#!/usr/bin/env bash
# Start a SLURM cluster on this machine, run tests/slurm on its login node, take it down. `make test-slurm` calls it.
#
#   test.sh PYTHON [pytest's arguments]
set -euo pipefail
MINUTES=25 # twice what it takes: ends what hangs, not what is slow
here=$(dirname "$(readlink -f "$0")")
fail() { echo "make test-slurm: $*" >&2; exit 1; }

[[ $(id -u) = 0 ]] || fail "needs root, this is $(id -un): the cluster's nodes are namespaces; use sudo, or a container with CAP_SYS_ADMIN"
for program in unshare nsenter; do
  command -v $program >/dev/null || fail "needs $program: install util-linux"
done
unshare --pid --mount --uts --net --ipc --fork true 2>/dev/null ||
  fail "unshare is not allowed here: it needs CAP_SYS_ADMIN (in a container: run it privileged)"
missing=()
for program in slurmctld slurmd sbatch munged ip pgrep; do
  command -v $program >/dev/null || missing+=("$program")
done
((${#missing[@]} == 0)) || command -v apt-get >/dev/null ||
  fail "needs ${missing[*]}, and there is no apt-get to install them: the packages are slurmctld, slurmd, slurm-client, munge, iproute2, procps"

python=$(readlink -f "$(dirname "$1")")/$(basename "$1")
shift
LAB_DIR=$(mktemp -d /tmp/trainshort-slurm.XXXXXX)
export LAB_DIR
chmod 755 "$LAB_DIR" # munge wants its socket within reach of all
down() {
  local code=$?
  if ((code)); then tail -n 5 "$LAB_DIR"/log/slurmctld.log >&2 || :; fi
  "$here/cluster.sh" down
  if ! ((code)); then rm -rf "$LAB_DIR"; fi
}
trap down EXIT
"$here/cluster.sh" up 3 || fail "the cluster did not start (missing at first: ${missing[*]:-nothing}): see $LAB_DIR/log"
cd "$here/../.."
code=0
PATH=$(dirname "$python"):$PATH timeout --kill-after=30 $((60 * MINUTES)) \
  "$here/cluster.sh" exec "$python" -P -m pytest -q -m slurm "${@:-tests/slurm}" || code=$?
((code != 124)) || fail "took more than $MINUTES minutes: see $LAB_DIR/log, and what pytest has said until then"
exit $code
