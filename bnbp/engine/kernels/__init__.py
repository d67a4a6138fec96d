"""The kernels: what the operators compute. ``kernels.pyx`` is the map, with one file for each idea."""
