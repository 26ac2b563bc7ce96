"""How torch's CUDA allocator is set up. Imports no torch: it has to happen before that allocator starts."""

import os

# The first of these that is there is what torch reads (2.11 to 2.13).
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def grow_segments() -> None:
    """Let the allocator extend the memory it has instead of asking for a new piece each time, unless the user set it.

    Work on a layer asks for pieces of many sizes, some of gigabytes, and in segments of fixed size what one has freed
    may fit the next one badly: on an H100 held to 24 GiB torch once had all of the 22.4 GiB it was allowed for 16.7 in
    use. With growing segments it had 19.1 for 16.8; how much of that is theirs was not measured apart.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = "expandable_segments:True"
