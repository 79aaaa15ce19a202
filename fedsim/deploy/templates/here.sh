
# Flower needs the absolute path of this folder's certificate, as a TOML string. By `if`, not &&: a subshell of
# bash 5.2 exits at the end of a sourced file that ends with an && list
if CA="$(printf '%s' "$FLWR_HOME/ca.crt" | sed 's/[\\"]/\\&/g')" awk '
    /^\[/ { ours = $0 == "[superlink.@NAME@]" }
    ours && /^root-certificates = / { $0 = "root-certificates = \"" ENVIRON["CA"] "\"" }
    { print }' "$FLWR_HOME/config.toml" >"$FLWR_HOME/config.toml.new"; then
    mv "$FLWR_HOME/config.toml.new" "$FLWR_HOME/config.toml"
fi
