"""Integer grids, bit packing, devices and memory: everything below files and models. Needs torch and pydantic."""
