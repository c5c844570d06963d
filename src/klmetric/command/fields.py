"""What is asked of each row besides its divergence, and what only the command asks."""

from klmetric.rows.fields import OF_CLASSES

# The largest probability of the reference, in bands that begin here.
BANDS = (0.0, 0.2, 0.4, 0.6, 0.8)
BAND_NAMES = tuple(f"{low:g} to {high:g}" for low, high in zip(BANDS, (*BANDS[1:], 1.0), strict=True))

# Where the reference is a file of llama.cpp, its own estimate of the divergence.
OF_LLAMA = ("llama_cpp",)

# How they are spread is told as well: by its name, which of them, and whether from 0 up or down.
SPREADS = {"delta_p": ("delta_p", 1), "-delta_p": ("delta_p", -1), "tail_mass": ("tail_mass", 1)}

# Those of which the difference between two models is reported.
COMPARED = (*OF_CLASSES, "ln_ratio", "delta_p")
