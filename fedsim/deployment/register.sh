#!/usr/bin/env bash
# Makes every node's public key known to the SuperLink: once, before the nodes start.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./env.sh
for key in keys/*.pub; do
    flwr supernode register "$key" @NAME@ --name "$(basename "$key" .pub)"
done
