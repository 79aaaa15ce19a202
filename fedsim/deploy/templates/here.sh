
# Flower wants an absolute path: that of this folder's certificate. By if, not &&: a subshell that sources a
# file which ends with && is left by bash 5.2 there
if sed "s|^root-certificates = .*|root-certificates = \"$FLWR_HOME/ca.crt\"|" "$FLWR_HOME/config.toml" \
    >"$FLWR_HOME/config.toml.new"; then
    mv "$FLWR_HOME/config.toml.new" "$FLWR_HOME/config.toml"
fi
