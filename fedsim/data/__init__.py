"""Data sets by name, images and their augmentation, partitions, the cache of decoded images, a node's own images."""
