"""Integer grids, bit packing and result records: everything below files and models. Needs only torch."""
