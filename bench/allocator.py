"""Where the memory of results comes from while something is timed on the CPU.

glibc serves a large tensor from the system, whose new pages cost more than the layer, or from memory that it happens to
have kept, depending on what the process did before: eager takes three times as long in one run as in the next
(measured). Either behaviour can be asked for.
"""

import ctypes

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_LARGE = 1 << 20

ABOUT = {
    "system": "whatever glibc does, which depends on what ran before",
    "fresh": "tensors of 1 MiB and more are new pages of the system at every call, but for memory that a library keeps "
    "itself, as normfused does for its outputs",
    "kept": "nothing goes back to the system, so that all memory is mapped already",
}


def use(policy):
    """Let malloc follow one of ABOUT from now on, in this process.

    Raises:
        ValueError: this C library cannot.
    """
    if policy == "system":
        return
    if not hasattr(library := ctypes.CDLL(None), "mallopt"):
        raise ValueError("this C library has no mallopt")
    settings = {
        # A threshold that is set stays; otherwise glibc raises it to what is freed.
        "fresh": [(_MMAP_THRESHOLD, _LARGE)],
        "kept": [(_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)],
    }[policy]
    if not all(library.mallopt(option, value) for option, value in settings):
        raise ValueError(f"mallopt refused {settings}")
