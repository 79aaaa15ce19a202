"""Images, data sets by name, partitions, the decoded cache, a node's own folder."""
