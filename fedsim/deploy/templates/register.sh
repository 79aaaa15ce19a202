#!/usr/bin/env bash
# Makes each public key of keys/ known to the SuperLink; those that it knows stay as they are.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./env.sh
for key in keys/*.pub; do
    if answer="$(flwr supernode register "$key" @NAME@ --name "$(basename "$key" .pub)" 2>&1)"; then
        echo "$key: registered"
    elif [[ $answer == *"already in use"* ]]; then
        echo "$key: registered before"
    else
        echo "$answer" >&2
        exit 1
    fi
done
