
# Flower wants an absolute path: that of this folder's certificate
sed "s|^root-certificates = .*|root-certificates = \"$FLWR_HOME/ca.crt\"|" "$FLWR_HOME/config.toml" \
    >"$FLWR_HOME/config.toml.new" && mv "$FLWR_HOME/config.toml.new" "$FLWR_HOME/config.toml"
