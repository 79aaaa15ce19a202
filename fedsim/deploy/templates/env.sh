# Flower's environment for what runs from this folder, wherever it has been copied to. To be sourced by bash or zsh.
FLWR_HOME="$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)"
export FLWR_HOME
# Flower installs nothing for a run and reports nothing; connections to this machine itself bypass any proxy
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_TELEMETRY_ENABLED=0
no_proxy="${no_proxy:-${NO_PROXY:-}}"
no_proxy="${no_proxy:+$no_proxy,}127.0.0.1,localhost"
export no_proxy NO_PROXY="$no_proxy"
# Flower's commands start each other by name
export PATH="${FEDSIM_BIN:+$FEDSIM_BIN:}$PATH"
command -v flower-superexec >/dev/null || {
    echo "error: flower-superexec is not on PATH: activate the environment that fedsim is installed in," \
        "or set FEDSIM_BIN to its bin folder" >&2
    return 2
}
