#!/usr/bin/env bash
# Open pages of `trainshort report` in headless Chromium. `make test-browser` calls it.
#
#   test.sh PYTHON [pytest's arguments]
set -euo pipefail
MINUTES=10 # several times what it takes: ends what hangs, not what is slow
fail() { echo "make test-browser: $*" >&2; exit 1; }

missing=()
[[ -x /usr/bin/chromium ]] || missing+=(chromium)
[[ -x /usr/bin/chromedriver ]] || missing+=(chromium-driver)
if ((${#missing[@]})); then
  command -v apt-get >/dev/null || fail "needs /usr/bin/chromium and /usr/bin/chromedriver, and there is no apt-get to install them"
  [[ $(id -u) = 0 ]] || fail "needs Debian's packages ${missing[*]}, this is $(id -un): as root, apt-get install ${missing[*]}"
  echo "make test-browser: installing ${missing[*]}"
  log=$(mktemp /tmp/trainshort-browser.XXXXXX)
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 ||
    { tail -n 5 "$log" >&2; fail "apt-get cannot install ${missing[*]}: see $log"; }
  rm -f "$log"
fi
python=$(readlink -f "$(dirname "$1")")/$(basename "$1")
shift
cd "$(dirname "$(readlink -f "$0")")/../.."
code=0
timeout --kill-after=30 $((60 * MINUTES)) "$python" -P -m pytest -q -m browser "${@:-tests/browser}" || code=$?
((code != 124)) || fail "took more than $MINUTES minutes"
exit $code
