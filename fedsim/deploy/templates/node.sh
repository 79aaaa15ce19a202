#!/usr/bin/env bash
# SuperNode @NODE@ of @NODES@: it trains on that shard. Its own port is for this machine alone.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./env.sh
exec flower-supernode --superlink "${FEDSIM_SUPERLINK:-@ADDRESS@}" --port @OWN_PORT@ \
    --node-config "partition-id=@NODE@ num-partitions=@NODES@" \
    @NODE_OPTIONS@
