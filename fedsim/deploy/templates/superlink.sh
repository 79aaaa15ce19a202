#!/usr/bin/env bash
# The SuperLink. Its database, and results of runs under relative paths, lie in this folder.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./env.sh
exec flower-superlink --host "${FEDSIM_LISTEN:-@LISTEN@}" --port @PORT@ --database superlink.db \
    @SERVER@
